"""A WebSocket client that costs little: the load generator must never be what is measured.

It masks with a zero key (legal, and the payload stays as it is), answers pings and asks for no extension.
"""

from __future__ import annotations

import asyncio
import base64
import os
import struct
from collections.abc import Callable
from typing import Self, TypeVar, cast

TEXT = 0x81
CLOSE = 0x88
PING = 0x89
PONG = 0x8A
NO_MASK = b"\0\0\0\0"


class Refused(Exception):
    """The server did not open the socket."""


def client_frame(payload: bytes, first: int = TEXT) -> bytes:
    """A frame from a client."""
    size = len(payload)
    if size < 126:
        return bytes((first, 0x80 | size)) + NO_MASK + payload
    if size < 65536:
        return struct.pack("!BBH", first, 0xFE, size) + NO_MASK + payload
    return struct.pack("!BBQ", first, 0xFF, size) + NO_MASK + payload


def server_frame_end(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """Where the payload of the server's frame at `start` begins and ends, or None while it is incomplete."""
    have = len(data) - start
    if have < 2:
        return None
    size = data[start + 1]
    begin = start + 2
    if size == 126:
        if have < 4:
            return None
        size = (data[start + 2] << 8) | data[start + 3]
        begin = start + 4
    elif size == 127:
        if have < 10:
            return None
        size = int.from_bytes(data[start + 2 : start + 10], "big")
        begin = start + 10
    end = begin + size
    return (begin, end) if end <= len(data) else None


class Socket(asyncio.Protocol):
    """One connection. Subclasses override `on_text`, which gets each text frame's payload."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = ""
        """Why the connection ended; empty while it lives."""
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_open = False
        self._rest = b""
        self._request = b""

    def on_text(self, payload: bytes) -> None:
        """A text frame arrived."""

    def on_closed(self) -> None:
        """The connection ended; `closed` says why."""

    def send(self, payload: bytes) -> None:
        """Send a text frame; into the void when the connection has ended."""
        if self.transport is not None:
            self.transport.write(client_frame(payload))

    def close(self) -> None:
        """Leave."""
        if self.transport is not None:
            self.closed = self.closed or "closed by us"
            self.transport.write(client_frame(b"\x03\xe8", CLOSE))
            self.transport.close()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have all of asyncio.Transport, but do not inherit it.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.closed = self.closed or f"connection lost ({exc or 'end of stream'})"
        if not self._opened.done():
            self._opened.set_exception(Refused(self.closed))
        self.on_closed()

    def data_received(self, data: bytes) -> None:
        if not self._is_open:
            data = self._handshake(data)
        elif self._rest:
            data = self._rest + data
        start = 0
        while (found := server_frame_end(data, start)) is not None:
            begin, end = found
            if data[start] == TEXT:
                self.on_text(data[begin:end])
            else:
                self.on_control(data[start], data[begin:end])
            start = end
        self._rest = data[start:]

    def on_control(self, first: int, payload: bytes) -> None:
        """Answer pings; note a close."""
        if first == PING and self.transport is not None:
            self.transport.write(client_frame(payload, PONG))
        elif first == CLOSE:
            code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
            self.closed = self.closed or f"closed by the server ({code} {payload[2:].decode('utf-8', 'replace')})"
            if self.transport is not None:
                self.transport.close()
        elif first != PONG:
            self.closed = self.closed or f"the server sent a frame this client does not know (0x{first:02x})"
            if self.transport is not None:
                self.transport.abort()

    def _handshake(self, data: bytes) -> bytes:
        data = self._rest + data
        head, separator, rest = data.partition(b"\r\n\r\n")
        if not separator:
            self._rest = data
            return b""
        self._rest = b""
        status = head.split(b"\r\n", 1)[0].decode("latin-1")
        if " 101 " not in status + " ":
            self.closed = f"{status}: {rest[:300].decode('utf-8', 'replace')}"
            if not self._opened.done():
                self._opened.set_exception(Refused(self.closed))
            if self.transport is not None:
                self.transport.close()
            return b""
        self._is_open = True
        if not self._opened.done():
            self._opened.set_result(None)
        return rest

    async def opened(self) -> Self:
        """Wait for the handshake.

        Raises Refused when the server says no.
        """
        await self._opened
        return self

    def ask(self, host: str, port: int, path: str, token: str | None) -> None:
        """Prepare the handshake that goes out once connected."""
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: {host}:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
        ]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        self._request = "\r\n".join([*lines, "", ""]).encode()


S = TypeVar("S", bound=Socket)


async def connect(
    make: Callable[[], S],
    port: int,
    path: str,
    *,
    token: str | None = None,
    source: str | None = None,
    seconds: float = 30,
) -> S:
    """Open a socket to a server on this machine.

    Raises Refused when the server says no, OSError when there is none, TimeoutError when it is silent.
    """
    loop = asyncio.get_running_loop()

    def build() -> S:
        socket = make()
        socket.ask("127.0.0.1", port, path, token)
        return socket

    async with asyncio.timeout(seconds):
        _, socket = await loop.create_connection(build, "127.0.0.1", port, local_addr=(source, 0) if source else None)
        return await socket.opened()
