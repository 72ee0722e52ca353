"""The door for sockets and the lane for what can wait, one by one and by the clock."""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from app.core import metrics
from app.core.errors import DialectError, TooManyRequests, Unavailable
from app.db.repositories import users as repository
from app.services.admission import RETURN_SECONDS_MAX, Admission, Lane
from app.services.coalescer import Coalescer
from app.services.container import Services
from tests.support.clock import ManualClock
from tests.support.databases import make_settings
from tests.support.metrics import value
from tests.support.people import people
from tests.support.statements import statements


def door(clock: ManualClock | None = None, **values: Any) -> Admission:
    """A door with these settings."""
    return Admission(make_settings(**values), clock or ManualClock(), readers=10)


# --- the door ---


def test_an_address_has_so_many_sockets_and_no_more() -> None:
    admission = door(max_sockets_per_ip=2)
    first, second = admission.enter("192.0.2.1"), admission.enter("192.0.2.1")
    with pytest.raises(TooManyRequests) as refused:
        admission.enter("192.0.2.1")
    assert refused.value.code == "too_many_sockets"
    assert refused.value.retry_after is not None
    admission.enter("192.0.2.2")
    first.leave()
    first.leave()  # gives back no second place
    admission.enter("192.0.2.1")
    with pytest.raises(TooManyRequests):
        admission.enter("192.0.2.1")
    second.leave()
    assert admission.open_sockets == 2


def test_a_connection_too_many_gets_the_place_of_another_or_is_refused() -> None:
    admission = door(max_http_connections=2, max_sockets_per_ip=0)
    places = [admission.connect("", lambda: False) for _ in range(2)]
    with pytest.raises(Unavailable) as refused:
        admission.connect("192.0.2.1", lambda: False)
    assert (refused.value.code, admission.open_connections) == ("overloaded", 2)

    def make_room() -> bool:
        places.pop().leave()
        return True

    admission.connect("192.0.2.1", make_room)
    assert admission.open_connections == 2


def test_connections_and_sockets_together_leave_some_files_for_what_else_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    admission = door(limit_connects_per_ip_per_second=0)
    for _ in range(90):
        admission.enter("192.0.2.1")
    for _ in range(5):
        admission.connect("192.0.2.1", lambda: False)
    with pytest.raises(Unavailable):
        admission.connect("192.0.2.1", lambda: False)


def test_a_customer_of_ipv6_is_one_address() -> None:
    admission = door(max_sockets_per_ip=1)
    admission.enter("2001:db8:0:7::1")
    with pytest.raises(TooManyRequests):
        admission.enter("2001:db8:0:7:ffff::2")
    admission.enter("2001:db8:0:8::1")


def test_sockets_without_an_address_are_counted_for_the_whole_server_only() -> None:
    admission = door(max_sockets=3, max_sockets_per_ip=1, limit_connects_per_ip_per_second=1)
    places = [admission.enter("") for _ in range(3)]
    with pytest.raises(Unavailable) as refused:
        admission.enter("")
    assert refused.value.code == "overloaded"
    places[0].leave()
    admission.enter("")


def test_an_address_opens_so_many_a_second_and_keeps_nobody_else_out() -> None:
    clock = ManualClock()
    admission = door(clock, limit_connects_per_ip_per_second=2, limit_connects_per_ip_burst=5)
    for _ in range(5):
        admission.enter("192.0.2.1").leave()
    with pytest.raises(TooManyRequests) as refused:
        admission.enter("192.0.2.1")
    assert refused.value.code == "rate_limited"
    admission.enter("192.0.2.2").leave()
    clock.advance(0.5)
    admission.enter("192.0.2.1").leave()
    assert admission.open_sockets == 0


def test_the_server_has_as_many_sockets_as_it_may_open_files_unless_told() -> None:
    assert door().max_sockets == resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 9 // 10
    assert door(max_sockets=7).max_sockets == 7


def test_who_is_turned_away_together_is_told_to_come_back_one_after_the_other() -> None:
    clock = ManualClock()
    admission = door(clock, limit_connects_per_second=100, limit_connects_burst=200)
    waits: list[float] = []
    for _ in range(1_200):
        try:
            admission.enter("")
        except Unavailable as error:
            waits.append(error.retry_after or 0.0)
    assert len(waits) == 1_000
    assert len(set(waits)) > 900
    # In no second do many more come back than may come in: 100 of them, and those whom chance puts beside them.
    in_second = Counter(math.floor(wait) for wait in waits)
    assert max(in_second.values()) < 160
    assert min(waits) >= 1
    assert 8 < max(waits) <= RETURN_SECONDS_MAX

    # And whoever does as told comes in: nobody is sent away for ever.
    failed = 0
    for begun in sorted(math.ceil(wait) for wait in waits):
        clock.advance(max(0.0, begun - (clock.monotonic() - 1_000)))
        try:
            admission.enter("")
        except DialectError:
            failed += 1
    assert failed < 200


def test_closed_together_means_coming_back_apart() -> None:
    admission = door(limit_connects_per_second=100)
    waits = [admission.return_in(2_000) for _ in range(2_000)]
    assert 1 <= min(waits) < 2
    assert 18 < max(waits) < 22
    assert max(admission.return_in(1_000_000) for _ in range(1_000)) <= RETURN_SECONDS_MAX
    assert max(admission.return_in(1) for _ in range(100)) < 1.1


# --- the lane ---


