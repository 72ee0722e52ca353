"""Ordinary ASGI WebSocket routes on a raw socket, so that one parser reads all that comes over a tuned server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.utils import ClientDisconnected

from app.services.transport import HIGH_WATER, BinaryFrames, Frames, Receiver, Transport

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent


class AsgiBridge(Receiver):
    """Turns messages into ASGI events and back. One message at most waits for the route; TCP holds the rest."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._events: asyncio.Queue[ASGIReceiveEvent] = asyncio.Queue()
        self._writable = asyncio.Event()
        self._closing = False

    async def receive(self) -> ASGIReceiveEvent:
        """The next event."""
        if self._events.empty():
            self._transport.resume_reading()
        return await self._events.get()

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message or close. Raises ClientDisconnected once the socket is closing."""
        while not self._closing and self._transport.unsent_bytes > HIGH_WATER:
            self._writable.clear()
            await self._writable.wait()
        if self._closing:
            raise ClientDisconnected
        if message["type"] == "websocket.close":
            self._close(message.get("code", 1000), message.get("reason") or "")
        elif message["type"] == "websocket.send":
            data, text = message.get("bytes"), message.get("text")
            self._transport.send(Frames([(text or "").encode()]) if data is None else BinaryFrames([data]))
        else:
            raise RuntimeError(f"an accepted WebSocket takes no {message['type']!r}")

    # --- Receiver ---

    def on_text(self, data: bytes) -> None:
        self._transport.pause_reading()
        self._events.put_nowait({"type": "websocket.receive", "text": data.decode()})

    def on_binary(self, data: bytes) -> None:
        self._transport.pause_reading()
        self._events.put_nowait({"type": "websocket.receive", "bytes": data})

    def on_drained(self) -> None:
        self._writable.set()

    def on_shutdown(self) -> None:
        self._close(1012, "")

    def on_closed(self, code: int) -> None:
        self._end(code)

    def _close(self, code: int, reason: str) -> None:
        self._transport.close(code, reason)
        self._end(code)

    def _end(self, code: int) -> None:
        if not self._closing:
            self._closing = True
            self._events.put_nowait({"type": "websocket.disconnect", "code": code})
        self._writable.set()
