"""The load of P1 and P2 against an XMPP server: the same texts, the same closed loops. Started by `python -m bench`.

`python -m bench.xmpp TASK.json` prints what `bench.client` prints. A message counts when it has arrived; at the end
every message must have arrived once wherever it should, and stand in the server's archive.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import pymysql

from bench import world
from bench.client import CONNECTS_AT_ONCE, Result, Run, Task, main, no_garbage_collection, percentiles
from bench.ejabberd import PASSWORD
from bench.websocket import Refused

STREAM = (
    b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' "
    b"to='localhost' version='1.0'>"
)
ROOM = b"bench@conference.localhost"
MESSAGE = re.compile(rb"<message\b([^>]*)>.*?</message>", re.DOTALL)
ID = re.compile(rb"\bid='([0-9a-f-]{36})'")
ANSWER_SECONDS = 30


class XmppRun(Run):
    """A run that counts what it sent."""

    sent = 0


class Talker(asyncio.Protocol):
    """One connected person, who says the next thing when the last one has arrived."""

    def __init__(self, run: XmppRun, name: str) -> None:
        self.run = run
        self.name = name
        self.received: list[bytes] = []
        """Ids, as they came."""
        self.head = b""
        """How what this one says begins."""
        self.listens_to: Talker | None = None
        """Whose messages this one confirms: the peer in a pair, oneself in a group."""
        self.waiting_for = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None
        self._lost = False
        self._rest = b""
        self._changed = asyncio.Event()
        self._talks = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self._lost = None, True
        self._changed.set()
        if not self.run.ending:
            self.run.problem(f"{self.name}: connection lost ({exc or 'end of stream'})")

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if not self._talks:
            self._changed.set()
            return
        end = 0
        for found in MESSAGE.finditer(self._rest):
            end = found.end()
            if (name := ID.search(found[1])) is not None:
                self._on_message(name[1])
        self._rest = self._rest[end:]

    # Logging in.

    async def enter(self) -> None:
        """Log in and be there. Raises Refused."""
        await self._ask(STREAM, b"</stream:features>")
        credentials = base64.b64encode(f"\0{self.name}\0{PASSWORD}".encode())
        await self._ask(
            b"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>" + credentials + b"</auth>", b"<success"
        )
        await self._ask(STREAM, b"</stream:features>")
        bind = b"<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>x</resource></bind>"
        await self._ask(b"<iq type='set' id='bind'>" + bind + b"</iq>", b"</iq>")
        await self._ask(b"<presence/>", b"<presence")

    async def enter_room(self) -> None:
        """Come into the room, and open it when it is new. Raises Refused."""
        name = self.name.encode()
        presence = b"<presence to='%s/%s'><x xmlns='http://jabber.org/protocol/muc'/></presence>" % (ROOM, name)
        if b"code='201'" in await self._ask(presence, b"code='110'"):
            await self._ask(
                b"<iq type='set' id='open' to='%s'><query xmlns='http://jabber.org/protocol/muc#owner'>"
                b"<x xmlns='jabber:x:data' type='submit'/></query></iq>" % ROOM,
                b"id='open'",
            )

    async def _ask(self, stanza: bytes, answer: bytes) -> bytes:
        self._write(stanza)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while answer not in self._rest:
                    self._changed.clear()
                    await self._changed.wait()
                    if self._lost or b"<failure" in self._rest:
                        raise Refused(f"{self.name}: {self._rest[-300:].decode()}")
        except TimeoutError:
            raise Refused(f"{self.name}: no {answer.decode()} in {self._rest[-300:].decode()}") from None
        said, self._rest = self._rest, b""
        return said

    def _write(self, stanza: bytes) -> None:
        if self._transport is not None:  # else `connection_lost` has told
            self._transport.write(stanza)

    # Talking.

    def listen(self) -> None:
        """From now on nothing but messages is looked at."""
        self._talks, self._rest = True, b""

    def talk(self) -> None:
        """Say the next thing."""
        if not self.run.sending:
            self.waiting_for = b""
            return
        client_id, text = self.run.next_message()
        self.waiting_for = client_id.encode()
        self.run.sent += 1
        self._sent_at = time.monotonic()
        self._write(b"<message %s id='%s'><body>%s</body></message>" % (self.head, self.waiting_for, text.encode()))

    def _on_message(self, name: bytes) -> None:
        self.received.append(name)
        speaker = self.listens_to
        if speaker is not None and name == speaker.waiting_for:
            self.run.latencies.append(time.monotonic() - speaker._sent_at)
            self.run.done += 1
            speaker.talk()

    def leave(self) -> None:
        """End."""
        self._write(b"</stream:stream>")
        if self._transport is not None:
            self._transport.close()


async def join(run: XmppRun, port: int, name: str) -> Talker:
    """Connect somebody and log them in. Raises Refused, OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    _, talker = await loop.create_connection(lambda: Talker(run, name), "127.0.0.1", port)
    await talker.enter()
    return talker


