"""Socket tickets: keys that open one socket within seconds, so that no token stands in a URL."""

from __future__ import annotations

import logging
from collections import OrderedDict
from datetime import datetime
from typing import NamedTuple, Protocol

import orjson
from redis.asyncio import Redis

from app.core import security
from app.core.clock import Clock
from app.core.errors import Unavailable
from app.services.bus import BUS_ERRORS
from app.services.caller import Caller

log = logging.getLogger(__name__)

TICKETS = 10_000
TICKETS_PER_SESSION = 10


class TicketStore(Protocol):
    """Where open tickets wait. Each works once, and what is kept of it is only its hash."""

    async def issue(self, caller: Caller, seconds: float) -> str:
        """A ticket for one socket of the caller. Of one session the oldest give way.

        Raises Unavailable when too many are waiting to be used, or Redis is away.
        """
        ...

    async def redeem(self, ticket: str) -> Caller | None:
        """Who was given this ticket; None when it is unknown, used or out of time. Raises Unavailable."""
        ...


class _Open(NamedTuple):
    caller: Caller
    closes_at: float


class MemoryTickets:
    """Tickets in this process; every operation costs the same, however many there are."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # All live equally long: the oldest is the first to run out.
        self._open: OrderedDict[bytes, _Open] = OrderedDict()
        self._of_session: dict[int, dict[bytes, None]] = {}

    async def issue(self, caller: Caller, seconds: float) -> str:
        now = self._clock.monotonic()
        while self._open and next(iter(self._open.values())).closes_at <= now:
            self._take(next(iter(self._open)))
        own = self._of_session.get(caller.session_id, {})
        if len(own) >= TICKETS_PER_SESSION:
            self._take(next(iter(own)))
        if len(self._open) >= TICKETS:
            raise Unavailable("overloaded", "Too many sockets are being opened; try again.", retry_after=1)
        ticket = security.new_secret()
        key = security.token_hash(ticket)
        self._open[key] = _Open(caller, now + seconds)
        self._of_session.setdefault(caller.session_id, {})[key] = None
        return ticket

    async def redeem(self, ticket: str) -> Caller | None:
        found = self._take(security.token_hash(ticket))
        return found.caller if found is not None and found.closes_at > self._clock.monotonic() else None

    def _take(self, key: bytes) -> _Open | None:
        found = self._open.pop(key, None)
        if found is not None:
            own = self._of_session[found.caller.session_id]
            del own[key]
            if not own:
                del self._of_session[found.caller.session_id]
        return found


class RedisTickets:
    """Tickets in Redis, so that the socket may be opened on another worker than the one that issued its ticket."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def issue(self, caller: Caller, seconds: float) -> str:
        ticket = security.new_secret()
        value = orjson.dumps([caller.user_id, caller.session_id, caller.expires_at.isoformat()])
        own = f"dialect:tickets:{caller.session_id}"
        try:
            pipeline = self._redis.pipeline(transaction=False)
            _ = pipeline.set(_name(ticket), value, px=max(1, round(seconds * 1000)))
            # A list of the session's own, so that the oldest can give way.
            _ = pipeline.lpush(own, _name(ticket))
            _ = pipeline.lrange(own, TICKETS_PER_SESSION, -1)
            _ = pipeline.ltrim(own, 0, TICKETS_PER_SESSION - 1)
            _ = pipeline.pexpire(own, max(1, round(seconds * 1000)))
            surplus = (await pipeline.execute())[2]
            if surplus:
                await self._redis.delete(*surplus)
        except BUS_ERRORS as error:
            raise _unavailable(error) from error
        return ticket

    async def redeem(self, ticket: str) -> Caller | None:
        try:
            value = await self._redis.getdel(_name(ticket))
        except BUS_ERRORS as error:
            raise _unavailable(error) from error
        if value is None:
            return None
        user_id, session_id, expires_at = orjson.loads(value)
        return Caller(user_id, session_id, datetime.fromisoformat(expires_at))


def _name(ticket: str) -> str:
    return f"dialect:ticket:{security.token_hash(ticket).hex()}"


def _unavailable(error: BaseException) -> Unavailable:
    log.warning("tickets_without_redis", extra={"error": type(error).__name__})
    return Unavailable("overloaded", "Tickets cannot be issued or checked right now; try again.", retry_after=2)
