"""What the connection manager knows of a socket, and events serialised and framed once for everybody.

Two classes implement `Transport`: one on uvicorn's raw connection, one over plain ASGI. The manager never
learns which it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import orjson

from app.core.config import Settings

CLOSE_SECONDS = 5.0
"""A peer that has not taken its close frame, and answered it, by then is cut off."""
HIGH_WATER = 64 * 1024
"""Above so many unsent bytes a paced sender stops and waits for `on_drained`."""
LOW_WATER = 16 * 1024
"""`on_drained` comes when the unsent bytes, once above HIGH_WATER, have fallen to this."""


def dead_socket_seconds(settings: Settings) -> float:
    """How long at most a socket stays open whose peer has vanished: a ping is missed, and then the farewell, too."""
    between_pings = max(settings.socket_heartbeat_seconds, settings.socket_timeout_seconds)
    return between_pings + settings.socket_timeout_seconds + CLOSE_SECONDS


_TEXT = 0x81
_BINARY = 0x82
_CLOSE = 0x88
_MAX_REASON_BYTES = 123


def frame_text(payload: bytes, head: int = _TEXT) -> bytes:
    """One whole text message as an RFC 6455 frame from a server, that is unmasked."""
    length = len(payload)
    if length < 126:
        return bytes((head, length)) + payload
    if length < 65536:
        return bytes((head, 126)) + length.to_bytes(2) + payload
    return bytes((head, 127)) + length.to_bytes(8) + payload


def frame_binary(payload: bytes) -> bytes:
    """The same of a binary message."""
    return frame_text(payload, _BINARY)


def fitting_reason(reason: str) -> str:
    """A reason cut between two characters, where it is too long for a control frame."""
    return reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")


def frame_close(code: int, reason: str = "") -> bytes:
    """A close frame."""
    text = fitting_reason(reason).encode()
    return bytes((_CLOSE, 2 + len(text))) + code.to_bytes(2) + text


class Frames:
    """Events as JSON documents, and as the bytes of a socket: both made once, however many receive them."""

    __slots__ = ("_framed", "payloads", "size")

    def __init__(self, payloads: Sequence[bytes]) -> None:
        self.payloads = payloads
        self.size = sum(map(len, payloads))
        self._framed: bytes | None = None

    @classmethod
    def of(cls, *events: Mapping[str, Any]) -> Frames:
        """Serialise events."""
        return cls([orjson.dumps(event) for event in events])

    @property
    def framed(self) -> bytes:
        """All payloads, each as one text frame, back to back."""
        framed = self._framed
        if framed is None:
            framed = self._framed = b"".join(map(frame_text, self.payloads))
        return framed


class BinaryFrames(Frames):
    """Binary messages. Events are text: these are for other routes on the same server."""

    __slots__ = ()

    @property
    def framed(self) -> bytes:
        framed = self._framed
        if framed is None:
            framed = self._framed = b"".join(map(frame_binary, self.payloads))
        return framed


class Transport(Protocol):
    """One client's socket as the connection manager sees it. Nothing here blocks, awaits or raises."""

    def send(self, frames: Frames) -> None:
        """Append to what goes out; silently ignored once the socket is closing."""
        ...

    @property
    def unsent_bytes(self) -> int:
        """What was sent here and the peer's side has not taken yet, as far as this process holds it.

        When it exceeds HIGH_WATER right after a `send`, an `on_drained` will follow (or `on_closed`).
        """
        ...

    def close(self, code: int, reason: str = "") -> None:
        """Send a close frame after what is queued and deliver nothing more. Only the first call counts.

        A peer that has not answered within CLOSE_SECONDS is cut off.
        """
        ...

    def pause_reading(self) -> None:
        """Deliver no more messages for now, and let TCP slow the client down.

        Meant to be short: while it lasts, a peer that went away is not noticed.
        """
        ...

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        ...


class Receiver(Protocol):
    """What a transport calls. An exception out of any of these is logged and closes the socket with 1011."""

    def on_text(self, data: bytes) -> None:
        """One complete text message, within the size limit and valid UTF-8."""
        ...

    def on_binary(self, data: bytes) -> None:
        """One complete binary message, within the size limit."""
        ...

    def on_drained(self) -> None:
        """The unsent bytes, once above HIGH_WATER, fell to LOW_WATER."""
        ...

    def on_shutdown(self) -> None:
        """The server is stopping and reads no more from here: finish what is in flight, then `close(1012)`.

        Comes only from the tuned server. Elsewhere the server closes its sockets by itself.
        """
        ...

    def on_closed(self, code: int) -> None:
        """The connection is gone; called exactly once, whatever ended it, and nothing is called after it.

        `code` is that of the first close frame, ours or the peer's: 1005 if it named none, 1006 if there was
        none.
        """
        ...
