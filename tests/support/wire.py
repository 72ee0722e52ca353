"""A WebSocket client that owns every byte it sends, right or wrong."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Literal

from websockets.utils import apply_mask

PATIENCE = 10.0
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

Frame = tuple[int, bytes]
Chop = Literal["at once", "by frame", "by octet"]


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, wide: int | None = None) -> bytes:
    """A masked frame, however wrong. `wide` sets the bytes of its length."""
    length = len(payload)
    if wide is None:
        wide = 0 if length < 126 else 2 if length < 65536 else 8
    size = (
        bytes((0x80 | length,)) if wide == 0 else bytes((0x80 | (126 if wide == 2 else 127),)) + length.to_bytes(wide)
    )
    mask = b"\x37\xfa\x21\x3d"
    return bytes((fin << 7 | rsv << 4 | opcode,)) + size + mask + apply_mask(payload, mask)


def fragments(opcode: int, *payloads: bytes) -> list[bytes]:
    """A message in these pieces."""
    last = len(payloads) - 1
    return [frame(0 if n else opcode, payload, fin=n == last) for n, payload in enumerate(payloads)]


class Client:
    """A client that sends what it is told and reads frames."""

    def __init__(self, port: int, path: str = "/", headers: str = "") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n".encode()
        )
        try:
            while b"\r\n\r\n" not in self._rest:
                self._rest += self._receive()
            self.response, _, self._rest = self._rest.partition(b"\r\n\r\n")
            assert self.response.startswith(b"HTTP/1.1 101 "), self.response
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, frames: Sequence[bytes], chop: Chop = "at once") -> None:
        """Send frames in so many pieces. A server may hang up meanwhile: what it said is read later."""
        data = b"".join(frames)
        pieces: Sequence[bytes] = [data]
        if chop == "by frame":
            pieces = frames
        elif chop == "by octet":
            pieces = [data[at : at + 1] for at in range(len(data))]
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.socket.sendall(piece)

    def frame(self) -> Frame:
        """The next frame; it must be whole and unmasked, as a server's small answers are."""
        head, length = self._exactly(2)
        if length >= 126:
            length = int.from_bytes(self._exactly(2 if length == 126 else 8))
        assert head & 0xF0 == 0x80
        return head & 0x0F, self._exactly(length)

    def until_close(self) -> tuple[list[Frame], int]:
        """All frames up to the close frame, and its code; after it the server sends nothing more."""
        frames: list[Frame] = []
        while True:
            opcode, payload = self.frame()
            if opcode == CLOSE:
                payload[2:].decode()
                return frames, int.from_bytes(payload[:2])
            frames.append((opcode, payload))

    def ended(self) -> None:
        """Nothing more comes but the end of the stream."""
        assert not self._rest
        with contextlib.suppress(ConnectionResetError):  # we had sent more than it wanted to know
            assert not self.socket.recv(1)

    def end(self) -> None:
        """Send the end of the stream, and nothing any more."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def _receive(self) -> bytes:
        data = self.socket.recv(1 << 18)
        if not data:
            raise EOFError
        return data

    def _exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._rest += self._receive()
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken
