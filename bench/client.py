"""The load generator: one process, many virtual users, one scenario. Started by `python -m bench`.

`python -m bench.client TASK.json` prints one JSON object. Users run in a closed loop (each sends its next message
when the last one is acknowledged and delivered) or an open one (messages leave at random moments fixed beforehand,
whatever the server does, and latency counts from those moments). Everything goes into the ledger, and is checked
against the server's history at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import uuid4

import orjson
import pymysql
import uvloop

from bench import ledger as books
from bench import machine, world
from bench.ledger import Acked, Ledger, Received, Sent, Stored
from bench.stream import CommonStream, Reader
from bench.websocket import TEXT, Refused, Socket, connect
from bench.world import Person, Room, World

SOCKET_PATH = "/api/v1/messages/ws"
FILLER = "the quick brown fox jumps over the lazy dog, and then some"
ECHO = b'{"type":"new_message","chat_id":1234567,"content":"' + FILLER.encode() + b'","message_type":"text"}'
CONNECTS_AT_ONCE = 50


@dataclass(slots=True)
class Task:
    """What to do. Read from a file that the parent wrote."""

    what: Literal["setup", "pairs", "group", "open", "echo", "idle"]
    port: int
    world: str = ""
    door: Literal["bearer", "query"] = "bearer"
    seqs: bool = True
    """Whether the server numbers messages 1, 2, 3 in each chat and promises their order."""
    framed_once: bool = True
    """Whether all members of a group get the same bytes."""
    server_pid: int | None = None
    database_pid: int | None = None
    warmup: float = 1.0
    seconds: float = 5.0
    drain: float = 60.0
    members: int = 0
    senders: int = 100
    rate: float = 1000.0
    people: int = 0
    pairs: int = 0
    groups: list[int] = field(default_factory=list)
    connections: int = 0
    sources: int = 20
    archive: dict[str, Any] = field(default_factory=dict)
    """How to connect to the database of a peer that keeps its own."""


@dataclass(slots=True)
class Result:
    """What came out."""

    rate: float = 0.0
    """Messages (or echoes) a second."""
    deliveries: float = 0.0
    """Deliveries a second."""
    latency_ms: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    """Share of a core that each process used while measuring."""
    kib_each: float = 0.0
    drops: int = 0
    connected: int = 0
    connect_seconds: float = 0.0
    messages: int = 0
    ledger: str = ""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Empty when all is well."""


# --- one run ----------------------------------------------------------------------------------------------------


class Run:
    """What the users of a scenario share."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.ledger = Ledger()
        self.result = Result()
        self.sending = False
        self.ending = False
        self.done = 0
        self.errors: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.latencies: list[float] = []
        self._names = str(uuid4())[:-12]
        self._number = 0

    def next_message(self) -> tuple[str, str]:
        """A client id and the body of a text."""
        self._number += 1
        return f"{self._names}{self._number:012x}", f"{self._number:08d} {FILLER}"

    def problem(self, text: str) -> None:
        """Note what should not have happened; the first few are enough."""
        if len(self.result.problems) < 10:
            self.result.problems.append(text)

    async def measure(self, progress: Callable[[], int]) -> None:
        """Let the warm-up pass, then watch the counter for the time that counts."""
        task, result = self.task, self.result
        await asyncio.sleep(task.warmup)
        self.latencies.clear()
        pids = {"server": task.server_pid, "database": task.database_pid, "generator": os.getpid()}
        cpu = {name: machine.cpu_seconds(pid) for name, pid in pids.items()}
        count, begun = progress(), time.monotonic()
        await asyncio.sleep(task.seconds)
        took = time.monotonic() - begun
        result.messages = progress() - count
        result.rate = result.messages / took
        result.cpu = {name: (machine.cpu_seconds(pid) - cpu[name]) / took for name, pid in pids.items()}

    async def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Wait until what was sent has arrived everywhere."""
        deadline = time.monotonic() + self.task.drain
        while not done():
            if self.result.problems:
                # Somebody is gone: it will not get better.
                deadline = min(deadline, time.monotonic() + 2)
            if time.monotonic() > deadline:
                self.problem(f"{what} within {self.task.drain:.0f} s")
                return
            await asyncio.sleep(0.01)
        # Twins and strays get a moment to show up.
        await asyncio.sleep(0.1)


