"""Cursors of lists: opaque to clients, so that what they hold may change."""

from __future__ import annotations

import base64
import json
from typing import Any

from app.core.errors import BadInput

Part = str | int


def encode_cursor(*parts: Part) -> str:
    """Where a page ended."""
    raw = json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_cursor(cursor: str, *kinds: type[Part]) -> list[Any]:
    """The parts of a cursor, of exactly these kinds. Raises BadInput for what the server would not have made."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        parts = json.loads(raw)
        if [type(part) for part in parts] != list(kinds) or not all(map(_is_sane, parts)):
            raise ValueError("not ours")
    except (ValueError, TypeError, RecursionError):
        raise BadInput("invalid_cursor", "The cursor is not one that the server gave.", field="cursor") from None
    return list(parts)


def _is_sane(part: Part) -> bool:
    if isinstance(part, int):
        return 0 <= part < 2**53
    # No database takes a NUL or a lone surrogate.
    return not any(letter == "\x00" or "\ud800" <= letter <= "\udfff" for letter in part)
