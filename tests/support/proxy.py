"""A TCP proxy that misbehaves on demand: it freezes, delays, cuts and resets what passes through it.

Knows just enough of MySQL's protocol to recognise a COMMIT and to lose the answer to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

Direction = Literal["up", "down"]
"""`up` from the client to the server, `down` back."""
Verdict = Literal["pass", "reset", "reset after the answer"]

_COMMIT = b"COMMIT"


class Link:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: FaultProxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._upstream = upstream
        self.doomed = 0
        """So many answers, one per statement, get lost, and then the connection."""
        self._edit = proxy.edit_answers() if proxy.edit_answers is not None else None
        self.deaf = False
        """Nothing passes any more, and nobody is told."""

    async def run(self) -> None:
        """Pass bytes on in both directions until one side ends or the proxy cuts."""
        up = asyncio.create_task(self._pump("up", self._client[0], self._upstream[1]))
        down = asyncio.create_task(self._pump("down", self._upstream[0], self._client[1]))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            for writer in (self._client[1], self._upstream[1]):
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def cut(self) -> None:
        """End both connections with a FIN, as a server does that is shut down."""
        for writer in (self._client[1], self._upstream[1]):
            writer.close()

    def reset(self) -> None:
        """End both connections with a RST, as a machine does that has lost its memory of them."""
        for writer in (self._client[1], self._upstream[1]):
            connection = writer.get_extra_info("socket")
            if connection is not None and not writer.is_closing():
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy, lost = self._proxy, b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(64 * 1024):
                await proxy.thawed()
                if self.deaf:
                    continue
                if direction == "down" and self._edit is not None:
                    data = self._edit(data)
                if proxy.delay_seconds:
                    await asyncio.sleep(proxy.delay_seconds)
                if direction == "up" and proxy.on_commit is not None and data.endswith(_COMMIT):
                    verdict = proxy.on_commit()
                    proxy.commits += 1
                    if verdict == "reset":
                        self.reset()
                        return
                    if verdict == "reset after the answer":
                        self.doomed = data.count(b";") + 1
                elif direction == "down" and self.doomed:
                    lost += data
                    if _packets(lost) >= self.doomed:
                        self.reset()
                        return
                    continue
                if direction == proxy.cut_direction and proxy.bytes_left is not None:
                    data, rest = data[: proxy.bytes_left], data[proxy.bytes_left :]
                    proxy.bytes_left -= len(data)
                    writer.write(data)
                    if rest or not proxy.bytes_left:
                        proxy.bytes_left = None
                        with contextlib.suppress(ConnectionError):
                            await writer.drain()
                        proxy.cuts_after_bytes += 1
                        self.cut()
                        return
                    continue
                writer.write(data)
                await writer.drain()


def _packets(data: bytes) -> int:
    """How many whole packets of MySQL's protocol these are."""
    count = 0
    while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:3], "little")):
        count, data = count + 1, data[end:]
    return count


class FaultProxy:
    """Listens on `port` and passes everything on to `target_port`, until told otherwise."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._closing = asyncio.Event()
        self.port = 0
        self.refusing = False
        """New connections are reset at once."""
        self.delay_seconds = 0.0
        """How much later everything arrives, each way."""
        self.bytes_left: int | None = None
        """After so many bytes in `cut_direction`, the connection that carried the last of them is cut; once."""
        self.cut_direction: Direction = "down"
        self.cuts_after_bytes = 0
        self.edit_answers: Callable[[], Callable[[bytes], bytes]] | None = None
        """Makes, for each new connection, what decides how much of the answers goes on."""
        self.on_commit: Callable[[], Verdict] | None = None
        """Asked at each COMMIT: may it pass, does it get lost, or only its answer?"""
        self.commits = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self._closing.set()
        self.thaw()
        self.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def links(self) -> int:
        """Open connections."""
        return len(self._links)

    def freeze(self) -> None:
        """Let nothing through, in either direction, and say so to nobody: new connections open and stay silent."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Let everything through again, what waited included."""
        self._flowing.set()

    async def thawed(self) -> None:
        """Return once nothing is frozen."""
        await self._flowing.wait()

    def lose(self) -> int:
        """Swallow whatever the connections of now carry from now on, as a network does that has forgotten them: each
        side believes that it is still connected. Returns how many they are."""
        for link in self._links:
            link.deaf = True
        return len(self._links)

    @property
    def lost(self) -> int:
        """How many of those neither side has given up yet."""
        return sum(link.deaf for link in self._links)

    def cut(self) -> None:
        """End every connection politely."""
        for link in tuple(self._links):
            link.cut()

    def reset(self) -> None:
        """End every connection with a RST."""
        for link in tuple(self._links):
            link.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refusing or self._closing.is_set():
            writer.transport.abort()
            return
        await self.thawed()
        try:
            upstream = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(self, (reader, writer), upstream)
        self._links.add(link)
        if self._closing.is_set():
            link.reset()
        try:
            await link.run()
        finally:
            self._links.discard(link)
