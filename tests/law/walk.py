"""A random walk: people with several devices use a real server, and every frame they get is watched.

A step is plain data, read against the state it meets, so any part of a walk is a walk and Hypothesis can shrink one.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import socket as sockets
import struct
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import websockets
from pydantic import Field, TypeAdapter

from app.db.events import AnyEvent
from tests.support.accounts import Account, register
from tests.support.replica import Event, Replica, fetch
from tests.support.servers import Server
from tests.support.socket_client import SocketClient

Step = tuple[str, int, int, int, bool]
"""What, three numbers that choose who, where and how, and whether to wait until it is done."""

EVENTS: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="type")])
PATIENCE = 5.0
"""Seconds until devices must have all they were sent; only a failing walk waits so long."""
IN_FLIGHT_MAX = 12
PEOPLE = 5
DEVICES = 2
ANSWERS = ("ack", "error", "pong", "resumed", "heartbeat")

WEIGHTS = {
    "send": 8,
    "burst": 2,
    "retry": 2,
    "edit": 4,
    "delete": 2,
    "hide": 4,
    "read": 4,
    "delivered": 4,
    "create_group": 1,
    "create_personal": 2,
    "add": 5,
    "remove": 3,
    "leave": 2,
    "role": 2,
    "transfer": 1,
    "info": 2,
    "block": 2,
    "unblock": 3,
    "rename": 1,
    "chat_settings": 6,
    "mark_unread": 3,
    "draft": 8,
    "user_settings": 1,
    "churn": 2,
    "storm": 5,
    "leave_server": 3,
    "freeze": 1,
    "connect": 2,
    "resume": 5,
    "resume_twice": 1,
    "resume_rest": 3,
    "resume_stranger": 1,
    "back_up": 2,
    "restore": 2,
    "check": 3,
    "settle": 1,
}
NAMES = ["nothing", *(name for name, weight in WEIGHTS.items() for _ in range(weight))]


class LawBroken(AssertionError):
    """A client that resumed differs from one that fetched, or got what it must not get."""


# --- what the truth is ------------------------------------------------------------------------------------------


@dataclass
class Span:
    """Somebody's time in a chat: from version `start` until before `end`, seeing messages from `visible_from` on."""

    start: int
    end: int | None = None
    visible_from: int = 1

    def covers(self, version: int) -> bool:
        return self.start <= version and (self.end is None or version < self.end)


@dataclass
class Log:
    """A chat as the witness heard it, version by version."""

    chat_id: int
    is_group: bool
    version: int = 0
    last_seq: int = 0
    history_visible: bool = True
    spans: dict[int, list[Span]] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)
    unheard: list[range] = field(default_factory=list)
    """Versions whose single events were lost: who came and went within them nobody can tell."""

    def members(self) -> list[int]:
        return sorted(user_id for user_id, spans in self.spans.items() if spans[-1].end is None)

    def take(self, event: Event) -> None:
        """Learn from the witness's next event."""
        if event["version"] <= self.version:
            return
        lost = event["type"] == "chat_changes"
        if lost:
            self.unheard.append(range(self.version + 1, event["version"] + 1))
        info = event.get("info")
        if info is not None:
            self.history_visible = info["history_visible"]
        for member in event.get("members", ()):
            spans = self.spans.setdefault(member["user_id"], [])
            is_in = bool(spans) and spans[-1].end is None
            self.roles[member["user_id"]] = member["role"]
            if member["active"] and not is_in:
                hidden = not lost and not self.history_visible
                start = self.version + 1 if lost else event["version"]
                spans.append(Span(start, None, self.last_seq + 1 if hidden else 1))
            elif not member["active"] and is_in:
                spans[-1].end = member["version"]
        messages = [event["message"]] if "message" in event else event.get("messages", ())
        self.last_seq = max([self.last_seq, *(message["seq"] for message in messages)])
        self.version = event["version"]

    def check(self, user_id: int, event: Event) -> None:
        """Nobody gets a frame, nor a row in it, of a chat they are not in at that version."""
        if any(event["version"] in versions for versions in self.unheard):
            return
        spans = [span for span in self.spans.get(user_id, []) if span.covers(event["version"])]
        if not spans:
            raise LawBroken(f"user {user_id} got a frame from outside their time {self.spans.get(user_id)}: {event}")
        [span] = spans
        for message in [event["message"]] if "message" in event else event.get("messages", ()):
            late = span.end is not None and message["version"] >= span.end
            if late or message["seq"] < span.visible_from:
                raise LawBroken(f"user {user_id}, in the chat for {span}, got {message} in {event['type']}")


