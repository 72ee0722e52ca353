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
from tests.support.socket_client import SocketClient

MB = 1024 * 1024


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
