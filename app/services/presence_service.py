"""Who is online: told to those who have a personal chat with them and asked to watch.

Best effort, and not part of any log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence, Set

from app.core import metrics
from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.errors import BadInput, Unavailable
from app.core.tasks import keep_running
from app.db.database import Database
from app.db.events import PresenceEvent
from app.db.repositories import pairs as pairs_repository
from app.db.repositories import users as users_repository
from app.services.connection_manager import Connection, ConnectionManager
from app.services.online import Online
from app.services.transport import Frames

log = logging.getLogger(__name__)

LAST_SEEN_DELAY_SECONDS = 1.0
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
        self._gone: set[int] = set()
        self._storing = asyncio.Lock()
        self._later: asyncio.Task[None] | None = None
        self._doubted = False
        self._rechecking: asyncio.Task[None] | None = None
        online.listeners.append(self._on_presence)
        online.here_listeners.append(self._on_here)

    async def subscribe(self, connection: Connection, user_ids: Sequence[int]) -> None:
        """Let a connection watch these people instead of those before, and tell it how they are now.

        People one has no personal chat with, or a block, simply never change. Raises BadInput for too many.
        """
        limit = self._settings.max_presence_subscriptions
        if len(user_ids) > limit:
            raise BadInput("too_many_subscriptions", f"At most {limit} people can be watched.", field="user_ids")
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

    def _on_here(self, user_id: int) -> None:
        # Stored by each worker for its own sockets: the last one to lose somebody has the last word.
        if not self._connections.is_online(user_id):
            self._gone.add(user_id)
            if self._later is None or self._later.done():
                self._later = self._connections.start_task(
                    keep_running("last-seen", self._flush_later, until=lambda: not self._gone), "last-seen"
                )

    async def _flush_later(self) -> None:
        """Store when people went, a second's worth at once: a thousand may drop together."""
        while self._gone:
            await asyncio.sleep(LAST_SEEN_DELAY_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Store now when people went, and wait for what is being stored already. Never raises for the database."""
        async with self._storing:
            gone = sorted(user_id for user_id in self._gone if not self._connections.is_online(user_id))
            self._gone.clear()
            if not gone:
                return
            try:
                async with self._database.writing() as session:
                    await users_repository.touch_last_seen(session, gone, self._clock.now().replace(tzinfo=None))
            except Unavailable:
                log.info("last_seen_not_stored", extra={"users": len(gone)})
            except Exception:
                log.exception("last_seen_not_stored", extra={"users": len(gone)})
