"""A storm: everybody loses the server at once, and everybody comes back at once, with what they have.

What is measured begins when the server listens again.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pymysql
import pytest
import uvloop
from sqlalchemy import insert, select

from app.core.clock import SystemClock
from app.core.config import Settings
from app.core.security import AccessTokens
from app.db.database import Database
from app.db.models import Chat, ChatMember, Message, Session, User
from app.db.schemas import GroupIn
from app.main import create_app
from app.services.container import Services
from bench.websocket import Refused, Socket, connect
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.support.servers import Server, free_port

CLIENTS = scaled("STORM_CLIENTS", short=1_000, long=5_000)
BAR_SECONDS = 15.0
"""Within so long everybody is back and has everything."""
STATEMENTS_PER_CLIENT = 1.0
"""What one who comes back may cost the database, on average: the same questions are asked for many together."""
GROUP = 50
GROUPS_OF_EACH = 3
SENDERS = 25
SENT_BEFORE = 1_500
PATIENCE = 60.0


@dataclass
class Storm:
    """What the clients share."""

    port: int
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while there is a server."""
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    acked: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by every event that comes."""

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that events bring about."""
        async with asyncio.timeout(PATIENCE):
            while not reached():
                self.moved.clear()
                await self.moved.wait()

    def fault(self, text: str) -> None:
        """Note what must not happen; a few are enough."""
        if len(self.faults) < 20:
            self.faults.append(text)


class Line(Socket):
    """One connection of a client."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client
        self.head = b""

    def _handshake(self, data: bytes) -> bytes:
        self.head = (self._rest + data).partition(b"\r\n\r\n")[0]
        return super()._handshake(data)

    def on_text(self, payload: bytes) -> None:
        self.client.on_event(orjson.loads(payload))

    def on_closed(self) -> None:
        self.client.on_lost(self)


class Client:
    """A device: holds the version and the newest seq of each of its chats, comes back, resumes, and may send."""

    def __init__(self, storm: Storm, user_id: int, token: str, account_version: int, chats: dict[int, tuple[int, int]]):
        self.storm = storm
        self.user_id = user_id
        self.token = token
        self.account_version = account_version
        self.versions = {chat_id: version for chat_id, (version, _) in chats.items()}
        self.seqs = {chat_id: seq for chat_id, (_, seq) in chats.items()}
        self.pending: dict[str, tuple[int, str]] = {}
        """Client id to chat and text of what has no answer yet."""
        self.acked: list[str] = []
        self.sending = False
        self.answered = False
        """Whether the server has begun to answer what was resumed: what it tells live after that leaves no hole."""
        self.back = asyncio.Event()
        self.lost = asyncio.Event()
        self.line: Line | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Come, and come back whenever the line is lost."""
        self._task = asyncio.create_task(self._stay())

    def stop(self) -> None:
        """Leave for good."""
        if self._task is not None:
            self._task.cancel()
        if self.line is not None:
            self.line.close()

    async def _stay(self) -> None:
        failures = 0
        while True:
            await self.storm.up.wait()
            self.lost.clear()
            line: Line | None = None

            def make() -> Line:
                nonlocal line
                line = Line(self)
                return line

            try:
                self.line = await connect(
                    make, self.storm.port, "/api/v1/messages/ws", token=self.token, seconds=PATIENCE
                )
            except (Refused, OSError, TimeoutError) as error:
                failures += 1
                await asyncio.sleep(self._pause(error, line, failures))
                continue
            failures = 0
            self.storm.counts["opened"] += 1
            await self.lost.wait()

    def _pause(self, error: Exception, line: Line | None, failures: int) -> float:
        """Seconds until the next try, by the rules of docs/protocol.md."""
        head = line.head if line is not None else b""
        if not head:
            self.storm.counts[f"no answer ({type(error).__name__})"] += 1
            return random.uniform(0, min(30.0, 2.0**failures))
        status = head.split(b" ", 2)[1].decode()
        headers = dict(row.lower().split(b": ", 1) for row in head.split(b"\r\n")[1:])
        self.storm.counts[f"refused with {status}"] += 1
        if status != "503" or b"retry-after" not in headers:
            self.storm.fault(f"a handshake was answered {head!r}")
            return 1.0
        return float(headers[b"retry-after"]) + random.random()

    def on_lost(self, line: Line) -> None:
        """The line is gone."""
        if line is self.line:
            self.line = None
            self.back.clear()
            self.storm.counts[f"lost: {line.closed[:40]}"] += 1
            self.lost.set()

    def on_event(self, event: dict[str, Any]) -> None:
        """Apply an event to what is held."""
        self.storm.moved.set()
        kind = event["type"]
        chat_id = event.get("chat_id")
        if kind in ("synced", "reset", "chat_removed", "resumed"):
            self.answered = True
        if kind == "hello":
            self.answered = False
            chats = {str(chat): version for chat, version in self.versions.items()}
            self._send({"type": "resume", "account_version": self.account_version, "chats": chats})
        elif kind == "resumed":
            self.account_version = event["account_version"]
            self.back.set()
            for client_id, (chat, text) in self.pending.items():
                self._send_message(chat, text, client_id)
        elif kind == "ack":
            self._on_ack(event["client_id"])
        elif kind == "error":
            self.storm.fault(f"an error: {event}")
        elif kind in ("chat_removed", "reset"):
            self.storm.fault(f"{kind} for one who missed little: {event}")
        elif isinstance(chat_id, int) and "version" in event:
            held = self.versions[chat_id]
            if event.get("prev", 0) > held:
                if not self.answered:
                    return  # live, from before the server read the resume: its answer brings this, too
                self.storm.fault(f"a hole: {held} is held, {event['type']} begins at {event['prev']}")
            for message in event["messages"] if kind == "chat_changes" else [event.get("message")]:
                if message is not None and message["seq"] > self.seqs[chat_id]:
                    if message["seq"] != self.seqs[chat_id] + 1:
                        self.storm.fault(f"seq {message['seq']} comes after {self.seqs[chat_id]}")
                    self.seqs[chat_id] = message["seq"]
            self.versions[chat_id] = max(held, event["version"])

    def has(self, chats: dict[int, tuple[int, int]]) -> bool:
        """Whether it has come as far as its chats have."""
        return all(version >= chats[chat_id][0] for chat_id, version in self.versions.items())

    # --- sending ---

    def send_something(self) -> None:
        """Send the next message to one of the chats."""
        client_id, text = str(uuid.uuid4()), f"{self.user_id}: {len(self.acked)}"
        chat_id = random.choice(list(self.versions))
        self.pending[client_id] = (chat_id, text)
        self._send_message(chat_id, text, client_id)

    def _send_message(self, chat_id: int, text: str, client_id: str) -> None:
        self._send({"type": "new_message", "chat_id": chat_id, "content": text, "client_id": client_id})

    def _on_ack(self, client_id: str) -> None:
        del self.pending[client_id]
        self.acked.append(client_id)
        self.storm.acked += 1
        if self.sending:
            self.send_something()

    def _send(self, frame: dict[str, Any]) -> None:
        if self.line is not None:
            self.line.send(orjson.dumps(frame))


