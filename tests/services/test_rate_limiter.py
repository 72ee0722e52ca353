"""The limiter by itself; each limit is tested where it stands guard."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import ValidationError

from app.core.errors import TooManyRequests
from app.services.rate_limiter import MovingWindows, RateLimiter, address_key
from tests.support.clock import ManualClock
from tests.support.databases import make_settings


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
