"""Who is in a chat, as of a `members_version`: an immutable snapshot, shared by checks and by delivery."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple, cast

from app.db.database import Database
from app.db.repositories import chat_log as repository
from app.db.repositories.chat_log import ChatRow
from app.db.schemas import ChatType, Role


class RosterMember(NamedTuple):
    """What a permission check needs to know of a member."""

    role: Role
    visible_from_seq: int


class Roster:
    """The people of a chat. Never changed: a new `members_version` means a new roster."""

    __slots__ = ("blockers", "chat_id", "max_visible_from", "members", "members_version", "type")

    def __init__(
        self,
        chat_id: int,
        type: ChatType,
        members_version: int,
        members: dict[int, RosterMember],
        blockers: frozenset[int] = frozenset(),
    ) -> None:
        self.chat_id = chat_id
        self.type = type
        self.members_version = members_version
        self.members = members
        self.blockers = blockers
        """Of a personal chat: those of the two who block the other."""
        self.max_visible_from = max((member.visible_from_seq for member in members.values()), default=1)


OUTDATED_MAX = 10_000


class RosterCache:
    """The newest rosters this worker knows, bounded by the members they hold. A hint: whoever decides by one
    compares its `members_version` with the locked chat row first.

    What is read without a lock may be outdated by the time it is put here, and would stay: so whatever is forgotten
    for being outdated is remembered by its version, and who reads names the `generation` that they began in.
    """

    def __init__(self, max_members: int = 1_000_000) -> None:
        self._rosters: OrderedDict[int, Roster] = OrderedDict()
        self._members = 0
        self._max_members = max_members
        self._outdated: dict[int, int] = {}
        """Chats whose rosters from before this `members_version` are not to be believed."""
        self.generation = 0
        """Ends when nobody knows any more what is outdated: of what was read before, nothing is to be believed."""

    def get(self, chat_id: int) -> Roster | None:
        """A roster, perhaps outdated."""
        roster = self._rosters.get(chat_id)
        if roster is not None:
            self._rosters.move_to_end(chat_id)
        return roster

    def put(self, roster: Roster, *, generation: int | None = None) -> bool:
        """Remember a committed roster, unless it is outdated; whether it is not.

        Who read it without the chat's lock names the `generation` from before they began to read.
        """
        if generation is not None and generation != self.generation:
            return False
        if roster.members_version < self._outdated.get(roster.chat_id, 0):
            return False
        known = self._rosters.get(roster.chat_id)
        if known is not None:
            if known.members_version > roster.members_version:
                return False
            self._members -= len(known.members)
        self._rosters[roster.chat_id] = roster
        self._rosters.move_to_end(roster.chat_id)
        self._members += len(roster.members)
        while self._members > self._max_members and len(self._rosters) > 1:
            _, oldest = self._rosters.popitem(last=False)
            self._members -= len(oldest.members)
            self._note_outdated(oldest.chat_id, oldest.members_version)
        return True

    def drop(self, chat_id: int, older_than: int) -> None:
        """Forget a roster from before this `members_version`, and believe none that is yet to come."""
        self._note_outdated(chat_id, older_than)
        known = self._rosters.get(chat_id)
        if known is not None and known.members_version < older_than:
            del self._rosters[chat_id]
            self._members -= len(known.members)

    def clear(self) -> None:
        """Forget all: some may be outdated, and nobody knows which."""
        self._rosters.clear()
        self._members = 0
        self.generation += 1

    def _note_outdated(self, chat_id: int, older_than: int) -> None:
        if len(self._outdated) >= OUTDATED_MAX:
            self._outdated.clear()
            self.generation += 1
        self._outdated[chat_id] = max(older_than, self._outdated.get(chat_id, 0))


async def load_rosters(executor: repository.Executor, chats: Iterable[ChatRow]) -> list[Roster]:
    """Read rosters afresh. Exact when the caller holds the chats' locks; a hint otherwise."""
    by_id = {chat.id: chat for chat in chats}
    if not by_id:
        return []
    members: dict[int, dict[int, RosterMember]] = {chat_id: {} for chat_id in by_id}
    for chat_id, user_id, role, visible_from in await repository.list_active_members(executor, list(by_id)):
        members[chat_id][user_id] = RosterMember(cast(Role, role), visible_from)
    pairs = {
        cast(tuple[int, int], tuple(sorted(members[chat.id]))): chat.id
        for chat in by_id.values()
        if chat.type == "personal" and len(members[chat.id]) == 2
    }
    blockers: dict[int, frozenset[int]] = {}
    for low, high, low_blocks, high_blocks in await repository.list_blocks(executor, list(pairs)):
        blockers[pairs[low, high]] = frozenset(
            user_id for user_id, blocks in ((low, low_blocks), (high, high_blocks)) if blocks
        )
    return [
        Roster(
            chat.id,
            cast(ChatType, chat.type),
            chat.members_version,
            members[chat.id],
            blockers.get(chat.id, frozenset()),
        )
        for chat in by_id.values()
    ]


async def fetch_roster(database: Database, cache: RosterCache, chat_id: int) -> Roster | None:
    """The cached roster of a chat, read when it is not there; None when the chat does not exist. Raises Unavailable."""
    while (roster := cache.get(chat_id)) is None:
        generation = cache.generation
        async with database.reading() as session:
            rosters = await load_rosters(session, await repository.find_chats(session, [chat_id]))
        if not rosters:
            return None
        if cache.put(rosters[0], generation=generation):
            return rosters[0]  # else it was outdated while it was read
    return roster