@dataclass
class Sent:
    """An acknowledged message."""

    chat_id: int
    sender_id: int
    id: int
    seq: int
    client_id: str


# --- devices ----------------------------------------------------------------------------------------------------


class Device:
    """A client: its state, perhaps a backup of it, perhaps a socket. One thing at a time, as `lock` sees to."""

    def __init__(self, world: World, account: Account, name: str) -> None:
        self.world = world
        self.account = account
        self.name = name
        self.replica = Replica(account.id)
        self.backup: Replica | None = None
        self.socket: SocketClient | None = None
        self.applied = 0
        self.synced: set[int] = set()
        self.resumed = False
        self.caught_up_over_rest = False
        self.frozen = False
        self.asking = 0
        self.lock = asyncio.Lock()
        self.history: list[str] = []

    @property
    def connected(self) -> bool:
        return self.socket is not None and self.socket.close_code is None and not self.frozen

    def pump(self, until: int | None = None) -> None:
        """Apply what has come, or the frames before `until`."""
        if self.socket is None:
            return
        frames = self.socket.seen[self.applied : until]
        self.applied += len(frames)
        for frame in frames:
            self._take(frame)
        self.socket.inbox[:] = [event for event in self.socket.inbox if event["type"] in ANSWERS]

    def _take(self, event: Event) -> None:
        self.world.watch(self.account.id, event)
        kind, chat_id = event["type"], event.get("chat_id")
        self._remember("", event)
        if "prev" in event and (self.resumed or chat_id in self.synced):
            chat = self.replica.chats.get(event["chat_id"])
            if chat is not None and event["prev"] > chat.version:
                raise LawBroken(f"{self} was resumed, has version {chat.version} and gets {event}\n{self.tail()}")
        self.replica.apply(event)
        if kind == "synced":
            self.synced.add(event["chat_id"])
        elif kind == "resumed":
            self.resumed = True
        elif kind == "hello":
            self.resumed = False

    def _remember(self, door: str, event: Event) -> None:
        names = ("chat_id", "version", "prev", "account_version", "user_id", "seq", "blocked", "message_id")
        shown = {name: event[name] for name in names if name in event}
        if "message" in event:
            shown |= {"id": event["message"]["id"], "seq": event["message"]["seq"]}
        self.history.append(f"{door}{event['type']} {shown}")

    def tail(self) -> str:
        return f"{self}:\n" + "\n".join(self.history[-60:])

    async def connect(self) -> None:
        """Open a socket, without resuming."""
        if self.connected:
            return
        await self.leave(cut=4)
        self.socket = await SocketClient.open(self.world.next_server().ws_url, self.account.access_token)
        self.world.opened.append(self.socket)
        if self.socket.seen[0]["type"] != "hello":
            raise LawBroken(f"{self} got {self.socket.seen[0]} before hello")
        self.applied, self.synced, self.resumed, self.caught_up_over_rest = 0, set(), False, False
        self.history.append(f"-- connected with {self.replica.resume_frame()}")

    async def leave(self, *, cut: int, gently: bool = False) -> None:
        """Lose the socket with `cut` quarters of what waited applied, and the rest lost."""
        socket, self.socket = self.socket, None
        if socket is None:
            return
        waiting = len(socket.seen) - self.applied
        self.socket = socket
        self.pump(self.applied + waiting * cut // 4)
        self.socket = None
        for event in socket.seen[self.applied :]:
            self.world.watch(self.account.id, event)
        self.frozen = self.resumed = self.caught_up_over_rest = False
        self.history.append(f"-- left, {waiting - waiting * cut // 4} of {waiting} frames lost")
        if gently and socket.close_code is None:
            await socket.close()
        else:
            cut_off(socket)
        await asyncio.gather(socket._reader, return_exceptions=True)

    async def ask(self, frame: Event) -> Event | None:
        """Send a command and return its answer; None when the connection ended."""
        socket = self.socket
        assert socket is not None
        ref = uuid.uuid4().hex
        self.asking += 1
        try:
            await socket.send(**{**frame, "ref": ref})
            return await socket.wait(lambda event: event["type"] in ANSWERS, ref=ref)
        except (AssertionError, websockets.ConnectionClosed):
            if socket.close_code == 1012 or socket is not self.socket or self.world.killing:
                return None  # the server asks to come back, or the client left before it heard the answer
            raise
        finally:
            self.asking -= 1

    async def resume(self, strange_chat: int | None = None) -> None:
        """Resume over the socket."""
        await self.connect()
        self.pump()
        frame = self.replica.resume_frame()
        if strange_chat is not None:
            frame["chats"] = {**frame["chats"], str(strange_chat): 3}
        self.history.append(f"-- resumes {frame}")
        await self.ask(frame)

    async def resume_over_rest(self) -> None:
        """Resume over REST, page by page. What the socket brings meanwhile waits until a page is applied."""
        for _ in range(200):
            self.pump()
            self.replica.holes.clear()
            frame = self.replica.resume_frame()
            del frame["type"]
            self.history.append(f"-- resumes over REST {frame}")
            answer = await self.world.http.post("/api/v1/messages/resume", json=frame, headers=self.account.headers)
            if answer.status_code == 503:
                continue
            assert answer.status_code == 200, answer.text
            for event in answer.json():
                self.world.watch(self.account.id, event)
                self._remember("REST ", event)
                self.replica.apply(event)
            self.pump()
            if answer.json()[-1]["complete"] and not self.replica.holes:
                self.caught_up_over_rest = True
                return
        raise LawBroken(f"resuming over REST does not end\n{self.tail()}")

    def __repr__(self) -> str:
        return f"device {self.name} of user {self.account.id}"


def cut_off(socket: SocketClient) -> None:
    """End a connection with a RST, as a lost network looks once it is back."""
    raw = socket.connection.transport.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    socket.abort()


def client(server: Server) -> httpx.AsyncClient:
    """A client that gives idle connections up before the server does, lest a request run into the end of one."""
    limits = httpx.Limits(max_connections=20, keepalive_expiry=2)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30)


