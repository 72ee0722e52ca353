"""A token bucket for the hot path: sockets and sends. Everything else is limited by services/rate_limiter.py."""

from __future__ import annotations

from app.core.clock import Clock


class TokenBucket:
    """`rate` permits a second, `burst` at most at once."""

    __slots__ = ("_burst", "_clock", "_rate", "_tokens", "_updated")

    def __init__(self, rate: float, burst: int, clock: Clock) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._updated = clock.monotonic()

    def take(self) -> float:
        """Take one permit. Returns 0, or the seconds until the next one when there is none."""
        now = self._clock.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._rate)
        self._updated = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate
