"""The delivery trace: what the sender of a message, and what the operator, is told of its way; and what nobody is."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from app.core.clock import Clock
from app.core.config import Settings
from app.db.database import Database, database_url
from app.db.repositories import trace as repository
from app.db.repositories.chat_log import MessageRow
from app.db.repositories.push import UnpushedChat
from app.db.repositories.trace import FanoutRow, PhoneRow, PushRow
from app.services.container import Services
from app.services.fanout_marks import FanoutMarks
from app.services.trace_service import FullTrace, RecipientDetail, TraceService
from app.trace import lines_of
from tests.conftest import StartServer
from tests.support.databases import make_settings
from tests.support.firebase import Answer, FakeGoogle, failure, fake_google, unregistered
from tests.support.people import Json, Person, people
from tests.support.secrets import plant
from tests.support.servers import Server, environment, run
from tests.support.statements import statements

TEXT = "a word that no trace repeats"
PATIENCE = 20.0
NAMED = r'"worker_named".*"worker":"([0-9a-f]{12})"'
COMMAND = [sys.executable, "-m", "app", "trace"]


@pytest.fixture
async def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGoogle]:
    """Google, on this machine."""
    plant(TEXT)
    async with fake_google(tmp_path, monkeypatch) as google:
        yield google


@pytest.fixture
def pushing(settings: Settings, google: FakeGoogle) -> Settings:
    """Push is on."""
    return settings.model_copy(update={"firebase_credentials_path": google.credentials_path, "push_grace_seconds": 0.3})


async def launch(start_server: StartServer, settings: Settings) -> Server:
    """A server. It is waited for in a thread: the loop here is Google's."""
    server = start_server(settings, ready=False)
    await asyncio.to_thread(server.wait_until_ready)
    return server


async def with_device(person: Person) -> str:
    """Register a device; its token."""
    token = f"device-{uuid.uuid4().hex}"
    plant(token)
    await person.do("PUT", "/push/device", {"kind": "token", "token": token})
    return token


def query(settings: Settings, statement: str, **values: Any) -> list[Any]:
    """Ask the database beside the server."""
    engine = create_engine(database_url(settings, driver="sync"), poolclass=NullPool)
    with engine.connect() as connection:
        rows = list(connection.execute(text(statement), values))
    engine.dispose()
    return rows


async def trace_of(person: Person, message: Json, **params: Any) -> Json:
    """What the sender is told."""
    found: Json = await person.do("GET", f"/messages/{message['id']}/trace", **params)
    return found


async def until(person: Person, message: Json, predicate: Callable[[Json], bool]) -> Json:
    """The trace, once it is so: marks are written behind, and nothing tells of it."""
    async with asyncio.timeout(PATIENCE):
        while not predicate(found := await trace_of(person, message)):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.05)
    return found


def push_of(found: Json, person: Person) -> str | None:
    """What is said of pushing to somebody."""
    [push] = [one["push"] for one in found["recipients"] if one["user_id"] == person.id]
    return push if push is None else str(push)


async def operator(settings: Settings, message_id: int, *options: str) -> str:
    """What the operator's command prints, beside whatever runs."""
    done = await asyncio.to_thread(
        run,
        [*COMMAND, str(message_id), *options],
        cwd=settings.upload_path.parent,
        env=environment(settings),
        forked=True,
    )
    assert done.returncode == 0, done.stderr
    assert TEXT not in done.stdout
    return done.stdout


# --- the sender -------------------------------------------------------------------------------------------------


