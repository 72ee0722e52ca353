"""A token bucket for the hot path: sockets and sends. Everything else is limited by services/rate_limiter.py."""

from __future__ import annotations

from collections import OrderedDict

from app.core import metrics
from app.core.clock import Clock
from app.core.errors import TooManyRequests


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
        wait = self.wait(1)
        if not wait:
            self._tokens -= 1
        return wait

    def wait(self, amount: float) -> float:
        """Seconds until so much can be taken; 0 when it can be now."""
        now = self._clock.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._rate)
        self._updated = now
        return max(0.0, amount - self._tokens) / self._rate

    def spend(self, amount: float) -> None:
        """Take what was used, even if it is more than there was."""
        self._tokens -= amount


class TokenBuckets:
    """A bucket for each account. Those of the accounts silent for longest make room."""

    def __init__(self, rate: float, burst: int, clock: Clock, *, most: int = 100_000) -> None:
        """`rate` 0: no limit."""
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._most = most
        self._buckets: OrderedDict[int, TokenBucket] = OrderedDict()

    def take(self, user_id: int) -> float:
        """Take one permit of an account. Returns 0, or the seconds until its next one when there is none."""
        return self._bucket(user_id).take() if self._rate else 0.0

    def wait(self, user_id: int, amount: float) -> float:
        """Seconds until an account can have so much; 0 when it can now."""
        return self._bucket(user_id).wait(amount) if self._rate else 0.0

    def spend(self, user_id: int, amount: float) -> None:
        """Take what an account has used, even if it is more than it had."""
        if self._rate:
            self._bucket(user_id).spend(amount)

    def _bucket(self, user_id: int) -> TokenBucket:
        bucket = self._buckets.get(user_id)
        if bucket is None:
            bucket = self._buckets[user_id] = TokenBucket(self._rate, self._burst, self._clock)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(user_id)
        return bucket


class AccountLimit:
    """A limit of each account over all its doors, named as its setting is; counted in this process alone."""

    def __init__(self, name: str, rate: float, burst: int, clock: Clock, *, refusal: str) -> None:
        """`rate` 0: no limit. `refusal` is the sentence for who is above it."""
        self._name = name
        self._refusal = refusal
        self._buckets = TokenBuckets(rate, burst, clock)

    def take(self, user_id: int, amount: int = 1) -> None:
        """Take permits of an account. Raises TooManyRequests, and takes nothing, when it has none.

        One is enough for any amount, and the rest is owed: else more than the burst could never be had.
        """
        if wait := self._buckets.wait(user_id, 1):
            metrics.rate_limited.labels(self._name).inc()
            raise TooManyRequests("rate_limited", self._refusal, retry_after=wait)
        self._buckets.spend(user_id, amount)
