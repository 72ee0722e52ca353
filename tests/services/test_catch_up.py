"""Catching up is for everybody: an account that asks for all of it again and again is bounded, and others go first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, update

from app.core.clock import SystemClock
from app.core.config import Settings
from app.core.errors import DialectError, TooManyRequests, Unavailable
from app.db.database import BulkReads
from app.db.events import CatchUpEvent
from app.db.models import HiddenMessage, User
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import sessions as sessions_repository
from app.db.schemas import ResumeIn
from app.services import connection_manager
from app.services.chat_log.catch_up import PAGE_HIDDEN
from app.services.container import Services
from app.services.token_bucket import TokenBuckets
from app.services.transport import Frames
from tests.services.test_sequencer import Inbox
from tests.support.clock import ManualClock
from tests.support.metrics import value
from tests.support.people import Json, people
from tests.support.servers import Server
from tests.support.socket_client import SocketClient


async def answer(socket: SocketClient, **state: Any) -> Json:
    """How a resume ends."""
    await socket.send(type="resume", ref="r", **state)
    return await socket.wait(lambda event: event["type"] in ("resumed", "error"), ref="r")


async def test_devices_of_one_account_wait_for_each_other_and_nobody_waits_for_all_of_them() -> None:
    line = BulkReads(2)
    order: list[int] = []
    go_on = asyncio.Event()

    async def read(user_id: int) -> None:
        async with line.of(user_id):
            order.append(user_id)
            await go_on.wait()

    async def read_for_many() -> None:
        async with line:
            order.append(0)

    tasks = [asyncio.create_task(read(user_id)) for user_id in [1] * 10 + [2] * 10 + [3]]
    tasks.append(asyncio.create_task(read_for_many()))
    for _ in tasks:
        await asyncio.sleep(0)  # all of them begin
    assert order == [1, 2]
    tasks[5].cancel()
    go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order[2:4] == [3, 0]
    assert sorted(order) == [0, *[1] * 9, *[2] * 10, 3]
    assert (line.waiting, line._accounts) == (0, {})


async def test_while_all_devices_of_one_account_resume_another_account_is_answered(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    for person in (ann, bo):
        await person.group()
    read, go_on = services.catch_up._reset, asyncio.Event()

    async def read_slowly(session: Any, user_id: int, cursor: Any) -> Any:
        if user_id == ann.id:
            await go_on.wait()
        return await read(session, user_id, cursor)

    monkeypatch.setattr(services.catch_up, "_reset", read_slowly)
    hers = [asyncio.create_task(services.catch_up.resume_page(ann.id, ResumeIn())) for _ in range(10)]
    async with asyncio.timeout(3):  # shorter than the database's own patience with Ann
        while services.database.bulk_reads.waiting < 9:
            await services.database.ping()
        events = await services.catch_up.resume_page(bo.id, ResumeIn())
    assert "reset" in [event["type"] for event in events]
    go_on.set()
    for events in await asyncio.gather(*hers):
        assert "reset" in [event["type"] for event in events]


@pytest.mark.settings(limit_resets_per_minute=0.6, limit_resets_burst=2)
async def test_who_wants_everything_afresh_without_end_is_told_when_to_come_again(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        group, personal = await ann.group(bo), await ann.personal(bo)
        async with await ann.open(server) as phone, await ann.open(server) as laptop, await bo.open(server) as his:
            for socket in (phone, laptop):
                assert (await answer(socket))["type"] == "resumed"
            for socket in (phone, laptop):
                refused = await answer(socket)
                assert (refused["type"], refused["code"], refused["retryable"]) == ("error", "rate_limited", True)
                assert 90 < refused["retry_after"] <= 100
            over_rest = await ann.request("POST", "/messages/resume", {})
            assert (over_rest.status_code, over_rest.json()["code"]) == (429, "rate_limited")
            assert 90 < int(over_rest.headers["retry-after"]) <= 101
            # All is as before: live events go on, and who holds the chats catches up as ever.
            await bo.say(group, "live")
            live = await laptop.wait(type="new_message", chat_id=group)
            assert await phone.wait(type="new_message", chat_id=group) == live
            assert live["message"]["content"] == "live"
            held = {str(group): live["version"], str(personal): (await ann.chat(personal))["version"]}
            assert (await answer(phone, chats=held))["type"] == "resumed"
            assert (await ann.resume(chats=held))[-1]["complete"] is True
            assert (await answer(phone, chats={str(group): 1, str(personal): 10**9}))["type"] == "error"
            assert (await answer(phone, chats=held, epoch="0287ba44-01bf-47e1-963b-fb1cb5c8cced"))["type"] == "error"
            assert (await answer(his))["type"] == "resumed"
        shown = (await client.get("/metrics")).text
        assert value(shown, "dialect_rate_limited_total", limit="limit_resets_per_minute") == 5


@pytest.mark.settings(
    limit_resets_per_minute=Settings.model_fields["limit_resets_per_minute"].default,
    limit_resets_burst=Settings.model_fields["limit_resets_burst"].default,
)
async def test_ten_devices_that_lost_everything_twice_are_brought_everything(server: Server) -> None:
    async with server.client() as client:
        [ann] = await people(client, 1)
        groups = [await ann.group() for _ in range(3)]
        async with AsyncExitStack() as stack:
            devices = [await stack.enter_async_context(await ann.open(server)) for _ in range(10)]
            for _ in range(2):
                ends = await asyncio.gather(*map(answer, devices))
                assert {end["type"] for end in ends} == {"resumed"}
            for device in devices:
                resets = [event["chat_id"] for event in device.seen if event["type"] == "reset"]
                assert sorted(resets) == sorted(groups * 2)


@pytest.mark.settings(limit_resets_per_minute=6, limit_resets_burst=1)
async def test_a_part_of_the_chats_afresh_counts_as_such(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    monkeypatch.setattr(services.catch_up, "_resets", TokenBuckets(0.1, 1, clock))
    [ann] = await people(client, 1)
    held = {str(await ann.group()): 1 for _ in range(4)}
    unknown, _ = held.popitem()
    for _ in range(4):
        events = await ann.resume(chats=held)
        assert [event["chat_id"] for event in events if event["type"] == "reset"] == [int(unknown)]
    with pytest.raises(TooManyRequests) as refused:
        await services.catch_up.resume_page(ann.id, ResumeIn(chats=held))
    assert refused.value.retry_after == pytest.approx(2.5)
    clock.advance(2.5)
    assert "reset" in str(await ann.resume(chats=held))


async def test_live_events_that_came_while_a_resume_was_refused_are_sent(
    client: httpx.AsyncClient, services: Services
) -> None:
    [ann] = await people(client, 1)
    asked, refuse = asyncio.Event(), asyncio.Event()

    async def refused_late(*_: Any) -> AsyncIterator[CatchUpEvent]:
        asked.set()
        await refuse.wait()
        raise TooManyRequests("rate_limited", "Too often.", retry_after=1)
        yield  # type: ignore[unreachable]

    services.connections.resume_events = refused_late
    inbox, errors = Inbox(), list[DialectError]()
    connection = services.connections.add(inbox, ann.id, 1, SystemClock().now() + timedelta(hours=1))
    connection.ready = True
    connection.resume(ResumeIn(), None, errors.append)
    await asked.wait()
    event: Any = {"type": "new_message", "chat_id": 1, "prev": 1, "version": 2}
    connection.deliver(1, 2, Frames.of(event))
    own: Any = {"type": "profile_changed", "account_version": 3, "profile_version": 2}
    connection.deliver_account(3, Frames.of(own))
    assert inbox.events == []
    refuse.set()
    await inbox.until(type="profile_changed")
    assert inbox.events == [event, own]
    assert [error.code for error in errors] == ["rate_limited"]
    assert not connection.catching_up
    connection.deliver(1, 3, Frames.of({**event, "version": 3}))
    assert len(inbox.events) == 3


def stop_ticking(services: Services) -> None:
    """From now on sockets are looked after when the test says so."""
    assert services.connections._ticker is not None
    services.connections._ticker.cancel()


@pytest.mark.parametrize("doubted", [False, True])
async def test_a_session_that_ended_unheard_takes_its_socket_along_even_while_that_is_catching_up(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch, doubted: bool
) -> None:
    ann, bo = await people(client, 2)
    clock = ManualClock()
    monkeypatch.setattr(services.connections, "_clock", clock)
    stop_ticking(services)

    async def endless(*_: Any) -> AsyncIterator[CatchUpEvent]:
        await asyncio.Event().wait()
        raise AssertionError
        yield  # type: ignore[unreachable]

    services.connections.resume_events = endless
    inboxes = Inbox(), Inbox()
    for person, inbox in zip((ann, bo), inboxes, strict=True):
        session_id = (await services.auth.authenticate(person.account.access_token)).session_id
        connection = services.connections.add(inbox, person.id, session_id, clock.now() + timedelta(hours=1))
        connection.ready = True
        connection.resume(ResumeIn(), None, lambda error: pytest.fail(error.code))
    services.auth.on_session_ended.clear()  # nobody tells this worker
    await ann.do("POST", "/auth/logout")
    if doubted:
        services.make_up_for_lost_hints()
    else:
        clock.advance(services.settings.socket_heartbeat_seconds)
    await services.connections._beat()
    assert [inbox.close_code for inbox in inboxes] == [4401, None]
    assert [inbox.events for inbox in inboxes] == [[], []]  # heartbeats wait


async def test_sessions_are_doubted_in_pages_until_the_database_has_answered_for_each(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_manager, "CHECKED_AT_ONCE", 2)
    stop_ticking(services)
    read, pages = sessions_repository.list_ended, list[int]()

    async def read_and_count(session: Any, session_ids: Sequence[int]) -> set[int]:
        pages.append(len(session_ids))
        if len(pages) == 2:
            raise Unavailable("database_unavailable", "The database does not answer.")
        if len(pages) == 3:  # one more loss while this is asked
            services.connections.recheck_sessions()
        return await read(session, session_ids)

    monkeypatch.setattr(sessions_repository, "list_ended", read_and_count)
    for session_id in range(1, 6):
        services.connections.add(Inbox(), 1, session_id, SystemClock().now() + timedelta(hours=1))
    services.connections.recheck_sessions()
    await services.connections._beat()
    assert pages == [2, 2]
    await services.connections._beat()
    assert pages == [2, 2, 2, 1]  # the first two stood already
    await services.connections._beat()
    assert pages == [2, 2, 2, 1, 2, 2, 1]
    await services.connections._beat()
    assert len(pages) == 7


@pytest.mark.parametrize("begins_at", ["nothing", "beyond"])
async def test_messages_hidden_by_the_thousand_come_in_pages_over_socket_and_rest(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch, begins_at: str
) -> None:
    [ann] = await people(client, 1)
    chat_id = await ann.group()
    version = (await ann.do("GET", "/users/me"))["account_version"]
    count = 2 * PAGE_HIDDEN + 7
    async with services.database.writing() as session:
        rows = [
            {"user_id": ann.id, "chat_id": chat_id, "seq": n, "message_id": 10**6 + n, "account_version": version + n}
            for n in range(1, count + 1)
        ]
        for start in range(0, count, 100):
            await session.execute(insert(HiddenMessage).values(rows[start : start + 100]))
        await session.execute(update(User).where(User.id == ann.id).values(account_version=version + count))
    read, pages = accounts_repository.list_changed_hidden, list[int]()

    async def read_and_count(*arguments: Any, **named: Any) -> list[accounts_repository.ChangedHidden]:
        page = await read(*arguments, **named)
        pages.append(len(page))
        return page

    monkeypatch.setattr(accounts_repository, "list_changed_hidden", read_and_count)
    everything = [row["message_id"] for row in rows]
    state: Json = {"account_version": 0 if begins_at == "nothing" else 10**9, "chats": {str(chat_id): 1}}

    inbox = Inbox()
    connection = services.connections.add(inbox, ann.id, 1, SystemClock().now() + timedelta(hours=1))
    connection.ready = True
    connection.resume(ResumeIn(**state), None, lambda error: pytest.fail(error.code))
    await inbox.until(type="resumed")
    assert [event["message_id"] for event in inbox.events if event["type"] == "message_hidden"] == everything
    assert pages == [PAGE_HIDDEN, PAGE_HIDDEN, 7]

    answers: list[list[Json]] = []
    while not answers or not answers[-1][-1]["complete"]:
        answers.append(await ann.resume(**state))
        state["account_version"] = answers[-1][-1]["account_version"]
        assert len(answers) <= 4
    told = [[event["message_id"] for event in answer if event["type"] == "message_hidden"] for answer in answers]
    assert sorted({message_id for some in told for message_id in some}) == everything
    assert max(map(len, told)) == PAGE_HIDDEN
    profiles = [sum(event["type"] == "profile_changed" for event in answer) for answer in answers]
    assert profiles == [*[0] * (len(answers) - 1), 1]
    assert state["account_version"] == version + count
    assert max(pages) == PAGE_HIDDEN
