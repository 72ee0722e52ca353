"""Who is typing: told to the members who are online, never stored, first to be dropped.

One word of a client becomes a frame for every member who is online. So nothing is told twice within a moment, by
whichever socket of the account, and what an account may tell at all is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import DialectError, TooManyRequests, chat_not_found
from app.db.database import Database
from app.services.chat_log.roster import Roster, RosterCache, fetch_roster
from app.services.cluster import Cluster
from app.services.connection_manager import ConnectionManager
from app.services.token_bucket import TokenBuckets
from app.services.transport import Frames


class _Told(NamedTuple):
    """What was last told of an account in a chat."""

    active: bool
    at: float


class TypingService:
    """Passes typing on."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        rosters: RosterCache,
        connections: ConnectionManager,
        cluster: Cluster,
    ) -> None:
        self._clock = clock
        self._database = database
        self._rosters = rosters
        self._connections = connections
        self._cluster = cluster
        self._repeat_seconds = settings.limit_typing_repeat_seconds
        self._rate = TokenBuckets(settings.limit_typing_per_second, settings.limit_typing_burst, clock)
        self._told: OrderedDict[tuple[int, int], _Told] = OrderedDict()
        """By account and chat, what would be a repetition now; the oldest first."""

    async def type(self, user_id: int, chat_id: int, *, active: bool) -> None:
        """Tell the others of a chat, unless they were told just now.

        Raises NotFound for whoever is no member, TooManyRequests; a block lets nothing through.
        """
        if self._is_repetition(user_id, chat_id, active=active):
            metrics.typing_repeats.n += 1
            return
        if wait := self._rate.take(user_id):
            metrics.rate_limited.labels("limit_typing_per_second").inc()
            raise TooManyRequests("rate_limited", "Too much typing.", retry_after=wait)
        # Noted before it is told: what the account's other sockets say meanwhile is a repetition, too.
        self._note(user_id, chat_id, active=active)
        try:
            await self._tell(user_id, chat_id, active=active)
        except DialectError:
            self.end(user_id, chat_id)  # nobody heard it
            raise

    def end(self, user_id: int, chat_id: int) -> None:
        """A message says that its sender types no more: typing that follows is no repetition."""
        self._told.pop((user_id, chat_id), None)

    def _is_repetition(self, user_id: int, chat_id: int, *, active: bool) -> bool:
        told = self._told.get((user_id, chat_id))
        since = self._clock.monotonic() - self._repeat_seconds
        return told is not None and told.active == active and told.at > since

    def _note(self, user_id: int, chat_id: int, *, active: bool) -> None:
        now = self._clock.monotonic()
        while self._told and next(iter(self._told.values())).at <= now - self._repeat_seconds:
            self._told.popitem(last=False)
        if self._repeat_seconds:
            self._told[user_id, chat_id] = _Told(active, now)
            self._told.move_to_end((user_id, chat_id))

    async def _tell(self, user_id: int, chat_id: int, *, active: bool) -> None:
        roster = await fetch_roster(self._database, self._rosters, chat_id)
        if roster is None or user_id not in roster.members:
            raise chat_not_found()
        if not roster.blockers:
            self._deliver(roster, user_id, active=active)
            self._cluster.type(roster, user_id, active=active)

    async def receive(self, chat_id: int, user_id: int, *, active: bool) -> None:
        """Tell those who are here of somebody who types on another worker; checked again, by what is known here.

        Raises Unavailable.
        """
        if chat_id in self._connections.channels:
            roster = await fetch_roster(self._database, self._rosters, chat_id)
            if roster is not None and user_id in roster.members and not roster.blockers:
                self._deliver(roster, user_id, active=active)

    def _deliver(self, roster: Roster, user_id: int, *, active: bool) -> None:
        channel = self._connections.channels.get(roster.chat_id)
        if channel is None:
            return
        frames = Frames.of({"type": "typing", "chat_id": roster.chat_id, "user_id": user_id, "active": active})
        for connection in channel.audience(roster):
            if connection.user_id != user_id:
                connection.send_droppable(frames)
