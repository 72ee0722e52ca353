"""The sequencer: versions go out one after the other, and what was swallowed is read from the database."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import timedelta

import httpx
import pytest
from sqlalchemy import text

from app.core import metrics
from app.core.clock import SystemClock
from app.core.errors import Unavailable
from app.services.chat_log import sequencer
from app.services.chat_log.changes import Appended, Change, ChangeMembers, EditMessage, SendMessage
from app.services.chat_log.sequencer import HEAL_PAUSE_SECONDS
from app.services.connection_manager import Channel, Connection
from app.services.container import Services
from app.services.transport import Frames
from tests.support.clock import ManualClock
from tests.support.metrics import value
from tests.support.people import Json, Person, people

# The sweep runs when a test says so.
pytestmark = pytest.mark.settings(sweep_seconds=3600)


class Inbox:
    """A transport whose peer reads at once; it keeps what came."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.close_code: int | None = None
        self._arrived = asyncio.Event()

    def send(self, frames: Frames) -> None:
        self.events += [json.loads(payload) for payload in frames.payloads]
        self._arrived.set()

    @property
    def unsent_bytes(self) -> int:
        return 0

    def close(self, code: int, reason: str = "") -> None:
        self.close_code = code

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    async def until(self, **fields: object) -> None:
        """Return once an event with these fields has come."""
        async with asyncio.timeout(10):
            while not any(all(event.get(key) == value for key, value in fields.items()) for event in self.events):
                self._arrived.clear()
                await self._arrived.wait()

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(prev, version) of the events of the log."""
        return [(event["prev"], event["version"]) for event in self.events if "prev" in event]


async def come_online(services: Services, person: Person, *, greeted: bool = True) -> Inbox:
    """A connection of somebody, as the socket's route makes it."""
    inbox = Inbox()
    expires_at = SystemClock().now() + timedelta(hours=1)
    connection: Connection = services.connections.add(inbox, person.id, 1, expires_at)
    await services.connections.load_chats(connection.user)
    connection.ready = greeted
    return inbox


async def commit(services: Services, *changes: Change) -> Appended:
    """Commit changes and announce nothing: what a crash, or a bus that loses everything, leaves behind."""
    ids = await services.ids.reserve("message", sum(isinstance(change, SendMessage) for change in changes) or 1)
    async with services.database.writing() as session:
        return await services.appender.append(await session.connection(), changes, ids)


def message(chat_id: int, person: Person, content: str = "x") -> SendMessage:
    """A message."""
    return SendMessage(chat_id, person.id, uuid.uuid4().bytes, content)


