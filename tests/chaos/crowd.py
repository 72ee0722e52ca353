"""A crowd that chats through crashes: devices that write ledgers, retry with the same client ids, and resume.

Every text says who may see it. Each device keeps a replica of its chats and a ledger file of its own, and repeats
every command until it is answered, over as many connections as that takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import orjson
import websockets
from websockets.asyncio.client import ClientConnection, connect

from bench.ledger import Kind, Ledger, Report, Stored, check, may_see, text_for_users
from tests.chaos.report import SceneReport
from tests.law.walk import difference
from tests.support.accounts import Account, register
from tests.support.replica import Replica, fetch

Event = dict[str, Any]
PATIENCE = 30.0
"""Seconds for an answer, restarts included. Only a failing test waits so long."""
STRETCHES = 1_000_000
"""More than a device has stretches of live messages. Each has a number in the ledger, and its order is checked."""
WINDOW = 8
"""Commands of a device under way."""


@dataclass(frozen=True)
class Room:
    """A chat and all its members."""

    id: int
    members: tuple[int, ...]


@dataclass
class Rewritten:
    """What a message became after it was sent: the text of its last edit, or nothing once deleted."""

    text: str
    deleted: bool = False


@dataclass
class Crowd:
    """What the devices share."""

    url: str
    rng: random.Random
    folder: Path
    target: int
    """Acknowledged sends after which nobody begins anything new."""
    other_urls: list[str] = field(default_factory=list)
    """Other workers; the devices and callers are spread over all."""
    accounts: list[Account] = field(default_factory=list)
    rooms: list[Room] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    callers: list[Caller] = field(default_factory=list)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the server is there."""
    acked: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    """Client id to what was sent."""
    rewritten: dict[str, Rewritten] = field(default_factory=dict)
    read: dict[tuple[int, int], int] = field(default_factory=dict)
    """(chat, user) to the seq up to which reading was acknowledged."""
    hidden: set[tuple[int, int]] = field(default_factory=set)
    """(user, message) whose deletion for oneself was acknowledged."""
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    close_codes: Counter[int] = field(default_factory=Counter)
    _thresholds: dict[int, asyncio.Event] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for keeper in self.keepers:
            keeper.ledger.close()

    def after(self, acks: int) -> asyncio.Event:
        """An event that comes when so many sends were acknowledged in all."""
        event = self._thresholds.setdefault(acks, asyncio.Event())
        if self.acked >= acks:
            event.set()
        return event

    @property
    def keepers(self) -> list[Keeper]:
        """Everybody."""
        return [*self.devices, *self.callers]

    @property
    def enough(self) -> bool:
        """Whether nobody shall begin anything new."""
        return self.acked >= self.target

    def count_ack(self) -> None:
        """A send was acknowledged."""
        self.acked += 1
        if (event := self._thresholds.pop(self.acked, None)) is not None:
            event.set()

    def fault(self, text: str) -> None:
        """Note what must not happen; the first few are enough."""
        if len(self.faults) < 20:
            self.faults.append(text)

    def http(self, number: int = 0) -> httpx.AsyncClient:
        """A client of the server's REST interface, which gives idle connections up before the server does, lest a
        request run into the end of one."""
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=2)
        return httpx.AsyncClient(base_url=self.url_of(number), timeout=PATIENCE, limits=limits)

    def url_of(self, number: int) -> str:
        """The worker that this one of the clients talks to."""
        return [self.url, *self.other_urls][number % (1 + len(self.other_urls))]

    async def wait_until_complete(self) -> None:
        """Return once each device holds what the server does, by what it was told alone. Nothing may be under way.

        Raises AssertionError when that takes longer than everybody's patience.
        """
        give_up_at = asyncio.get_running_loop().time() + PATIENCE
        behind = list(self.devices)
        async with self.http() as client:
            while behind:
                fresh = await asyncio.gather(*(fetch(client, a.headers, a.id) for a in self.accounts))
                views = {replica.user_id: replica.view() for replica in fresh}
                for device in behind:  # what came before their first page nobody promised to tell
                    await device.replica.complete(client, device.account.headers)
                behind = [device for device in behind if device.replica.view() != views[device.account.id]]
                assert asyncio.get_running_loop().time() < give_up_at, [
                    (device.name, difference(device.replica.view(), views[device.account.id])) for device in behind
                ]
                await asyncio.sleep(0.1)  # their replicas change by frames, which tell nobody here

    async def gather(self, users: int, devices: int, callers: int) -> None:
        """Register users with chats between them, and give them devices (sockets) and callers (REST)."""
        async with self.http() as client:
            self.accounts = [await register(client) for _ in range(users)]
            ids = [account.id for account in self.accounts]
            for first, second in zip(self.accounts, [*self.accounts[1:], self.accounts[0]], strict=True):
                answer = await client.post("/api/v1/chats/personal", json={"user_id": second.id}, headers=first.headers)
                assert answer.status_code == 201, answer.text
                self.rooms.append(Room(answer.json()["id"], (first.id, second.id)))
            for people in (ids, ids[: len(ids) // 2]):
                body = {"title": "All of us", "member_ids": people}
                answer = await client.post("/api/v1/chats/group", json=body, headers=self.accounts[0].headers)
                assert answer.status_code == 201, answer.text
                self.rooms.append(Room(answer.json()["id"], tuple(people)))
        for number in range(devices):
            self.devices.append(Device(self, self.accounts[number % users], number))
        for number in range(devices, devices + callers):
            self.callers.append(Caller(self, self.accounts[number % users], number))

    def rooms_of(self, user: int) -> list[Room]:
        """The chats of a user."""
        return [room for room in self.rooms if user in room.members]

    async def stored_places(self) -> dict[str, tuple[int, int]]:
        """The client ids of all messages that the server holds now, and their (id, seq)."""
        async with self.http() as client:
            fresh = await asyncio.gather(*(fetch(client, a.headers, a.id) for a in self.accounts))
        chats = [chat for replica in fresh for chat in replica.chats.values()]
        return {m["client_id"]: (m["id"], m["seq"]) for chat in chats for m in chat.messages.values()}

    async def check(self) -> Report:
        """Compare all ledgers and replicas with what the server holds now. Nothing may be under way."""
        async with self.http() as client:
            fresh = await asyncio.gather(*(fetch(client, a.headers, a.id) for a in self.accounts))
            views = {replica.user_id: replica.view() for replica in fresh}
            for keeper in self.keepers:
                await keeper.replica.complete(client, keeper.account.headers)
                keeper.note_completed()
                _compare(self, keeper.name, keeper.replica.view(), views[keeper.account.id])
        history: list[Stored] = []
        for room in self.rooms:
            replicas = {replica.user_id: replica.chats[room.id] for replica in fresh if replica.user_id in room.members}
            held = replicas[room.members[0]]
            order = {user: sorted((m["seq"], i) for i, m in chat.messages.items()) for user, chat in replicas.items()}
            for user, seqs in order.items():
                if seqs != order[room.members[0]]:
                    self.fault(f"users {user} and {room.members[0]} have chat {room.id} in another order")
            history += [self._stored(message) for message in held.messages.values()]
            for user in room.members:
                if held.members[user]["read_seq"] < (marked := self.read.get((room.id, user), 0)):
                    self.fault(f"user {user} had read chat {room.id} up to {marked}: {held.members[user]}")
        for replica in fresh:
            for message in (message for chat in replica.chats.values() for message in chat.messages.values()):
                if not may_see(message["content"], replica.user_id, {}):
                    self.fault(f"user {replica.user_id} finds {message}")
                if (replica.user_id, message["id"]) in self.hidden and not message["hidden"]:
                    self.fault(f"user {replica.user_id} had deleted {message} for themselves")
        ledger = Ledger.read(sorted(self.folder.glob("*.ledger")))
        everybody = {room.id: room.members for room in self.rooms}
        return check(ledger, history, members=everybody, present=everybody)

    def hold(self, report: SceneReport, checked: Report) -> None:
        """Nothing may be wrong: hold what was found against that, fault by fault."""
        print(*self.faults, checked, sep="\n")  # noqa: T201 - pytest shows it when the test fails
        found = checked.counts
        report.exactly("lost", found[Kind.LOST], 0)
        report.exactly("stored twice", found[Kind.STORED_TWICE] + found[Kind.ID_TWICE] + found[Kind.SEQ_TWICE], 0)
        order = (Kind.HISTORY_HOLE, Kind.OTHER_ORDER, Kind.OUT_OF_ORDER, Kind.REPEATED, Kind.GAP)
        report.exactly("holes or other orders", sum(found[kind] for kind in order), 0)
        report.exactly("missed by a member", found[Kind.MISSED], 0)
        report.exactly("seen by the wrong person", found[Kind.WRONG_PERSON], 0)
        report.exactly("states other than the server's", len(self.faults), 0)
        checked.raise_if_faulty()

    def _stored(self, message: Event) -> Stored:
        """A message of the history, with the text it was sent with if it is now what it was made afterwards."""
        client_id, text = message["client_id"], message["content"]
        became = self.rewritten.get(client_id)
        if message["hidden"]:
            text = self.texts[client_id]
        elif became is not None:
            if message["deleted"] != became.deleted or (not became.deleted and text != became.text):
                self.fault(f"{message} should have become {became}")
            text = self.texts[client_id]
        return Stored(
            message["chat_id"],
            message["seq"],
            message["id"],
            message["sender_id"],
            client_id,
            text,
            message["message_type"] == "service",
        )


def _compare(crowd: Crowd, name: str, held: dict[str, Any], fresh: dict[str, Any]) -> None:
    if held == fresh:
        return
    for chat_id in held["chats"].keys() | fresh["chats"].keys():
        mine, theirs = held["chats"].get(chat_id), fresh["chats"].get(chat_id)
        if mine != theirs:
            parts = [
                key
                for key in ("version", "info", "members", "messages")
                if (mine or {}).get(key) != (theirs or {}).get(key)
            ]
            crowd.fault(f"{name} holds another state of chat {chat_id} than the server: {parts}")
            return
    crowd.fault(f"{name} holds other blocks than the server")


class Keeper:
    """One client: an account, a ledger file, a replica."""

    def __init__(self, crowd: Crowd, account: Account, number: int, name: str) -> None:
        self.crowd = crowd
        self.account = account
        self.number = number
        self.name = f"{name} {number} of user {account.id}"
        self.rng = random.Random(crowd.rng.random())
        self.replica = Replica(account.id)
        self.ledger = Ledger(crowd.folder / f"{number}.ledger")
        rooms = crowd.rooms_of(account.id)
        # Most is said between two: a group's messages, to everybody's devices, would be nearly all the work.
        self.rooms = [*rooms, *(room for room in rooms if len(room.members) == 2)]
        self.finished = asyncio.Event()
        """Nothing is under way and nothing more will be begun."""
        self.said = 0
        self._seen: set[int] = set()

    async def run(self) -> None:
        """Chat until there is enough."""
        raise NotImplementedError

    async def settle(self) -> None:
        """Catch up once more, when all is quiet, so that the replica holds everything."""
        raise NotImplementedError

    def new_text(self, room: Room, body: str = "message") -> str:
        """A text that names its audience."""
        self.said += 1
        return text_for_users(f"{body} {self.said} of {self.name}", room.members)

    def note_sent(self, room: Room) -> tuple[str, str]:
        """A new client id and text, written down before a byte of it leaves."""
        client_id, text = str(uuid.UUID(int=self.rng.getrandbits(128), version=4)), self.new_text(room)
        self.crowd.texts[client_id] = text
        self.ledger.sent(self.account.id, room.id, client_id, text)
        return client_id, text

    def note_acked(self, client_id: str, message_id: int, seq: int) -> None:
        """A send was promised to be stored."""
        self.ledger.acked(self.account.id, client_id, message_id, seq)
        self.crowd.count_ack()

    def look_at(self, message: Event) -> None:
        """Whatever the way it came, it must be meant for this user."""
        if not may_see(message["content"], self.account.id, {}):
            self.crowd.fault(f"{self.name} got {message}")

    def note_received(self, message: Event, session: int, *, live: bool) -> None:
        """A message came, perhaps changed since it was sent."""
        self.look_at(message)
        text = message["content"]
        if not live and message["id"] in self._seen:
            return
        self._seen.add(message["id"])
        if message["edited_at"] or message["deleted"] or message["hidden"]:
            text = self.crowd.texts.get(message["client_id"], text)
        self.ledger.received(
            self.account.id,
            message["chat_id"],
            message["seq"],
            message["id"],
            message["client_id"],
            text,
            session=session,
            live=live,
        )

    def note_completed(self) -> None:
        """The replica has fetched what a reset had left out."""
        for chat in self.replica.chats.values():
            for message in chat.messages.values():
                if message["id"] not in self._seen:
                    self.note_received(message, self.number * STRETCHES, live=False)


@dataclass
class Pending:
    """A command that is not answered yet."""

    frame: Event
    sent_before: bool = False


class Device(Keeper):
    """A client on a socket that sends, edits, deletes and reads, all at once."""

    def __init__(self, crowd: Crowd, account: Account, number: int) -> None:
        super().__init__(crowd, account, number, "device")
        self.pending: dict[str, Pending] = {}
        self.connections = 0
        self._mine: list[tuple[Room, int, str]] = []
        self._live: set[int] = set()
        self._stretch: dict[int, int] = {}
        self._stretches = 1
        self._refs = 0
        self._resumed = asyncio.Event()
        self._connection: ClientConnection | None = None
        self._gone = asyncio.Event()

    async def run(self) -> None:
        """Live until cancelled: connect, resume, repeat what was not answered, go on; again after every drop."""
        failures = 0
        while True:
            await self.crowd.up.wait()
            url = self.crowd.url_of(self.number).replace("http", "ws", 1) + "/api/v1/messages/ws"
            try:
                connection = await connect(
                    url, additional_headers=self.account.headers, max_size=None, compression=None, open_timeout=PATIENCE
                )
            except (OSError, EOFError, TimeoutError, websockets.InvalidHandshake, websockets.ConnectionClosed):
                failures += 1
                if self.crowd.up.is_set() and failures > 100:
                    raise
                await asyncio.sleep(0.05)  # a client's pause between two attempts
                continue
            failures = 0
            self.connections += 1
            self._live.clear()
            self._stretch.clear()
            self._stretches += 1
            self._connection = connection
            self._gone.clear()
            self._resumed.clear()
            try:
                async for frame in connection:
                    for answer in self._handle(orjson.loads(frame)):
                        # Once the server has said goodbye nothing can be sent, but what came before is still to read.
                        with contextlib.suppress(websockets.ConnectionClosed):
                            await connection.send(orjson.dumps(answer).decode())
            except websockets.ConnectionClosed:
                pass
            finally:
                self._connection = None
                connection.transport.abort()
                self._gone.set()
            self.crowd.close_codes[connection.close_code or 1006] += 1

    def give_up(self) -> None:
        """Lose patience with this connection and try another."""
        if self._connection is not None:
            self._connection.transport.abort()

    async def gone(self) -> None:
        """Return once the connection has ended and all it brought has been looked at."""
        await self._gone.wait()

    async def settle(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._resumed.wait()  # a socket resumes once at a time
                self._resumed.clear()
                assert self._connection is not None
                await self._connection.send(orjson.dumps(self.replica.resume_frame()).decode())
                await self._resumed.wait()
        except TimeoutError:
            self.crowd.fault(f"{self.name} is not told that it has caught up")

    # --- frames ---

    def _handle(self, event: Event) -> list[Event]:
        kind = event["type"]
        caught_up = self.number * STRETCHES
        if kind == "new_message":
            message = event["message"]
            if message["id"] in self._live:
                self.crowd.fault(f"{self.name} was told twice over one connection: {message}")
            self._live.add(message["id"])
            stretch = self._stretch.setdefault(event["chat_id"], self._stretches)
            self.note_received(message, caught_up + stretch, live=True)
        elif kind in ("chat_changes", "reset"):
            for message in event["messages"]:
                self.note_received(message, caught_up, live=False)
        elif kind in ("message_edited", "message_deleted"):
            self.note_received(event["message"], caught_up, live=False)
        if kind in ("chat_changes", "reset", "synced"):
            # Live messages are one after the other until the next time; what came between is all held now.
            self._stretches += 1
            self._stretch[event["chat_id"]] = self._stretches
        self.replica.apply(event)
        if kind == "hello":
            frames = [self.replica.resume_frame()]
            for pending in self.pending.values():
                self.crowd.counts["retried"] += pending.sent_before
                pending.sent_before = True
                frames.append(pending.frame)
            return frames + self._begin()
        if kind == "heartbeat":
            # The client's rule: whose account is newer there than here has missed something private, and asks for it.
            if event["account_version"] > self.replica.account_version and self._resumed.is_set():
                self.crowd.counts["resumed for a heartbeat"] += 1
                self._resumed.clear()
                return [self.replica.resume_frame()]
            return []
        if kind == "ack":
            return self._acked(event)
        if kind == "error":
            return self._refused(event)
        if kind == "resumed":
            self.replica.holes.clear()
            self._resumed.set()
        elif self.replica.holes and self._resumed.is_set():
            self.crowd.fault(f"{self.name} is told {event}, and knows nothing of what was before")
        return []

    def _held(self, chat_id: int) -> dict[int, Event]:
        chat = self.replica.chats.get(chat_id)
        return chat.messages if chat is not None else {}

    def _acked(self, event: Event) -> list[Event]:
        pending = self.pending.pop(event["ref"], None)
        if pending is None:
            return []  # the second answer to a command that was repeated
        frame = pending.frame
        kind, chat_id = frame["type"], frame["chat_id"]
        self.crowd.counts[kind] += 1
        if kind == "new_message":
            if event["client_id"] != frame["client_id"]:
                self.crowd.fault(f"{frame} was answered with {event}")
            self.note_acked(frame["client_id"], event["message_id"], event["seq"])
            room = next(room for room in self.rooms if room.id == chat_id)
            self._mine.append((room, event["message_id"], frame["client_id"]))
        elif kind == "message_read":
            place = (chat_id, self.account.id)
            message = self._held(chat_id)[frame["message_id"]]
            self.crowd.read[place] = max(self.crowd.read.get(place, 0), message["seq"])
        elif kind == "delete_message" and not frame["for_everyone"]:
            self.crowd.hidden.add((self.account.id, frame["message_id"]))
        return self._begin()

    def _refused(self, event: Event) -> list[Event]:
        pending = self.pending.get(event["ref"])
        if pending is None or not event["retryable"]:
            self.crowd.fault(f"{self.name} was refused: {event}, {pending}")
            self.pending.pop(event["ref"], None)
            return self._begin()
        self.crowd.counts[f"refused {event['code']}"] += 1
        asyncio.get_running_loop().call_later(event["retry_after"] or 0.1, self._repeat, event["ref"])
        return []

    def _repeat(self, ref: str) -> None:
        if (pending := self.pending.get(ref)) is not None and self._connection is not None:
            task = asyncio.ensure_future(self._connection.send(orjson.dumps(pending.frame).decode()))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    # --- what to do next ---

    def _begin(self) -> list[Event]:
        frames: list[Event] = []
        while len(self.pending) < WINDOW and not self.crowd.enough:
            frame = self._command()
            self._refs += 1
            frame["ref"] = f"{self.number}.{self._refs}"
            self.pending[frame["ref"]] = Pending(frame, sent_before=True)
            frames.append(frame)
        if self.crowd.enough and not self.pending:
            self.finished.set()
        return frames

    def _command(self) -> Event:
        chance = self.rng.random()
        if chance < 0.12 and self._mine:
            if (frame := self._change(chance)) is not None:
                return frame
        elif chance < 0.18:
            room = self.rng.choice(self.rooms)
            if held := self._held(room.id):
                return {"type": "message_read", "chat_id": room.id, "message_id": next(reversed(held))}
        room = self.rng.choice(self.rooms)
        client_id, text = self.note_sent(room)
        return {"type": "new_message", "chat_id": room.id, "content": text, "client_id": client_id}

    def _change(self, chance: float) -> Event | None:
        """Edit or delete an own message, one command per message at a time and nothing after its deletion."""
        place = self.rng.randrange(len(self._mine))
        room, message_id, client_id = self._mine[place]
        if any(pending.frame.get("message_id") == message_id for pending in self.pending.values()):
            return None
        frame = {"chat_id": room.id, "message_id": message_id}
        if chance < 0.08:
            became = self.crowd.rewritten[client_id] = Rewritten(self.new_text(room, "edit"))
            return {**frame, "type": "edit_message", "content": became.text}
        self._mine.pop(place)
        if chance < 0.11:
            self.crowd.rewritten[client_id] = Rewritten("", deleted=True)
        return {**frame, "type": "delete_message", "for_everyone": chance < 0.11}


class Caller(Keeper):
    """A client that knows only REST."""

    def __init__(self, crowd: Crowd, account: Account, number: int) -> None:
        super().__init__(crowd, account, number, "caller")

    async def run(self) -> None:
        """Send one message after the other, each until it is stored, and catch up now and then."""
        async with self.crowd.http(self.number) as client:
            while not self.crowd.enough:
                room = self.rng.choice(self.rooms)
                client_id, text = self.note_sent(room)
                body = {"content": text, "client_id": client_id}
                answer = await self._ask(client, f"/api/v1/chats/{room.id}/messages", body, 201)
                self.note_acked(client_id, answer["message"]["id"], answer["message"]["seq"])
                if answer["message"]["client_id"] != client_id or answer["message"]["content"] != text:
                    self.crowd.fault(f"{self.name} sent {body} and was answered {answer}")
                if self.said % 20 == 0:
                    await self._catch_up(client)
            self.finished.set()

    async def settle(self) -> None:
        async with self.crowd.http(self.number) as client:
            await self._catch_up(client)

    async def _catch_up(self, client: httpx.AsyncClient) -> None:
        while True:
            body = self.replica.resume_frame()
            del body["type"]
            events = await self._ask(client, "/api/v1/messages/resume", body, 200)
            for event in events:
                for message in event.get("messages", ()):
                    self.note_received(message, self.number * STRETCHES, live=False)
                self.replica.apply(event)
            if events[-1]["complete"]:
                return

    async def _ask(self, client: httpx.AsyncClient, path: str, body: Event, status: int) -> Any:
        for _ in range(200):
            await self.crowd.up.wait()
            try:
                answer = await client.post(path, json=body, headers=self.account.headers)
            except httpx.TransportError:
                self.crowd.counts["requests cut"] += 1
                await asyncio.sleep(0.05)  # a client's pause between two attempts
                continue
            if answer.status_code == status:
                return answer.json()
            if answer.status_code != 503:
                raise AssertionError(f"{self.name}: {path} answered {answer.status_code} {answer.text}")
            self.crowd.counts[f"refused {answer.json()['code']}"] += 1
            await asyncio.sleep(0.1)
        raise AssertionError(f"{self.name}: {path} is never answered")