class User(Socket):
    """A connected person that keeps its ledger."""

    def __init__(self, run: Run, person: Person, chat: int) -> None:
        super().__init__()
        self.run = run
        self.person = person
        self.chat = chat
        self.count = 0
        """Messages received live."""
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_closed(self) -> None:
        if not self.run.ending:
            self.run.problem(f"user {self.person.id}: {self.closed}")
        if not self.greeted.done():
            self.greeted.set_exception(Refused(self.closed))
            # Nobody may be waiting any more.
            self.greeted.exception()

    def on_text(self, payload: bytes) -> None:
        event = orjson.loads(payload)
        kind = event["type"]
        if kind == "new_message":
            message = event["message"]
            client_id = message["client_id"]
            self.count += 1
            self.run.ledger.received_rows.append(_received(self.person.id, message))
            self.on_message(client_id, message["sender_id"])
        elif kind == "ack":
            client_id, message_id = event["client_id"], event["message_id"]
            self.run.ledger.acked_rows.append(
                Acked(self.person.id, client_id, message_id, event.get("seq") or message_id)
            )
            self.on_ack(client_id)
        else:
            self.on_event(kind, event)

    def on_event(self, kind: str, event: dict[str, Any]) -> None:
        """Anything but messages and acks."""
        if kind == "hello":
            if not self.greeted.done():
                self.greeted.set_result(None)
            return
        self.run.others[kind] += 1
        if kind == "error":
            self.run.errors[event["code"]] += 1
            self.run.problem(f"user {self.person.id}: the server refused: {payload_start(event)}")
        elif kind in ("chat_changes", "reset"):
            for message in event["messages"]:
                self.run.ledger.received_rows.append(_received(self.person.id, message, live=False))
                self.on_message(message["client_id"], message["sender_id"])

    def on_message(self, client_id: str, sender_id: int) -> None:
        """A message of the chat arrived."""

    def on_ack(self, client_id: str) -> None:
        """An own message is stored."""

    def say(self, audience: str) -> str:
        """Send a message and return its client id."""
        client_id, body = self.run.next_message()
        text = f"{body} {audience}"
        self.run.ledger.sent_rows.append(Sent(self.person.id, self.chat, client_id, text))
        self.send(
            b'{"type":"new_message","chat_id":%d,"content":"%s","message_type":"text","client_id":"%s","ref":"%d"}'
            % (self.chat, text.encode(), client_id.encode(), self.run.done)
        )
        return client_id


def payload_start(event: dict[str, Any]) -> str:
    """An event in few words."""
    return orjson.dumps(event)[:300].decode()


def _received(user: int, message: dict[str, Any], *, live: bool = True) -> Received:
    return Received(
        user,
        message["chat_id"],
        message.get("seq") or message["id"],
        message["id"],
        message["client_id"],
        message["content"],
        0,
        live,
    )


class Talker(User):
    """One that says the next thing when the last one is acknowledged and has arrived."""

    def __init__(self, run: Run, person: Person, chat: int, audience: str) -> None:
        super().__init__(run, person, chat)
        self.audience = audience
        self.listens_to: Talker | None = None
        """Whose messages this one confirms: the peer in a pair, oneself in a group."""
        self.waiting_for = ""
        self._acked = False
        self._arrived = False
        self._sent_at = 0.0

    def talk(self) -> None:
        """Say the next thing."""
        if not self.run.sending:
            self.waiting_for = ""
            return
        self._acked = self._arrived = False
        self._sent_at = time.monotonic()
        self.waiting_for = self.say(self.audience)

    def on_ack(self, client_id: str) -> None:
        if client_id == self.waiting_for:
            self._acked = True
            self._go_on()

    def on_message(self, client_id: str, sender_id: int) -> None:
        speaker = self.listens_to
        if speaker is not None and client_id == speaker.waiting_for:
            speaker.has_arrived()

    def has_arrived(self) -> None:
        """Called by whoever confirms."""
        if not self._arrived:
            self._arrived = True
            self.run.latencies.append(time.monotonic() - self._sent_at)
            self._go_on()

    def _go_on(self) -> None:
        if self._acked and self._arrived:
            self.run.done += 1
            self.talk()


