"""Who may come in when too many want to: connections, sockets, and reads that can wait so that sends need not.

A refusal is cheap and says when to come back: those who are turned away together are told different times.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import TooManyRequests, Unavailable
from app.core.tasks import supervise
from app.services.rate_limiter import address_key
from app.services.token_bucket import TokenBucket

log = logging.getLogger(__name__)

RETURN_SECONDS_MAX = 30.0
"""Nobody is sent away for longer."""
ADDRESSES_MAX = 50_000
CONNECTIONS_MAX = 10_000
"""Where a process may open files without end: each connection costs some ten thousand bytes, too."""
LAG_TICK_SECONDS = 0.1
DOOR_LAG = 4.0
"""The door stays open until the loop lags so many times as much as sheds reads."""
WARNING_SECONDS = 60.0


class Lane:
    """One class of work: some of it at once, some waiting, none for long."""

    def __init__(self, at_once: int, *, waiting_max: int, seconds: float, closed: Callable[[], bool]) -> None:
        self.at_once = at_once
        self._slots = asyncio.Semaphore(at_once)
        self._waiting_max = waiting_max
        self._seconds = seconds
        self._closed = closed
        self.waiting = 0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Do something in this lane. Raises Unavailable (`overloaded`) when its turn does not come in time."""
        if self._closed() or self.waiting >= self._waiting_max:
            raise self._refusal()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise self._refusal() from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._slots.release()

    def _refusal(self) -> Unavailable:
        metrics.bulk_reads_refused.inc()
        wait = random.uniform(1.0, 1.0 + 2 * self._seconds)
        return Unavailable("overloaded", "The server has too much to do; try again.", retry_after=wait)


class Crowd:
    """How many are in, altogether and from each address."""

    def __init__(self) -> None:
        self.size = 0
        self._of_address: dict[str, int] = {}

    def enter(self, address: str) -> Place:
        """A place for one more; empty is no address."""
        self.size += 1
        if address:
            self._of_address[address] = self._of_address.get(address, 0) + 1
        return Place(self, address)

    def of(self, address: str) -> int:
        """How many of them have this address."""
        return self._of_address.get(address, 0)

    def _leave(self, address: str) -> None:
        self.size -= 1
        if address:
            left = self._of_address[address] - 1
            if left:
                self._of_address[address] = left
            else:
                del self._of_address[address]


class Place:
    """One's place among those that are in: a socket's from before its handshake until it is gone."""

    __slots__ = ("_address", "_crowd", "kept")

    def __init__(self, crowd: Crowd, address: str) -> None:
        self._crowd: Crowd | None = crowd
        self._address = address
        self.kept = False
        """Whether somebody has taken it upon them to `leave`."""

    def leave(self) -> None:
        """Give it back; does nothing the second time."""
        crowd, self._crowd = self._crowd, None
        if crowd is not None:
            crowd._leave(self._address)


