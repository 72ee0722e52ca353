"""Who is typing: told to the members who are online, never stored, first to be dropped."""

from __future__ import annotations

from app.core.errors import chat_not_found
from app.db.database import Database
from app.services.chat_log.roster import Roster, RosterCache, fetch_roster
from app.services.cluster import Cluster
from app.services.connection_manager import ConnectionManager
from app.services.transport import Frames


class TypingService:
    """Passes typing on."""

    def __init__(
        self, *, database: Database, rosters: RosterCache, connections: ConnectionManager, cluster: Cluster
    ) -> None:
        self._database = database
        self._rosters = rosters
        self._connections = connections
        self._cluster = cluster

    async def type(self, user_id: int, chat_id: int, *, active: bool) -> None:
        """Tell the others of a chat. Raises NotFound for whoever is no member; a block lets nothing through."""
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