async def test_the_sender_sees_when_it_was_committed_who_told_of_it_and_how_each_recipient_stands(
    settings: Settings, start_server: StartServer
) -> None:
    server = start_server(settings)
    worker = server.wait_for_log(NAMED).group(1)
    async with server.client() as client:
        ann, bo, cy = await people(client, 3)
        chat = await ann.group(bo, cy)
        await ann.personal(bo)
        async with await bo.open(server) as socket:
            message = await ann.say(chat, TEXT)
            await socket.wait(type="new_message", chat_id=chat)
            await socket.send(type="message_delivered", chat_id=chat, message_id=message["id"])
            await socket.wait(type="message_delivered", chat_id=chat)
            found = await until(ann, message, lambda found: bool(found["fanned_out"]))
            assert (found["message_id"], found["chat_id"], found["seq"]) == (message["id"], chat, message["seq"])
            assert found["committed_at"] == message["created_at"]
            assert found["fanned_out"]["worker"] == worker
            assert found["fanned_out"]["up_to_seq"] == message["seq"]
            assert found["fanned_out"]["at"] >= found["committed_at"]
            of_bo = {
                "user_id": bo.id,
                "delivered": True,
                "read": False,
                "read_at": None,
                "connected": True,
                "push": "none",
            }
            # There is no personal chat with Cy, so that Cy's presence is nothing to Ann.
            of_cy = {**of_bo, "user_id": cy.id, "delivered": False, "connected": None, "push": None}
            assert found["recipients"] == [of_bo, of_cy]
            assert found["next"] is None
        await bo.read(message)
        found = await until(ann, message, lambda found: not found["recipients"][0]["connected"])
        assert found["recipients"][0] == {
            **of_bo, "read": True, "connected": False, "read_at": found["recipients"][0]["read_at"]
        }  # fmt: skip
        assert found["recipients"][0]["read_at"] >= found["committed_at"]


async def test_who_did_not_send_it_gets_the_answer_of_a_message_that_does_not_exist(client: httpx.AsyncClient) -> None:
    ann, bo, cy, eve = await people(client, 4)
    chat = await ann.group(bo, cy)
    message = await ann.say(chat, TEXT)
    of_cy = await cy.say(chat, TEXT)
    await ann.remove(chat, cy)

    async def ask(person: Person, message_id: int) -> Any:
        answer = await person.request("GET", f"/messages/{message_id}/trace")
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        return answer.status_code, answer.content, headers

    assert (await ask(ann, message["id"]))[0] == 200
    missing = await ask(eve, 2**52)
    assert missing[0] == 404
    assert b'"message_not_found"' in missing[1]
    for person, message_id in (
        (eve, message["id"]),  # a stranger
        (bo, message["id"]),  # somebody who reads it
        (ann, of_cy["id"]),
        (cy, of_cy["id"]),  # who sent it, and was removed since
    ):
        assert await ask(person, message_id) == missing


async def test_across_a_block_marks_stay_and_a_recipient_looks_like_somebody_who_is_away(
    settings: Settings, start_server: StartServer
) -> None:
    server = start_server(settings)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat = await ann.personal(bo)
        message = await ann.say(chat, TEXT)
        away = {
            "user_id": bo.id,
            "delivered": False,
            "read": False,
            "read_at": None,
            "connected": False,
            "push": "none",
        }
        assert (await trace_of(ann, message))["recipients"] == [away]
        async with await bo.open(server) as socket:
            await socket.send(type="message_read", chat_id=chat, message_id=message["id"])
            await socket.wait(type="message_read", chat_id=chat)
            here = (await trace_of(ann, message))["recipients"]
            assert here == [{**away, "delivered": True, "read": True, "connected": True, "read_at": here[0]["read_at"]}]
            for blocker, blocked in ((bo, ann), (ann, bo)):
                await blocker.block(blocked)
                assert (await trace_of(ann, message))["recipients"] == [{**here[0], "connected": False}]
                await blocker.unblock(blocked)


