"""Cursors of lists: where a page ended, in a form whose every value a pattern describes.

Clients pass them back as they are. Numbers are decimal and texts hexadecimal, joined by dots: so the API's schema
can say exactly what is acceptable, and whatever matches it leads somewhere.
"""

from __future__ import annotations

import re
from typing import Any

from app.core.errors import BadInput

Part = str | int
_PATTERNS: dict[type, str] = {int: "[0-9]{1,16}", str: "(?:[0-9a-f]{2}){0,1024}"}


def cursor_pattern(*kinds: type[Part]) -> str:
    """What cursors of these parts look like."""
    return "^" + r"\.".join(_PATTERNS[kind] for kind in kinds) + "$"


def encode_cursor(*parts: Part) -> str:
    """Where a page ended."""
    return ".".join(str(part) if isinstance(part, int) else part.encode().hex() for part in parts)


def decode_cursor(cursor: str, *kinds: type[Part]) -> list[Any]:
    """The parts of a cursor, of exactly these kinds. Raises BadInput for anything of another form."""
    if not re.fullmatch(cursor_pattern(*kinds), cursor, re.ASCII):
        raise BadInput("invalid_cursor", "The cursor is not one that the server gave.")
    return [
        # No database takes a NUL, nor bytes that are no text; a cursor that the server gave has neither.
        int(part) if kind is int else bytes.fromhex(part).decode(errors="replace").replace("\0", "")
        for part, kind in zip(cursor.split("."), kinds, strict=True)
    ]
