"""The writer: one commit for many, a poisoned change alone, locks, deadlines and a full queue."""

from __future__ import annotations

import asyncio
import uuid

import httpx
import pytest
from sqlalchemy import text

from app.core.config import Settings
from app.core.errors import DialectError, Unavailable
from app.db.database import MYSQL_LOG_CONNECTIONS
from app.services.chat_log.changes import Change, Done, EditMessage, Mark, SendMessage
from app.services.container import Services
from tests.support.locks import held
from tests.support.people import Json, contents, people
from tests.support.statements import statements

POISON = "\ud800"
"""No database can store a lone surrogate. The edge refuses it; here it stands for whatever else may go wrong."""


def send(chat_id: int, user_id: int, content: str = "x", client_id: bytes = b"") -> SendMessage:
    """A message."""
    return SendMessage(chat_id, user_id, client_id or uuid.uuid4().bytes, content)


async def outcomes(services: Services, changes: list[Change]) -> list[Done | BaseException]:
    """What comes of changes that are submitted all at once."""
    return await asyncio.gather(*(services.writer.write(change) for change in changes), return_exceptions=True)


def message_of(outcome: object) -> Json:
    """The message that was written."""
    assert isinstance(outcome, Done)
    assert outcome.message is not None
    return dict(outcome.message)