async def _populate(settings: Settings) -> None:
    """People with a session each, in groups."""
    services: Services = create_app(settings).state.services
    await services.start()
    now = datetime.now(UTC).replace(tzinfo=None)
    first = (await services.ids.reserve("user", CLIENTS))[0] if CLIENTS else 0
    people = list(range(first, first + CLIENTS))
    async with services.database.writing() as session:
        for start in range(0, CLIENTS, 500):
            some = people[start : start + 500]
            users = [
                {
                    "id": user,
                    "phone": f"+7999{user:07d}",
                    "username": f"storm_{user}",
                    "display_name": "Storm",
                    "display_name_key": "storm",
                    "bio": "",
                    "password_hash": "",
                    "profile_version": 1,
                    "account_version": 0,
                    "created_at": now,
                }
                for user in some
            ]
            await session.execute(insert(User).values(users))
            sessions = [
                {
                    "id": user,
                    "user_id": user,
                    "device_name": "",
                    "platform": "",
                    "ip": "",
                    "created_at": now,
                    "last_seen_at": now - timedelta(days=1),
                    "expires_at": now + timedelta(days=1),
                }
                for user in some
            ]
            await session.execute(insert(Session).values(sessions))
    for round_ in range(GROUPS_OF_EACH):
        # Each time with others: a group never holds the same people twice.
        order = sorted(people, key=lambda user: (user * (round_ * 7 + 1)) % (CLIENTS + 1))
        for start in range(0, CLIENTS, GROUP):
            members = order[start : start + GROUP]
            async with services.unit_of_work() as uow:
                await services.chats.create_group(
                    uow, members[0], GroupIn(title=f"Group {round_} {start}", member_ids=members[1:])
                )
    await services.stop()


async def _clients(settings: Settings, storm: Storm) -> list[Client]:
    tokens = AccessTokens(settings, SystemClock())
    database = Database(settings)
    async with database.reading() as session:
        accounts = (await session.execute(select(User.id, User.account_version).order_by(User.id))).all()
        rows = (
            await session.execute(
                select(ChatMember.user_id, Chat.id, Chat.version, Chat.last_seq).join(
                    Chat, Chat.id == ChatMember.chat_id
                )
            )
        ).all()
    await database.close()
    chats: dict[int, dict[int, tuple[int, int]]] = {}
    for user_id, chat_id, version, seq in rows:
        chats.setdefault(user_id, {})[chat_id] = (version, seq)
    return [
        Client(storm, user_id, tokens.issue(user_id, user_id), version, chats[user_id]) for user_id, version in accounts
    ]


async def _stored(settings: Settings) -> tuple[dict[int, tuple[int, int]], Counter[str]]:
    """(version, last seq) of the chats, and how often each client id stands in the database."""
    database = Database(settings)
    async with database.reading() as session:
        chats = {
            row[0]: (row[1], row[2]) for row in await session.execute(select(Chat.id, Chat.version, Chat.last_seq))
        }
        found = Counter(
            str(uuid.UUID(bytes=key)) for key in (await session.execute(select(Message.client_id))).scalars()
        )
    await database.close()
    return chats, found