class GroupMember(Talker):
    """A member of a group on a server that frames each message once: bytes are compared, not parsed."""

    def __init__(self, run: Run, person: Person, chat: int, audience: str, group: CommonGroup) -> None:
        super().__init__(run, person, chat, audience)
        self.group = group
        self.reader = Reader(group.stream, self._on_other)
        self.own_end = -1
        """Where the message that this one waits for ends in the common stream, once it is known."""
        self._streaming = False

    def stream_on(self) -> None:
        """From the greeting on, everything goes through the reader."""
        self._streaming = True
        rest, self._rest = self._rest, b""
        if rest:
            self.reader.feed(rest)

    def data_received(self, data: bytes) -> None:
        if not self._streaming:
            super().data_received(data)
            return
        reader = self.reader
        reader.feed(data)
        if 0 <= self.own_end <= reader.position:
            self.own_end = -1
            self.has_arrived()
        if reader.diverged:
            self.run.problem(f"user {self.person.id} saw another order than the others: {reader.diverged}")

    def _on_other(self, first: int, payload: bytes) -> None:
        if first == TEXT:
            self.on_text(payload)
        else:
            self.on_control(first, payload)


class CommonGroup:
    """What the members of a group share."""

    def __init__(self) -> None:
        self.stream = CommonStream(self._on_frame)
        self.rows: list[Received] = []
        self.by_id: dict[int, GroupMember] = {}

    def _on_frame(self, payload: bytes, end: int) -> None:
        message = orjson.loads(payload)["message"]
        self.rows.append(_received(0, message))
        member = self.by_id.get(message["sender_id"])
        if member is not None and member.waiting_for == message["client_id"]:
            member.own_end = end


# --- connecting and checking ------------------------------------------------------------------------------------


U = TypeVar("U", bound=User)


async def join(task: Task, make: Callable[[], U], person: Person, source: str | None = None) -> U:
    """Connect a user and wait for the greeting.

    Raises Refused when the server says no.
    """
    if task.door == "bearer":
        user = await connect(make, task.port, SOCKET_PATH, token=person.token, source=source)
    else:
        user = await connect(make, task.port, f"{SOCKET_PATH}?token={person.token}", source=source)
    async with asyncio.timeout(30):
        await user.greeted
    return user


async def starting_points(task: Task, rooms: Sequence[Room], people: list[Person]) -> list[int]:
    """The seq of each chat's newest message before the run."""
    api = world.Api(task.port)
    try:
        return await world.in_turns(lambda room: api.newest_seq(room, people), rooms)
    finally:
        await api.http.aclose()


async def settle(run: Run, rooms: Sequence[Room], people: list[Person], after: list[int]) -> None:
    """Read the history back and check the ledger against it."""
    api = world.Api(run.task.port)
    try:
        pages = await world.in_turns(
            lambda place: api.history(place[0], people, place[1]), list(zip(rooms, after, strict=True))
        )
    finally:
        await api.http.aclose()
    history: list[Stored] = [row for page in pages for row in page]
    audience = {room.chat: {people[member].id for member in room.members} for room in rooms}
    promised = run.task.seqs
    report = books.check(
        run.ledger,
        history,
        members=audience,
        present=audience,
        ordered=promised,
        gap_free=promised,
        dense=promised,
    )
    run.result.ledger = str(report)
    if not report.ok:
        run.problem(f"the ledger does not balance: {report}")
    if run.others:
        run.result.notes.append("other frames: " + ", ".join(f"{kind} {n}" for kind, n in run.others.most_common()))


