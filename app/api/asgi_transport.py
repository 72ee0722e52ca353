"""A socket for the route: on the raw connection where the server offers it, over plain ASGI elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from starlette.websockets import WebSocket

from app.services.transport import (
    CLOSE_SECONDS,
    HIGH_WATER,
    LOW_WATER,
    Frames,
    Receiver,
    Transport,
    fitting_reason,
)

log = logging.getLogger(__name__)

RAW_EXTENSION = "dialect.socket"
"""Where `app.api.websocket_protocol` leaves itself in the scope. Not imported: any server will do here."""


class _RawConnection(Protocol):
    def attach(
        self, make_receiver: Callable[[Transport], Receiver], max_frame_bytes: int, max_small_frames: int
    ) -> None: ...


async def serve_socket(
    websocket: WebSocket,
    make_receiver: Callable[[Transport], Receiver],
    max_frame_bytes: int,
    max_small_frames: int = 0,
) -> None:
    """Accept a WebSocket and connect it with a receiver. Must be the last thing that a route does.

    Returns when the socket is closed; on a raw connection at once, because a route that waits weighs five times what
    the connection does. So what is to be done at the end belongs into `on_closed`, on both.

    `make_receiver` may send at once. If it fails, the socket closes with 1011 and the error is raised here. A longer
    message than `max_frame_bytes` closes with 1009. More than `max_small_frames` pings, pongs and fragments within a
    second close with 4429, where they are seen, that is on a raw connection; 0 sets no limit.
    """
    await websocket.accept()
    raw: _RawConnection | None = websocket.scope.get("extensions", {}).get(RAW_EXTENSION)
    if raw is not None:
        raw.attach(make_receiver, max_frame_bytes, max_small_frames)
    else:
        await AsgiSocket(websocket, max_frame_bytes).run(make_receiver)


class AsgiSocket:
    """An accepted WebSocket of any ASGI server: implements `Transport`, calls a `Receiver`."""

    __slots__ = (
        "_above",
        "_close_code",
        "_close_reason",
        "_closing",
        "_deadline",
        "_loop",
        "_max_bytes",
        "_mute",
        "_outbox",
        "_readable",
        "_receiver",
        "_task",
        "_unsent",
        "_wake",
        "_websocket",
    )

    def __init__(self, websocket: WebSocket, max_frame_bytes: int) -> None:
        self._websocket = websocket
        self._max_bytes = max_frame_bytes
        self._loop = asyncio.get_running_loop()
        self._receiver: Receiver | None = None
        self._outbox: deque[bytes] = deque()
        self._unsent = 0
        self._above = False  # the outbox has been above HIGH_WATER and not yet come down
        self._wake: asyncio.Future[None] | None = None  # the writer waits here for work
        self._readable = asyncio.Event()
        self._readable.set()
        self._mute = False  # nothing can be sent any more
        self._closing = False
        self._close_code = 1006
        self._close_reason: str | None = None  # a close frame is to be sent
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    # --- Transport ----------------------------------------------------------------------------------------

    def send(self, frames: Frames) -> None:
        if self._closing or self._mute:
            return
        self._outbox.extend(frames.payloads)
        self._unsent += frames.size
        if self._unsent > HIGH_WATER:
            self._above = True
        self._wake_writer()

    @property
    def unsent_bytes(self) -> int:
        return self._unsent

    def close(self, code: int, reason: str = "") -> None:
        if self._closing:
            return
        self._closing = True
        self._close_code = code
        self._close_reason = fitting_reason(reason)
        self._deadline = self._loop.call_later(CLOSE_SECONDS, self._give_up)
        self._wake_writer()
        self._readable.set()

    def pause_reading(self) -> None:
        if not self._closing:
            self._readable.clear()

    def resume_reading(self) -> None:
        self._readable.set()

    # --- the two loops ------------------------------------------------------------------------------------

    async def run(self, make_receiver: Callable[[Transport], Receiver]) -> None:
        """Serve the socket until it is closed."""
        try:
            receiver = make_receiver(self)
        except BaseException:
            with contextlib.suppress(Exception):
                await self._websocket.close(1011, "internal error")
            raise
        self._receiver = receiver
        writer = asyncio.create_task(self._write())
        # The reader is a task of its own, so that giving up can end it without cancelling the route.
        self._task = reader = asyncio.create_task(self._read(receiver))
        try:
            await asyncio.wait((reader,))
        finally:
            self._closing = True
            if self._deadline is not None:
                self._deadline.cancel()
            for task in (reader, writer):
                task.cancel()
            self._outbox.clear()
            self._unsent = 0
            self._receiver = None
            try:
                receiver.on_closed(self._close_code)
            except Exception:
                log.exception("a socket's receiver failed at its end")
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, receiver: Receiver) -> None:
        while True:
            await self._readable.wait()
            try:
                message = await self._websocket.receive()
            except RuntimeError:  # the server says the connection is gone in its own way
                return
            if message["type"] == "websocket.disconnect":
                if self._close_reason is None:
                    self._close_code = message.get("code") or 1005
                return
            # The turn of the loop in which this was received may have closed or paused.
            await self._readable.wait()
            text: str | None = message.get("text")
            data: bytes = (message.get("bytes") or b"") if text is None else text.encode()
            if self._closing:
                continue
            if len(data) > self._max_bytes:
                self.close(1009, "the message is too big")
                continue
            try:
                if text is None:
                    receiver.on_binary(data)
                else:
                    receiver.on_text(data)
            except Exception as error:
                self._receiver_failed(error)

    async def _write(self) -> None:
        websocket, outbox = self._websocket, self._outbox
        try:
            while True:
                while outbox:
                    payload = outbox[0]
                    await self._send_message(payload)
                    outbox.popleft()
                    self._unsent -= len(payload)
                    if self._above and self._unsent <= LOW_WATER:
                        self._above = False
                        self._drained()
                if self._close_reason is not None:
                    await websocket.close(self._close_code, self._close_reason)
                    return
                self._wake = self._loop.create_future()
                await self._wake
        except Exception:
            # The peer went away in the middle. The reader is told in its turn, after what the peer had still sent.
            log.debug("a socket could not be written to", exc_info=True)
            self._mute = True
            outbox.clear()
            self._unsent = 0

    async def _send_message(self, payload: bytes) -> None:
        await self._websocket.send({"type": "websocket.send", "text": payload.decode()})

    def _drained(self) -> None:
        if self._closing or self._receiver is None:
            return
        try:
            self._receiver.on_drained()
        except Exception as error:
            self._receiver_failed(error)

    def _wake_writer(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _give_up(self) -> None:
        # ASGI cannot cut a connection. This ends everything on our side; the server has the rest.
        if self._task is not None:
            self._task.cancel()

    def _receiver_failed(self, error: Exception) -> None:
        log.error("a socket's receiver failed", exc_info=error)
        self.close(1011, "internal error")
