"""The limiter by itself; each limit is tested where it stands guard."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool

from app.core import metrics
from app.core.clock import SystemClock
from app.core.errors import TooManyRequests, Unavailable
from app.services.bus import Bus, patient_redis_client, redis_client
from app.services.caller import Caller
from app.services.container import build_services
from app.services.rate_limiter import MovingWindows, RateLimiter, address_key
from tests.support.clock import ManualClock
from tests.support.databases import make_settings
from tests.support.metrics import value
from tests.support.redis_server import RedisServer


async def test_the_window_moves_and_says_how_long_to_wait() -> None:
    clock = ManualClock()
    limiter = RateLimiter(make_settings(limit_search_per_user="3/minute"), clock)
    for _ in range(3):
        await limiter.hit("limit_search_per_user", 1)
        clock.advance(10)
    for seconds in (30.0, 20.0):
        with pytest.raises(TooManyRequests) as caught:
            await limiter.hit("limit_search_per_user", 1)
        assert (caught.value.code, caught.value.retry_after) == ("rate_limited", seconds)
        clock.advance(10)
    await limiter.hit("limit_search_per_user", 2)
    clock.advance(10.1)
    await limiter.hit("limit_search_per_user", 1)


async def test_of_many_at_once_only_as_many_pass_as_are_left() -> None:
    limiter = RateLimiter(make_settings(limit_search_per_user="7/minute"), ManualClock())
    answers = await asyncio.gather(
        *(limiter.hit("limit_search_per_user", 1) for _ in range(50)), return_exceptions=True
    )
    assert sum(answer is None for answer in answers) == 7


async def test_what_was_counted_can_be_forgotten() -> None:
    limiter = RateLimiter(make_settings(limit_search_per_user="1/day"), ManualClock())
    for _ in range(3):
        await limiter.hit("limit_search_per_user", "a", "b")
        await limiter.clear("limit_search_per_user", "a", "b")
    await limiter.hit("limit_search_per_user", "a")


@pytest.mark.parametrize("rule", ["", " ", "0/minute"])
async def test_a_limit_can_be_switched_off(rule: str) -> None:
    limiter = RateLimiter(make_settings(limit_search_per_user=rule), ManualClock())
    for _ in range(1000):
        await limiter.hit("limit_search_per_user", 1)
    await limiter.clear("limit_search_per_user", 1)


def test_a_rule_nobody_understands_stops_the_start() -> None:
    for rule in ("often", "10", "-1/hour"):
        with pytest.raises(ValidationError, match=r"limit_search_per_user\n.*write it like 10/minute"):
            make_settings(limit_search_per_user=rule)


async def test_what_has_run_out_takes_no_memory() -> None:
    clock = ManualClock()
    windows = MovingWindows(clock)
    for number in range(1000):
        await windows.acquire_entry(f"minute {number}", 5, 60)
        await windows.acquire_entry(f"day {number}", 5, 86400)
    clock.advance(61)
    for number in range(600):
        await windows.acquire_entry(f"new {number}", 5, 60)
    assert await windows.reset() == 600 + 1000


def test_an_ipv6_customer_counts_as_one() -> None:
    assert address_key("2001:db8:1:2::1") == address_key("2001:db8:1:2:ffff::9") != address_key("2001:db8:1:3::1")
    assert address_key("::ffff:192.0.2.1") == address_key("192.0.2.1") == "192.0.2.1"
    assert address_key("192.0.2.1") != address_key("192.0.2.2")
    assert address_key("not an address") == "not an address"


# --- with Redis -------------------------------------------------------------------------------------------------


async def test_a_burst_far_beyond_the_connections_to_redis_is_counted_and_no_hint_is_lost_beside_it(
    redis: RedisServer,
) -> None:
    services = build_services(make_settings(redis_url=redis.url, limit_login_per_ip="450/day"))
    services.cluster.on_lost = lambda: None
    limiter, tickets = services.rate_limiter, services.auth.tickets
    other, joined, heard = Bus(redis_client(redis.url), SystemClock()), asyncio.Event(), asyncio.Event()
    other.on_peer = lambda *_: joined.set()
    other.on_item = lambda _, item: heard.set() if item["kind"] == "username" else None
    other.on_lost, other.beat = lambda: None, lambda: {"online": 0, "pushes": False}
    caller = Caller(1, 1, datetime(2100, 1, 1, tzinfo=UTC))
    try:
        services.cluster.start("test")
        other.start("test")
        async with asyncio.timeout(10):
            await joined.wait()
        dropped = _dropped()
        hits = [asyncio.create_task(limiter.hit("limit_login_per_ip", "ip")) for _ in range(500)]
        issued = [asyncio.create_task(tickets.issue(caller, 30)) for _ in range(200)]
        await asyncio.sleep(0)  # all of them ask now
        services.cluster.take_username("somebody")
        answers = await asyncio.gather(*hits, return_exceptions=True)
        assert {type(answer) for answer in answers} == {type(None), TooManyRequests}
        assert sum(answer is None for answer in answers) == 450
        assert len(set(await asyncio.gather(*issued))) == 200
        async with asyncio.timeout(10):
            await heard.wait()
        assert _dropped() == dropped
    finally:
        await other.stop()
        await services.stop()


def _dropped() -> float:
    return value(metrics.exposition().decode(), "dialect_bus_items_dropped_total")


async def test_who_waits_for_a_connection_in_vain_is_refused_alone_and_redis_is_not_taken_to_be_away(
    redis: RedisServer,
) -> None:
    client = patient_redis_client(redis.url, connections=1)
    pool = client.connection_pool
    assert isinstance(pool, BlockingConnectionPool)
    pool.timeout = 0.05
    settings = make_settings(limit_login_per_ip="2/minute", limit_search_per_user="1/minute")
    limiter = RateLimiter(settings, ManualClock(), client)  # a pause would not end
    async with contextlib.aclosing(client):
        only = await pool.get_connection()  # type: ignore[no-untyped-call]
        with pytest.raises(Unavailable):
            await limiter.hit("limit_login_per_ip", "ip")
        await limiter.hit("limit_search_per_user", 1)  # counted by this worker
        await pool.release(only)
        for _ in range(2):
            await limiter.hit("limit_login_per_ip", "ip")
        with pytest.raises(TooManyRequests):
            await limiter.hit("limit_login_per_ip", "ip")