def _statements(settings: Settings) -> int:
    """Statements that the database has run for us so far; 0 on SQLite, which does not count."""
    if not settings.uses_mysql:
        return 0
    connection = pymysql.connect(
        host=settings.db_host or "",
        port=settings.db_port,
        user=settings.db_user,
        password=settings.db_password.get_secret_value(),
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT COALESCE(SUM(count_star), 0) FROM performance_schema.events_statements_summary_by_digest"
            " WHERE schema_name = %s",
            (settings.db_name,),
        )
        row = cursor.fetchone()
        return int(row[0]) if row else 0


async def _all_back(clients: list[Client], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        for client in clients:
            await client.back.wait()


async def _storm(settings: Settings, launch: Launch, report: SceneReport) -> None:
    await _populate(settings)
    port = free_port()
    storm = Storm(port)
    clients = await _clients(settings, storm)
    server: Server = launch(settings, port)
    await asyncio.to_thread(server.wait_until_ready)
    storm.up.set()
    try:
        for client in clients:
            client.start()
        await _all_back(clients, PATIENCE)
        for client in clients[:: max(1, CLIENTS // SENDERS)]:
            client.sending = True
            client.send_something()
        await storm.until(lambda: storm.acked >= SENT_BEFORE)
        storm.up.clear()
        server.kill()
        killed = time.monotonic()
        for client in clients:
            client.sending = False
            await client.lost.wait()
        waiting = sum(len(client.pending) for client in clients)
        assert waiting > 0, "the kill met no send under way: this run shows nothing"
        storm.counts.clear()
        before = await asyncio.to_thread(_statements, settings)
        server = launch(settings, port)
        await asyncio.to_thread(server.wait_until_ready)
        listening = time.monotonic()
        storm.up.set()
        await _all_back(clients, PATIENCE)
        seconds = time.monotonic() - listening
        statements = await asyncio.to_thread(_statements, settings) - before
        await storm.until(lambda: not any(client.pending for client in clients))
        chats, found = await _stored(settings)
        await storm.until(lambda: all(client.has(chats) for client in clients))
    finally:
        for client in clients:
            client.stop()
    print(  # noqa: T201 - the figures of the run
        f"{CLIENTS} clients: back and complete {seconds:.1f} s after the server listened, {listening - killed:.1f} s"
        f" after the kill; {statements / CLIENTS:.2f} statements each; {storm.acked} acknowledged, {waiting} waited for"
        f" an answer at the kill; {dict(storm.counts)}"
    )
    for client in clients:
        for chat_id, seq in client.seqs.items():
            if seq != chats[chat_id][1]:
                storm.fault(f"user {client.user_id} has {seq} of {chats[chat_id][1]} messages of chat {chat_id}")
        for client_id in client.acked:
            if found[client_id] != 1:
                storm.fault(f"acknowledged, and stored {found[client_id]} times")
    assert storm.faults == []
    refused = sum(count for what, count in storm.counts.items() if what.startswith("refused"))
    report.tell("clients", CLIENTS)
    report.tell("sends without an answer at the kill, repeated", waiting)
    report.tell("handshakes refused with 503 and Retry-After", refused)
    report.exactly("acknowledged and not stored once, or not with every member", len(storm.faults), 0)
    if settings.uses_mysql:
        assert statements > 0, "MySQL counted no statement: nothing is known of their number"
        report.at_most("statements for each", statements / CLIENTS, STATEMENTS_PER_CLIENT)
    report.at_most("until the last is back and complete", seconds, BAR_SECONDS, "s")


@pytest.mark.chaos("A storm is survived")
@pytest.mark.timeout(300)
@pytest.mark.settings(
    limit_connects_per_second=Settings.model_fields["limit_connects_per_second"].default,
    max_loop_lag_seconds=Settings.model_fields["max_loop_lag_seconds"].default,
    limit_resets_per_minute=Settings.model_fields["limit_resets_per_minute"].default,
)
def test_a_crowd_that_lost_the_server_is_back_soon_and_has_missed_nothing(
    settings: Settings, launch: Launch, report: SceneReport
) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > CLIENTS + 500, "too few files may be open"
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_storm(settings, launch, report))


def test_a_client_of_the_storm_forgives_holes_only_until_its_resume_is_answered() -> None:
    storm = Storm(0)
    client = Client(storm, 1, "", 0, {1: (5, 5), 2: (5, 5)})
    hole = {"type": "message_read", "chat_id": 1, "prev": 7, "version": 8}
    client.on_event({"type": "hello"})
    client.on_event(hole)
    assert (storm.faults, client.versions[1]) == ([], 5)
    client.on_event({"type": "synced", "chat_id": 2, "version": 5})
    client.on_event(hole)
    assert storm.faults == ["a hole: 5 is held, message_read begins at 7"]
    client.on_event({"type": "hello"})  # a new socket, and nothing of it is answered yet
    client.on_event(hole)
    assert len(storm.faults) == 1