async def test_marks_are_those_that_the_readers_of_a_message_show(client: httpx.AsyncClient) -> None:
    ann, bo, cy, di, eve, flo = await people(client, 6)
    chat = await ann.group(bo, cy, di, eve)
    message = await ann.say(chat, TEXT)
    for reader in (bo, cy, di):
        await reader.read(message)
    await ann.add(chat, flo)  # who came later
    await cy.block(ann)
    await di.leave(chat)
    read_by, delivered_to = await ann.readers(message)
    recipients = (await trace_of(ann, message))["recipients"]
    assert {one["user_id"] for one in recipients} == {bo.id, cy.id, eve.id}
    assert {one["user_id"] for one in recipients if one["read"]} == read_by == {bo.id, cy.id}
    assert {one["user_id"] for one in recipients if one["delivered"]} == delivered_to == {bo.id, cy.id}


async def told_to(sender: Person, *messages: Json) -> dict[str, Any]:
    """All that their sender can ask about messages and about who is in their chats."""
    chats = {message["chat_id"] for message in messages}
    paths = [
        "/chats",
        *(f"/{path}/{chat}" for chat in chats for path in ("chats", "messages/history")),
        *(f"/chats/{chat}/members" for chat in chats),
        *(f"/chats/{message['chat_id']}/messages/{message['id']}/readers" for message in messages),
    ]
    told = {path: await sender.do("GET", path) for path in paths}
    told["events"] = [
        event
        for event in await sender.resume(chats={str(chat): 1 for chat in chats})
        if event["type"] in ("chat_changes", "reset", "synced")
    ]
    told["traces"] = [await trace_of(sender, message) for message in messages]
    for trace in told["traces"]:
        del trace["fanned_out"]  # it moves with what others say
    return told


@pytest.mark.parametrize("by_recipient", [True, False])
async def test_nothing_that_the_sender_can_ask_tells_of_a_block(
    pushing: Settings, start_server: StartServer, google: FakeGoogle, by_recipient: bool
) -> None:
    server = await launch(start_server, pushing)
    async with server.client() as client:
        ann, bo, cy = await people(client, 3)
        blocker, blocked = (bo, ann) if by_recipient else (ann, bo)
        personal, group = await ann.personal(bo), await ann.group(bo, cy)
        await ann.personal(cy)
        for person in (bo, cy):
            await with_device(person)
        first = {chat: await ann.say(chat, TEXT) for chat in (personal, group)}
        for message in first.values():
            await bo.read(message)
        second = {chat: await ann.say(chat, TEXT) for chat in (personal, group)}
        for chat in (personal, group):
            await until(ann, second[chat], lambda found: push_of(found, bo) == "sent")
        await until(ann, second[group], lambda found: push_of(found, cy) == "sent")
        messages = [*first.values(), *second.values()]
        before = await told_to(ann, *messages)
        assert [trace["recipients"][0]["read"] for trace in before["traces"]] == [True, True, False, False]
        assert {event["type"] for event in before["events"]} == {"chat_changes", "synced", "reset"}

        await blocker.block(blocked)
        assert await told_to(ann, *messages) == before
        # In the personal chat marks move unseen; neither then nor after the block has ended does anything show it.
        await bo.read(second[personal])
        assert await told_to(ann, *messages) == before
        await blocker.unblock(blocked)
        assert await told_to(ann, *messages) == before

        # In a group what is sent across a block stands as it does with everybody who is away, then and after the block.
        await blocker.block(blocked)
        async with await ann.open(server) as socket:
            third = await ann.say(group, TEXT)
            await until(ann, third, lambda found: {push_of(found, bo), push_of(found, cy)} == {"sent"})
            for marked in (False, True):
                told = await told_to(ann, third)
                of_bo, of_cy = ({**one, "user_id": 0, "read_at": None} for one in told["traces"][0]["recipients"])
                assert of_bo == of_cy == {
                    "user_id": 0, "delivered": marked, "read": marked, "read_at": None,
                    "connected": False, "push": "sent",
                }  # fmt: skip
                reached = {bo.id, cy.id} if marked else set()
                assert await ann.readers(third) == (reached, reached)
                members = told[f"/chats/{group}/members"]["items"]
                marks = {one["user_id"]: one["read_seq"] >= third["seq"] for one in members}
                assert marks == {ann.id: True, bo.id: marked, cy.id: marked}
                if not marked:
                    for person in (bo, cy):
                        await person.read(third)
                        await socket.wait(type="message_read", chat_id=group, user_id=person.id, seq=third["seq"])
        told = await told_to(ann, third)
        await blocker.unblock(blocked)
        assert await told_to(ann, third) == told