async def test_what_arrives_together_is_one_transaction_in_order(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    first, second = await ann.personal(bo), await ann.group(bo)
    changes: list[Change] = [send((first, second)[i % 2], (ann, bo)[i % 3 == 0].id, str(i)) for i in range(90)]
    twins = [send(first, ann.id, "twin", b"t" * 16) for _ in range(3)]
    missing = send(999_999, ann.id)
    foreign = send(first, 999_999)
    with statements(services.database) as seen:
        done = await outcomes(services, [*changes, *twins, missing, foreign])
    assert len([one for one in seen if one.startswith("INSERT INTO messages")]) <= 2
    assert len(seen) < 30
    for chat_id in (first, second):
        seqs = [message_of(one)["seq"] for one in done[:90] if message_of(one)["chat_id"] == chat_id]
        assert seqs == list(range(seqs[0], seqs[0] + 45))
    assert message_of(done[90]) == message_of(done[91]) == message_of(done[92])
    for refused in done[93:]:
        assert isinstance(refused, DialectError)
        assert refused.code == "chat_not_found"
    assert (await ann.chat(first))["last_seq"] == 46


async def test_of_many_that_wait_for_mysql_half_go_at_once(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.personal(bo), await ann.group(bo)]
    with statements(services.database) as seen:
        done = await outcomes(services, [send(chats[i % 2], ann.id, str(i)) for i in range(400)])
    assert len({message_of(one)["id"] for one in done}) == 400
    transactions = len([one for one in seen if one.startswith("INSERT INTO messages")])
    assert transactions == (3 if services.database.is_mysql else 1)  # of 200, 100 and 100


@pytest.mark.logs_errors
async def test_a_poisoned_change_fails_alone(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id, group = await ann.personal(bo), await ann.group(bo)
    kept = message_of((await outcomes(services, [send(group, ann.id, "kept")]))[0])
    changes: list[Change] = [send(chat_id, ann.id, str(number)) for number in range(20)]
    changes[3] = send(chat_id, ann.id, POISON)
    changes[11] = EditMessage(group, ann.id, kept["id"], POISON)
    changes[12] = Mark(group, bo.id, kept["id"], "read")
    done = await outcomes(services, changes)
    for number, outcome in enumerate(done):
        if number in (3, 11):
            assert isinstance(outcome, DialectError)
            assert (outcome.code, outcome.retryable) == ("internal_error", False)
            assert POISON not in str(outcome)
        else:
            assert isinstance(outcome, Done), (number, outcome)
    page = await bo.history(chat_id)
    assert contents(page) == [str(number) for number in range(20) if number not in (3, 11, 12)]
    assert [message["seq"] for message in page["items"]] == list(range(1, 18))
    assert contents(await ann.history(group)) == ["kept"]
    assert (await bo.chat(group))["unread_count"] == 0
    assert (await ann.say(chat_id, "and on it goes"))["seq"] == 18


async def test_a_chat_that_somebody_holds_waits_while_others_are_written(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    if not settings.uses_mysql:
        pytest.skip("SQLite has one lock for all")
    ann, bo = await people(client, 2)
    locked, free = await ann.group(bo), await ann.group(bo)
    with held(settings, f"chats WHERE id = {locked}"):
        waiting = [asyncio.create_task(services.writer.write(send(locked, ann.id, str(i)))) for i in range(3)]
        for number in range(5):
            assert isinstance(await services.writer.write(send(free, bo.id, str(number))), Done)
        assert not any(task.done() for task in waiting)
        assert services.writer.waiting >= 3
    await asyncio.gather(*waiting)
    assert contents(await bo.history(locked)) == ["0", "1", "2"]
    assert contents(await bo.history(free)) == ["0", "1", "2", "3", "4"]


async def one_commits(services: Services) -> None:
    """Wait until a batch is at its commit."""
    async with asyncio.timeout(5):
        while all(lane.committing_since is None for lane in services.writer._lanes):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


async def test_beside_a_commit_that_hangs_others_go_on_and_overtake_it_in_no_chat(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    if not settings.uses_mysql:
        pytest.skip("SQLite has one lock for all")
    ann, bo = await people(client, 2)
    quick, slow = await ann.group(bo), await ann.group(bo)
    await ann.say(slow, "ids are leased")
    with held(settings, f"chat_members WHERE chat_id = {slow}"):  # its marks are written with the commit
        waiting = [asyncio.create_task(services.writer.write(send(slow, ann.id, "first")))]
        await one_commits(services)
        for number in range(5):
            assert isinstance(await services.writer.write(send(quick, bo.id, str(number))), Done)
            waiting.append(asyncio.create_task(services.writer.write(send(slow, bo.id, str(number)))))
        assert not any(task.done() for task in waiting)
    seqs = [message_of(one)["seq"] for one in await asyncio.gather(*waiting)]
    assert seqs == sorted(seqs)
    assert contents(await bo.history(slow))[1:] == ["first", "0", "1", "2", "3", "4"]
    assert contents(await bo.history(quick)) == ["0", "1", "2", "3", "4"]


async def test_beside_a_commit_that_takes_no_time_no_batch_begins(
    client: httpx.AsyncClient, services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not settings.uses_mysql:
        pytest.skip("SQLite has one lock for all")
    ann, bo = await people(client, 2)
    quick, slow = await ann.group(bo), await ann.group(bo)
    await ann.say(slow, "ids are leased")
    monkeypatch.setattr("app.services.chat_log.writer.SLOW_COMMIT_SECONDS", 60)
    with held(settings, f"chat_members WHERE chat_id = {slow}"):
        waiting = [asyncio.create_task(services.writer.write(send(slow, ann.id, "first")))]
        await one_commits(services)
        waiting += [asyncio.create_task(services.writer.write(send(quick, bo.id, str(i)))) for i in range(5)]
        await asyncio.wait(waiting, timeout=0.3)
        assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    assert contents(await bo.history(quick)) == [str(number) for number in range(5)]


def looked(seen: list[str]) -> int:
    """How often the writer looked at chats before it wrote to them."""
    return len([one for one in seen if one.startswith("SELECT id, type") and "ORDER BY id" in one])


def compared(seen: list[str]) -> int:
    """How often it let the database compare them with what it remembers."""
    return len([one for one in seen if "SELECT EXP(" in one or "SELECT abs(" in one])


async def test_to_chats_it_remembers_the_writer_sends_in_one_packet(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(30)]  # more than are compared by name
    done: list[Done | BaseException] = []
    for some in (chats[:1], chats):
        await outcomes(services, [send(chat_id, ann.id, "hello") for chat_id in some])
        with statements(services.database) as seen:
            done = await outcomes(services, [send(chat_id, bo.id, "again") for chat_id in some])
        assert all(isinstance(one, Done) for one in done)
        assert looked(seen) == 0
        assert compared(seen) == 1
    assert contents(await bo.history(chats[0])) == ["hello", "again"] * 2
    assert [message_of(one)["seq"] for one in done] == [5] + [3] * 29
    assert len(services.database._mysql_logs) == (MYSQL_LOG_CONNECTIONS if services.database.is_mysql else 0)


CHANGES = {
    "renamed": "UPDATE chats SET title = 'new', version = version + 1, info_version = version WHERE id = {chat}",
    "a message": "UPDATE chats SET version = version + 1 WHERE id = {chat}",
    "a block": "UPDATE chats SET members_version = members_version + 1 WHERE id = {chat}",
}
"""What another worker does to a chat, of which the bus says nothing."""


@pytest.mark.parametrize("others", [0, 29])
@pytest.mark.parametrize("change", list(CHANGES))
async def test_a_chat_that_another_worker_has_changed_is_looked_at_before_anything_is_written(
    client: httpx.AsyncClient, services: Services, change: str, others: int
) -> None:
    ann, bo = await people(client, 2)
    changed, *rest = [await ann.group(bo) for _ in range(1 + others)]
    first = [message_of(one) for one in await outcomes(services, [send(chat, ann.id) for chat in (changed, *rest)])]
    async with services.database.writing() as session:
        await session.execute(text(CHANGES[change].format(chat=changed)))
    open_before = list(services.database._mysql_logs)
    with statements(services.database) as seen:
        again = await outcomes(services, [send(chat, bo.id) for chat in (changed, *rest)])
    assert looked(seen) == 1
    assert [message_of(one)["seq"] for one in again] == [one["seq"] + 1 for one in first]
    versions = [message_of(new)["version"] - old["version"] for new, old in zip(again, first, strict=True)]
    assert versions == [1 if change == "a block" else 2, *([1] * others)]
    assert set(services.database._mysql_logs) == set(open_before)  # a refusal costs no connection
    with statements(services.database) as seen:
        await services.writer.write(send(changed, ann.id))
    assert looked(seen) == 0


async def test_a_member_removed_by_another_worker_slips_no_message_in(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.group(bo)
    await services.writer.write(send(chat_id, bo.id, "in time"))
    async with services.database.writing() as session:
        await session.execute(
            text(f"UPDATE chat_members SET left_seq = 1 WHERE chat_id = {chat_id} AND user_id = {bo.id}")
        )
        await session.execute(
            text(f"UPDATE chats SET version = version + 1, members_version = members_version + 1 WHERE id = {chat_id}")
        )
    with pytest.raises(DialectError) as refused:
        await services.writer.write(send(chat_id, bo.id, "too late"))
    assert refused.value.code == "chat_not_found"
    assert contents(await ann.history(chat_id)) == ["in time"]


async def test_a_remembered_chat_that_somebody_holds_does_not_hold_up_others(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    if not settings.uses_mysql:
        pytest.skip("SQLite has one lock for all")
    ann, bo = await people(client, 2)
    locked, free = await ann.group(bo), await ann.group(bo)
    await outcomes(services, [send(locked, ann.id, "known"), send(free, ann.id, "known")])
    with held(settings, f"chats WHERE id = {locked}"):
        waiting, done = (
            asyncio.create_task(services.writer.write(send(chat_id, bo.id, "now"))) for chat_id in (locked, free)
        )
        assert isinstance(await asyncio.wait_for(done, 2), Done)
        assert not waiting.done()
    await waiting
    assert contents(await bo.history(locked)) == contents(await bo.history(free)) == ["known", "now"]


@pytest.mark.parametrize("what", ["sent", "refused"])
async def test_a_retry_among_others_gets_its_first_answer_and_costs_them_nothing(
    client: httpx.AsyncClient, services: Services, what: str
) -> None:
    ann, bo = await people(client, 2)
    group, personal = await ann.group(bo), await ann.personal(bo)
    names = [b"\"'\xff%);*/--`\x00{} " + bytes([n]) for n in range(3)]
    first = await outcomes(services, [send(group, bo.id, "first", names[n]) for n in range(3)])
    if what == "refused":
        await ann.remove(group, bo)
    changes: list[Change] = [send(personal, (ann, bo)[i % 2].id, str(i)) for i in range(20)]
    for n in range(3):
        changes.insert(5 * n, send(group, bo.id, "again", names[n]))
    changes.append(send(group, bo.id, "new"))
    with statements(services.database) as seen:
        done = await outcomes(services, changes)
    assert [done[5 * n] for n in range(3)] == first
    new = done.pop()
    if what == "refused":
        assert isinstance(new, DialectError)
        assert new.code == "chat_not_found"
        assert len([one for one in seen if one.startswith("INSERT INTO messages")]) == 1
    else:
        assert message_of(new)["seq"] == message_of(first[2])["seq"] + 1
    assert contents(await ann.history(personal)) == [str(number) for number in range(20)]
    kept = [message["content"] for message in (await ann.history(group))["items"] if message["message_type"] == "text"]
    assert kept == ["first"] * 3 + ["new"] * (what == "sent")


async def test_after_a_retry_was_met_others_are_looked_up_before_anything_is_written(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    change = send(chat_id, ann.id, "x", b"c" * 16)
    tries = []
    for _ in range(3):
        with statements(services.database) as seen:
            await services.writer.write(change)
        tries.append(len([one for one in seen if one.startswith("INSERT INTO messages")]))
    assert tries == [1, 1, 0]  # the second was refused by the index
    assert contents(await bo.history(chat_id)) == ["x"]


@pytest.mark.settings(write_timeout_seconds=0.5, db_timeout_seconds=8)
@pytest.mark.parametrize("place", ["before it is taken up", "in the middle of its transaction"])
async def test_a_change_the_database_keeps_waiting_is_answered_and_its_retry_is_one_row(
    client: httpx.AsyncClient, services: Services, settings: Settings, place: str
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    await ann.say(chat_id, "ids are leased")
    change = send(chat_id, ann.id, "late", b"c" * 16)
    rows = f"chats WHERE id = {chat_id}"
    if place != "before it is taken up":
        rows = f"chat_members WHERE chat_id = {chat_id}"  # marks are written last
    started = services.clock.monotonic()
    with held(settings, rows):
        with pytest.raises(Unavailable) as refused:
            await services.writer.write(change)
        assert refused.value.code == "database_unavailable"
        assert 0.4 < services.clock.monotonic() - started < 5
    await services.writer.drained()
    # Whether it was stored after all depends on how far it had come; its sender cannot know.
    stored = contents(await bo.history(chat_id))
    assert stored in (["ids are leased"], ["ids are leased", "late"])
    if settings.uses_mysql and place != "before it is taken up":
        assert len(stored) == 2
    message = message_of(await services.writer.write(change))
    assert contents(await bo.history(chat_id)) == ["ids are leased", "late"]
    assert message_of(await services.writer.write(change)) == message
    assert message["seq"] == 2


@pytest.mark.settings(writer_queue_max=5)
async def test_a_full_queue_refuses_at_once_and_recovers(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    told: list[Done | DialectError] = []
    for number in range(5):
        services.writer.submit(send(chat_id, ann.id, str(number)), told.append)
    with pytest.raises(Unavailable) as refused:
        services.writer.submit(send(chat_id, ann.id, "one too many"), told.append)
    assert (refused.value.code, refused.value.retryable, refused.value.retry_after) == ("overloaded", True, 2)
    await services.writer.drained()
    assert [message_of(one)["content"] for one in told] == ["0", "1", "2", "3", "4"]
    assert (await ann.say(chat_id, "room again"))["seq"] == 6


async def test_a_listener_that_fails_takes_nobody_else_along(
    client: httpx.AsyncClient, services: Services, request: pytest.FixtureRequest
) -> None:
    request.node.add_marker(pytest.mark.logs_errors)
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    told: list[Done | DialectError] = []

    def fail(_outcome: Done | DialectError) -> None:
        raise RuntimeError("the socket is gone in an unexpected way")

    services.writer.submit(send(chat_id, ann.id, "1"), fail)
    services.writer.submit(send(chat_id, ann.id, "2"), told.append)
    await services.writer.drained()
    assert len(told) == 1
    assert contents(await bo.history(chat_id)) == ["1", "2"]


async def test_after_a_stop_nothing_is_taken_and_what_was_taken_is_stored(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    tasks = [asyncio.create_task(services.writer.write(send(chat_id, ann.id, str(i)))) for i in range(20)]
    await asyncio.sleep(0)  # all are submitted
    await services.writer.stop()
    assert [message_of(await task)["seq"] for task in tasks] == list(range(1, 21))
    assert await ann.refused("POST", f"/chats/{chat_id}/messages", {"content": "x"}) == (503, "shutting_down")
    assert len((await bo.history(chat_id))["items"]) == 20