class Admission:
    """The gate for connections, the door for sockets, and the lane for reads that can wait."""

    def __init__(self, settings: Settings, clock: Clock, *, readers: int) -> None:
        """`readers`: the connections of the database that all reads share."""
        self._settings = settings
        self._clock = clock
        files = _open_files()
        self.max_sockets = settings.max_sockets or files * 9 // 10
        self.max_connections = settings.max_http_connections or min(files // 4, CONNECTIONS_MAX)
        self._max_together = files * 19 // 20  # the rest is for the database and what is open beside
        self._sockets = Crowd()
        self._connections = Crowd()
        self._bucket = self._new_bucket(settings.limit_connects_per_second, settings.limit_connects_burst)
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._turned_away = 0.0
        """People told to come back who are not due yet, if they come at the pace of the limit."""
        self._counted_at = clock.monotonic()
        self._warned_at: dict[str, float] = {}
        self._lag = 0.0
        self._due = float("inf")
        self._ticker: asyncio.Task[None] | None = None
        # A third of the readers for these, half for catching up (`Database.bulk_reads`), the rest for what is short:
        # who is calling, who may write where.
        self.bulk = Lane(
            max(1, readers // 3),
            waiting_max=settings.bulk_queue,
            seconds=settings.bulk_wait_seconds,
            closed=lambda: self.lag > settings.max_loop_lag_seconds,
        )

    # --- the loop ---

    def start(self) -> None:
        """Begin to watch how late the event loop is."""
        self._ticker = supervise("admission-lag", self._watch)

    async def stop(self) -> None:
        """End."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._due = loop.time() + LAG_TICK_SECONDS
            await asyncio.sleep(LAG_TICK_SECONDS)
            self._note_lag(loop.time() - self._due)

    def _note_lag(self, seconds: float) -> None:
        # It is forgotten a second per second: one moment's rest is not yet the end of a rush.
        self._lag = max(seconds, self._lag - LAG_TICK_SECONDS)

    @property
    def lag(self) -> float:
        """Seconds by which the event loop is late, or has been a moment ago."""
        # From outside of the loop, and before the start, nothing is late.
        if self._ticker is None:
            return 0.0
        return max(self._lag, asyncio.get_running_loop().time() - self._due)

    # --- the gate ---

    @property
    def open_connections(self) -> int:
        """Connections that are no sockets, or not yet."""
        return self._connections.size

    def connect(self, ip: str, make_room: Callable[[], bool]) -> Place:
        """A place for one more connection, from an address that is one client's or from an unknown one (empty).

        `make_room` lets another one leave, if it can. Raises TooManyRequests for what the address has too much of,
        Unavailable for what the server has.
        """
        address = address_key(ip) if ip else ""
        limit = self._settings.max_http_connections_per_ip
        if address and 0 < limit <= self._connections.of(address):
            self._warn(
                "too_many_connections_from_one_address", address=address, hint=_HINT + "_HTTP_CONNECTIONS_PER_IP"
            )
            raise TooManyRequests(
                "too_many_connections", f"One address may have {limit} connections open.", retry_after=_a_while()
            )
        if self._is_full():
            self._warn("too_many_connections", open=self._connections.size, sockets=self._sockets.size)
            if not make_room() or self._is_full():
                raise Unavailable("overloaded", "Too many connections are open; try again.", retry_after=_a_while())
        return self._connections.enter(address)

    def _is_full(self) -> bool:
        connections = self._connections.size
        return connections >= self.max_connections or connections + self._sockets.size >= self._max_together

    # --- the door ---

    @property
    def open_sockets(self) -> int:
        """Places taken."""
        return self._sockets.size

    def enter(self, ip: str) -> Place:
        """A place for one more socket from an address.

        Raises TooManyRequests for what the address has too much of, Unavailable for what the server has.
        """
        settings = self._settings
        address = address_key(ip) if ip else ""
        if address:
            if (wait := self._wait_of_address(address)) > 0:
                raise TooManyRequests("rate_limited", "Too many sockets at once.", retry_after=wait + random.random())
            if 0 < settings.max_sockets_per_ip <= self._sockets.of(address):
                self._warn("too_many_sockets_from_one_address", address=address, hint=_HINT + "_SOCKETS_PER_IP")
                raise TooManyRequests(
                    "too_many_sockets",
                    f"One address may have {settings.max_sockets_per_ip} sockets open.",
                    retry_after=_a_while(),
                )
        if self._sockets.size >= self.max_sockets:
            raise _overloaded(_a_while())
        if self.lag > settings.max_loop_lag_seconds * DOOR_LAG or (self._bucket is not None and self._bucket.take()):
            raise _overloaded(self._time_to_return())
        return self._sockets.enter(address)

    def return_in(self, count: int) -> float:
        """When one of `count` whose sockets are closed together shall come back, in seconds: chance decides."""
        return 1.0 + random.uniform(0.0, min(count / self._pace, RETURN_SECONDS_MAX - 1.0))

    @property
    def _pace(self) -> float:
        return self._settings.limit_connects_per_second or 1000.0

    def _time_to_return(self) -> float:
        """In the order in which they were turned away, no more a second than may come in."""
        now = self._clock.monotonic()
        self._turned_away = max(0.0, self._turned_away - (now - self._counted_at) * self._pace) + 1
        self._counted_at = now
        return min(1.0 + self._turned_away / self._pace * random.uniform(0.8, 1.2), RETURN_SECONDS_MAX)

    def _wait_of_address(self, address: str) -> float:
        settings = self._settings
        bucket = self._buckets.get(address)
        if bucket is None:
            bucket = self._new_bucket(settings.limit_connects_per_ip_per_second, settings.limit_connects_per_ip_burst)
            if bucket is None:
                return 0.0
            self._buckets[address] = bucket
            if len(self._buckets) > ADDRESSES_MAX:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(address)
        return bucket.take()

    def _new_bucket(self, rate: float, burst: int) -> TokenBucket | None:
        return TokenBucket(rate, burst, self._clock) if rate else None

    def _warn(self, event: str, **fields: str | int) -> None:
        now = self._clock.monotonic()
        if now - self._warned_at.get(event, -WARNING_SECONDS) >= WARNING_SECONDS:
            self._warned_at[event] = now
            log.warning(event, extra=fields)


_HINT = "if this is a proxy of yours, name it in FORWARDED_ALLOW_IPS; else see MAX"


def _a_while() -> float:
    return random.uniform(RETURN_SECONDS_MAX / 3, RETURN_SECONDS_MAX)


def _overloaded(wait: float) -> Unavailable:
    return Unavailable("overloaded", "Too many sockets are being opened; try again.", retry_after=wait)


def _open_files() -> int:
    """The files that this process may have open."""
    if sys.platform == "win32":
        return 8192
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
