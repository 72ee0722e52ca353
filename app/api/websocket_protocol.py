"""Our WebSocket protocol class for uvicorn: `python -m app` runs with it.

Handshake, refusals and routing are uvicorn's and go through ASGI. Once the route has accepted, the connection's
protocol is swapped for a `RawSocket`: a strict parser of RFC 6455 that hands each message straight to a receiver, and
a writer that takes frames made once for everybody. A route that calls `attach` brings its own receiver, and no queue,
no task switch and no `str` stand between; for an ordinary ASGI route it is an `AsgiBridge`.

That route returns as soon as a receiver is attached, and all of the handshake, from uvicorn's buffers to the frames
of FastAPI, is freed: that was five sixths of what an idle connection weighed.

Written against uvicorn 0.54, which requirements.txt pins.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeader, InvalidMethod
from websockets.frames import Close
from websockets.http11 import Response
from websockets.server import ServerProtocol

from app.api import problems
from app.api.asgi_bridge import AsgiBridge
from app.services.transport import (
    CLOSE_SECONDS,
    HIGH_WATER,
    LOW_WATER,
    Frames,
    Receiver,
    Transport,
    frame_close,
)

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
    from uvicorn.config import Config
    from uvicorn.server import ServerState
    from websockets.http11 import Request
    from websockets.typing import StatusLike

try:
    from websockets.speedups import apply_mask
except ImportError:  # a machine for which websockets has no wheel
    from websockets.utils import apply_mask

log = logging.getLogger(__name__)

ReceiverT = TypeVar("ReceiverT", bound=Receiver)

SCOPE_EXTENSION: Final = "dialect.socket"

FLOODING: Final = 4429
"""The close code for a client that sends too many frames."""
MESSAGES_PER_TURN = 64
"""After so many messages of one client the others get their turn."""

_FIN = 0x80
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_WHOLE_TEXT = _FIN | _TEXT
_EMPTY_PING = bytes((_FIN | _PING, 0))

# The kernel takes megabytes for a peer that has stopped reading, and a ping would wait behind them. With this
# the kernel holds little that it has not put on the wire, so `unsent_bytes` tells the truth.
_NOTSENT_LOWAT: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", None)


def _torn_end(data: bytes, *, last: bool) -> bytes:
    """The first bytes of a character that `data` ends in; raises UnicodeDecodeError where it is not UTF-8.

    When it is the last there will be, it must end between two characters.
    """
    if data.isascii():
        return b""
    return data[codecs.utf_8_decode(data, "strict", last)[1] :]


class RawSocket(asyncio.Protocol):
    """An accepted WebSocket without ASGI: implements `Transport`, calls a `Receiver`.

    uvicorn keeps it among its connections, so a stop of the server waits for it.
    """

    __slots__ = (
        "_ahead",
        "_choked",
        "_close_code",
        "_closing",
        "_connections",
        "_corked",
        "_corked_bytes",
        "_deadline",
        "_deaf",
        "_grace",
        "_heard",
        "_looked",
        "_loop",
        "_max_bytes",
        "_max_small",
        "_more",
        "_need",
        "_partial",
        "_partial_is_text",
        "_paused",
        "_ping_interval",
        "_ping_timeout",
        "_pong",
        "_receiver",
        "_small",
        "_small_since",
        "_stopping",
        "_tail",
        "_timer",
        "_torn",
        "_transport",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        connections: set[Any],
        config: Config,
        max_frame_bytes: int,
        max_small_frames: int = 0,
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._connections = connections
        self._max_bytes = max_frame_bytes
        self._max_small = max_small_frames
        self._receiver: Receiver | None = None

        self._closing = False  # a close frame went out, or nothing can go out any more
        self._deaf = False  # what still comes in is thrown away
        self._close_code = 1006
        self._deadline: float | None = None  # the server waits no longer

        # Reading: bytes that are no whole frame yet (or may not be delivered yet) and how many are needed.
        self._tail: bytearray | None = None
        self._need = 0
        self._paused = False
        self._stopping = False
        self._more = False  # a turn has ended and the next is scheduled
        # The message whose first fragments are here, and the bytes of a character that they tear apart.
        self._partial: bytearray | None = None
        self._partial_is_text = False
        self._torn = b""
        # How much of an unfinished frame is known to be UTF-8 so far, and what it tears apart in its turn.
        self._looked = 0
        self._ahead = b""

        # Frames that are no whole message, and since when they are counted.
        self._small = 0
        self._small_since = loop.time()

        # Writing: while bytes are parsed, answers gather here and go out in one write.
        self._corked: list[bytes] | None = None
        self._corked_bytes = 0
        self._choked = False
        self._pong: bytes | None = None  # of the newest ping, waiting until the peer reads

        self._ping_interval = config.ws_ping_interval
        self._ping_timeout = config.ws_ping_timeout
        self._grace = config.timeout_graceful_shutdown
        self._heard = True
        self._timer: asyncio.TimerHandle | None = None
        if self._ping_interval:
            self._timer = loop.call_later(self._ping_interval, self._send_ping)

        transport.set_write_buffer_limits(high=HIGH_WATER, low=LOW_WATER)
        if _NOTSENT_LOWAT is not None and (raw := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):  # not every socket is TCP
                raw.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, HIGH_WATER)

    def start(self, receiver: Receiver, held: bytes) -> None:
        """Begin to deliver, first what came before and made the connection pause."""
        self._receiver = receiver
        if held:
            self.data_received(held)
            if not (self._paused or self._more or self._transport.is_closing()):
                self._transport.resume_reading()

    # --- Transport ----------------------------------------------------------------------------------------

    def send(self, frames: Frames) -> None:
        if not self._closing:
            self._write(frames.framed)

    @property
    def unsent_bytes(self) -> int:
        if self._corked_bytes:
            self._flush()
        return self._transport.get_write_buffer_size()

    def close(self, code: int, reason: str = "") -> None:
        if self._closing:
            return
        self._write(frame_close(code, reason))
        self._shut(code)
        # The peer's answer must be seen; nothing is delivered any more.
        self._listen()

    def pause_reading(self) -> None:
        if not self._closing:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and not self._stopping:
            self._listen()

    def abort(self, code: int) -> None:
        """Cut the connection; a peer that reads still finds a close frame."""
        self.close(code)
        self._flush()
        self._transport.abort()

    # --- what asyncio and uvicorn call --------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._deaf:
            return
        tail = self._tail
        if tail is not None:
            tail += data
            if self._paused or self._more:
                return
            if len(tail) < self._need:
                self._look_ahead(tail)
                return
            data = bytes(tail)
            self._tail = None
        self._parse(data)

    def eof_received(self) -> None:
        # The transport closes itself when this returns, but first sends what is queued: possibly for ever.
        self._shut(self._close_code)

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._heard = True  # the buffers were full, so only the peer's reading can have emptied them
        if self._closing:
            return
        if self._pong is not None:
            pong, self._pong = self._pong, None
            self._write(pong)
        if self._receiver is not None:
            try:
                self._receiver.on_drained()
            except Exception as error:
                self._receiver_failed(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = self._deaf = True
        self._tail = self._partial = self._corked = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._connections.discard(self)
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            try:
                receiver.on_closed(self._close_code)
            except Exception:
                log.exception("a socket's receiver failed at its end")

    def shutdown(self) -> None:
        """uvicorn is stopping: read no more, and let the receiver finish and close."""
        if self._closing or self._receiver is None:
            return
        self._stopping = True
        self.pause_reading()
        if self._grace is not None:
            self._deadline = self._loop.time() + self._grace
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self.abort, 1012)
        try:
            self._receiver.on_shutdown()
        except Exception as error:
            self._receiver_failed(error)

    # --- reading ------------------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """Take whole frames out of `data`; what remains waits in the tail."""
        end = len(data)
        at = need = turn = 0
        self._corked = []
        while at < end and not self._paused:
            if turn == MESSAGES_PER_TURN:
                self._more = True
                self._transport.pause_reading()
                self._loop.call_soon(self._next_turn)
                break
            # RFC 6455 section 5.2. What the header shows to be wrong is refused before its payload arrives.
            if end - at < 2:
                need = 2
                break
            head = data[at]
            length = data[at + 1] - 128
            if length < 0:
                self._fail(1002, "a client must mask its frames")
                break
            body = at + 6
            if length > 125:
                wide = 2 if length == 126 else 8
                body += wide
                if end - at < 2 + wide:
                    need = 2 + wide
                    break
                length = int.from_bytes(data[at + 2 : at + 2 + wide])
                if length < (126 if wide == 2 else 65536) or length >> 63:
                    self._fail(1002, "a malformed length")
                    break
            plain = head == _WHOLE_TEXT and self._partial is None
            if plain:
                if length > self._max_bytes:
                    self._fail(1009, "the frame is too big")
                    break
            elif not self._acceptable(head, length):
                break
            stop = body + length
            if stop > end:
                need = stop - at
                break
            payload = apply_mask(data[body:stop], data[body - 4 : body])
            at = stop
            turn += 1
            if plain:
                self._text(payload)
            else:
                self._frame(head, payload)
            if self._deaf:
                break
        if at < end and not self._deaf:
            self._tail = tail = bytearray(data[at:])
            self._need = need
            self._looked = 0
            if need:
                self._look_ahead(tail)
        self._flush()
        self._corked = None

    def _acceptable(self, head: int, length: int) -> bool:
        """Whether any other frame than a whole text may come now, and in this size."""
        opcode = head & 0x0F
        if head & 0x70:
            self._fail(1002, "reserved bits are set")
        elif opcode >= _CLOSE:
            if opcode > _PONG:
                self._fail(1002, "unknown opcode")
            elif not head & _FIN or length > 125:
                self._fail(1002, "a control frame is one short frame")
        elif opcode > _BINARY:
            self._fail(1002, "unknown opcode")
        elif (opcode == _CONTINUATION) != (self._partial is not None):
            self._fail(1002, "fragments out of order")
        elif (len(self._partial) if self._partial else 0) + length > self._max_bytes:
            self._fail(1009, "the message is too big")
        return not self._deaf

    def _frame(self, head: int, payload: bytes) -> None:
        """Anything but a whole text message."""
        self._small += 1
        if self._small > self._max_small and self._is_flood():
            return
        opcode = head & 0x0F
        if opcode == _PING:
            if not self._closing:
                pong = bytes((_FIN | _PONG, len(payload))) + payload
                if self._choked:
                    # Who pings and does not read gets one answer, to the newest (RFC 6455 section 5.5.3).
                    self._pong = pong
                else:
                    self._write(pong)
        elif opcode == _CLOSE:
            self._peer_closes(payload)
        elif opcode != _PONG:
            if self._partial is None:
                self._partial = bytearray()
                self._partial_is_text = opcode == _TEXT
                self._torn = b""
            last = bool(head & _FIN)
            if self._partial_is_text:
                try:
                    self._torn = _torn_end(self._torn + payload, last=last)
                except UnicodeDecodeError:
                    self._fail(1007, "not UTF-8")
                    return
            self._partial += payload
            if last:
                message = bytes(self._partial)
                self._partial = None
                if self._partial_is_text:
                    self._deliver(message)
                else:
                    self._binary(message)

    def _is_flood(self) -> bool:
        """Whether so many small frames came within a second: they cost as much as messages and count as none."""
        now = self._loop.time()
        if self._max_small and now - self._small_since < 1.0:
            log.info("flood_closed", extra={"small_frames": self._small})
            self._fail(FLOODING, "too many small frames")
            return True
        self._small, self._small_since = 1, now
        return False

    def _text(self, payload: bytes) -> None:
        if not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                self._fail(1007, "not UTF-8")
                return
        self._deliver(payload)

    def _look_ahead(self, tail: bytearray) -> None:
        """Fail on text that cannot become UTF-8 any more, while the rest of its frame is still to come."""
        opcode = tail[0] & 0x0F
        if len(tail) <= 6 or (opcode != _TEXT and not (opcode == _CONTINUATION and self._partial_is_text)):
            return
        short = tail[1] & 0x7F
        body = 6 if short < 126 else 8 if short == 126 else 14
        start = body + self._looked
        if len(tail) <= start:
            return
        if not self._looked:
            self._ahead = self._torn if opcode == _CONTINUATION else b""
        turned = self._looked % 4
        mask = bytes(tail[body - 4 + turned : body] + tail[body - 4 : body - 4 + turned])
        try:
            self._ahead = _torn_end(self._ahead + apply_mask(bytes(tail[start:]), mask), last=False)
        except UnicodeDecodeError:
            self._fail(1007, "not UTF-8")
            return
        self._looked = len(tail) - body

    def _deliver(self, payload: bytes) -> None:
        if self._closing or self._receiver is None:
            return
        try:
            self._receiver.on_text(payload)
        except Exception as error:
            self._receiver_failed(error)

    def _binary(self, payload: bytes) -> None:
        if self._closing or self._receiver is None:
            return
        try:
            self._receiver.on_binary(payload)
        except Exception as error:
            self._receiver_failed(error)

    def _peer_closes(self, payload: bytes) -> None:
        code = 1005
        if payload:
            try:
                close = Close.parse(payload)
                close.check()
            except UnicodeDecodeError:
                self._fail(1007, "not UTF-8")
                return
            except Exception:  # websockets' ProtocolError: an impossible code or half of one
                self._fail(1002, "a malformed close frame")
                return
            code = int(close.code)
        if not self._closing:
            self._write(bytes((_FIN | _CLOSE, len(payload))) + payload)
        self._flush()
        self._shut(code)
        self._deaf = True
        self._transport.close()

    def _next_turn(self) -> None:
        self._more = False
        if self._closing:
            self._listen()
        elif not self._paused:
            self._transport.resume_reading()
            self._continue()

    def _listen(self) -> None:
        """Undo a pause. What was held back is delivered later, never from within a call of the receiver."""
        self._paused = False
        if self._more and not self._closing:
            return  # the next turn resumes
        if not self._transport.is_closing():
            self._transport.resume_reading()
        if self._tail is not None:
            self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        tail = self._tail
        if tail is not None and len(tail) >= self._need and not (self._paused or self._more or self._deaf):
            self._tail = None
            self._parse(bytes(tail))

    # --- writing and ending -------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        if self._corked is None:
            self._transport.write(data)
            return
        self._corked.append(data)
        self._corked_bytes += len(data)
        if self._corked_bytes > LOW_WATER:
            self._flush()

    def _flush(self) -> None:
        if self._corked:
            data, self._corked = b"".join(self._corked), []
            self._corked_bytes = 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def _shut(self, code: int) -> None:
        """From now on the peer has CLOSE_SECONDS to end this, or is cut off."""
        if self._closing:
            return
        self._closing = True
        self._close_code = code
        if self._timer is not None:
            self._timer.cancel()
        end = self._loop.time() + CLOSE_SECONDS
        if self._deadline is not None:
            end = min(end, self._deadline)
        self._timer = self._loop.call_at(end, self._transport.abort)

    def _fail(self, code: int, reason: str) -> None:
        """Fail the connection (RFC 6455 section 7.1.7)."""
        self._deaf = True
        self._tail = self._partial = None
        if not self._closing:
            self._write(frame_close(code, reason))
            self._shut(code)
        self._flush()
        # Closing with bytes unread resets the connection, and a reset overtakes the close frame. So only our
        # direction ends; what the peer still sends is thrown away until it ends the other.
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()

    def _receiver_failed(self, error: Exception) -> None:
        log.error("a socket's receiver failed", exc_info=error)
        self.close(1011, "internal error")

    # --- keepalive ----------------------------------------------------------------------------------------

    def _send_ping(self) -> None:
        self._heard = False
        self._transport.write(_EMPTY_PING)
        if self._ping_timeout:
            self._timer = self._loop.call_later(self._ping_timeout, self._check_alive)
        elif self._ping_interval:
            self._timer = self._loop.call_later(self._ping_interval, self._send_ping)

    def _check_alive(self) -> None:
        """Anything heard since the ping will do: a pong may queue behind much else."""
        if not (self._heard or self._paused or self._more):
            self.close(1011, "keepalive ping timeout")
            return
        wait = max(0.0, (self._ping_interval or 0.0) - (self._ping_timeout or 0.0))
        self._timer = self._loop.call_later(wait, self._send_ping)


class _Handshake(ServerProtocol):
    """Handshakes as RFC 6455 wants them; what is wrong with one is told as the rest of the API tells it."""

    def process_request(self, request: Request) -> tuple[str, str | None, str | None]:
        if len(request.headers.get_all("Host")) != 1:
            raise InvalidHeader("Host")
        return super().process_request(request)

    def reject(self, status: StatusLike, text: str) -> Response:
        wrong = self.handshake_exc
        if isinstance(wrong, InvalidHeader) and wrong.name == "Sec-WebSocket-Version":
            answer = problems.problem(
                426,
                "upgrade_required",
                "The server speaks version 13 of the WebSocket protocol.",
                headers={"Upgrade": "websocket", "Sec-WebSocket-Version": "13"},
            )
        elif isinstance(wrong, InvalidMethod):
            answer = problems.problem(405, "method_not_allowed", "A WebSocket opens with GET.")
        elif wrong is not None:
            answer = problems.problem(400, "bad_handshake", "The handshake breaks RFC 6455, or is too long.")
        else:  # the application failed, or refused
            return super().reject(status, text)
        headers = Headers((name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.raw_headers)
        headers["Connection"] = "close" if answer.status_code != 426 else "Upgrade, close"
        return Response(answer.status_code, HTTPStatus(answer.status_code).phrase, headers, bytes(answer.body))


class DialectWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, until the handshake is done.

    What the peer sends after its handshake is held back unparsed until the route has shown what it wants: `attach`, or
    the ordinary ASGI messages.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # No extensions: frames that are the same for everybody cannot be compressed per connection.
        self.conn = _Handshake(max_size=config.ws_max_size, logger=self.logger)
        self._held = bytearray()
        self._asked_to_connect = False
        self._attached = False
        self._bridge: AsgiBridge | None = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.handshake_complete:  # that is, not refused yet; the route starts in a later turn of the loop
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[SCOPE_EXTENSION] = self

    def data_received(self, data: bytes) -> None:
        if self.handshake_initiated:
            self._held += data
            self.transport.pause_reading()  # one read at most is held for a stranger
            return
        super().data_received(data)
        if not self.handshake_initiated:
            # uvicorn passes a whole request on. What is too long for websockets would wait here unanswered for ever.
            answer = b"".join(self.conn.data_to_send())
            self.transport.write(answer or self.conn.reject(HTTPStatus.BAD_REQUEST, "").serialize())
            self.transport.close()

    def attach(
        self, make_receiver: Callable[[Transport], Receiver], max_frame_bytes: int, max_small_frames: int = 0
    ) -> None:
        """Take the connection over from ASGI, which must have accepted it and done nothing else with it.

        The route returns after this; it is no longer told anything. If `make_receiver` fails, the socket closes
        with 1011 and the error is raised here.
        """
        if not self.handshake_complete or self._bridge is not None or self._attached:
            raise RuntimeError("attach comes right after accept")
        self._attached = True
        self._keep_open()
        self._take_over(make_receiver, max_frame_bytes, max_small_frames)

    def _keep_open(self) -> None:
        # uvicorn ends the connection when the route returns, unless its own closing handshake is under way.
        self.close_timer = self.loop.call_later(0, int)

    def _take_over(
        self, make_receiver: Callable[[Transport], ReceiverT], max_frame_bytes: int, max_small_frames: int = 0
    ) -> ReceiverT:
        self.stop_keepalive()
        held, self._held = bytes(self._held), bytearray()
        lost, shut = self.disconnected, self.transport.is_closing()
        self.scope["extensions"].pop(SCOPE_EXTENSION, None)
        raw = RawSocket(self.transport, self.loop, self.connections, self.config, max_frame_bytes, max_small_frames)
        if lost:
            self.loop.call_soon(raw.connection_lost, None)
        else:
            self.connections.discard(self)
            self.connections.add(raw)  # type: ignore[arg-type]
            self.transport.set_protocol(raw)
        if shut:
            raw.eof_received()
        try:
            receiver = make_receiver(raw)
        except BaseException:
            raw.close(1011, "internal error")
            raise
        raw.start(receiver, b"" if shut else held)
        return receiver

    async def receive(self) -> ASGIReceiveEvent:
        if self._asked_to_connect and (bridge := self._as_asgi()) is not None:
            return await bridge.receive()
        self._asked_to_connect = True
        return await super().receive()

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] in ("websocket.send", "websocket.close") and (bridge := self._as_asgi()) is not None:
            if message["type"] == "websocket.close":
                self._keep_open()
            await bridge.send(message)
        elif self._attached:
            raise ClientDisconnected
        else:
            await super().send(message)

    def _as_asgi(self) -> AsgiBridge | None:
        """The bridge of a route that speaks ASGI; None as long as it has not accepted, or when it has refused."""
        if self._attached:
            raise ClientDisconnected
        if self._bridge is None and self.handshake_complete and not (self.close_sent or self.disconnected):
            self._bridge = self._take_over(AsgiBridge, self.config.ws_max_size)
        return self._bridge