# --- the world --------------------------------------------------------------------------------------------------


class World:
    """People, their devices, and the steps they take."""

    def __init__(self, servers: Sequence[Server], restart: Callable[[], Server] | None = None) -> None:
        """Workers of one database; sockets and requests go to each in turn."""
        self.servers = list(servers)
        self.restart = restart
        self.clients = [client(server) for server in servers]
        self._turns = itertools.count()
        self.people: list[Account] = []
        self.devices: list[Device] = []
        self.witness: Device
        self.logs: dict[int, Log] = {}
        self.sent: list[Sent] = []
        self.unwatched: list[tuple[int, Event]] = []
        self.opened: list[SocketClient] = []
        self.in_flight: set[asyncio.Task[None]] = set()
        self.failures: list[BaseException] = []
        self.texts = itertools.count(1)
        self.frames = 0
        self.checks = 0
        self.killing = False

    async def walk(self, steps: Sequence[Step]) -> None:
        """Take the steps, then compare everybody with the server."""
        where = "at the beginning"
        try:
            await self._begin()
            for number, step in enumerate(steps, 1):
                where = f"at step {number} {step}"
                await self._step(*step)
            where = "at the end"
            await self.settle()
            await self._check_acknowledged()
        except Exception as error:
            raise LawBroken(f"{where}, after {self.frames} frames: {type(error).__name__} {error}") from error
        finally:
            for task in self.in_flight:
                task.cancel()
            await asyncio.gather(*self.in_flight, return_exceptions=True)
            for socket in self.opened:
                cut_off(socket)
                await asyncio.gather(socket._reader, return_exceptions=True)
            for http in self.clients:
                await http.aclose()

    def next_server(self) -> Server:
        """Where the next socket is opened."""
        return self.servers[next(self._turns) % len(self.servers)]

    @property
    def http(self) -> httpx.AsyncClient:
        """What the next request goes through."""
        return self.clients[next(self._turns) % len(self.clients)]

    async def _begin(self) -> None:
        for _ in range(PEOPLE):
            account = await register(self.http)
            self.people.append(account)
            self.devices += [Device(self, account, str(number)) for number in range(DEVICES)]
        # The first device of the first person is never disturbed; by what it hears, everybody else is judged.
        self.witness = self.devices.pop(0)
        await self.witness.resume()
        everybody = [account.id for account in self.people]
        await self._create(0, {"title": "all", "member_ids": everybody})
        await self._create(1, {"title": "few", "member_ids": everybody[:2], "history_visible": False})
        await self._create(2, None, peer_id=everybody[1])
        for device in self.devices[::2]:
            await device.resume()

    async def _step(self, name: str, a: int, b: int, c: int, wait: bool) -> None:
        if name == "nothing":
            return
        if name in ("check", "settle", "kill"):
            await self.quiesce()
            await {"check": lambda: self.check(self._device(a)), "settle": self.settle, "kill": self.kill}[name]()
            return
        action: Coroutine[Any, Any, None] = getattr(self, f"do_{name}")(a, b, c)
        while len(self.in_flight) >= IN_FLIGHT_MAX:
            await asyncio.wait(self.in_flight, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(action)
        self.in_flight.add(task)
        task.add_done_callback(self._done)
        if wait:
            await asyncio.wait([task])
            if name.startswith("resume"):
                await self.quiesce()
                await self.check(self._device(a))
        else:
            await asyncio.sleep(0)
        self._raise()

    def _done(self, task: asyncio.Task[None]) -> None:
        self.in_flight.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    def _raise(self) -> None:
        if self.failures:
            raise self.failures[0]

    # --- watching ---

    def watch(self, user_id: int, event: Event) -> None:
        """Check a frame's shape, and keep it until the witness knows who might see it."""
        self.frames += 1
        seen = EVENTS.validate_python(event, strict=True)
        if EVENTS.dump_python(seen) != event:
            raise LawBroken(f"a frame has more than is published: {event}")
        if "prev" in event and event["type"] != "chat_changes" and event["prev"] != event["version"] - 1:
            raise LawBroken(f"versions are not dense: {event}")
        if "prev" in event or event["type"] == "reset":
            self.unwatched.append((user_id, event))
        if user_id == self.witness.account.id and "prev" in event and event["chat_id"] in self.logs:
            log = self.logs[event["chat_id"]]
            if event["prev"] <= log.version:
                log.take(event)

    async def quiesce(self) -> None:
        """Return once nothing is under way and all that came so far is judged."""
        if self.in_flight:
            await asyncio.wait(self.in_flight)
        self._raise()
        if not self.witness.connected:
            await self.witness.resume()
        for _ in range(2):
            await self.witness.ask({"type": "ping"})
        self.witness.pump()
        later: list[tuple[int, Event]] = []
        for user_id, event in self.unwatched:
            log = self.logs.get(event["chat_id"])
            if log is None:
                raise LawBroken(f"user {user_id} hears of a chat that nobody made: {event}")
            if log.is_group and event["version"] > log.version:
                later.append((user_id, event))
            else:
                log.check(user_id, event)
        self.unwatched = later

    async def check(self, device: Device) -> None:
        """The law: a device that resumed equals one that fetches everything afresh."""
        async with device.lock:
            if device.frozen:
                await device.leave(cut=4)
            if device.caught_up_over_rest and not device.connected:
                await device.resume_over_rest()  # with nothing under way any more
            while not (device.caught_up_over_rest or (device.connected and device.resumed)):
                await device.resume()
                device.pump()
            await self._compare(device, await fetch(self.http, device.account.headers, device.account.id))

    async def _compare(self, device: Device, truth: Replica) -> None:
        self.checks += 1
        expected = view(truth)
        for chat_id, chat in truth.chats.items():
            seqs = sorted(message["seq"] for message in chat.messages.values())
            if seqs and seqs != list(range(seqs[0], seqs[-1] + 1)):
                raise LawBroken(f"messages of chat {chat_id} are not dense: {seqs}")
        deadline = time.monotonic() + PATIENCE
        while True:
            problem: object = None
            if device.connected:
                await device.ask({"type": "ping"})
                await device.ask({"type": "ping"})
                device.pump()
                if device.caught_up_over_rest and not device.resumed and device.replica.holes:
                    await device.resume_over_rest()
            try:
                await device.replica.complete(self.http, device.account.headers)
            except AssertionError as error:  # a chat that the server does not show them
                problem = error
            held = view(device.replica)
            if problem is None and held == expected:
                break
            if time.monotonic() > deadline:
                raise LawBroken(f"{device} differs: {problem or difference(held, expected)}\n{device.tail()}")

    async def settle(self) -> None:
        """Everybody comes back, equals the server, and hears so in a heartbeat."""
        await self.quiesce()
        truths = {account.id: await fetch(self.http, account.headers, account.id) for account in self.people}
        everyone = [self.witness, *self.devices]
        for device in everyone:
            async with device.lock:
                if device.frozen:
                    await device.leave(cut=4)
                while not (device.connected and device.resumed):
                    await device.resume()
                    device.pump()
                await self._compare(device, truths[device.account.id])
        await asyncio.gather(*map(self._hear_heartbeat, everyone))

    async def _hear_heartbeat(self, device: Device) -> None:
        socket = device.socket
        assert socket is not None
        socket.inbox[:] = [event for event in socket.inbox if event["type"] != "heartbeat"]
        mine = (device.replica.account_version, device.replica.digest())
        deadline = time.monotonic() + PATIENCE
        while True:
            heartbeat = await socket.wait(type="heartbeat")
            theirs = (heartbeat["account_version"], heartbeat["digest"])
            if mine == theirs:
                return
            if len(self.servers) > 1 and mine[1] == theirs[1] and mine[0] < theirs[0]:
                # Account events of two workers may overtake each other (decision 10): then the client resumes.
                async with device.lock:
                    await device.resume()
                    device.pump()
                mine = (device.replica.account_version, device.replica.digest())
            if time.monotonic() > deadline:
                raise LawBroken(f"{device} has (account, digest) {mine}; heartbeats say {theirs}\n{device.tail()}")

    async def _check_acknowledged(self) -> None:
        truth = await fetch(self.http, self.people[0].headers, self.people[0].id)
        for sent in self.sent:
            chat = truth.chats.get(sent.chat_id)
            if chat is not None and chat.messages.get(sent.id, {}).get("seq") != sent.seq:
                raise LawBroken(f"acknowledged and not there: {sent}")

    async def kill(self) -> None:
        """Kill a server in the middle of what `do_` left under way, and start another on the same database."""
        if self.restart is None:
            return
        for number in range(6):
            self._spawn_quietly(self.do_send(number, number * 7, 1))
        await asyncio.sleep(0)
        self.killing = True
        killed = next(self._turns) % len(self.servers)
        self.servers[killed].kill()
        await asyncio.gather(*self.in_flight, return_exceptions=True)
        self.killing = False
        self.failures.clear()
        await self.clients[killed].aclose()
        self.servers[killed] = await asyncio.to_thread(self.restart)
        self.clients[killed] = client(self.servers[killed])
        await self.witness.leave(cut=4)
        for number, device in enumerate(self.devices):
            await device.leave(cut=number % 5)

    def _spawn_quietly(self, action: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(action)
        self.in_flight.add(task)
        task.add_done_callback(self._done)

    # --- choosing ---

    def _device(self, a: int) -> Device:
        return self.devices[a % len(self.devices)]

    def _log(self, b: int, *, groups: bool = False) -> Log:
        logs = [log for log in self.logs.values() if log.is_group or not groups]
        return logs[b % len(logs)]

    def _person(self, log: Log, a: int) -> Account:
        """Mostly a member; now and then somebody who is none, and who must get nowhere."""
        members = log.members()
        if a % 16 == 15:
            return self.people[a // 16 % PEOPLE]
        return self._account(members[a % len(members)])

    def _ranking(self, log: Log, role: str, a: int) -> Account:
        fitting = [user_id for user_id in log.members() if log.roles.get(user_id) in (role, "owner")]
        return self._account(fitting[a % len(fitting)]) if fitting else self._person(log, a)

    def _account(self, user_id: int) -> Account:
        return next(account for account in self.people if account.id == user_id)

    def _target(self, a: int) -> Sent | None:
        # Mostly a recent one: that is where things race.
        return self.sent[-1 - min(a % 23, len(self.sent) - 1)] if self.sent else None

    async def _call(self, account: Account, method: str, path: str, body: Any = None) -> Any:
        """A request that may be refused, and must not fail."""
        answer = await self.http.request(method, f"/api/v1{path}", json=body, headers=account.headers)
        assert answer.status_code < 500, (method, path, answer.status_code, answer.text)
        return answer.json() if answer.is_success and answer.content else None

    # --- people ---

    async def do_send(self, a: int, b: int, c: int) -> None:
        log = self._log(b)
        await self._send(log.chat_id, self._person(log, a), str(uuid.uuid4()), c)

    async def _send(self, chat_id: int, account: Account, client_id: str, c: int) -> None:
        text = f"{next(self.texts)} to {chat_id}"
        device = next((d for d in self.devices if d.account is account and d.connected), None)
        if c % 2 and device is not None:
            frame = {"type": "new_message", "chat_id": chat_id, "content": text, "client_id": client_id}
            answer = await device.ask(frame)
            if answer is None or answer["type"] != "ack":
                return
            id, seq = answer["message_id"], answer["seq"]
        else:
            path = f"/chats/{chat_id}/messages"
            done = await self._call(account, "POST", path, {"content": text, "client_id": client_id})
            if done is None:
                return
            id, seq = done["message"]["id"], done["message"]["seq"]
        sent = Sent(chat_id, account.id, id, seq, client_id)
        first = next((other for other in self.sent if other.client_id == client_id), None)
        if first is None:
            self.sent.append(sent)
        elif first != sent:
            raise LawBroken(f"a retry of {first} was answered with {sent}")

    async def do_burst(self, a: int, b: int, c: int) -> None:
        log = self._log(b)
        account = self._person(log, a)
        count = 110 if c % 4 == 0 else 35
        await asyncio.gather(*(self._send(log.chat_id, account, str(uuid.uuid4()), c) for _ in range(count)))

    async def do_retry(self, a: int, b: int, c: int) -> None:
        if (sent := self._target(a)) is not None:
            await self._send(sent.chat_id, self._account(sent.sender_id), sent.client_id, c)

    async def do_edit(self, a: int, b: int, c: int) -> None:
        if (sent := self._target(a)) is not None:
            path = f"/chats/{sent.chat_id}/messages/{sent.id}"
            await self._call(self._account(sent.sender_id), "PATCH", path, {"content": f"edited {next(self.texts)}"})

    async def do_delete(self, a: int, b: int, c: int) -> None:
        if (sent := self._target(a)) is not None:
            path = f"/chats/{sent.chat_id}/messages/{sent.id}"
            await self._call(self._account(sent.sender_id), "DELETE", path)

    async def do_hide(self, a: int, b: int, c: int) -> None:
        if (sent := self._target(a)) is not None:
            path = f"/chats/{sent.chat_id}/messages/{sent.id}?for_everyone=false"
            await self._call(self._person(self.logs[sent.chat_id], b), "DELETE", path)

    async def do_read(self, a: int, b: int, c: int) -> None:
        if (sent := self._target(a)) is not None:
            path = f"/chats/{sent.chat_id}/messages/{sent.id}/read"
            await self._call(self._person(self.logs[sent.chat_id], b), "POST", path)

    async def do_delivered(self, a: int, b: int, c: int) -> None:
        if (sent := self._target(a)) is not None:
            account = self._person(self.logs[sent.chat_id], b)
            device = next((d for d in self.devices if d.account is account and d.connected), None)
            if device is not None:
                await device.ask({"type": "message_delivered", "chat_id": sent.chat_id, "message_id": sent.id})

    async def do_create_group(self, a: int, b: int, c: int) -> None:
        others = [account.id for number, account in enumerate(self.people) if number == 0 or b >> number & 1]
        title = f"group {next(self.texts)}"
        await self._create(a, {"title": title, "member_ids": others, "history_visible": c % 2 == 0})

    async def do_create_personal(self, a: int, b: int, c: int) -> None:
        await self._create(a, None, peer_id=self.people[b % PEOPLE].id)

    async def _create(self, a: int, group: Event | None, peer_id: int = 0) -> None:
        if len(self.logs) >= 8:
            return
        account = self.people[a % PEOPLE]
        if group is None:
            chat = await self._call(account, "POST", "/chats/personal", {"user_id": peer_id})
            members = {account.id, peer_id}
        else:
            chat = await self._call(account, "POST", "/chats/group", group)
            members = {account.id, *group["member_ids"]}
        if chat is None or chat["id"] in self.logs:
            return
        log = Log(chat["id"], group is not None, 2 if group else 1, 1 if group else 0, chat["history_visible"])
        log.spans = {user_id: [Span(0)] for user_id in members}
        log.roles = dict.fromkeys(members, "member") | {account.id: chat["role"]}
        self.logs[chat["id"]] = log

    async def do_add(self, a: int, b: int, c: int) -> None:
        log = self._log(b, groups=True)
        outside = [account.id for account in self.people if account.id not in log.members()]
        if outside:
            who = [outside[c % len(outside)]]
            path = f"/chats/{log.chat_id}/members"
            await self._call(self._ranking(log, "admin", a), "POST", path, {"user_ids": who})

    async def do_remove(self, a: int, b: int, c: int) -> None:
        log = self._log(b, groups=True)
        if removable := [user_id for user_id in log.members() if user_id != self.people[0].id]:
            path = f"/chats/{log.chat_id}/members/{removable[c % len(removable)]}"
            await self._call(self._ranking(log, "admin", a), "DELETE", path)

    async def do_leave(self, a: int, b: int, c: int) -> None:
        log = self._log(b, groups=True)
        account = self._person(log, a)
        if account is not self.people[0]:
            await self._call(account, "POST", f"/chats/{log.chat_id}/leave")

    async def do_role(self, a: int, b: int, c: int) -> None:
        await self._set_role(self._log(b, groups=True), a, "admin" if c % 3 else "member")

    async def do_transfer(self, a: int, b: int, c: int) -> None:
        await self._set_role(self._log(b, groups=True), a, "owner")

    async def _set_role(self, log: Log, a: int, role: str) -> None:
        member = self._person(log, a)
        path = f"/chats/{log.chat_id}/members/{member.id}/role"
        await self._call(self._ranking(log, "owner", a), "PUT", path, {"role": role})

    async def do_info(self, a: int, b: int, c: int) -> None:
        log = self._log(b, groups=True)
        bodies = ({"title": f"title {c}"}, {"history_visible": c % 2 == 0}, {"description": f"about {c}", "title": "t"})
        await self._call(self._ranking(log, "admin", a), "PATCH", f"/chats/{log.chat_id}", bodies[c % 3])

    async def do_block(self, a: int, b: int, c: int) -> None:
        await self._call(self.people[a % PEOPLE], "POST", f"/users/block/{self.people[b % PEOPLE].id}")

    async def do_unblock(self, a: int, b: int, c: int) -> None:
        await self._call(self.people[a % PEOPLE], "DELETE", f"/users/block/{self.people[b % PEOPLE].id}")

    async def do_rename(self, a: int, b: int, c: int) -> None:
        await self._call(self.people[a % PEOPLE], "PATCH", "/users/me", {"display_name": f"Name {b}"})

    async def do_chat_settings(self, a: int, b: int, c: int) -> None:
        log = self._log(b)
        moments = ("9999-12-31T23:59:59.000Z", "2100-01-01T00:00:00.000Z", "1970-01-01T00:00:00.000Z")
        body = ({"muted_until": moments[c % 3]}, {"pinned": c % 3 > 0}, {"archived": c % 2 == 0, "pinned": True})[b % 3]
        await self._call(self._person(log, a), "PATCH", f"/chats/{log.chat_id}/settings", body)

    async def do_mark_unread(self, a: int, b: int, c: int) -> None:
        """Marked as unread on one device, and read on another, after it or at the same time."""
        if (sent := self._target(a)) is None:
            return
        account = self._person(self.logs[sent.chat_id], b)
        path = f"/chats/{sent.chat_id}"
        marking = self._call(account, "PATCH", f"{path}/settings", {"marked_unread": c % 8 != 7})
        reading = self._call(account, "POST", f"{path}/messages/{sent.id}/read")
        if c % 2:
            await asyncio.gather(marking, reading)
        else:
            await marking
            await reading

    async def do_draft(self, a: int, b: int, c: int) -> None:
        log = self._log(b)
        path = f"/chats/{log.chat_id}/draft"
        if c % 3 == 0:
            await self._call(self._person(log, a), "DELETE", path)
        else:
            reply_to = self.sent[-1].id if c % 2 and self.sent else None
            body = {"content": f"begun {next(self.texts)}", "reply_to": reply_to}
            await self._call(self._person(log, a), "PUT", path, body)

    async def do_user_settings(self, a: int, b: int, c: int) -> None:
        body = {"notify_personal": b % 2 == 0, "notify_groups": c % 2 == 0}
        await self._call(self.people[a % PEOPLE], "PATCH", "/users/me/settings", body)

    async def do_churn(self, a: int, b: int, c: int) -> None:
        """Somebody is put out and let in again, as fast as it goes."""
        log = self._log(b, groups=True)
        account = self.people[1 + a % (PEOPLE - 1)]
        path = f"/chats/{log.chat_id}/members"
        for _ in range(1 + c % 2):
            await self._call(self._ranking(log, "admin", c), "DELETE", f"{path}/{account.id}")
            await self._send(log.chat_id, self.people[0], str(uuid.uuid4()), 0)
            if c % 3:
                await self._call(self._ranking(log, "admin", c), "POST", path, {"user_ids": [account.id]})

    async def do_storm(self, a: int, b: int, c: int) -> None:
        """What races with catching up, while a device catches up."""
        device = self._device(a)
        number = self.people.index(device.account)
        hides = [
            self._call(device.account, "DELETE", f"/chats/{sent.chat_id}/messages/{sent.id}?for_everyone=false")
            for sent in self.sent[-3:]
        ]
        await asyncio.gather(
            self._with(device, device.resume_over_rest if b % 4 == 0 else device.resume),
            self.do_churn(number - 1, b, c),
            self.do_send(c, b, 1),
            self.do_read(0, number, c),
            (self.do_block if c % 2 else self.do_unblock)(number, b, c),
            self.do_chat_settings(number, b, c),
            self.do_draft(number, b, c),
            *hides,
        )

    # --- devices ---

    async def _with(self, device: Device, *actions: Callable[[], Awaitable[None]]) -> None:
        async with device.lock:
            for action in actions:
                await action()

    async def do_leave_server(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        await self._with(device, lambda: device.leave(cut=b % 5, gently=c % 2 == 0))

    async def do_freeze(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        async with device.lock:
            if device.connected and device.socket is not None and not device.asking:
                device.socket.connection.transport.pause_reading()
                device.frozen = True

    async def do_connect(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        await self._with(device, device.connect)

    async def do_resume(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        await self._with(device, device.resume)

    async def do_resume_twice(self, a: int, b: int, c: int) -> None:
        device = self._device(a)

        async def twice() -> None:
            await device.connect()
            await asyncio.gather(device.resume(), device.resume())

        await self._with(device, *((twice,) if b % 2 else (device.resume, device.resume)))

    async def do_resume_rest(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        await self._with(device, device.resume_over_rest)

    async def do_resume_stranger(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        strange = [log.chat_id for log in self.logs.values() if device.account.id not in log.members()]
        await self._with(device, lambda: device.resume(strange[b % len(strange)] if strange else 10**9))

    async def do_back_up(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        async with device.lock:
            device.pump()
            device.backup = copy.deepcopy(device.replica)

    async def do_restore(self, a: int, b: int, c: int) -> None:
        device = self._device(a)
        async with device.lock:
            await device.leave(cut=b % 5)
            device.replica = copy.deepcopy(device.backup) if device.backup else Replica(device.account.id)
            device.history.append("-- restored from its backup")


# --- comparing --------------------------------------------------------------------------------------------------


def view(replica: Replica) -> dict[str, Any]:
    """What must be equal: the state, and the number on each chat's badge."""
    return {
        **replica.view(),
        "unread": {chat_id: chat.unread(replica.user_id) for chat_id, chat in replica.chats.items()},
    }


def difference(held: Any, expected: Any, path: str = "") -> list[str]:
    """Where two states differ, in words."""
    if isinstance(held, dict) and isinstance(expected, dict):
        keys = [*expected, *(key for key in held if key not in expected)]
        found: list[str] = []
        for key in keys:
            if key not in held:
                found.append(f"{path}.{key} is missing (it is {expected[key]})")
            elif key not in expected:
                found.append(f"{path}.{key} is too much: {held[key]}")
            else:
                found += difference(held[key], expected[key], f"{path}.{key}")
        return found[:12]
    return [] if held == expected else [f"{path} is {held!r} instead of {expected!r}"]
