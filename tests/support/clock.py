"""A clock that a test moves by hand."""

from __future__ import annotations

from datetime import datetime, timedelta

from app.core.clock import SystemClock


class ManualClock:
    """Starts at the machine's time and stands still."""

    def __init__(self) -> None:
        self._now = SystemClock().now()
        self._monotonic = 1_000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds

    def set_back(self, seconds: float) -> None:
        """Put the wall clock back, as an administrator or a time server may."""
        self._now -= timedelta(seconds=seconds)
