"""Who is typing: told to the members who are online, never stored, first to be dropped."""

from __future__ import annotations

from app.core.errors import chat_not_found
from app.db.database import Database
from app.services.chat_log.roster import RosterCache, fetch_roster
from app.services.connection_manager import ConnectionManager
from app.services.transport import Frames


class TypingService:
    """Passes typing on."""

    def __init__(self, *, database: Database, rosters: RosterCache, connections: ConnectionManager) -> None:
        self._database = database
        self._rosters = rosters
        self._connections = connections

    async def type(self, user_id: int, chat_id: int, *, active: bool) -> None:
        """Tell the others of a chat. Raises NotFound for whoever is no member; a block lets nothing through."""
        roster = self._rosters.get(chat_id)
        if roster is None:
            async with self._database.reading() as session:
                roster = await fetch_roster(session, self._rosters, chat_id)
        if roster is None or user_id not in roster.members:
            raise chat_not_found()
        channel = self._connections.channels.get(chat_id)
        if channel is None or roster.blockers:
            return
        frames = Frames.of({"type": "typing", "chat_id": chat_id, "user_id": user_id, "active": active})
        for connection in channel.audience(roster):
            if connection.user_id != user_id:
                connection.send_droppable(frames)
