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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pymysql
import pytest
import websockets
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.config import Settings
from app.core.errors import Unavailable
from app.db.database import Database
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.support.accounts import Account, register
from tests.support.proxy import FaultProxy, Verdict
from tests.support.servers import Server, free_port
from tests.support.socket_client import SocketClient

Event = dict[str, Any]
PROMISE = "Trouble with the database is no loss and no hang"
ANSWER_SECONDS = 5.0
"""Within so long everything is answered, whatever the database does."""
RECOVERY_SECONDS = 5.0
"""And so long after the database is back, everything works."""
SLACK = 0.5
"""What this process itself may take to notice an answer on a busy machine."""

# Paths that are served without the database.
NO_DATABASE = {"/", "/health/live", "/openapi.json", "/docs", "/redoc"}


@dataclass
class World:
    """Two people, their chat, a group, and a message in each."""

    server: Server
    ann: Account
    bob: Account
    chat_id: int
    group_id: int
    message_id: int
    sockets: list[SocketClient] = field(default_factory=list)


@contextlib.asynccontextmanager
async def _populated(server: Server) -> AsyncIterator[World]:
    async with server.client() as client:
        ann, bob = await register(client), await register(client)
        chat = (await client.post("/api/v1/chats/personal", json={"user_id": bob.id}, headers=ann.headers)).json()
        body = {"title": "Both", "member_ids": [bob.id]}
        group = (await client.post("/api/v1/chats/group", json=body, headers=ann.headers)).json()
        path = f"/api/v1/chats/{chat['id']}/messages"
        sent = (await client.post(path, json={"content": "before the trouble"}, headers=ann.headers)).json()
    world = World(server, ann, bob, chat["id"], group["id"], sent["message"]["id"])
    async with contextlib.AsyncExitStack() as stack:
        for account in (ann, bob):
            socket = await SocketClient.open(server.ws_url, account.access_token)
            world.sockets.append(await stack.enter_async_context(socket))
        yield world


async def _launch(launch: Launch, settings: Settings) -> Server:
    server = launch(settings, free_port())
    await asyncio.to_thread(server.wait_until_ready)
    return server


@pytest.fixture
async def proxy(mysql_settings: Settings) -> AsyncIterator[FaultProxy]:
    """What stands between the server and MySQL."""
    async with FaultProxy(mysql_settings.db_host or "", mysql_settings.db_port) as proxy:
        yield proxy


@pytest.fixture
async def world(mysql_settings: Settings, proxy: FaultProxy, launch: Launch) -> AsyncIterator[World]:
    """People on a server that reaches MySQL through the proxy."""
    behind = mysql_settings.model_copy(update={"db_host": "127.0.0.1", "db_port": proxy.port})
    async with _populated(await _launch(launch, behind)) as world:
        yield world


# --- asking for everything --------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came of a request, and how soon."""

    what: str
    seconds: float
    status: int
    code: str

    @property
    def late(self) -> bool:
        return self.seconds > ANSWER_SECONDS + SLACK


async def _timed(what: str, asking: Callable[[], Awaitable[tuple[int, str]]]) -> Answer:
    begun = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_SECONDS * 3):
            status, code = await asking()
    except TimeoutError:
        status, code = 0, "never answered"
    return Answer(what, time.monotonic() - begun, status, code)


def _every_request(world: World, openapi: Event) -> list[tuple[str, str, Event | None]]:
    """Each route of the API with a body that would do; a route this does not know yet gets an empty one."""
    values = {
        "chat_id": world.chat_id,
        "message_id": world.message_id,
        "user_id": world.bob.id,
        "session_id": 1,
        "identifier": world.bob.username,
    }
    bodies: dict[str, Event] = {
        "/chats/personal": {"user_id": world.bob.id},
        "/chats/group": {"title": "New"},
        "/chats/{chat_id}/messages": {"content": "in trouble"},
        "/chats/{chat_id}/messages/{message_id}": {"content": "edited"},
        "/chats/{chat_id}/members": {"user_ids": [world.bob.id]},
        "/chats/{chat_id}/members/{user_id}/role": {"role": "admin"},
        "/chats/{chat_id}": {"title": "Renamed"},
        "/users/me": {"bio": "trouble"},
        "/messages/resume": {},
        "/auth/register": {"phone": "+79990000000", "password": "Orchid-lantern-77!", "username": "trouble_77"},
        "/auth/refresh": {"refresh_token": "x" * 43},
        "/push/device": {"kind": "token", "token": "trouble"},
    }
    requests: list[tuple[str, str, Event | None]] = []
    for template, methods in openapi["paths"].items():
        short = template.removeprefix("/api/v1")
        path = re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], 1)), template)
        for method in methods:
            if (
                method not in ("get", "post", "put", "patch", "delete")
                or short.endswith("/ws")
                or short == "/auth/logout"
            ):
                continue
            if template in NO_DATABASE:
                continue
            query = ""
            if short == "/users/search":
                query = "?q=person"
            elif short == "/users/username-available":
                query = f"?username={world.bob.username}"
            requests.append(
                (method, path + query, bodies.get(short, {}) if method in ("post", "put", "patch") else None)
            )
    return requests


