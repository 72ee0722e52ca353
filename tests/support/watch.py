"""What an attack does to a server, seen from outside: its memory, its disk, and the patience of everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.people import Person
from tests.support.servers import Server
from tests.support.socket_client import SocketClient

MB = 1024 * 1024
PAUSE_SECONDS = 0.05
"""A turn of the loop that comes so much later was a pause of this process."""


def memory(pid: int, field: str) -> int:
    """Bytes of a process, by a field of /proc (`VmRSS` now, `VmHWM` at its peak); 0 when it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


class MemoryWatch:
    """How far a server's memory rises from now on, alone (exactly) and with its children (every few milliseconds)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak of before
        self._before = memory(pid, "VmRSS")
        self._together = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """Of the server alone, at its peak."""
        return memory(self._pid, "VmHWM") - self._before

    @property
    def growth_with_children(self) -> int:
        """Of the server and the processes it started."""
        return max(self._together - self._before, self.growth)

    def _look(self) -> None:
        while not self._ended.wait(0.005):
            children: list[int] = []
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{self._pid}/task").iterdir():
                    children += [int(child) for child in (task / "children").read_text().split()]
            together = memory(self._pid, "VmRSS") + sum(memory(child, "VmRSS") for child in children)
            self._together = max(self._together, together)


def files_under(folder: Path) -> dict[str, int]:
    """Every file of a folder, with its size."""
    found: dict[str, int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() or path.is_symlink():
                found[str(path.relative_to(folder))] = path.lstat().st_size
    return found


@dataclass
class Bystander:
    """Somebody who chats and asks meanwhile; the longest they waited, and how often they got an answer."""

    person: Person
    socket: SocketClient
    chat_id: int
    longest: float = 0.0
    rounds: int = 0

    async def go_on(self) -> None:
        """Send a message and make a request, again and again."""
        while True:
            begun = time.monotonic()
            answer = await self.socket.say(self.chat_id, "still there?")
            assert answer["type"] == "ack", answer
            await self.person.do("GET", "/users/me")
            self.longest = max(self.longest, time.monotonic() - begun)
            self.rounds += 1
            self.socket.inbox.clear()
            self.socket.seen.clear()


@contextlib.asynccontextmanager
async def undisturbed(bystander: Bystander, seconds: float) -> AsyncIterator[None]:
    """Fails when the bystander waits longer than that for an answer while this lasts."""
    bystander.longest = 0.0
    begun = bystander.rounds
    task = asyncio.create_task(bystander.go_on())
    try:
        yield
        while bystander.rounds < begun + 2 and not task.done():
            await asyncio.wait([task], timeout=0.01)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert bystander.longest < seconds, f"somebody else waited {bystander.longest:.2f} s"


class Watch:
    """Two who chat with each other, and how long each message took."""

    def __init__(self, sender: SocketClient, receiver: SocketClient, chat_id: int) -> None:
        self.sender, self.receiver, self.chat_id = sender, receiver, chat_id
        self.seconds: list[float] = []
        self._late = 0.0

    async def say(self) -> None:
        """One message there."""
        text = f"echo {len(self.seconds)}"
        began, late = time.monotonic(), self._late
        assert (await self.sender.say(self.chat_id, text))["type"] == "ack"
        await self.receiver.wait(lambda event: event["message"]["content"] == text, type="new_message")
        took = time.monotonic() - began
        await asyncio.sleep(0)  # whoever measures this loop is told of the same pause in the same turn
        self.seconds.append(took - (self._late - late))
        await self.sender.wait(type="new_message")

    @contextlib.asynccontextmanager
    async def talking(self, least: int) -> AsyncIterator[asyncio.Task[None]]:
        """They chat while this lasts, and then until so many messages have come; yields the task that only fails."""
        talk = asyncio.create_task(self._go_on())
        pauses = asyncio.create_task(self._count_pauses())
        try:
            yield talk
            async with asyncio.timeout(30):
                while len(self.seconds) < least and not talk.done():
                    await asyncio.wait([talk], timeout=0.01)
            if talk.done():
                talk.result()
        finally:
            talk.cancel()
            pauses.cancel()
            await asyncio.gather(talk, pauses, return_exceptions=True)
        self.check()

    async def _go_on(self) -> None:
        while True:
            await self.say()
            await asyncio.sleep(0.005)

    async def _count_pauses(self) -> None:
        """This process attacks, too, and shares its processors: when it pauses itself, the server is not to blame."""
        while True:
            due = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            late = time.monotonic() - due
            if late > PAUSE_SECONDS:  # less is how timers are
                self._late += late

    @property
    def p99(self) -> float:
        """Seconds that all but one in a hundred took at most: the machine itself may pause now and then."""
        return sorted(self.seconds)[-1 - len(self.seconds) // 100]

    def check(self) -> None:
        """Nobody has waited for a second, and nothing came twice or to the wrong people."""
        assert self.p99 < 1, self.seconds
        for socket in (self.sender, self.receiver):
            assert {event["type"] for event in socket.seen} <= {"hello", "ack", "new_message", "heartbeat"}
            heard = [event for event in socket.seen if event["type"] == "new_message"]
            assert [event["message"]["seq"] for event in heard] == list(range(1, len(heard) + 1))
            assert socket.close_code is None


@contextlib.asynccontextmanager
async def watched(server: Server, one: Person, other: Person) -> AsyncIterator[Watch]:
    chat_id = await one.personal(other)
    async with await one.open(server) as sender, await other.open(server) as receiver:
        yield Watch(sender, receiver, chat_id)