@pytest.mark.settings(receipts_members_max=2)
async def test_in_a_group_whose_log_tells_no_marks_a_block_takes_none_back(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    chat = await ann.group(bo, cy)
    first = await ann.say(chat, TEXT)
    await bo.read(first)
    before = await told_to(ann, first)
    await bo.block(ann)
    assert await told_to(ann, first) == before
    second = await ann.say(chat, TEXT)
    for reader in (bo, cy):
        await reader.read(second)
    recipients = (await trace_of(ann, second))["recipients"]
    assert {one["user_id"]: one["read"] for one in recipients} == {bo.id: True, cy.id: True}
    assert await ann.readers(second) == ({bo.id, cy.id}, {bo.id, cy.id})


async def test_recipients_come_in_pages_and_a_page_takes_as_few_queries_whatever_its_length(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, *others = await people(client, 8)
    message = await ann.say(await ann.group(*others), TEXT)
    counts = []
    for limit in (3, 100):
        with statements(services.database) as seen:
            page = await trace_of(ann, message, limit=limit)
        counts.append(len([statement for statement in seen if statement.lstrip().startswith("SELECT")]))
        assert len(page["recipients"]) == min(limit, 7)
    found, cursor = [], None
    while True:
        page = await trace_of(ann, message, limit=3, **({"cursor": cursor} if cursor else {}))
        found += [one["user_id"] for one in page["recipients"]]
        if (cursor := page["next"]) is None:
            break
    assert found == sorted(other.id for other in others)
    assert counts[0] == counts[1] <= 8, counts
    assert await ann.refused("GET", f"/messages/{message['id']}/trace", limit=101) == (422, "invalid_request")
    assert await ann.refused("GET", f"/messages/{message['id']}/trace", cursor="x") == (422, "invalid_cursor")


async def test_whose_sockets_let_it_out_is_not_told_to_the_sender(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.group(bo)
    message = await ann.say(chat, TEXT)
    await services.fanout.store()
    worker = services.fanout.worker
    now = services.clock.now().replace(tzinfo=None)
    async with services.database.writing() as session:
        await session.execute(text("DELETE FROM fanout_marks"))
        await repository.save_fanout(session, [FanoutRow(chat, worker, "sockets", 1, message["seq"], now)])
    assert (await trace_of(ann, message))["fanned_out"] is None
    # Nor is a run that began after it, or ended before it, or is of a worker that did not commit it, one that holds it.
    seq = message["seq"]
    for name, first, last, told in (
        (worker, seq + 1, 99, False),
        (worker, 1, 1, False),
        ("another", 1, 99, False),
        (worker, seq, 99, True),
    ):
        async with services.database.writing() as session:
            await session.execute(text("DELETE FROM fanout_marks"))
            await repository.save_fanout(session, [FanoutRow(chat, name, "commit", first, last, now)])
        assert bool((await trace_of(ann, message))["fanned_out"]) == told
    # And of a message from before workers had numbers nobody knows.
    async with services.database.writing() as session:
        await session.execute(text("UPDATE messages SET worker = NULL"))
    assert (await trace_of(ann, message))["fanned_out"] is None


async def test_of_workers_that_take_turns_in_a_chat_each_message_keeps_the_one_that_committed_it(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.group(bo)
    names = {ann.id: services.fanout.worker, bo.id: "another"}
    another = FanoutMarks(clock=services.clock, database=services.database, worker="another")
    await another.take_number()
    said: list[tuple[Person, Json]] = []
    for _ in range(3):
        said.append((ann, await ann.say(chat, TEXT)))
        with monkeypatch.context() as patch:
            patch.setattr(services.appender, "worker", lambda: another.number)
            patch.setattr(services.sequencer, "_fanout", another)
            said.append((bo, await bo.say(chat, TEXT)))
        await services.fanout.store()
        await another.store()
    for person, message in said:
        told = (await trace_of(person, message))["fanned_out"]
        assert (told["worker"], told["up_to_seq"]) == (
            names[person.id],
            max(one["seq"] for sender, one in said if sender is person),
        )
    rows = "SELECT worker, part, COUNT(*) FROM fanout_marks WHERE chat_id = :id AND part = 'commit' GROUP BY 1, 2"
    async with services.database.reading() as session:
        marks = [tuple(row) for row in await session.execute(text(rows), {"id": chat})]
    assert sorted(marks) == sorted((name, "commit", 1) for name in names.values())


# --- push -------------------------------------------------------------------------------------------------------


async def test_the_sender_sees_what_firebase_said_and_that_it_needed_none(
    pushing: Settings, start_server: StartServer, google: FakeGoogle
) -> None:
    server = await launch(start_server, pushing)
    async with server.client() as client:
        ann, *others = await people(client, 6)
        gone, down, taken, unwilling, silent = others
        for other in others:
            await ann.personal(other)
        tokens = {other.id: await with_device(other) for other in others}
        chat = await ann.group(*others)
        for token in tokens.values():  # its creation is pushed, too
            await google.wait(token, answered=True)
        await silent.do("PATCH", f"/chats/{chat}/settings", {"muted_until": "9999-12-31T23:59:59.000Z"})
        google.answers[tokens[gone.id]] = [unregistered()]
        google.answers[tokens[down.id]] = [failure(500, "INTERNAL"), failure(500, "INTERNAL"), Answer()]
        google.answers[tokens[unwilling.id]] = [failure(400, "INVALID_ARGUMENT")]
        message = await ann.say(chat, TEXT)
        await until(ann, message, lambda found: push_of(found, down) == "retrying")
        found = await until(ann, message, lambda found: push_of(found, down) == "sent")
        assert push_of(found, taken) == "sent"
        assert push_of(found, gone) == "unregistered"
        assert push_of(found, unwilling) == "refused"
        await until(ann, message, lambda found: push_of(found, silent) == "none")
        # The token is deleted, and everybody still knows why there is none.
        assert not query(pushing, "SELECT 1 FROM push_devices WHERE user_id = :id", id=gone.id)
        later = await ann.say(chat, TEXT)
        found = await until(ann, later, lambda found: push_of(found, taken) == "sent")
        assert push_of(found, gone) == "unregistered"
        # With a new one it goes on.
        await with_device(gone)
        newest = await ann.say(chat, TEXT)
        await until(ann, newest, lambda found: push_of(found, gone) == "sent")


async def test_a_push_that_firebase_never_answers_for_is_given_up(
    pushing: Settings, start_server: StartServer, google: FakeGoogle
) -> None:
    server = await launch(start_server, pushing.model_copy(update={"push_give_up_seconds": 0.1}))
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat = await ann.personal(bo)
        google.answers[await with_device(bo)] = [failure(503, "UNAVAILABLE")]
        message = await ann.say(chat, TEXT)
        await until(ann, message, lambda found: push_of(found, bo) == "given_up")
        full = json.loads(await operator(pushing, message["id"], "--json"))
        [session] = full["recipients"][0]["sessions"]
        assert session["push"] == "given_up"
        assert session["pushed"]["reason"] == "UnavailableError 503"


NOW = datetime(2026, 1, 31, 12, tzinfo=UTC).replace(tzinfo=None)


@pytest.mark.parametrize(
    ("pushed", "device", "cursor", "age", "says"),
    [
        (None, False, 20, 0, "none"),
        (None, True, 20, 0, "none"),
        (None, True, 9, 0, "waiting"),
        (None, True, 9, 25, "none"),  # hours: what is older than a day is not pushed any more
        ((12, 12, "sent"), True, 9, 0, "sent"),
        ((12, 14, "dead"), False, 20, 0, "sent"),  # this one it had
        ((8, 8, "sent"), True, 9, 0, "waiting"),
        ((8, 8, "sent"), True, 20, 0, "none"),
        ((8, 12, "retry"), True, 9, 0, "retrying"),
        ((8, 12, "retry"), True, 20, 0, "none"),  # it was read, or muted, before the next try
        ((8, 12, "given_up"), True, 20, 0, "given_up"),
        ((8, 12, "refused"), True, 20, 0, "refused"),
        ((8, 9, "refused"), True, 20, 0, "none"),
        ((0, 8, "dead"), False, 20, 0, "unregistered"),  # ever since
        ((0, 8, "dead"), True, 20, 0, "none"),  # it has come back
        ((0, 12, "dead"), True, 20, 0, "unregistered"),
    ],
)
def test_what_is_said_of_a_push_follows_from_its_marks(
    pushed: tuple[int, int, str] | None, device: bool, cursor: int, age: int, says: str
) -> None:
    service = TraceService(
        settings=make_settings(),
        clock=cast(Clock, ClockAt(NOW)),
        database=cast(Database, None),
        is_online=lambda _: False,
        push_is_on=True,
    )
    mark = PushRow(7, 1, pushed[0], pushed[1], pushed[2], "", NOW) if pushed else None
    phone = PhoneRow(7, 2, "", "", NOW, NOW, None, None, "token" if device else None, NOW if device else None, mark)
    created = NOW - timedelta(hours=age)
    message = MessageRow(1, 10, 1, 1, 1, b"", "text", "", None, None, None, None, created, None, None)
    assert service._answer(message, UnpushedChat(1, "group", 30, cursor, 2), phone) == says


class ClockAt:
    """It is then."""

    def __init__(self, moment: datetime) -> None:
        self._moment = moment.replace(tzinfo=UTC)

    def now(self) -> datetime:
        return self._moment


async def test_a_server_that_does_not_push_says_so_of_those_who_have_a_device(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    message = await ann.say(await ann.personal(bo), TEXT)
    assert push_of(await trace_of(ann, message), bo) == "none"
    await with_device(bo)
    assert push_of(await trace_of(ann, message), bo) == "off"


# --- the operator -----------------------------------------------------------------------------------------------


async def test_the_operator_sees_mute_devices_and_answers_beside_the_server_and_no_text(
    pushing: Settings, start_server: StartServer, google: FakeGoogle
) -> None:
    server = await launch(start_server, pushing)
    async with server.client() as client:
        ann, bo, cy, di = await people(client, 4)
        token_bo, token_cy = await with_device(bo), await with_device(cy)
        chat = await ann.group(bo, cy, di)
        for token in (token_bo, token_cy):  # its creation is pushed, too
            await google.wait(token, answered=True)
        google.answers[token_bo] = [unregistered()]
        await cy.do("PATCH", f"/chats/{chat}/settings", {"muted_until": "9999-12-31T23:59:59.000Z"})
        message = await ann.say(chat, TEXT)
        await cy.read(message)
        await di.block(ann)
        await di.leave(chat)
        await until(ann, message, lambda found: bool(found["fanned_out"]))

        async def full() -> Json:
            printed: Json = json.loads(await operator(pushing, message["id"], "--json"))
            return printed

        async with asyncio.timeout(PATIENCE):
            while True:  # the server knows its own marks before they are stored, which is all that the command sees
                found = await full()
                if found["pushed_seq"] >= message["seq"] and any(run["covers"] for run in found["fanout"]):
                    break
        assert (found["chat_id"], found["seq"], found["sender_id"]) == (chat, message["seq"], ann.id)
        assert found["sender"] == ann.account.username
        assert found["committed_at"] == message["created_at"]
        assert found["committed_by"] == server.wait_for_log(NAMED).group(1)
        assert {run["part"] for run in found["fanout"] if run["covers"]} == {"commit"}  # nobody had a socket
        of_bo, of_cy, of_di = found["recipients"]
        assert (of_bo["username"], of_bo["muted"], of_bo["state"]) == (bo.account.username, False, "member")
        [session] = of_bo["sessions"]
        assert (session["device"], session["push"]) == (None, "unregistered")
        assert session["pushed"]["answer"] == "dead"
        assert session["pushed"]["reason"] == "UnregisteredError"
        assert session["pushed"]["tried_seq"] == message["seq"]
        assert (of_cy["muted"], of_cy["muted_until"]) == (True, "9999-12-31T23:59:59.000Z")
        assert of_cy["read_seq"] == of_cy["delivered_seq"] == message["seq"]
        assert (of_cy["sessions"][0]["device"], of_cy["sessions"][0]["push"]) == ("token", "none")
        assert (of_di["state"], of_di["left_seq"]) == ("left", message["seq"] + 1)
        assert of_di["blocks_sender"]
        assert not of_di["blocked_by_sender"]

        table = await operator(pushing, message["id"])
        assert f"Message {message['id']}: seq {message['seq']} of chat {chat} (group)" in table
        for word in (
            bo.account.username,
            "until 9999-12-31",
            "blocks sender",
            "dead (UnregisteredError)",
            found["committed_by"],
        ):
            assert word in table, table
        assert token_bo not in table
        assert token_cy not in table


async def test_the_command_says_in_a_sentence_what_is_wrong(settings: Settings, tmp_path: Path) -> None:
    env = environment(settings)
    none = run([*COMMAND, "42"], cwd=tmp_path, env=env)
    assert (none.returncode, none.stdout, none.stderr) == (1, "", "There is no such message. (message 42)\n")
    for wrong in ("0", "x", "-1", str(2**53)):
        refused = run([*COMMAND, "--", wrong], cwd=tmp_path, env=env, forked=True)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "an id is a number" in refused.stderr
    if not settings.uses_mysql:
        missing = tmp_path / "missing.db"
        done = run([*COMMAND, "42"], cwd=tmp_path, env={**env, "SQLITE_PATH": str(missing)}, forked=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"There is no database {missing}; run: python -m app migrate\n"
        assert not missing.exists()


def test_a_device_named_in_control_characters_does_not_move_the_cursor_of_a_terminal() -> None:
    session: Any = {
        "session_id": 7, "device_name": "Pixel\x1b[2J\u202e", "platform": "", "state": "alive", "last_seen_at": "-",
        "device": None, "registered_at": None, "push": "none", "pushed": None,
    }  # fmt: skip
    recipient: RecipientDetail = {
        "user_id": 2, "username": "jane", "state": "member", "joined_seq": 1, "left_seq": None, "visible": True,
        "delivered_seq": 0, "read_seq": 0, "read_at": None, "muted": False, "muted_until": None, "blocks_sender": False,
        "blocked_by_sender": False, "last_seen_at": None, "sessions": [session],
    }  # fmt: skip
    found: FullTrace = {
        "message_id": 1, "chat_id": 1, "chat_type": "group", "seq": 1, "message_type": "text", "sender_id": 1,
        "sender": "ann", "committed_at": "-", "committed_by": None, "deleted_at": None, "last_seq": 1, "pushed_seq": 0,
        "push_is_on": False, "fanout": [], "recipients": [recipient],
    }  # fmt: skip
    assert any("Pixel?[2J?" in line for line in lines_of(found))
    assert all(line.isprintable() for line in lines_of(found))


# --- the truth --------------------------------------------------------------------------------------------------


async def test_after_a_kill_the_trace_claims_nothing_that_did_not_happen(
    pushing: Settings, start_server: StartServer, google: FakeGoogle
) -> None:
    server = await launch(start_server, pushing)
    worker = server.wait_for_log(NAMED).group(1)
    async with server.client() as client:
        ann, bo, cy = await people(client, 3)
        chat = await ann.personal(bo)
        await with_device(cy)
        hangs = asyncio.Event()
        token = await with_device(bo)
        google.answers[token] = [Answer(), Answer(when=hangs)]
        first = await ann.say(chat, TEXT)
        await until(ann, first, lambda found: bool(found["fanned_out"]) and push_of(found, bo) == "sent")
        second = await ann.say(chat, TEXT)
        await google.wait(token, 2)  # it is with Google, who has not answered
        # Once what Firebase says to Cy's push is stored, all that was noted before it is.
        beside = await ann.say(await ann.personal(cy), TEXT)
        await until(ann, beside, lambda found: push_of(found, cy) == "sent")
        last = await ann.say(chat, TEXT)
    server.signal(signal.SIGKILL)
    await asyncio.to_thread(server.wait)
    rows = query(pushing, "SELECT first_seq, last_seq FROM fanout_marks WHERE chat_id = :id", id=chat)
    assert rows
    assert all(first["seq"] <= mark.last_seq <= last["seq"] for mark in rows)
    [(sent_seq, tried_seq, answer)] = query(
        pushing, "SELECT sent_seq, tried_seq, answer FROM push_marks WHERE chat_id = :id", id=chat
    )
    assert (sent_seq, tried_seq, answer) == (first["seq"], first["seq"], "sent")
    full = json.loads(await operator(pushing, second["id"], "--json"))
    assert full["recipients"][0]["sessions"][0]["push"] == "waiting"
    hangs.set()
    # The next process has another name, pushes again what nobody has answered for, and tells of what it told.
    other = await launch(start_server, pushing)
    async with other.client() as client:
        ann = Person(client, ann.account)
        await until(ann, last, lambda found: push_of(found, bo) == "sent")
        newest = await ann.say(chat, TEXT)
        found = await until(ann, newest, lambda found: bool(found["fanned_out"]))
        assert found["fanned_out"]["worker"] != worker
        assert (await trace_of(ann, first))["fanned_out"]["worker"] == worker
        of_last = (await trace_of(ann, last))["fanned_out"]
        assert of_last is None or of_last["worker"] == worker


async def test_a_stop_stores_what_was_noted_last(settings: Settings, start_server: StartServer) -> None:
    server = start_server(settings)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat = await ann.personal(bo)
        seqs = [(await ann.say(chat, TEXT))["seq"] for _ in range(5)]
    server.stop()
    [(first_seq, last_seq)] = query(
        settings, "SELECT first_seq, last_seq FROM fanout_marks WHERE chat_id = :id", id=chat
    )
    assert (first_seq, last_seq) == (seqs[0], seqs[-1])


async def test_a_session_that_is_pruned_takes_its_marks_along(
    client: httpx.AsyncClient, app: FastAPI, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    async with services.database.reading() as session:
        [phone] = (await repository.list_phones(session, chat, [bo.id]))[bo.id]
    now = services.clock.now().replace(tzinfo=None)
    async with services.database.writing() as session:
        await repository.save_pushed(session, [PushRow(phone.session_id, chat, 1, 1, "sent", "", now)])
        await session.execute(
            text("UPDATE sessions SET expires_at = :at WHERE id = :id"),
            {"at": (now - timedelta(days=1)).isoformat(" ", "microseconds"), "id": phone.session_id},
        )
    form = {"username": bo.account.phone, "password": bo.account.password}
    tokens = (await client.post("/api/v1/auth/token", data=form)).raise_for_status().json()
    plant(tokens["access_token"], tokens["refresh_token"])
    async with services.database.reading() as session:
        assert not list(await session.execute(text("SELECT 1 FROM push_marks")))
        assert len((await repository.list_phones(session, chat, [bo.id]))[bo.id]) == 1
