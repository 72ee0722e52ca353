"""Time, injected: wall time for stamps that people read, monotonic time for waiting."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the app needs to know of time."""

    def now(self) -> datetime:
        """Wall time in UTC, timezone-aware. Never used for order."""
        ...

    def monotonic(self) -> float:
        """Seconds that only grow, for timeouts and limits."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as all times are on the wire: `2026-01-31T12:00:00.000Z`.

    Databases hand back naive datetimes; they are UTC here by construction.
    """
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="milliseconds") + "Z"
