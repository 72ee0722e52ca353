"""Rate limits by name, one for each `limit_...` setting, shared by REST and sockets, and with Redis by all workers.

While Redis is away, limits that protect logins refuse (fail closed): else an outage would be the time to guess
passwords. All others go on in this process alone (fail open): a conversation must not stop for a counter.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict, deque

from limits import RateLimitItem, parse
from limits.aio.storage import MovingWindowSupport, RedisStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter
from redis.asyncio import Redis
from redis.exceptions import MaxConnectionsError

from app.core import metrics
from app.core.clock import Clock, SystemClock
from app.core.config import Settings
from app.core.errors import TooManyRequests, Unavailable
from app.services.bus import BUS_ERRORS

log = logging.getLogger(__name__)

FAIL_CLOSED = frozenset(
    {
        "limit_register_per_ip",
        "limit_login_per_ip",
        "limit_login_per_account_and_ip",
        "limit_login_failures_per_account",
    }
)
"""Limits without which passwords could be guessed, or accounts be made, without end."""
REDIS_PAUSE_SECONDS = 1.0
"""After Redis failed, it is not asked for so long: nobody else shall wait for it."""


class MovingWindows(Storage, MovingWindowSupport):
    """Hits in memory, for the `limits` library.

    Its own memory storage starts a search of all keys at every hit, with a thread switch for each key: 10,000
    of them keep a core busy. Here each hit forgets the few that have run out.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        # Per length of window, so that the key hit longest ago stands first and is the first to run out.
        self._windows: dict[int, OrderedDict[str, deque[float]]] = {}

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count `amount` hits if that many are left. Atomic: it never awaits."""
        now = self._clock.monotonic()
        keys = self._windows.setdefault(expiry, OrderedDict())
        _forget(keys, now - expiry)
        hits = keys.get(key)
        if hits is None:
            hits = keys[key] = deque()
        while hits and hits[0] <= now - expiry:
            hits.popleft()
        if len(hits) + amount > limit:
            return False
        hits.extend([now] * amount)
        keys.move_to_end(key)
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """(when the oldest counted hit was, how many are counted)."""
        now = self._clock.monotonic()
        keys = self._windows.get(expiry, OrderedDict())
        hits = [hit for hit in keys.get(key, deque()) if hit > now - expiry]
        return (hits[0] if hits else now), len(hits)

    async def clear(self, key: str) -> None:
        for keys in self._windows.values():
            keys.pop(key, None)

    async def reset(self) -> int:
        count = sum(map(len, self._windows.values()))
        self._windows.clear()
        return count

    async def check(self) -> bool:
        return True

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    # Counters of fixed windows, which nobody here uses.

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError

    async def get(self, key: str) -> int:
        raise NotImplementedError

    async def get_expiry(self, key: str) -> float:
        raise NotImplementedError


def _forget(keys: OrderedDict[str, deque[float]], before: float) -> None:
    for _ in range(2):  # more than are added, so that the rest shrinks
        if not keys:
            return
        oldest = next(iter(keys))
        if keys[oldest] and keys[oldest][-1] > before:
            return
        del keys[oldest]


class RateLimiter:
    """Counts what callers do. A limit is called as its setting is."""

    def __init__(self, settings: Settings, clock: Clock | None = None, redis: Redis | None = None) -> None:
        self._clock = clock or SystemClock()
        self._here = MovingWindowRateLimiter(MovingWindows(self._clock))
        self._shared: SlidingWindowCounterRateLimiter | None = None
        if redis is not None:
            # Its windows run by the clock of Redis: those of the workers may differ, and jump.
            storage = RedisStorage(
                "async+redis://",  # the pool knows where
                implementation="redispy",
                key_prefix="dialect:limits",
                connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # passed on to the client
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)
        self._redis_again_at = 0.0
        self._rules: dict[str, RateLimitItem | None] = {}
        for name, value in settings:
            if name.startswith("limit_") and isinstance(value, str):
                self._rules[name] = _rule(value)

    async def hit(self, name: str, *key: str | int) -> None:
        """Count one more. Raises TooManyRequests, and counts nothing, once the limit is reached; Unavailable where
        the limit fails closed and Redis is away."""
        rule = self._rules[name]
        if rule is None:
            return
        parts = (name, *map(str, key))
        if self._shared is not None:
            wait = await self._hit_shared(self._shared, rule, parts)
            if wait is not None:
                if wait:
                    metrics.rate_limited.labels(name).inc()
                    raise _too_many(wait)
                return
            if name in FAIL_CLOSED:
                what = "Registrations" if name == "limit_register_per_ip" else "Logins"
                raise Unavailable("overloaded", f"{what} cannot be counted right now; try again.", retry_after=2)
        if not await self._here.hit(rule, *parts):
            metrics.rate_limited.labels(name).inc()
            stats = await self._here.get_window_stats(rule, *parts)
            raise _too_many(stats.reset_time - self._clock.monotonic())

    async def _hit_shared(
        self, shared: SlidingWindowCounterRateLimiter, rule: RateLimitItem, parts: tuple[str, ...]
    ) -> float | None:
        """Count in Redis: the seconds to wait, 0 when the limit is not reached, None when Redis cannot be asked."""
        if self._clock.monotonic() < self._redis_again_at:
            return None
        try:
            if await shared.hit(rule, *parts):
                return 0.0
            stats = await shared.get_window_stats(rule, *parts)
        except BUS_ERRORS as error:
            self._note_away(error)
            return None
        return max(stats.reset_time - time.time(), 0.001)  # the library's own clock

    def _note_away(self, error: Exception) -> None:
        log.warning("limits_without_redis", extra={"error": type(error).__name__})
        if not isinstance(error, MaxConnectionsError):  # it is well; too many asked at once
            self._redis_again_at = self._clock.monotonic() + REDIS_PAUSE_SECONDS

    async def clear(self, name: str, *key: str | int) -> None:
        """Forget what was counted.

        A limit of failures counts each try before it is made, so that tries made at once cannot slip past
        together, and a success clears it.
        """
        rule = self._rules[name]
        if rule is None:
            return
        parts = (name, *map(str, key))
        await self._here.clear(rule, *parts)
        if self._shared is not None and self._clock.monotonic() >= self._redis_again_at:
            try:
                await self._shared.clear(rule, *parts)
            except BUS_ERRORS as error:
                self._note_away(error)


def _too_many(wait: float) -> TooManyRequests:
    return TooManyRequests("rate_limited", "Too many requests; wait a while.", retry_after=round(max(wait, 0.001), 3))


def _rule(value: str) -> RateLimitItem | None:
    if not value.strip():
        return None
    rule = parse(value)
    return rule if rule.amount > 0 else None


def address_key(ip: str) -> str:
    """What counts as one address: an IPv6 customer has a whole /64 to choose from."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
