"""Rate limits by name, one for each `limit_...` setting, shared by REST and sockets.

Kept in this process: several workers each allow the whole limit.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque

from limits import RateLimitItem, parse
from limits.aio.storage import MovingWindowSupport, Storage
from limits.aio.strategies import MovingWindowRateLimiter

from app.core import metrics
from app.core.clock import Clock, SystemClock
from app.core.config import Settings
from app.core.errors import StartupError, TooManyRequests


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

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._limiter = MovingWindowRateLimiter(MovingWindows(self._clock))
        self._rules: dict[str, RateLimitItem | None] = {}
        for name, value in settings:
            if name.startswith("limit_") and isinstance(value, str):
                self._rules[name] = _rule(name, value)

    async def hit(self, name: str, *key: str | int) -> None:
        """Count one more. Raises TooManyRequests, and counts nothing, once the limit is reached."""
        rule = self._rules[name]
        if rule is None:
            return
        parts = (name, *map(str, key))
        if not await self._limiter.hit(rule, *parts):
            metrics.rate_limited.labels(name).inc()
            stats = await self._limiter.get_window_stats(rule, *parts)
            wait = max(stats.reset_time - self._clock.monotonic(), 0.001)
            raise TooManyRequests("rate_limited", "Too many requests; wait a while.", retry_after=round(wait, 3))

    async def clear(self, name: str, *key: str | int) -> None:
        """Forget what was counted.

        A limit of failures counts each try before it is made, so that tries made at once cannot slip past
        together, and a success clears it.
        """
        rule = self._rules[name]
        if rule is not None:
            await self._limiter.clear(rule, name, *map(str, key))


def _rule(name: str, value: str) -> RateLimitItem | None:
    if not value.strip():
        return None
    try:
        rule = parse(value)
    except ValueError:
        raise StartupError(
            f"The setting {name.upper()} cannot be used: write it like 10/minute, or leave it empty."
        ) from None
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
