"""Marks of fan-out: a run of what was told of, few rows and few statements, and never more than the truth."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.core.errors import Unavailable
from app.db.database import Database
from app.db.repositories import trace as repository
from app.db.repositories.trace import FanoutRow, PushRow
from app.services import fanout_marks
from app.services.chat_log.changes import Announcement
from app.services.chat_log.roster import Roster
from app.services.container import Services
from app.services.fanout_marks import FanoutMarks, run_of
from tests.support.clock import ManualClock
from tests.support.people import people
from tests.support.statements import statements

NOW = ManualClock().now().replace(tzinfo=None)


def sent(chat_id: int, *seqs: int) -> Announcement:
    """What is announced of new messages."""
    events: list[Any] = [{"type": "new_message", "message": {"seq": seq}} for seq in seqs]
    return Announcement(chat_id, 0, 1, Roster(chat_id, "group", 1, {}), events, [0] * len(seqs))


async def stored(database: Database, chat_id: int = 1) -> list[tuple[str, str, int, int]]:
    """(worker, part, first, last) of a chat."""
    async with database.reading() as session:
        return sorted(row[1:5] for row in await repository.list_fanout(session, chat_id))


def test_a_run_ends_at_the_newest_message_and_has_no_gap() -> None:
    def new(seq: int) -> Any:
        return {"type": "new_message", "message": {"seq": seq}}

    healed: Any = {"type": "chat_changes", "messages": [{"seq": seq} for seq in (3, 12, 11, 10)]}
    typed: Any = {"type": "message_read", "seq": 5}
    assert run_of([new(4), new(5), new(6)]) == (4, 6)
    assert run_of([healed]) == (10, 12)  # 3 was edited
    assert run_of([new(9), healed]) == (9, 12)
    assert run_of([typed]) is None
    assert run_of([]) is None


@pytest.mark.parametrize(
    ("part", "before", "told", "after"),
    [
        ("sockets", (5, 9), (10, 12), (5, 12)),
        ("sockets", (5, 9), (7, 12), (5, 12)),
        ("sockets", (5, 9), (3, 4), (3, 9)),
        ("sockets", (5, 9), (6, 7), (5, 9)),
        ("sockets", (5, 9), (1, 20), (1, 20)),
        ("sockets", (5, 9), (11, 12), (11, 12)),  # 10 never came here
        ("sockets", (5, 9), (1, 3), (5, 9)),
        ("commit", (5, 9), (10, 12), (5, 12)),
        ("commit", (5, 9), (11, 12), (5, 12)),  # another worker committed 10
        ("commit", (5, 9), (1, 3), (1, 9)),
    ],
)
async def test_runs_join_in_memory_as_in_the_database_and_those_let_out_to_sockets_only_without_a_gap(
    database: Database,
    part: fanout_marks.Part,
    before: tuple[int, int],
    told: tuple[int, int],
    after: tuple[int, int],
) -> None:
    earlier = fanout_marks.Run(*before, NOW)
    later = fanout_marks.Run(*told, NOW + timedelta(seconds=1))
    joined = earlier.joined(later, part)
    assert joined[:2] == after
    for run in (earlier, later):
        async with database.writing() as session:
            await repository.save_fanout(session, [FanoutRow(1, "w", part, *run)])
    async with database.reading() as session:
        [row] = await repository.list_fanout(session, 1)
    assert row == FanoutRow(1, "w", part, *joined)
    assert (row.at == later.at) == (told[1] >= before[1])


async def test_many_messages_make_one_row_per_chat_and_part_and_one_statement(database: Database) -> None:
    marks = FanoutMarks(clock=ManualClock(), database=database, worker="w")
    for seq in range(1, 1001):
        for chat_id in (1, 2, 3):
            marks.committed(sent(chat_id, seq))
            marks.let_out(sent(chat_id, seq))
    with statements(database) as seen:
        await marks.store()
    assert len([statement for statement in seen if "INSERT" in statement]) == 1
    for chat_id in (1, 2, 3):
        assert await stored(database, chat_id) == [("w", "commit", 1, 1000), ("w", "sockets", 1, 1000)]
    # From then on it is the one statement alone; and nothing at all when nothing was said.
    marks.committed(sent(1, 1001))
    with statements(database) as seen:
        await marks.store()
        await marks.store()
    assert len(seen) == 1, seen


async def test_a_send_waits_for_no_mark_and_a_hundred_make_a_statement_a_second(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    began = services.clock.monotonic()
    with statements(services.database, background=True) as seen:
        for _ in range(100):
            await ann.say(chat, "hello")
        seconds = services.clock.monotonic() - began
    written = [statement for statement in seen if "fanout_marks" in statement and "INSERT" in statement]
    assert len(written) <= seconds + 1, "one a second"


async def test_what_cannot_be_stored_waits_and_is_stored_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = FanoutMarks(clock=ManualClock(), database=database, worker="w")
    marks.committed(sent(1, 1, 2))

    async def fail(*_: object) -> None:
        raise Unavailable("busy", "Not now.")

    with monkeypatch.context() as patch:
        patch.setattr(repository, "save_fanout", fail)
        with pytest.raises(Unavailable):
            await marks.store()
    marks.committed(sent(1, 3))
    await marks.store()
    assert await stored(database) == [("w", "commit", 1, 3)]


async def test_what_is_noted_while_it_is_being_stored_is_stored_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = FanoutMarks(clock=ManualClock(), database=database, worker="w")
    marks.committed(sent(1, 1))
    save = repository.save_fanout

    async def meanwhile(*arguments: Any) -> None:
        await save(*arguments)
        marks.committed(sent(1, 2))

    with monkeypatch.context() as patch:
        patch.setattr(repository, "save_fanout", meanwhile)
        await marks.store()
    assert await stored(database) == [("w", "commit", 1, 1)]
    await marks.store()
    assert await stored(database) == [("w", "commit", 1, 2)]


async def test_more_chats_than_are_stored_at_once_take_turns_and_memory_is_bounded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout_marks, "STORE_ROWS", 2)
    monkeypatch.setattr(fanout_marks, "WAITING_MAX", 4)
    marks = FanoutMarks(clock=ManualClock(), database=database, worker="w")
    for chat_id in (1, 2, 3, 4, 5):
        marks.committed(sent(chat_id, 1))
    save = repository.save_fanout

    async def meanwhile(*arguments: Any) -> None:
        await save(*arguments)
        marks.committed(sent(1, 2))
        marks.committed(sent(2, 2))

    with monkeypatch.context() as patch:
        patch.setattr(repository, "save_fanout", meanwhile)
        await marks.store()
    await marks.store()
    assert await stored(database, 4) == [("w", "commit", 1, 1)]  # though 1 and 2 have more
    assert await stored(database, 1) == [("w", "commit", 1, 1)]
    await marks.store()
    assert await stored(database, 1) == [("w", "commit", 1, 2)]
    assert await stored(database, 5) == []


async def test_a_new_process_forgets_what_others_told_of_a_week_ago_and_no_more(database: Database) -> None:
    clock = ManualClock()
    now = clock.now().replace(tzinfo=None)
    async with database.writing() as session:
        await repository.save_fanout(
            session,
            [
                FanoutRow(1, "old", "commit", 1, 5, now - timedelta(days=8)),
                FanoutRow(1, "young", "commit", 6, 7, now - timedelta(days=6)),
                FanoutRow(2, "old", "commit", 1, 5, now - timedelta(days=8)),
            ],
        )
    marks = FanoutMarks(clock=clock, database=database, worker="new")
    marks.committed(sent(1, 8))
    await marks.store()
    assert await stored(database, 1) == [("new", "commit", 8, 8), ("young", "commit", 6, 7)]
    assert await stored(database, 2) == [("old", "commit", 1, 5)]


async def test_an_announcement_that_waits_for_an_earlier_one_leaves_no_mark_until_its_turn(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    message = await ann.say(chat, "hello")
    noted: list[tuple[str, int]] = []
    monkeypatch.setattr(services.fanout, "_note", lambda told, part: noted.append((part, told.version)))
    roster = services.rosters.get(chat)
    assert roster is not None
    version = message["version"]
    channel: Any = type("Channel", (), {})()
    channel.version, channel.healing, channel.chat_id = version, True, chat
    channel.connections, channel.audience = [], lambda _roster: []
    services.connections.channels[chat] = channel
    try:
        ahead, next_one = (
            Announcement(chat, version + step, version + step + 1, roster, [], [], here=True) for step in (1, 0)
        )
        services.sequencer.offer(ahead)
        assert noted == []
        services.sequencer.offer(next_one)
        assert noted == [
            ("sockets", version + 1),
            ("commit", version + 1),
            ("sockets", version + 2),
            ("commit", version + 2),
        ]
    finally:
        del services.connections.channels[chat]


async def test_the_answer_kept_of_a_device_is_that_to_the_newest_message_and_sent_never_goes_back(
    database: Database,
) -> None:
    later = NOW + timedelta(seconds=1)
    for row in (
        PushRow(7, 1, 5, 5, "sent", "", NOW),
        PushRow(7, 1, 0, 6, "retry", "UnavailableError 503", later),
        PushRow(7, 1, 0, 4, "refused", "late", NOW),
    ):
        async with database.writing() as session:
            await repository.save_pushed(session, [row])
    async with database.reading() as session:
        rows = list(await session.execute(repository.PUSHED.select()))
    assert [PushRow(*row) for row in rows] == [PushRow(7, 1, 5, 6, "retry", "UnavailableError 503", later)]


async def test_a_thousand_rows_and_one_are_stored_as_few_statements(database: Database) -> None:
    rows = [FanoutRow(chat_id, "w", "commit", 1, 1, NOW) for chat_id in range(1, repository.ROWS_MAX + 2)]
    with statements(database) as seen:
        async with database.writing() as session:
            await repository.save_fanout(session, rows)
    assert len(seen) == 2
    assert await stored(database, repository.ROWS_MAX + 1) == [("w", "commit", 1, 1)]


async def test_a_worker_that_the_database_refused_a_number_at_its_start_takes_one_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout_marks, "STORE_SECONDS", 0.01)
    add, tries = repository.add_worker, 0

    async def refuse_twice(*arguments: Any) -> int:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise Unavailable("database_unavailable", "Not now.")
        return await add(*arguments)

    monkeypatch.setattr(repository, "add_worker", refuse_twice)
    marks = FanoutMarks(clock=ManualClock(), database=database, worker="w")
    await marks.start()
    marks.committed(sent(1, 1))
    async with asyncio.timeout(20):
        while marks.number is None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)
    await marks.stop()
    async with database.reading() as session:
        [worker] = list(await session.execute(repository.WORKER.select()))
    assert (worker.number, worker.name) == (marks.number, "w")
    assert await stored(database) == [("w", "commit", 1, 1)]


async def test_two_workers_store_marks_of_the_same_chats_at_once(database: Database) -> None:
    workers = [FanoutMarks(clock=ManualClock(), database=database, worker=name) for name in ("a", "b")]
    for round_ in range(1, 4):
        for marks in workers:
            for chat_id in range(1, 51):
                marks.committed(sent(chat_id, round_))
        await asyncio.gather(*(marks.store() for marks in workers))
    assert await stored(database, 50) == [("a", "commit", 1, 3), ("b", "commit", 1, 3)]
