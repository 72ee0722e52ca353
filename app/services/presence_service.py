"""Who is online: told to those who have a personal chat with them and asked to watch. And who was, when last.

Best effort, and not part of any log. When somebody was last seen is stored as they come, every few minutes while they
stay, and as they go: a crash leaves it a few minutes early. Each is a row in a batch, never a transaction of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence, Set
from datetime import UTC, datetime
from itertools import islice

from app.core import metrics
from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.errors import BadInput, Unavailable
from app.core.tasks import keep_running, supervise
from app.db.database import Database
from app.db.events import PresenceEvent
from app.db.repositories import pairs as pairs_repository
from app.db.repositories import users as users_repository
from app.services.connection_manager import Connection, ConnectionManager
from app.services.online import Online
from app.services.token_bucket import AccountLimit
from app.services.transport import Frames

log = logging.getLogger(__name__)

LAST_SEEN_DELAY_SECONDS = 1.0
"""Who came or went is stored with all others of so long: a thousand may drop together."""
LAST_SEEN_BATCH = 500
"""People stored by one transaction, which for a moment holds rows that others want."""
LAST_SEEN_WAITING_MAX = 100_000
"""People to be stored while the database is away; beyond, they were last seen when they came."""
RECHECKED_AT_ONCE = 400
"""Pairs of people asked for together."""
RECHECK_PAUSE_SECONDS = 1.0
"""Between tries while the database is away."""


class PresenceService:
    """Keeps who watches whom, and tells them."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        connections: ConnectionManager,
        online: Online,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._connections = connections
        self._online = online
        self._watchers: dict[int, set[Connection]] = {}
        self._separations = 0
        self._seen: dict[int, datetime] = {}
        """When people were last seen, where it is not stored yet."""
        self._staying: OrderedDict[int, float] = OrderedDict()
        """Those who are online here, each with when that is stored again; the next one first."""
        self._storing = asyncio.Lock()
        self._storer: asyncio.Task[None] | None = None
        self._doubted = False
        self._rechecking: asyncio.Task[None] | None = None
        self._limit = AccountLimit(
            "limit_presence_per_second",
            settings.limit_presence_per_second,
            settings.limit_presence_burst,
            clock,
            refusal="Too many lists of people to watch; slow down.",
        )
        online.listeners.append(self._on_presence)
        online.here_listeners.append(self._on_here)

    def start(self) -> None:
        """Begin to store when people were last seen."""
        self._storer = supervise("last-seen", self._keep_storing)

    async def stop(self) -> None:
        """Store who has gone and who has to go now, as far as the database is there, and end."""
        if self._storer is not None:
            self._storer.cancel()
            await asyncio.gather(self._storer, return_exceptions=True)
            self._storer = None
        for user_id in self._staying:
            self._note_seen(user_id)
        await self.store()

    async def subscribe(self, connection: Connection, user_ids: Sequence[int]) -> None:
        """Let a connection watch these people instead of those before, and tell it how they are now.

        People one has no personal chat with, or a block, simply never change. Raises BadInput for too many of them,
        TooManyRequests for an account that asks too often.
        """
        limit = self._settings.max_presence_subscriptions
        if len(user_ids) > limit:
            raise BadInput("too_many_subscriptions", f"At most {limit} people can be watched.", field="user_ids")
        self._limit.take(connection.user_id)
        while True:
            separations = self._separations
            async with self._database.reading() as session:
                pairs = await pairs_repository.find_pairs(session, connection.user_id, user_ids)
                allowed = [user_id for user_id, pair in pairs.items() if pair.may_watch]
                rows = await users_repository.list_users(session, allowed)
            if connection.closing:
                return
            if separations == self._separations:
                break  # else what was read may be older than a block
        self.forget(connection)
        connection.watching = frozenset(row.id for row in rows)
        for row in rows:
            self._watchers.setdefault(row.id, set()).add(connection)
            online = self._online.is_online(row.id)
            seen = None if online or row.last_seen_at is None else timestamp(row.last_seen_at)
            connection.send_event({"type": "presence", "user_id": row.id, "online": online, "last_seen_at": seen})

    def forget(self, connection: Connection) -> None:
        """End all that a connection watches."""
        for user_id in connection.watching:
            self._unwatch(connection, user_id)
        connection.watching = frozenset()

    def separate(self, user_id: int, other_id: int) -> None:
        """A block came between two: neither sees the other any more."""
        self._separations += 1
        for watcher, watched in ((user_id, other_id), (other_id, user_id)):
            for connection in list(self._watchers.get(watched, ())):
                if connection.user_id == watcher:
                    self._unwatch(connection, watched)
                    connection.watching -= {watched}

    def recheck(self) -> None:
        """Blocks may have been told that were not heard here: ask the database who may still watch whom."""
        self._separations += 1
        self._doubted = True
        if self._rechecking is None or self._rechecking.done():
            work = keep_running("presence-recheck", self._recheck_all, until=lambda: not self._doubted)
            self._rechecking = self._connections.start_task(work, "presence-recheck")

    async def _recheck_all(self) -> None:
        while self._doubted:
            self._doubted = False
            checked = ended = 0
            keys: set[tuple[int, int]] = set()
            for user_id in (*self._watchers, None):
                # Some at a time, each time in a session of their own: there may be hundreds of thousands.
                if user_id is not None:
                    watchers = self._watchers.get(user_id, ())
                    keys |= {pairs_repository.pair_key(user_id, connection.user_id) for connection in watchers}
                if keys and (user_id is None or len(keys) >= RECHECKED_AT_ONCE):
                    apart = keys - await self._find_watchable(keys)
                    for pair in apart:
                        self.separate(*pair)
                    checked, ended = checked + len(keys), ended + len(apart)
                    keys = set()
            metrics.presence_rechecks.inc()
            log.info("presence_rechecked", extra={"pairs": checked, "ended": ended})

    async def _find_watchable(self, keys: Set[tuple[int, int]]) -> set[tuple[int, int]]:
        while True:
            try:
                async with self._database.bulk_reads, self._database.reading() as session:
                    pairs = await pairs_repository.list_pairs(session, sorted(keys))
            except Unavailable:
                await asyncio.sleep(RECHECK_PAUSE_SECONDS)
            else:
                return {(pair.low_id, pair.high_id) for pair in pairs if pair.may_watch}

    def _unwatch(self, connection: Connection, user_id: int) -> None:
        watchers = self._watchers.get(user_id)
        if watchers is not None:
            watchers.discard(connection)
            if not watchers:
                del self._watchers[user_id]

    def _on_presence(self, user_id: int, online: bool) -> None:
        now = self._clock.now()
        watchers = self._watchers.get(user_id)
        if watchers:
            event: PresenceEvent = {
                "type": "presence",
                "user_id": user_id,
                "online": online,
                "last_seen_at": None if online else timestamp(now),
            }
            frames = Frames.of(event)
            for connection in watchers:
                connection.send_droppable(frames)

    # --- when people were last seen ---

    def _on_here(self, user_id: int) -> None:
        # Stored by each worker for its own sockets: the last one to lose somebody has the last word.
        online = self._connections.is_online(user_id)
        if online and user_id in self._staying:
            return  # one socket more, or one of several less
        self._note_seen(user_id)
        if online:
            self._staying[user_id] = self._clock.monotonic() + self._settings.last_seen_seconds
        else:
            self._staying.pop(user_id, None)

    def _note_seen(self, user_id: int) -> None:
        if user_id in self._seen or len(self._seen) < LAST_SEEN_WAITING_MAX:
            self._seen[user_id] = self._now().replace(microsecond=0)  # so that many share a moment, and a statement

    def _now(self) -> datetime:
        return self._clock.now().astimezone(UTC).replace(tzinfo=None)

    async def _keep_storing(self) -> None:
        while True:
            await asyncio.sleep(LAST_SEEN_DELAY_SECONDS)
            await self.store()

    async def store(self) -> None:
        """Store when people were last seen, those who have stayed for long enough included, and wait for what is being
        stored already. What a silent database does not take waits for the next time. Never raises for the database."""
        now = self._clock.monotonic()
        while self._staying and next(iter(self._staying.values())) <= now:
            user_id, _ = self._staying.popitem(last=False)
            self._note_seen(user_id)
            self._staying[user_id] = now + self._settings.last_seen_seconds
        async with self._storing:
            while batch := dict(islice(self._seen.items(), LAST_SEEN_BATCH)):
                moments: dict[datetime, list[int]] = {}
                for user_id, at in sorted(batch.items()):
                    moments.setdefault(at, []).append(user_id)
                try:
                    for at, user_ids in moments.items():
                        # Each in a transaction of its own, which locks users in the order of their ids as all do.
                        async with self._database.writing() as session:
                            await users_repository.touch_last_seen(session, user_ids, at, now=self._now())
                except Unavailable:
                    log.info("last_seen_not_stored", extra={"users": len(self._seen)})
                    return
                except Exception:
                    log.exception("last_seen_not_stored", extra={"users": len(batch)})
                for user_id, at in batch.items():
                    if self._seen[user_id] == at:  # else they came or went meanwhile
                        del self._seen[user_id]