async def test_a_lane_lets_some_in_and_some_wait_and_refuses_the_rest_at_once() -> None:
    lane = Lane(2, waiting_max=3, seconds=30, closed=lambda: False)
    go, inside, refused = asyncio.Event(), 0, 0
    name = "dialect_bulk_reads_refused_total"
    counted = value(metrics.exposition().decode(), name)

    async def work() -> None:
        nonlocal inside, refused
        try:
            async with lane.turn():
                inside += 1
                await go.wait()
        except Unavailable:
            refused += 1

    tasks = [asyncio.create_task(work()) for _ in range(10)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert (inside, lane.waiting, refused) == (2, 3, 5)
    assert value(metrics.exposition().decode(), name) == counted + 5
    go.set()
    await asyncio.gather(*tasks)
    assert inside == 5


async def test_nobody_waits_in_a_lane_for_long() -> None:
    lane = Lane(1, waiting_max=3, seconds=0.05, closed=lambda: False)
    async with lane.turn():
        with pytest.raises(Unavailable) as refused:
            async with lane.turn():
                raise AssertionError("two at once")
        assert (refused.value.code, refused.value.retry_after or 0) > ("overloaded", 0.9)
    async with lane.turn():
        pass  # who gave up took no place with them


@pytest.mark.settings(max_loop_lag_seconds=0.5)
async def test_a_late_loop_serves_no_lists_and_still_sends(services: Services, client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    time.sleep(3)  # noqa: ASYNC251 - this is the fault
    assert await ann.refused("GET", f"/messages/history/{chat_id}") == (503, "overloaded")
    assert services.admission.lag > 0.5
    await ann.say(chat_id, "in spite of it")
    async with asyncio.timeout(30):
        while (await ann.request("GET", f"/messages/history/{chat_id}")).status_code != 200:
            await services.database.ping()


# --- one question for many ---


async def test_what_is_asked_for_while_a_question_is_under_way_is_the_next_one() -> None:
    asked: list[list[int]] = []
    gate = asyncio.Event()

    async def look_up(keys: Any) -> dict[int, str]:
        asked.append(list(keys))
        await gate.wait()
        return {key: str(key) for key in keys if key != 4}

    lookups = Coalescer(look_up, most=3)
    tasks = [asyncio.create_task(lookups.get(key)) for key in (1, 2, 1)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(lookups.get(key)) for key in (1, 3, 4, 5)]
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*tasks) == ["1", "2", "1", "1", "3", None, "5"]
    assert asked == [[1, 2], [1, 3, 4], [5]]


async def test_a_question_that_fails_fails_for_its_own_and_nobody_hangs() -> None:
    count = 0

    async def look_up(keys: Any) -> dict[int, str]:
        nonlocal count
        count += 1
        await asyncio.sleep(0)
        if count == 1:
            raise Unavailable("database_unavailable", "The database does not answer; try again.")
        return {key: str(key) for key in keys}

    lookups = Coalescer(look_up, most=2)
    left = asyncio.create_task(lookups.get(1))
    first = [asyncio.create_task(lookups.get(key)) for key in (1, 2)]
    await asyncio.sleep(0)
    left.cancel()
    answers = await asyncio.gather(*first, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    assert await lookups.get(1) == "1"
    assert left.cancelled()


async def test_many_who_come_together_cost_the_database_what_one_does(
    services: Services, client: httpx.AsyncClient
) -> None:
    crowd = await people(client, 20)
    services.auth._alive.clear()  # as after a restart

    async def come(count: int) -> int:
        with statements(services.database) as seen:
            callers = await asyncio.gather(
                *(services.auth.authenticate(one.account.access_token) for one in crowd[:count])
            )
            await asyncio.gather(*(services.connections._chats.get(caller.user_id) for caller in callers))
        services.auth._alive.clear()
        return len([one for one in seen if one.lstrip().startswith("SELECT")])

    assert await come(1) == 3
    assert await come(20) == 3


# --- shedding, with real connections that are taken ---


@pytest.mark.settings(db_pool_size=5, bulk_queue=5, db_timeout_seconds=30)
async def test_searches_that_take_all_connections_hold_up_no_send(
    app: FastAPI, services: Services, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eighty requests at once on five connections, of which the searches are slow: the sends do not wait for them."""
    search = repository.search_usernames

    holding, go = 0, asyncio.Event()

    async def slowly(session: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal holding
        await session.execute(text("SELECT 1"))  # from here on a connection is taken
        holding += 1
        try:
            await go.wait()
        finally:
            holding -= 1
        return await search(session, *arguments, **options)

    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    monkeypatch.setattr(repository, "search_usernames", slowly)
    # Not `client`, which holds each answer against the documents: that takes longer than the answer.
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=ann.account.headers) as crowd:

        async def status(method: str, path: str, body: Any = None) -> int:
            return (await crowd.request(method, f"/api/v1{path}", json=body)).status_code

        searches = [asyncio.create_task(status("GET", "/users/search?q=person")) for _ in range(60)]
        while sum(search.done() for search in searches) < 50 or holding < services.admission.bulk.at_once:
            await services.database.ping()
        # All that searches may take is taken.
        sends = [status("POST", f"/chats/{chat_id}/messages", {"content": "now"}) for _ in range(10)]
        others = [status("GET", "/users/me") for _ in range(10)]
        assert set(await asyncio.gather(*sends)) == {201}
        assert set(await asyncio.gather(*others)) == {200}
        go.set()
        async with asyncio.timeout(10):
            assert set(await asyncio.gather(*searches)) <= {200, 503}
