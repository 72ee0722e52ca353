"""What Redis says, cut into messages, so that some of those of its channels can get lost on the way."""

from __future__ import annotations

from collections.abc import Callable


class LosesMessages:
    """Passes a connection's answers on, and loses those messages of channels for which `loses` says so."""

    def __init__(self, loses: Callable[[bytes], bool]) -> None:
        self._loses = loses
        self._waiting = b""

    def __call__(self, data: bytes) -> bytes:
        """What of these bytes, and of those before that were not whole, goes on."""
        self._waiting += data
        passed = b""
        while (end := end_of_value(self._waiting, 0)) is not None:
            value, self._waiting = self._waiting[:end], self._waiting[end:]
            if not (is_message(value) and self._loses(value)):
                passed += value
        return passed


def is_message(value: bytes) -> bool:
    """Whether this was published by somebody to a channel."""
    return value[:1] in (b"*", b">") and b"\r\nmessage\r\n" in value[:32]


def end_of_value(data: bytes, begin: int) -> int | None:
    """Where the value of RESP that begins here ends; None when it is not whole yet."""
    line = data.find(b"\r\n", begin)
    if line < 0:
        return None
    kind, end = data[begin : begin + 1], line + 2
    if kind in b"$=!" and int(data[begin + 1 : line]) >= 0:
        end += int(data[begin + 1 : line]) + 2
    elif kind in b"*>~%":
        for _ in range(int(data[begin + 1 : line]) * (2 if kind == b"%" else 1)):
            inner = end_of_value(data, end)
            if inner is None:
                return None
            end = inner
    return end if end <= len(data) else None