def leave(run: Run, users: Iterable[Socket]) -> None:
    """Disconnect everybody."""
    run.ending = True
    for user in users:
        user.close()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    pick = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * part))] for name, part in pick.items()}


# --- scenarios --------------------------------------------------------------------------------------------------


async def run_pairs(task: Task) -> Result:
    """Pairs talk both ways, everybody with one message under way."""
    run, place = Run(task), World.load(Path(task.world))
    rooms = place.pairs[: task.pairs]
    after = await starting_points(task, rooms, place.people)

    async def enter(seat: tuple[Room, int]) -> Talker:
        room, member = seat
        person = place.people[member]
        audience = books.text_for_users("", (place.people[other].id for other in room.members)).strip()
        return await join(task, lambda: Talker(run, person, room.chat, audience), person)

    talkers = await world.in_turns(enter, [(room, m) for room in rooms for m in room.members], CONNECTS_AT_ONCE)
    for first, second in zip(talkers[::2], talkers[1::2], strict=True):
        first.listens_to, second.listens_to = second, first
    with no_garbage_collection():
        run.sending = True
        for talker in talkers:
            talker.talk()
        await run.measure(lambda: run.done)
        run.result.latency_ms = percentiles(run.latencies)
        run.sending = False
        await run.wait_for(
            lambda: not any(talker.waiting_for for talker in talkers), "not everything was acked and delivered"
        )
    leave(run, talkers)
    run.result.deliveries = run.result.rate * 2
    await settle(run, rooms, place.people, after)
    return run.result


