"""Checking what a big group receives, byte by byte, for the price of a memory comparison.

A server that frames an event once sends the same bytes to every member. So the first member to get a frame adds it
to the common stream, where it is parsed once, and everybody else's bytes are compared with that stream. Frames meant
for one member alone (acks, heartbeats, pings) are cut out on the way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

from bench.websocket import TEXT, server_frame_end

MARK = b'{"type":"new_message"'


class CommonStream:
    """Every `new_message` frame of one chat, in the order in which it was announced."""

    def __init__(self, on_frame: Callable[[bytes, int], None]) -> None:
        self.data = bytearray()
        self.ends: list[int] = []
        """Where each frame ends."""
        self._on_frame = on_frame

    def append(self, frame: bytes, payload: bytes) -> None:
        """Add the next frame; `on_frame` gets its payload and its end."""
        self.data += frame
        self.ends.append(len(self.data))
        self._on_frame(payload, len(self.data))

    def frames_until(self, position: int) -> int:
        """The number of whole frames before a position."""
        return bisect_right(self.ends, position)


class Reader:
    """One member's place in the common stream."""

    __slots__ = ("_other", "_partial", "_stream", "diverged", "position", "skipped")

    def __init__(self, stream: CommonStream, on_other: Callable[[int, bytes], None]) -> None:
        self._stream = stream
        self._other = on_other
        self._partial = b""
        self.position = 0
        self.skipped: list[tuple[int, int]] = []
        """Parts of the stream that this member never got."""
        self.diverged = ""
        """A frame that does not belong here: the member saw something else than the others."""

    def feed(self, data: bytes) -> None:
        """Take what arrived."""
        if not self._partial and self._stream.data.startswith(data, self.position):
            self.position += len(data)
        else:
            self._walk(data)

    def frames(self) -> int:
        """How many frames of the stream this member has got, apart from the skipped ones."""
        return self._stream.frames_until(self.position)

    def _walk(self, data: bytes) -> None:
        stream = self._stream
        if self._partial:
            data, self._partial = self._partial + data, b""
        else:
            frames = stream.frames_until(self.position)
            boundary = stream.ends[frames - 1] if frames else 0
            data, self.position = bytes(stream.data[boundary : self.position]) + data, boundary
        # From here on `position` stands between two frames of the stream, and so does `start` in the data.
        start = self._run(data, 0)
        while start < len(data):
            found = server_frame_end(data, start)
            if found is None:
                self._partial = data[start:]
                return
            begin, end = found
            if data[start] == TEXT and data.startswith(MARK, begin):
                self._place(data[start:end], data[begin:end])
                start = end
            else:
                self._other(data[start], data[begin:end])
                start = end + self._run(data, end)

    def _run(self, data: bytes, start: int) -> int:
        """Step over the longest part of `data` that continues the stream, and return its length.

        Ends between two frames, or with the data.
        """
        stream, position = self._stream, self.position
        view = memoryview(data)
        if stream.data.startswith(view[start:], position):
            self.position += len(data) - start
            return len(data) - start
        low = bisect_right(stream.ends, position)
        high = bisect_right(stream.ends, position + len(data) - start)
        best = 0
        while low < high:
            middle = (low + high) // 2
            length = stream.ends[middle] - position
            if stream.data.startswith(view[start : start + length], position):
                best, low = length, middle + 1
            else:
                high = middle
        self.position += best
        return best

    def _place(self, frame: bytes, payload: bytes) -> None:
        stream = self._stream
        if self.position == len(stream.data):
            stream.append(frame, payload)
        elif not stream.data.startswith(frame, self.position):
            found = stream.data.find(frame, self.position)
            if found < 0 or (found and stream.ends[bisect_left(stream.ends, found)] != found):
                self.diverged = self.diverged or payload[:300].decode("utf-8", "replace")
                return
            self.skipped.append((self.position, found))
            self.position = found
        self.position += len(frame)