async def run_setup(task: Task) -> Result:
    """Register the people, in the server's own table."""
    rows = [(f"u{number}", PASSWORD) for number in range(task.people)]
    with connect_archive(task) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO users (username, password) VALUES (%s, %s)", rows)
        connection.commit()
    return Result()


def connect_archive(task: Task) -> pymysql.Connection[Any]:
    """The server's database."""
    return pymysql.connect(**task.archive)


def archived(task: Task) -> int:
    """Rows in the server's archive."""
    with connect_archive(task) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM archive")
        [[count]] = cursor.fetchall()
    return int(count)


async def run_pairs(task: Task) -> Result:
    """Pairs talk both ways, everybody with one message under way."""
    run, before = XmppRun(task), archived(task)
    talkers = await world.in_turns(
        lambda number: join(run, task.port, f"u{number}"), range(2 * task.pairs), CONNECTS_AT_ONCE
    )
    for first, second in zip(talkers[::2], talkers[1::2], strict=True):
        for one, other in ((first, second), (second, first)):
            one.head, one.listens_to = b"to='%s@localhost/x' type='chat'" % other.name.encode(), other
    await talk(run, talkers, talkers, 1, lambda: run.done)
    run.result.deliveries = run.result.rate
    check(run, {talker.name: Counter(talker.received) for talker in talkers}, run.sent)
    check_archive(run, archived(task) - before, 2 * run.sent)
    return run.result


async def run_group(task: Task) -> Result:
    """One room, everybody in it, some of them with one message under way. What counts is what has reached everybody."""
    run, before = XmppRun(task), archived(task)
    members = await world.in_turns(
        lambda number: join(run, task.port, f"u{number}"), range(task.members), CONNECTS_AT_ONCE
    )
    for member in members:
        await member.enter_room()
        member.head, member.listens_to = b"to='%s' type='groupchat'" % ROOM, member
    talkers = members[:: max(1, len(members) // task.senders)][: task.senders]
    await talk(run, members, talkers, len(members), lambda: min(len(member.received) for member in members))
    run.result.deliveries = run.result.rate * task.members
    for member in members:
        if member.received != members[0].received:
            run.problem(f"{member.name} saw other messages, or another order, than {members[0].name}")
    check(run, {members[0].name: Counter(members[0].received)}, run.sent)
    check_archive(run, archived(task) - before, run.sent)
    return run.result


async def talk(
    run: XmppRun, everybody: Sequence[Talker], talkers: Sequence[Talker], copies: int, progress: Callable[[], int]
) -> None:
    """Let them talk, and measure it; each message goes to so many."""
    for one in everybody:
        one.listen()
    with no_garbage_collection():
        run.sending = True
        for talker in talkers:
            talker.talk()
        await run.measure(progress)
        run.result.latency_ms = percentiles(run.latencies)
        run.sending = False
        await run.wait_for(
            lambda: sum(len(one.received) for one in everybody) >= run.sent * copies, "not everything arrived"
        )
    run.ending = True
    for one in everybody:
        one.leave()


def check(run: XmppRun, received: dict[str, Counter[bytes]], sent: int) -> None:
    """Every message has arrived once."""
    arrived = sum(sum(counts.values()) for counts in received.values())
    twice = sum(count - 1 for counts in received.values() for count in counts.values())
    run.result.ledger = f"{sent} sent, {arrived} arrived, {twice} of them again"
    if arrived != sent or twice:
        run.problem(f"the ledger does not balance: {run.result.ledger}")


def check_archive(run: XmppRun, rows: int, expected: int) -> None:
    """Every message is in the archive as often as it should be."""
    if rows != expected:
        run.problem(f"the archive has {rows} rows more, of {expected}")


if __name__ == "__main__":
    raise SystemExit(main({"setup": run_setup, "pairs": run_pairs, "group": run_group}))