async def run_group(task: Task) -> Result:
    """One group, all members online, some of them with one message under way; two strangers must hear nothing.

    What counts is what has reached every member.
    """
    run, place = Run(task), World.load(Path(task.world))
    room = place.groups[task.members]
    after = await starting_points(task, [room], place.people)
    audience = books.text_for_chat("", room.chat).strip()
    group = CommonGroup()

    async def enter(index: int) -> Talker:
        person = place.people[index]
        if task.framed_once and index < task.members:
            member = await join(task, lambda: GroupMember(run, person, room.chat, audience, group), person)
            member.stream_on()
            return member
        return await join(task, lambda: Talker(run, person, room.chat, audience), person)

    everybody = await world.in_turns(enter, range(task.members + 2), CONNECTS_AT_ONCE)
    members = everybody[: task.members]
    streamed = [member for member in members if isinstance(member, GroupMember)]
    group.by_id = {member.person.id: member for member in streamed}
    talkers = members[:: max(1, len(members) // task.senders)][: task.senders]
    for talker in talkers:
        talker.listens_to = talker

    def reached_all() -> int:
        if streamed:
            return group.stream.frames_until(min(member.reader.position for member in streamed))
        return min(member.count for member in members)

    def all_is_quiet() -> bool:
        return not any(talker.waiting_for for talker in talkers) and reached_all() >= len(run.ledger.sent_rows)

    with no_garbage_collection():
        run.sending = True
        for talker in talkers:
            talker.talk()
        await run.measure(reached_all)
        run.result.latency_ms = percentiles(run.latencies)
        run.sending = False
        await run.wait_for(all_is_quiet, "not everything was acked and delivered to every member")
    leave(run, everybody)
    run.result.deliveries = run.result.rate * task.members
    write_down(run, group, streamed)
    await settle(run, [room], place.people, after)
    return run.result


def write_down(run: Run, group: CommonGroup, streamed: Sequence[GroupMember]) -> None:
    """Enter what the readers compared into the ledger."""
    together: dict[int, list[int]] = {}
    for member in streamed:
        reader = member.reader
        if reader.skipped:
            kept = list(group.rows[: reader.frames()])
            for start, end in reversed(reader.skipped):
                del kept[group.stream.frames_until(start) : group.stream.frames_until(end)]
            run.ledger.received_by_all([member.person.id], kept)
        else:
            together.setdefault(reader.frames(), []).append(member.person.id)
    for frames, users in together.items():
        run.ledger.received_by_all(users, group.rows[:frames])


class Listener(User):
    """A pair's member under an open load: notes when each message of the peer was meant to leave and arrived."""

    def __init__(self, run: Run, person: Person, chat: int, audience: str, due: dict[str, float]) -> None:
        super().__init__(run, person, chat)
        self.audience = audience
        self.due = due
        self.acks = 0

    def on_ack(self, client_id: str) -> None:
        self.acks += 1

    def on_message(self, client_id: str, sender_id: int) -> None:
        if sender_id != self.person.id:
            meant = self.due.pop(client_id, None)
            if meant is not None:
                self.run.done += 1
                self.run.latencies.append(time.monotonic() - meant)


async def run_open(task: Task) -> Result:
    """Messages leave at random moments, at a fixed mean rate, between random people of the pairs."""
    run, place = Run(task), World.load(Path(task.world))
    rooms = place.pairs[: task.pairs]
    after = await starting_points(task, rooms, place.people)
    due: dict[str, float] = {}

    async def enter(seat: tuple[Room, int]) -> Listener:
        room, member = seat
        person = place.people[member]
        audience = books.text_for_users("", (place.people[other].id for other in room.members)).strip()
        return await join(task, lambda: Listener(run, person, room.chat, audience, due), person)

    users = await world.in_turns(enter, [(room, m) for room in rooms for m in room.members], CONNECTS_AT_ONCE)
    moments: list[float] = []
    moment = time.monotonic() + 0.2
    end = moment + task.warmup + task.seconds
    while (moment := moment + random.expovariate(task.rate)) < end:
        moments.append(moment)
    late: list[float] = []

    def send_due(meant: float) -> None:
        late.append(time.monotonic() - meant)
        user = random.choice(users)
        due[user.say(user.audience)] = meant

    with no_garbage_collection():
        clock = Alarm(moments, send_due)
        try:
            await run.measure(lambda: run.done)
            # `measure` forgot the warm-up; what was sent in time but has not arrived yet still counts.
            await run.wait_for(
                lambda: clock.finished and not due and sum(user.acks for user in users) >= len(moments),
                "not everything was acked and delivered",
            )
        finally:
            clock.stop()
    leave(run, users)
    run.result.latency_ms = percentiles(run.latencies)
    run.result.deliveries = run.result.rate * 2
    run.result.latency_ms["generator late p99"] = percentiles(late)["p99"]
    await settle(run, rooms, place.people, after)
    return run.result


class Alarm:
    """Calls back at moments of the monotonic clock, to some tens of microseconds.

    The event loop's own timers count whole milliseconds, which would show in the latency.
    """

    def __init__(self, moments: Sequence[float], call: Callable[[float], None]) -> None:
        self._moments = moments
        self._call = call
        self._next = 0
        self._loop = asyncio.get_running_loop()
        self._libc = ctypes.CDLL(None, use_errno=True)
        clock_monotonic, non_blocking = 1, os.O_NONBLOCK
        self._descriptor = self._libc.timerfd_create(clock_monotonic, non_blocking)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._descriptor, self._ring)
        self._arm()

    @property
    def finished(self) -> bool:
        """Whether the last moment has passed."""
        return self._next >= len(self._moments)

    def stop(self) -> None:
        """Take the clock away."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _arm(self) -> None:
        if self.finished:
            return
        nanoseconds = int(self._moments[self._next] * 1e9)
        # interval (none), then the absolute moment; each is seconds and nanoseconds
        when = (ctypes.c_long * 4)(0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
        absolute = 1
        self._libc.timerfd_settime(self._descriptor, absolute, ctypes.byref(when), None)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)
        moments = self._moments
        while self._next < len(moments) and moments[self._next] <= time.monotonic():
            self._call(moments[self._next])
            self._next += 1
        self._arm()


class Echoer(Socket):
    """Sends the same text again and again."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def on_text(self, payload: bytes) -> None:
        self.run.done += 1
        if payload != ECHO:
            self.run.problem(f"the echo differs: {payload[:100]!r}")
        if self.run.sending:
            self.send(ECHO)

    def on_closed(self) -> None:
        if not self.run.ending:
            self.run.problem(f"the echo server left: {self.closed}")


async def run_echo(task: Task) -> Result:
    """Round trips with a server that does nothing else."""
    run = Run(task)
    sockets = [await connect(lambda: Echoer(run), task.port, "/") for _ in range(2 * task.pairs)]
    run.sending = True
    with no_garbage_collection():
        for socket in sockets:
            socket.send(ECHO)
        await run.measure(lambda: run.done)
    run.sending = False
    leave(run, sockets)
    return run.result


class Idler(User):
    """Connected and silent."""

    def on_closed(self) -> None:
        if not self.run.ending and self.greeted.done():
            self.run.result.drops += 1
        super().on_closed()


async def run_idle(task: Task) -> Result:
    """Many authenticated connections that do nothing; what each costs the server, and whether it keeps them."""
    run, place = Run(task), World.load(Path(task.world))
    result = run.result
    room_for = machine.allow_many_files(task.connections + 200)
    if room_for < task.connections + 100:
        run.problem(f"only {room_for} open files are allowed here: raise the limit (ulimit -n) above the connections")
        return result

    async def enter(number: int) -> Idler:
        person = place.people[number % len(place.people)]
        source = f"127.0.0.{2 + number % task.sources}"
        return await join(task, lambda: Idler(run, person, 0), person, source)

    # Caches fill and pools grow once; that is not a connection's price.
    first = await world.in_turns(enter, range(min(100, task.connections)), CONNECTS_AT_ONCE)
    run.ending = True
    for idler in first:
        idler.close()
    await asyncio.sleep(1)
    run.ending = False
    assert task.server_pid is not None
    before = machine.rss_kib(task.server_pid)
    begun = time.monotonic()
    idlers: list[Idler] = []
    step = max(1, task.connections // 10)
    for start in range(0, task.connections, step):
        numbers = range(start, min(start + step, task.connections))
        idlers += await world.in_turns(enter, numbers, CONNECTS_AT_ONCE)
        print(f"{len(idlers)} connected", file=sys.stderr)
    result.connect_seconds = time.monotonic() - begun
    cpu = machine.cpu_seconds(task.server_pid)
    held = time.monotonic()
    await asyncio.sleep(task.seconds)
    result.cpu = {"server": (machine.cpu_seconds(task.server_pid) - cpu) / (time.monotonic() - held)}
    result.kib_each = (machine.rss_kib(task.server_pid) - before) / task.connections
    result.connected = sum(not idler.closed for idler in idlers)
    leave(run, idlers)
    return result


async def run_setup(task: Task) -> Result:
    """Make the people and chats."""
    made = await world.build(task.port, task.people, task.pairs, task.groups)
    made.save(Path(task.world))
    return Result()


SCENARIOS: Mapping[str, Callable[[Task], Coroutine[Any, Any, Result]]] = {
    "setup": run_setup,
    "pairs": run_pairs,
    "group": run_group,
    "open": run_open,
    "echo": run_echo,
    "idle": run_idle,
}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The ledger only grows, and walking it again and again would stall the measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main(scenarios: Mapping[str, Callable[[Task], Coroutine[Any, Any, Result]]]) -> int:
    """Run the task of a file, one of these, and print the result."""
    task = Task(**orjson.loads(Path(sys.argv[1]).read_bytes()))
    try:
        result = uvloop.run(scenarios[task.what](task))
    except (world.SetupFailed, Refused, OSError, TimeoutError, pymysql.MySQLError) as error:
        result = Result(problems=[f"{type(error).__name__}: {error}"])
    sys.stdout.buffer.write(orjson.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(SCENARIOS))