async def _ask_for_everything(world: World, openapi: Event) -> list[Answer]:
    async with httpx.AsyncClient(
        base_url=world.server.url, timeout=ANSWER_SECONDS * 4, limits=httpx.Limits(max_connections=200)
    ) as client:

        def request(method: str, path: str, body: Event | None) -> Callable[[], Awaitable[tuple[int, str]]]:
            async def ask() -> tuple[int, str]:
                answer = await client.request(method, path, json=body, headers=world.ann.headers)
                is_problem = answer.headers.get("content-type", "") == "application/problem+json"
                return answer.status_code, answer.json()["code"] if is_problem else ""

            return ask

        def send(number: int) -> Callable[[], Awaitable[tuple[int, str]]]:
            async def say() -> tuple[int, str]:
                socket = world.sockets[number % 2]
                answer = await socket.say(world.chat_id, f"over the socket {number}")
                if answer["type"] == "ack":
                    return 200, "ack"
                assert answer["retryable"], answer
                return 503, answer["code"]

            return say

        async def connect() -> tuple[int, str]:
            try:
                client = await SocketClient.open(world.server.ws_url, world.bob.access_token)
            except AssertionError as error:
                return (503, "1012") if "closed with 1012" in str(error) else (500, str(error))
            except websockets.InvalidStatus as error:
                return error.response.status_code, ""
            await client.close()
            return 200, "hello"

        asking = [
            _timed(f"{method} {path}", request(method, path, body))
            for method, path, body in _every_request(world, openapi)
        ]
        asking += [_timed(f"send {number}", send(number)) for number in range(20)]
        asking.append(_timed("a new socket", connect))
        return list(await asyncio.gather(*asking))


async def _say_until_stored(world: World, client_id: str, sender: int = 0) -> Event:
    """Repeat a send until it is acknowledged, as a client does; every answer must come in time."""
    while True:
        begun = time.monotonic()
        answer = await world.sockets[sender].say(world.chat_id, "again and again", client_id=client_id)
        assert time.monotonic() - begun <= ANSWER_SECONDS + SLACK, answer
        if answer["type"] == "ack":
            return answer
        assert answer["code"] in ("database_unavailable", "busy"), answer
        assert answer["retryable"] is True
        assert answer["client_id"] == client_id


async def _recovery(world: World) -> float:
    """Seconds until a read and a send work again."""
    begun = time.monotonic()
    async with asyncio.timeout(RECOVERY_SECONDS * 4), world.server.client() as client:
        await _say_until_stored(world, str(uuid.uuid4()))
        while (await client.get("/api/v1/chats", headers=world.ann.headers)).status_code != 200:
            pass
        while (await client.get("/health/ready")).status_code != 200:
            pass
    return time.monotonic() - begun


def _rows(settings: Settings, chat_id: int) -> dict[str, list[tuple[int, int]]]:
    """Client id to the (id, seq) it is stored under, asked of MySQL itself."""
    connection = pymysql.connect(
        host=settings.db_host,
        port=settings.db_port,
        user=settings.db_user,
        password=settings.db_password.get_secret_value(),
        database=settings.db_name,
    )
    with connection, connection.cursor() as cursor:
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
        answers += await _ask_for_everything(world, openapi)
    frozen = time.monotonic() - begun
    proxy.thaw()
    recovered = await _recovery(world)
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
    assert {(answer.status, answer.code) for answer in reads} == {(503, "database_unavailable")}
    report.at_most("recovered in", recovered, RECOVERY_SECONDS, "s")
    # What was refused is stored once by its retry, and the sockets that were open all the time hear of it.
    ack = await _say_until_stored(world, named)
    assert _rows(mysql_settings, world.chat_id)[named] == [(ack["message_id"], ack["seq"])]
    heard = await world.sockets[1].wait(lambda e: e["type"] == "new_message" and e["message"]["client_id"] == named)
    assert heard["message"]["id"] == ack["message_id"]


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
    ack = await _say_until_stored(world, client_id)
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
    report.at_most("recovered from a reset in", await _recovery(world), RECOVERY_SECONDS, "s")
    proxy.cut()  # and once more, politely, with nobody kept waiting outside
    report.at_most("recovered from a goodbye in", await _recovery(world), RECOVERY_SECONDS, "s")
    ack = await _say_until_stored(world, client_id)
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
        acks[client_id] = await _say_until_stored(world, client_id)
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
    async with _populated(await _launch(launch, sqlite_settings)) as world:
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
        async def ask() -> tuple[int, str]:
            answer = await world.sockets[number % 2].say(world.chat_id, "at a lock", client_id=client_id)
            return (200, "ack") if answer["type"] == "ack" else (503, answer["code"])

        return await _timed(f"send {number}", ask)

    async def ask(method: str, path: str, body: Event | None = None) -> Answer:
        async def request() -> tuple[int, str]:
            answer = await client.request(method, path, json=body, headers=world.ann.headers)
            return answer.status_code, answer.json().get("code", "") if answer.content else ""

        return await _timed(f"{method} {path}", request)

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
    recovered = await _recovery(world)
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
    acks = [await _say_until_stored(world, client_id, number % 2) for number, client_id in enumerate(named)]
    assert len({ack["message_id"] for ack in acks}) == len(named)
    async with world.server.client() as client:
        page = (
            await client.get(f"/api/v1/messages/history/{world.chat_id}?limit=100", headers=world.bob.headers)
        ).json()
    stored = [message["client_id"] for message in page["items"]]
    assert sorted(set(stored) & set(named)) == sorted(named)
    assert len(stored) == len(set(stored))