async def test_announcements_that_come_early_wait_for_their_turn(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    inboxes = [await come_online(services, person) for person in (ann, bo, bo)]
    appended = [await commit(services, message(chat_id, ann, str(number))) for number in range(6)]
    for number in (5, 0, 3, 4, 2, 1):
        services.sequencer.announce(appended[number])
    for inbox in inboxes:
        assert inbox.spans == [(version, version + 1) for version in range(1, 7)]
        assert [event["message"]["content"] for event in inbox.events] == ["0", "1", "2", "3", "4", "5"]
    for number in (3, 0):  # once more, as a bus may
        services.sequencer.announce(appended[number])
    assert [len(inbox.events) for inbox in inboxes] == [6, 6, 6]
    assert services.sequencer.healed == 0


async def test_a_device_is_told_nothing_before_it_is_greeted(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    early = await come_online(services, bo, greeted=False)
    inbox = await come_online(services, bo)  # loads the chats of the other one too
    services.sequencer.announce(await commit(services, message(chat_id, ann)))
    await ann.group(bo)
    await bo.block(ann)
    await inbox.until(type="block_changed")
    assert {"new_message", "chat_added"} <= {event["type"] for event in inbox.events}
    assert early.events == []


async def test_a_hole_that_does_not_fill_is_read_from_the_database(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id, other = await ann.personal(bo), await ann.group(bo)
    inbox = await come_online(services, bo)
    swallowed = await commit(services, message(chat_id, ann, "swallowed"))
    heard = await commit(services, message(chat_id, ann, "heard"))
    services.sequencer.announce(heard)
    assert inbox.events == []
    services.sequencer.announce(await commit(services, message(other, ann, "elsewhere")))
    assert [event["chat_id"] for event in inbox.events] == [other]  # the hole holds up no other chat
    await inbox.until(chat_id=chat_id, version=3)
    [healed] = [event for event in inbox.events if event["chat_id"] == chat_id]
    assert (healed["type"], healed["prev"], healed["version"]) == ("chat_changes", 1, 3)
    assert [one["content"] for one in healed["messages"]] == ["swallowed", "heard"]
    assert services.sequencer.healed == 1
    for late in (swallowed, heard):
        services.sequencer.announce(late)
    services.sequencer.announce(await commit(services, message(chat_id, ann, "next")))
    assert inbox.spans[-2:] == [(1, 3), (3, 4)]


async def test_what_nobody_announced_at_all_is_found_by_the_sweep(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo, cy = await people(client, 3)
    chat_id, group = await ann.personal(bo), await ann.group(bo, cy)
    inbox, gone = await come_online(services, bo), await come_online(services, cy)
    first = message(chat_id, ann, "1")
    await commit(services, first)
    await commit(services, message(group, ann, "2"), ChangeMembers(group, leave=[cy.id]), message(group, ann, "3"))
    await services.sequencer.sweep()
    assert inbox.events == []  # it may still be on its way
    await services.sequencer.sweep()
    assert sorted(event["chat_id"] for event in inbox.events) == sorted((chat_id, group))
    assert {event["type"] for event in inbox.events} == {"chat_changes"}
    in_group = next(event for event in inbox.events if event["chat_id"] == group)
    assert [one["content"] for one in in_group["messages"]][-2:] == ["2", "3"]
    assert [(one["user_id"], one["active"]) for one in in_group["members"]] == [(cy.id, False)]
    assert in_group["info"]["member_count"] == 2
    # Who was removed in the hole hears nothing of it, nor of what follows.
    services.sequencer.announce(await commit(services, message(group, ann, "after")))
    assert "after" in str(inbox.events[-1])
    assert gone.events == []
    healed = services.sequencer.healed
    await services.sequencer.sweep()
    await services.sequencer.sweep()
    assert services.sequencer.healed == healed


async def spoil(services: Services, chat_id: int, *, whole: bool = False) -> None:
    """Make a chat's messages such that they cannot be read, or whole again."""
    async with services.database.writing() as session:
        await session.execute(
            text("UPDATE messages SET service = :service WHERE chat_id = :chat_id"),
            {"service": None if whole else "{", "chat_id": chat_id},
        )


def heals_failed() -> float:
    return value(metrics.exposition().decode(), "dialect_heals_failed_total")


def stop_the_clock(services: Services, monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """Let the sequencer's time pass when the test says so."""
    clock = ManualClock()
    monkeypatch.setattr(services.sequencer, "_clock", clock)
    monkeypatch.setattr(services.sequencer, "_swept", clock.monotonic())
    return clock


@pytest.mark.logs_errors
async def test_a_chat_that_cannot_be_healed_holds_up_no_other_and_is_tried_again_after_growing_pauses(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = stop_the_clock(services, monkeypatch)
    ann, bo = await people(client, 2)
    before, sick, behind = [await ann.group(bo) for _ in range(3)]
    inbox, failed = await come_online(services, bo), heals_failed()

    async def sweep_after(seconds: float = 0.0) -> tuple[float, int]:
        """(tries to heal that have failed, events that have come)"""
        clock.advance(seconds)
        await services.sequencer.sweep()
        return heals_failed() - failed, len(inbox.events)

    for group in (before, sick, behind):
        await commit(services, message(group, ann, "unheard"))
    await spoil(services, sick)
    assert await sweep_after() == (0, 0)
    assert await sweep_after() == (1, 2)
    assert {event["chat_id"] for event in inbox.events} == {before, behind}
    await commit(services, message(behind, ann, "more"))
    assert await sweep_after() == (1, 2)
    assert await sweep_after() == (1, 3)
    assert await sweep_after(HEAL_PAUSE_SECONDS) == (2, 3)
    assert await sweep_after(HEAL_PAUSE_SECONDS) == (2, 3)
    await spoil(services, sick, whole=True)
    assert await sweep_after(HEAL_PAUSE_SECONDS) == (2, 4)
    assert inbox.events[-1]["chat_id"] == sick
    told = [record for record in caplog.records if record.message == "heal_failed"]
    assert [(record.chat_id, record.pause) for record in told] == [(sick, 5.0), (sick, 10.0)]  # type: ignore[attr-defined]
    services.sequencer.announce(await commit(services, message(sick, ann, "live again")))
    assert inbox.events[-1]["prev"] == inbox.events[-2]["version"]


@pytest.mark.logs_errors
async def test_behind_a_hole_that_cannot_be_healed_nothing_gathers_and_the_sweep_heals_it_at_last(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = stop_the_clock(services, monkeypatch)
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    inbox, failed = await come_online(services, bo), heals_failed()
    await commit(services, message(chat_id, ann, "swallowed"))
    await spoil(services, chat_id)
    services.sequencer.announce(await commit(services, message(chat_id, ann, "early")))
    async with asyncio.timeout(10):
        while services.connections.channels[chat_id].healing:
            await services.database.ping()
    for number in range(3):
        services.sequencer.announce(await commit(services, message(chat_id, ann, f"later {number}")))
    assert heals_failed() - failed == 1
    assert services.sequencer._early == {}
    await spoil(services, chat_id, whole=True)
    clock.advance(HEAL_PAUSE_SECONDS)
    await services.sequencer.sweep()
    [healed] = inbox.events
    assert (healed["prev"], healed["version"], len(healed["messages"])) == (1, 6, 5)
    services.sequencer.announce(await commit(services, message(chat_id, ann, "live again")))
    assert inbox.spans[-1] == (6, 7)


async def test_a_chat_that_takes_the_database_too_long_goes_to_the_end_of_the_line(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    slow, well = [await ann.group(bo) for _ in range(2)]
    inbox = await come_online(services, bo)
    heal, tried = services.sequencer.heal, []

    async def heal_the_other(channel: Channel) -> None:
        tried.append(channel.chat_id)
        if channel.chat_id == slow:
            raise Unavailable("database_unavailable", "The database does not answer.")
        await heal(channel)

    monkeypatch.setattr(services.sequencer, "heal", heal_the_other)
    await commit(services, message(slow, ann, "unheard"))
    await services.sequencer.sweep()
    await commit(services, message(well, ann, "unheard"))
    for _ in range(2):
        with pytest.raises(Unavailable):
            await services.sequencer.sweep()
    assert tried == [slow, well, slow]
    assert [event["chat_id"] for event in inbox.events] == [well]


async def test_the_sweep_reads_what_changed_page_by_page_and_misses_none(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequencer, "SWEEP_ROWS", 2)
    ann, bo = await people(client, 2)
    groups = [await ann.group(bo) for _ in range(5)]
    # Some of one stamp: a page may end between them.
    async with services.database.writing() as session:
        await session.execute(
            text("UPDATE chats SET changed_at = (SELECT at FROM (SELECT MAX(changed_at) AS at FROM chats) AS c)")
        )
    inbox = await come_online(services, bo)
    for group in groups:
        await commit(services, message(group, ann, "unheard"))
    await services.sequencer.sweep()
    await services.sequencer.sweep()
    assert sorted(event["chat_id"] for event in inbox.events) == sorted(groups)


async def test_healing_shows_nobody_what_was_said_before_their_time(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group(history_visible=False)
    old = await ann.say(group, "before Bo")
    await ann.add(group, bo)
    hers, his = await come_online(services, ann), await come_online(services, bo)
    await commit(services, EditMessage(group, ann.id, old["id"], "changed before Bo"), message(group, ann, "to both"))
    await services.sequencer.sweep()
    await services.sequencer.sweep()
    [to_her], [to_him] = hers.events, his.events
    assert {one["content"] for one in to_her["messages"]} == {"changed before Bo", "to both"}
    assert [one["content"] for one in to_him["messages"]] == ["to both"]
    assert (to_her["prev"], to_her["version"]) == (to_him["prev"], to_him["version"])
    # The same when it is announced as it should be.
    services.sequencer.announce(
        await commit(services, EditMessage(group, ann.id, old["id"], "again"), message(group, ann, "and on"))
    )
    assert hers.spans == his.spans
    assert [event["type"] for event in hers.events] == ["chat_changes", "message_edited", "new_message"]
    assert [event["type"] for event in his.events] == ["chat_changes", "chat_changes", "new_message"]
    assert "before Bo" not in str(his.events)
    assert "again" not in str(his.events)


async def test_a_hole_too_large_for_one_frame_is_caught_up_in_pages(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    inbox = await come_online(services, bo)
    await commit(services, *(message(chat_id, ann, str(number)) for number in range(501)))
    last = await commit(services, message(chat_id, ann, "last"))
    services.sequencer.announce(last)
    await inbox.until(type="synced", version=503)
    changes = [event for event in inbox.events if event["type"] == "chat_changes"]
    assert len(changes) > 1
    assert [event["prev"] for event in changes] == [1, *(event["version"] for event in changes[:-1])]
    assert [one["seq"] for event in changes for one in event["messages"]] == list(range(1, 503))
    services.sequencer.announce(await commit(services, message(chat_id, ann, "live")))
    assert (inbox.events[-1]["prev"], inbox.events[-1]["version"]) == (503, 504)
