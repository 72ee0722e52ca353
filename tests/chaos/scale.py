"""How much a scene does: a short form for every change, a long one for the figures of docs/reliability.md."""

from __future__ import annotations

import os

FORM = os.environ.get("DIALECT_CHAOS") or "short"
"""`short`, or `long` for the figures that we promise."""

if FORM not in ("short", "long"):
    raise ValueError(f"DIALECT_CHAOS is {FORM!r}: say short or long")


def scaled(name: str, *, short: int, long: int) -> int:
    """A number that DIALECT_CHAOS chooses, and that DIALECT_CHAOS_<name> sets on its own."""
    own = os.environ.get(f"DIALECT_CHAOS_{name}")
    return int(own) if own else long if FORM == "long" else short
