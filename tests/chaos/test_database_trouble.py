"""The database freezes, vanishes, loses answers or is locked: everything is answered in time, nothing is acknowledged
wrongly, and nobody needs to restart anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import httpx
import pymysql
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.config import Settings
from app.core.errors import Unavailable
from app.db.database import Database
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.world import (
    ANSWER_SECONDS,
    RECOVERY_SECONDS,
    SLACK,
    Answer,
    Event,
    World,
    ask_for_everything,
    launched,
    populated,
    recovery,
    say_until_stored,
    timed,
)
from tests.support.accounts import Account, register
from tests.support.contract import PROBLEM, document, operation_of
from tests.support.proxy import FaultProxy, Verdict
from tests.support.socket_client import SocketClient

PROMISE = "Trouble with the database is no loss and no hang"


@pytest.fixture
async def proxy(mysql_settings: Settings) -> AsyncIterator[FaultProxy]:
    """What stands between the server and MySQL."""
    async with FaultProxy(mysql_settings.db_host or "", mysql_settings.db_port) as proxy:
        yield proxy


@pytest.fixture
async def world(mysql_settings: Settings, proxy: FaultProxy, launch: Launch) -> AsyncIterator[World]:
    """People on a server that reaches MySQL through the proxy."""
    behind = mysql_settings.model_copy(update={"db_host": "127.0.0.1", "db_port": proxy.port})
    async with populated(await launched(launch, behind)) as world:
        yield world


def _connect(settings: Settings) -> pymysql.Connection[Any]:
    """Another program that works on the same database."""
    return pymysql.connect(
        host=settings.db_host,
        port=settings.db_port,
        user=settings.db_user,
        password=settings.db_password.get_secret_value(),
        database=settings.db_name,
    )


def _can_wait(world: World, what: str) -> bool:
    """Whether an operation is one of those that stand in line, and are refused when the line does not move."""
    method, _, path = what.partition(" ")
    found = operation_of(httpx.Request(method, world.server.url + path))
    if found is None:
        return False
    template, method = found
    unavailable = document()["paths"][template][method]["responses"]["503"]["content"][PROBLEM]
    reads = method == "get" or template.endswith("/resume")
    return reads and "overloaded" in unavailable["examples"]


def _rows(settings: Settings, chat_id: int) -> dict[str, list[tuple[int, int]]]:
    """Client id to the (id, seq) it is stored under, asked of MySQL itself."""
    with _connect(settings) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT client_id, id, seq FROM messages WHERE chat_id = %s", (chat_id,))
        rows: dict[str, list[tuple[int, int]]] = {}
        for client_id, message_id, seq in cursor.fetchall():
            rows.setdefault(str(uuid.UUID(bytes=client_id)), []).append((message_id, seq))
        return rows


# --- MySQL ------------------------------------------------------------------------------------------------------


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_a_frozen_database_is_answered_for_in_time_and_serves_again_without_a_restart(
    world: World, proxy: FaultProxy, mysql_settings: Settings, report: SceneReport
) -> None:
    async with world.server.client() as client:
        openapi = (await client.get("/openapi.json")).json()
    named = str(uuid.uuid4())
    proxy.freeze()
    begun = time.monotonic()
    answers: list[Answer] = []
    refused: Event = {}
    while time.monotonic() - begun < 6:
        refused = await world.sockets[0].say(world.chat_id, "again and again", client_id=named)
        answers += await ask_for_everything(world, openapi)
    frozen = time.monotonic() - begun
    proxy.thaw()
    recovered = await recovery(world)
    report.tell("frozen for", frozen, "s")
    report.tell("requests meanwhile", len(answers))
    report.at_most("slowest answer", max(a.seconds for a in answers), ANSWER_SECONDS + SLACK, "s")
    assert [answer for answer in answers if answer.late or not answer.status] == []
    assert [answer for answer in answers if answer.status >= 500 and answer.status != 503] == []
    assert refused["code"] == "database_unavailable"
    assert refused["retryable"] is True
    sends = [answer for answer in answers if answer.what.startswith("send")]
    assert {answer.code for answer in sends} == {"database_unavailable"}
    reads = [answer for answer in answers if answer.what.startswith("get /api/v1/chats")]
    # Those that wait for a turn behind a read that is not answered are refused before it is.
    assert {answer.status for answer in reads} == {503}
    codes = {answer.code for answer in reads}
    assert "database_unavailable" in codes
    assert codes <= {"database_unavailable", "overloaded"}
    shed = {answer.what for answer in answers if answer.code == "overloaded"}
    assert [what for what in shed if not _can_wait(world, what)] == []
    report.at_most("recovered in", recovered, RECOVERY_SECONDS, "s")
    # What was refused is stored once by its retry, and the sockets that were open all the time hear of it.
    ack = await say_until_stored(world, named)
    assert _rows(mysql_settings, world.chat_id)[named] == [(ack["message_id"], ack["seq"])]
    heard = await world.sockets[1].wait(lambda e: named in _heard(e))
    assert _heard(heard)[named] == ack["message_id"]


def _heard(event: Event) -> dict[str, int]:
    """Client ids and ids of the messages that an event brings: one told of at once, or all of a chat that went on."""
    told = [event["message"]] if event["type"] == "new_message" else event.get("messages", [])
    return {message["client_id"]: message["id"] for message in told}


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_a_crowd_that_connects_while_the_database_is_frozen_is_refused_in_time_to_the_last(
    world: World, proxy: FaultProxy, report: SceneReport
) -> None:
    async with world.server.client() as client:
        people = [await register(client) for _ in range(12)]
        for person in people:  # so that their tokens need no database
            assert (await client.get("/api/v1/users/me", headers=person.headers)).status_code == 200

    async def knock(person: Account) -> tuple[int, str, str]:
        with pytest.raises(AssertionError, match="closed with 1012"):
            await SocketClient.open(world.server.ws_url, person.access_token)
        return 503, "1012", ""

    proxy.freeze()
    answers = await asyncio.gather(*(timed("a new socket", partial(knock, person)) for person in people * 5))
    proxy.thaw()
    report.tell("new sockets", len(answers))
    report.at_most("the last one refused after", max(a.seconds for a in answers), ANSWER_SECONDS + SLACK, "s")
    async with asyncio.timeout(RECOVERY_SECONDS):
        while True:
            with contextlib.suppress(AssertionError):
                await (await SocketClient.open(world.server.ws_url, people[0].access_token)).close()
                break


@pytest.mark.chaos(PROMISE)
@pytest.mark.settings(db_timeout_seconds=0.5)
async def test_no_transaction_outlives_its_deadline_when_many_give_up_at_once(
    mysql_settings: Settings, proxy: FaultProxy, rng: random.Random, report: SceneReport
) -> None:
    behind = mysql_settings.model_copy(update={"db_host": "127.0.0.1", "db_port": proxy.port})
    database = Database(behind)
    await database.start()

    async def ask(begin: Callable[[], AbstractAsyncContextManager[AsyncSession]]) -> float:
        begun = time.monotonic()
        with contextlib.suppress(Unavailable):
            async with begin() as session:
                await session.execute(text("SELECT 1"))
        return time.monotonic() - begun

    late: list[float] = []
    asked = 0
    for _ in range(12):
        await asyncio.gather(*(ask(begin) for begin in (database.reading, database.writing) for _ in range(3)))
        proxy.freeze()
        asking: list[asyncio.Task[float]] = []
        for _ in range(6):
            for begin in (database.reading, database.writing):
                asking += [asyncio.create_task(ask(begin)) for _ in range(15)]
            await asyncio.sleep(rng.uniform(0, 0.3))  # so that some give up just when others begin
        asked += len(asking)
        _, hanging = await asyncio.wait(asking, timeout=ANSWER_SECONDS)
        proxy.thaw()
        late += [seconds for seconds in await asyncio.gather(*asking) if seconds > 0.5 + ANSWER_SECONDS - 4]
        assert not hanging
    await database.close()
    report.tell("transactions", asked)
    report.exactly("that outlived their deadline", len(late), 0)


@pytest.mark.chaos(PROMISE)
@pytest.mark.parametrize("verdict", ["reset", "reset after the answer"])
async def test_a_connection_lost_during_commit_is_never_acknowledged_wrongly_and_its_retry_makes_one_row(
    world: World, proxy: FaultProxy, mysql_settings: Settings, verdict: Verdict, report: SceneReport
) -> None:
    proxy.on_commit = lambda: verdict
    client_id = str(uuid.uuid4())
    begun = time.monotonic()
    answer = await world.sockets[0].say(world.chat_id, "again and again", client_id=client_id)
    assert time.monotonic() - begun <= ANSWER_SECONDS + SLACK
    first = _rows(mysql_settings, world.chat_id).get(client_id, [])
    assert proxy.commits > 0
    if verdict == "reset":
        assert first == []
        assert answer["type"] == "error"
    else:
        assert len(first) == 1
        # A server that found its own row again may say so; anything else must be told that it is not known.
        if answer["type"] == "ack":
            assert (answer["message_id"], answer["seq"]) == first[0]
    if answer["type"] == "error":
        assert (answer["code"], answer["retryable"]) == ("database_unavailable", True)
    # A request that is one transaction of its own: it committed or not, the caller cannot know, and is not told 201.
    async with world.server.client() as client:
        begun = time.monotonic()
        group = await client.post("/api/v1/chats/group", json={"title": "Lost"}, headers=world.ann.headers)
        assert (group.status_code, group.json()["code"]) == (503, "database_unavailable")
        assert time.monotonic() - begun <= ANSWER_SECONDS + SLACK
    proxy.on_commit = None
    begun = time.monotonic()
    ack = await say_until_stored(world, client_id)
    assert time.monotonic() - begun <= RECOVERY_SECONDS
    assert _rows(mysql_settings, world.chat_id)[client_id] == [(ack["message_id"], ack["seq"])]
    assert first in ([], [(ack["message_id"], ack["seq"])])
    report.exactly("rows after the retry", len(_rows(mysql_settings, world.chat_id)[client_id]), 1)


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_sends_through_many_lost_commits_are_each_stored_once_in_one_order(
    world: World, proxy: FaultProxy, mysql_settings: Settings, rng: random.Random, report: SceneReport
) -> None:
    verdicts: list[Verdict] = ["pass", "pass", "pass", "reset", "reset after the answer"]
    proxy.on_commit = lambda: rng.choice(verdicts)
    acks: dict[str, tuple[int, int]] = {}

    async def talk(socket: SocketClient, count: int) -> None:
        for number in range(count):
            client_id = str(uuid.uuid4())
            while client_id not in acks:
                answer = await socket.say(world.chat_id, f"message {number}", client_id=client_id)
                if answer["type"] == "ack":
                    acks[client_id] = (answer["message_id"], answer["seq"])
                else:
                    assert answer["retryable"], answer

    await asyncio.gather(*(talk(socket, 40) for socket in world.sockets for _ in range(2)))
    proxy.on_commit = None
    rows = _rows(mysql_settings, world.chat_id)
    assert {client_id: rows[client_id] for client_id in acks} == {key: [value] for key, value in acks.items()}
    assert len(rows) == len(acks) + 1
    report.tell("commits", proxy.commits)
    report.exactly("rows", len(rows) - 1, len(acks))
    assert sorted(seq for places in rows.values() for _, seq in places) == list(range(1, len(rows) + 1))
    # Both sides heard each message, in order, though many announcements followed a commit nobody heard of.
    for socket in world.sockets:
        await socket.wait(lambda e: _highest(e) == len(rows))
        seqs = [message["seq"] for event in socket.seen for message in _messages(event)]
        assert sorted(set(seqs)) == list(range(2, len(rows) + 1))
        assert seqs == sorted(seqs)


def _messages(event: Event) -> list[Event]:
    if event["type"] == "new_message":
        return [event["message"]]
    return event["messages"] if event["type"] == "chat_changes" else []


def _highest(event: Event) -> int:
    return max((message["seq"] for message in _messages(event)), default=0)


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_a_server_whose_connections_are_all_reset_recovers_by_itself(
    world: World, proxy: FaultProxy, mysql_settings: Settings, report: SceneReport
) -> None:
    client_id = str(uuid.uuid4())
    proxy.refusing = True
    proxy.reset()
    begun = time.monotonic()
    answer = await world.sockets[0].say(world.chat_id, "again and again", client_id=client_id)
    assert answer["code"] == "database_unavailable"
    assert time.monotonic() - begun <= ANSWER_SECONDS + SLACK
    async with world.server.client() as client:
        for path in ("/api/v1/chats", f"/api/v1/messages/history/{world.chat_id}", "/health/ready"):
            begun = time.monotonic()
            response = await client.get(path, headers=world.ann.headers)
            assert response.status_code == 503, (path, response.text)
            assert time.monotonic() - begun <= ANSWER_SECONDS + SLACK
    proxy.refusing = False
    report.at_most("recovered from a reset in", await recovery(world), RECOVERY_SECONDS, "s")
    proxy.cut()  # and once more, politely, with nobody kept waiting outside
    report.at_most("recovered from a goodbye in", await recovery(world), RECOVERY_SECONDS, "s")
    ack = await say_until_stored(world, client_id)
    assert _rows(mysql_settings, world.chat_id)[client_id] == [(ack["message_id"], ack["seq"])]


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_an_answer_of_the_database_cut_at_any_byte_costs_no_message_and_doubles_none(
    world: World, proxy: FaultProxy, mysql_settings: Settings, rng: random.Random, report: SceneReport
) -> None:
    acks: dict[str, Event] = {}
    for _ in range(40):
        proxy.bytes_left = rng.randrange(1, 400)
        client_id = str(uuid.uuid4())
        acks[client_id] = await say_until_stored(world, client_id)
    assert proxy.cuts_after_bytes > 10
    proxy.bytes_left = None
    rows = _rows(mysql_settings, world.chat_id)
    for client_id, ack in acks.items():
        assert rows[client_id] == [(ack["message_id"], ack["seq"])]
    report.tell("answers cut", proxy.cuts_after_bytes)
    report.exactly("rows", len(rows) - 1, len(acks))


@pytest.mark.chaos(PROMISE)
async def test_a_distant_database_makes_answers_late_not_wrong(
    world: World, proxy: FaultProxy, report: SceneReport
) -> None:
    proxy.delay_seconds = 0.05
    begun = time.monotonic()
    ack = await world.sockets[0].say(world.chat_id, "from far away")
    assert ack["type"] == "ack"
    took = time.monotonic() - begun
    assert took > 0.1
    report.at_most("answered in", took, ANSWER_SECONDS, "s")


# --- locks ------------------------------------------------------------------------------------------------------


async def _until_somebody_waits(settings: Settings) -> None:
    """Return once a transaction of this database waits for a lock of another."""
    waiting = """SELECT COUNT(*) FROM performance_schema.data_lock_waits w JOIN performance_schema.data_locks l
        ON l.engine_lock_id = w.requesting_engine_lock_id WHERE l.object_schema = DATABASE()"""

    def look() -> int:
        with _connect(settings) as connection, connection.cursor() as cursor:
            cursor.execute(waiting)
            [count] = cursor.fetchone() or (0,)
            return int(count)

    async with asyncio.timeout(ANSWER_SECONDS):
        while not await asyncio.to_thread(look):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # a look at the database from outside; it tells nobody


@pytest.mark.timeout(120)
@pytest.mark.chaos(PROMISE)
async def test_a_row_that_another_program_keeps_locked_is_refused_in_time_and_free_again_works(
    mysql_settings: Settings, launch: Launch, report: SceneReport
) -> None:
    async with populated(await launched(launch, mysql_settings)) as world, world.server.client() as client:
        named = str(uuid.uuid4())
        elsewhere = await client.post("/api/v1/chats/group", json={"title": "Elsewhere"}, headers=world.bob.headers)
        with _connect(mysql_settings) as holder, holder.cursor() as cursor:
            for chat_id in (world.chat_id, world.group_id):
                cursor.execute("SELECT id FROM chats WHERE id = %s FOR UPDATE", (chat_id,))

            async def send() -> tuple[int, str, str]:
                answer = await world.sockets[0].say(world.chat_id, "again and again", client_id=named)
                return (200, "ack", "") if answer["type"] == "ack" else (503, answer["code"], answer["retry_after"])

            async def rename() -> tuple[int, str, str]:
                path = f"/api/v1/chats/{world.group_id}"
                answer = await client.patch(path, json={"title": "Renamed"}, headers=world.ann.headers)
                return answer.status_code, answer.json().get("code", ""), answer.headers.get("retry-after", "")

            asked = [asyncio.create_task(timed("send", send)), asyncio.create_task(timed("rename", rename))]
            free = []
            while not all(task.done() for task in asked):
                begun = time.monotonic()
                other = await world.sockets[1].say(elsewhere.json()["id"], "nobody holds this one")
                assert other["type"] == "ack"
                free.append(time.monotonic() - begun)
            answers = await asyncio.gather(*asked)
            holder.rollback()
        ack = await say_until_stored(world, named)
        answer = await client.patch(
            f"/api/v1/chats/{world.group_id}", json={"title": "Renamed"}, headers=world.ann.headers
        )
        assert answer.status_code == 200
    assert [(answer.status, bool(answer.retry_after)) for answer in answers] == [(503, True)] * 2
    assert answers[1].code == "busy"  # 1205
    report.at_most("refused after", max(answer.seconds for answer in answers), ANSWER_SECONDS + SLACK, "s")
    report.tell("sends to other chats meanwhile", len(free))
    report.at_most("slowest of them", max(free), 1, "s")
    report.exactly("rows after the retry", len(_rows(mysql_settings, world.chat_id)[named]), 1)
    assert _rows(mysql_settings, world.chat_id)[named] == [(ack["message_id"], ack["seq"])]


@pytest.mark.timeout(120)
@pytest.mark.chaos(PROMISE)
async def test_who_loses_a_deadlock_is_told_to_try_again_or_has_it_done_by_the_server(
    mysql_settings: Settings, launch: Launch, report: SceneReport
) -> None:
    async with populated(await launched(launch, mysql_settings)) as world, world.server.client() as client:

        async def edit() -> str:
            socket, ref = world.sockets[0], uuid.uuid4().hex
            await socket.send(
                type="edit_message", chat_id=world.chat_id, message_id=world.message_id, content="edited", ref=ref
            )
            return str((await socket.wait(ref=ref))["type"])

        async def remove() -> str:
            path = f"/api/v1/chats/{world.group_id}/members/{world.bob.id}"
            answer = await client.delete(path, headers=world.ann.headers)
            return "done" if answer.status_code == 204 else str(answer.json()["code"])

        outcomes: list[str] = []
        for chat_id, table, row, act in (
            (world.chat_id, "messages", world.message_id, edit),
            (world.group_id, "users", world.bob.id, remove),
        ):
            with _connect(mysql_settings) as opponent, opponent.cursor() as cursor:
                # MySQL ends the transaction that has changed less: never this one.
                cursor.execute("CREATE TEMPORARY TABLE heavy (n INT) ENGINE=InnoDB")
                cursor.executemany("INSERT INTO heavy VALUES (%s)", [(n,) for n in range(2000)])
                cursor.execute(f"SELECT id FROM {table} WHERE id = %s FOR UPDATE", (row,))
                acting = asyncio.create_task(act())
                await _until_somebody_waits(mysql_settings)
                await asyncio.to_thread(cursor.execute, "SELECT id FROM chats WHERE id = %s FOR UPDATE", (chat_id,))
                opponent.rollback()
            outcomes.append(await acting)
        # The writer tries again by itself; a unit of work leaves that to the client.
        assert outcomes == ["ack", "busy"]
        assert await remove() == "done"
        history = await client.get(f"/api/v1/messages/history/{world.chat_id}", headers=world.bob.headers)
        assert [message["content"] for message in history.json()["items"]] == ["edited"]
    lost = len(re.findall(r"\b1213\b", world.server.log))
    report.at_least("deadlocks lost", lost, 2)


# --- SQLite -----------------------------------------------------------------------------------------------------

HOLD_THE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [3, 6])
async def test_a_sqlite_file_locked_by_another_process_delays_or_refuses_sends_and_stops_nothing(
    sqlite_settings: Settings, launch: Launch, seconds: int, report: SceneReport
) -> None:
    async with populated(await launched(launch, sqlite_settings)) as world:
        await _hold_and_ask(world, sqlite_settings, seconds, report)


async def _hold_and_ask(world: World, sqlite_settings: Settings, seconds: int, report: SceneReport) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HOLD_THE_LOCK,
        str(sqlite_settings.sqlite_path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    await holder.stdout.readline()
    locked = time.monotonic()
    named = [str(uuid.uuid4()) for _ in range(10)]

    async def say(number: int, client_id: str) -> Answer:
        async def ask() -> tuple[int, str, str]:
            answer = await world.sockets[number % 2].say(world.chat_id, "at a lock", client_id=client_id)
            return (200, "ack", "") if answer["type"] == "ack" else (503, answer["code"], "")

        return await timed(f"send {number}", ask)

    async def ask(method: str, path: str, body: Event | None = None) -> Answer:
        async def request() -> tuple[int, str, str]:
            answer = await client.request(method, path, json=body, headers=world.ann.headers)
            return answer.status_code, answer.json().get("code", "") if answer.content else "", ""

        return await timed(f"{method} {path}", request)

    async with httpx.AsyncClient(base_url=world.server.url, timeout=ANSWER_SECONDS * 4) as client:
        sends = [asyncio.create_task(say(number, client_id)) for number, client_id in enumerate(named)]
        writes = [
            asyncio.create_task(ask("PATCH", "/api/v1/users/me", {"bio": "locked"})),
            asyncio.create_task(ask("POST", "/api/v1/chats/group", {"title": "Locked"})),
            asyncio.create_task(ask("POST", f"/api/v1/chats/{world.chat_id}/messages", {"content": "locked"})),
        ]
        reads = [await ask("GET", path) for path in ("/api/v1/chats", f"/api/v1/messages/history/{world.chat_id}")]
        await asyncio.sleep(max(0.0, locked + seconds - time.monotonic()))  # how long the lock is held is what we test
        holder.stdin.write(b"\n")
        released = time.monotonic()
        answers = [*await asyncio.gather(*sends), *await asyncio.gather(*writes)]
    await holder.wait()
    recovered = await recovery(world)
    report.tell("locked for", released - locked, "s")
    report.at_most("slowest answer", max(a.seconds for a in answers), ANSWER_SECONDS + SLACK, "s")
    allowed = {(200, "ack"), (200, ""), (201, ""), (503, "database_unavailable"), (503, "busy")}
    assert {(answer.status, answer.code) for answer in answers} <= allowed
    assert [(answer.status, answer.late) for answer in reads] == [(200, False), (200, False)]
    report.at_most("slowest read", max(answer.seconds for answer in reads), 1, "s")  # waits for nobody's lock
    if seconds == 3:
        assert {answer.code for answer in answers[: len(sends)]} == {"ack"}
    else:
        assert {answer.status for answer in answers[: len(sends)]} == {503}
    report.at_most("recovered in", recovered, RECOVERY_SECONDS, "s")
    acks = [await say_until_stored(world, client_id, number % 2) for number, client_id in enumerate(named)]
    assert len({ack["message_id"] for ack in acks}) == len(named)
    async with world.server.client() as client:
        page = (
            await client.get(f"/api/v1/messages/history/{world.chat_id}?limit=100", headers=world.bob.headers)
        ).json()
    stored = [message["client_id"] for message in page["items"]]
    assert sorted(set(stored) & set(named)) == sorted(named)
    assert len(stored) == len(set(stored))
