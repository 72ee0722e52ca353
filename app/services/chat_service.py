"""Chats: personal, group and saved messages; who is in them, with which role."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.clock import Clock
from app.core.config import Settings
from app.core.cursors import decode_cursor, encode_cursor
from app.core.errors import Conflict, Forbidden, chat_not_found, peer_unavailable, user_not_found
from app.db.database import Database
from app.db.repositories import chats as chats_repository
from app.db.repositories import pairs as pairs_repository
from app.db.repositories import users as users_repository
from app.db.repositories.chat_log import ChatRow
from app.db.repositories.chats import ChatListRow
from app.db.repositories.pairs import PairRow
from app.db.schemas import Chat, ChatEditIn, ChatPage, ChatType, GroupIn, Members, Role, ServiceAction
from app.services.chat_log.changes import Change, ChangeInfo, ChangeMembers, SendService
from app.services.chat_log.roster import Roster
from app.services.chat_log.views import chat_view, member_view, people_named
from app.services.rate_limiter import RateLimiter
from app.services.token_bucket import AccountLimit
from app.services.unit_of_work import UnitOfWork
from app.services.user_service import users_seen_by

CHAT_CURSOR = (int, int)
"""Microseconds of the last activity since 1970, chat id."""
MEMBER_CURSOR = (int,)
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - naive UTC, as the database has it
RANK: dict[Role, int] = {"member": 0, "admin": 1, "owner": 2}


class ChatService:
    """What people do with chats. Whoever is no member gets the answer of a chat that does not exist."""

    def __init__(
        self, *, settings: Settings, clock: Clock, database: Database, limiter: RateLimiter, limit: AccountLimit
    ) -> None:
        """`limit` is that of messages: each change of a group is told to all its members, as a message is."""
        self._settings = settings
        self._clock = clock
        self._database = database
        self._limiter = limiter
        self._limit = limit

    # --- reading ---

    async def list_chats(
        self,
        user_id: int,
        *,
        cursor: str | None,
        limit: int,
        pinned: bool | None = None,
        archived: bool | None = None,
    ) -> ChatPage:
        """A page of one's chats by last activity, newest first, in few queries whatever its length."""
        limit = min(limit, self._settings.page_size_max)
        before: tuple[datetime, int] | None = None
        if cursor is not None:
            moment, chat_id = decode_cursor(cursor, *CHAT_CURSOR)
            before = (EPOCH + timedelta(microseconds=moment), chat_id)
        async with self._database.reading() as session:
            rows = await chats_repository.list_chats(
                session, user_id, before=before, pinned=pinned, archived=archived, limit=limit + 1
            )
            more = len(rows) > limit
            rows = rows[:limit]
            items = [chat_view(row) for row in rows]
            people = {chat["peer_id"] for chat in items if chat["peer_id"] is not None}
            people = people.union(*(people_named(chat["last_message"]) for chat in items if chat["last_message"]))
            users = await users_seen_by(session, user_id, sorted(people))
        return {
            "items": items,
            "users": users,
            "next": _place(rows[-1]) if more else None,
        }

    async def get(self, user_id: int, chat_id: int) -> Chat:
        """One chat of the caller's."""
        async with self._database.reading() as session:
            return await self._get(session, user_id, chat_id)

    async def _get(self, session: AsyncSession, user_id: int, chat_id: int) -> Chat:
        rows = await chats_repository.list_chats(session, user_id, chat_ids=[chat_id], limit=1)
        if not rows:
            raise chat_not_found()
        return chat_view(rows[0])

    async def list_members(self, user_id: int, chat_id: int, *, cursor: str | None, limit: int) -> Members:
        """A page of who is in a chat, by user id."""
        limit = min(limit, self._settings.page_size_max)
        [after] = decode_cursor(cursor, *MEMBER_CURSOR) if cursor is not None else [0]
        async with self._database.reading() as session:
            version = await chats_repository.chat_version(session, chat_id)
            if await chats_repository.find_membership(session, chat_id, user_id) is None:
                raise chat_not_found()
            rows = await chats_repository.list_members(session, chat_id, after=after, limit=limit + 1)
            more = len(rows) > limit
            rows = rows[:limit]
            users = await users_seen_by(session, user_id, [row.user_id for row in rows])
        return {
            "items": [member_view(row) for row in rows],
            "users": users,
            "version": version,
            "next": encode_cursor(rows[-1].user_id) if more else None,
        }

    # --- creating ---

    async def create_personal(self, uow: UnitOfWork, user_id: int, peer_id: int) -> tuple[Chat, bool]:
        """The personal chat of two people, made when they have none. Says whether it is new.

        Raises Forbidden when either blocks the other, NotFound when there is no such person.
        """
        if peer_id == user_id:
            return await self.create_saved(uow, user_id)
        async with self._database.reading() as reading:
            if await users_repository.find_user(reading, peer_id) is None:
                raise user_not_found()
            known = (await pairs_repository.find_pairs(reading, user_id, [peer_id])).get(peer_id)
            if known is not None:
                if known.chat_id is not None:
                    return await self._get(reading, user_id, known.chat_id), False
                self._require_no_block(known, user_id)
        # Counted before anything is locked, for Redis may take its time; and looked at again under the lock.
        await self._limiter.hit("limit_chats_created_per_user", user_id)
        [chat_id] = await uow.ids.reserve("chat")
        session = uow.session
        pair = await pairs_repository.lock_pair(session, user_id, peer_id)
        if pair.chat_id is not None:
            return await self._get(session, user_id, pair.chat_id), False
        self._require_no_block(pair, user_id)
        await self._insert(session, chat_id, "personal", user_id)
        await pairs_repository.set_pair_chat(session, user_id, peer_id, chat_id)
        await uow.append(ChangeMembers(chat_id, join=[(user_id, "member"), (peer_id, "member")]))
        return await self._get(session, user_id, chat_id), True

    async def create_saved(self, uow: UnitOfWork, user_id: int) -> tuple[Chat, bool]:
        """The caller's saved messages: the personal chat with oneself, one per person."""
        [chat_id] = await uow.ids.reserve("chat")
        session = uow.session
        pair = await pairs_repository.lock_pair(session, user_id, user_id)
        if pair.chat_id is not None:
            return await self._get(session, user_id, pair.chat_id), False
        await self._insert(session, chat_id, "saved", user_id)
        await pairs_repository.set_pair_chat(session, user_id, user_id, chat_id)
        await uow.append(ChangeMembers(chat_id, join=[(user_id, "owner")]))
        return await self._get(session, user_id, chat_id), True

    async def create_group(self, uow: UnitOfWork, user_id: int, body: GroupIn) -> Chat:
        """A new group; the caller is its owner.

        Raises Forbidden (`peer_unavailable`) when one of the people blocks the caller, NotFound for a missing one.
        """
        await self._limiter.hit("limit_chats_created_per_user", user_id)
        others = sorted(set(body.member_ids) - {user_id})
        self._require_room(len(others) + 1)
        [chat_id] = await uow.ids.reserve("chat")
        [message_id] = await uow.ids.reserve("message")
        session = uow.session
        await self._require_invitable(session, user_id, others)
        await self._insert(
            session,
            chat_id,
            "group",
            user_id,
            title=body.title,
            description=body.description,
            history_visible=body.history_visible,
        )
        members: list[tuple[int, Role]] = [(user_id, "owner"), *((other, "member") for other in others)]
        await uow.append(
            ChangeMembers(chat_id, join=members),
            self._service(chat_id, user_id, message_id, "chat_created", others, body.title),
        )
        return await self._get(session, user_id, chat_id)

    async def _insert(
        self,
        session: AsyncSession,
        chat_id: int,
        type: ChatType,
        created_by: int,
        *,
        title: str = "",
        description: str = "",
        history_visible: bool = True,
    ) -> None:
        await chats_repository.insert_chat(
            session,
            chat_id=chat_id,
            type=type,
            title=title,
            description=description,
            history_visible=history_visible,
            created_by=created_by,
            now=self._clock.now().replace(tzinfo=None),
        )

    # --- changing groups ---

    async def edit(self, uow: UnitOfWork, user_id: int, chat_id: int, body: ChatEditIn) -> Chat:
        """Change title, description or settings. Admins only."""
        self._limit.take(user_id, max(1, (body.title is not None) + (body.description is not None)))
        ids = iter(await uow.ids.reserve("message", 2))
        row, roster = await self._lock_group(uow, user_id, chat_id)
        self._require_rank(roster, user_id, "admin")
        changes: list[Change] = [
            ChangeInfo(chat_id, title=body.title, description=body.description, history_visible=body.history_visible)
        ]
        if body.title is not None and body.title != row.title:
            changes.append(self._service(chat_id, user_id, next(ids), "title_changed", [], body.title))
        if body.description is not None and body.description != row.description:
            changes.append(self._service(chat_id, user_id, next(ids), "description_changed", [], body.description))
        await uow.append(*changes)
        return await self._get(uow.session, user_id, chat_id)

    async def set_avatar(
        self, uow: UnitOfWork, user_id: int, chat_id: int, name: str | None
    ) -> tuple[Chat, str | None]:
        """Give a group another picture, or none; returns it and the name of the picture before. Admins only."""
        self._limit.take(user_id)
        [message_id] = await uow.ids.reserve("message")
        row, roster = await self._lock_group(uow, user_id, chat_id)
        self._require_rank(roster, user_id, "admin")
        if row.avatar != name:
            await uow.append(
                ChangeInfo(chat_id, avatar=name or ""),
                self._service(chat_id, user_id, message_id, "avatar_changed", []),
            )
        return await self._get(uow.session, user_id, chat_id), row.avatar

    async def require_admin(self, user_id: int, chat_id: int) -> None:
        """Whether somebody may change a group, before they upload for it. Raises as `edit` does."""
        chat = await self.get(user_id, chat_id)
        self._require_group(chat["type"])
        self._require_role(chat["role"], "admin")

    async def add_members(self, uow: UnitOfWork, user_id: int, chat_id: int, user_ids: Sequence[int]) -> Chat:
        """Let people into a group. Admins only; those already in it are passed over."""
        self._limit.take(user_id)
        [message_id] = await uow.ids.reserve("message")
        _, roster = await self._lock_group(uow, user_id, chat_id)
        self._require_rank(roster, user_id, "admin")
        new = sorted(set(user_ids) - roster.members.keys())
        if new:
            self._require_room(len(roster.members) + len(new))
            await self._require_invitable(uow.session, user_id, new)
            await uow.append(
                ChangeMembers(chat_id, join=[(other, "member") for other in new]),
                self._service(chat_id, user_id, message_id, "members_added", new),
            )
        return await self._get(uow.session, user_id, chat_id)

    async def remove_member(self, uow: UnitOfWork, user_id: int, chat_id: int, member_id: int) -> None:
        """Take somebody out of a group. Only those of a lower role can be removed."""
        if member_id == user_id:
            await self.leave(uow, user_id, chat_id)
            return
        self._limit.take(user_id)
        [message_id] = await uow.ids.reserve("message")
        _, roster = await self._lock_group(uow, user_id, chat_id)
        self._require_rank(roster, user_id, "admin")
        member = roster.members.get(member_id)
        if member is None:
            raise user_not_found()
        if RANK[member.role] >= RANK[roster.members[user_id].role]:
            raise Forbidden("not_allowed", "Only members of a lower role can be removed.")
        await uow.append(
            self._service(chat_id, user_id, message_id, "member_removed", [member_id]),
            ChangeMembers(chat_id, leave=[member_id]),
        )

    async def leave(self, uow: UnitOfWork, user_id: int, chat_id: int) -> None:
        """Leave a group. An owner hands it over first, unless nobody else is in it."""
        self._limit.take(user_id)
        [message_id] = await uow.ids.reserve("message")
        _, roster = await self._lock_group(uow, user_id, chat_id)
        if roster.members[user_id].role == "owner" and len(roster.members) > 1:
            raise Conflict("owner_must_transfer", "Hand the group over before you leave it.")
        await uow.append(
            self._service(chat_id, user_id, message_id, "member_left", [user_id]),
            ChangeMembers(chat_id, leave=[user_id]),
        )

    async def set_role(self, uow: UnitOfWork, user_id: int, chat_id: int, member_id: int, role: Role) -> Chat:
        """Give a member another role. The owner only; giving `owner` away makes the caller an admin."""
        self._limit.take(user_id)
        _, roster = await self._lock_group(uow, user_id, chat_id)
        self._require_rank(roster, user_id, "owner")
        if member_id not in roster.members:
            raise user_not_found()
        if member_id == user_id:
            if role != "owner":
                raise Conflict("owner_must_transfer", "Hand the group over by making somebody else its owner.")
        elif role == "owner":
            await uow.append(ChangeMembers(chat_id, roles=[(member_id, "owner"), (user_id, "admin")]))
        elif roster.members[member_id].role != role:
            await uow.append(ChangeMembers(chat_id, roles=[(member_id, role)]))
        return await self._get(uow.session, user_id, chat_id)

    # --- rules ---

    async def _lock_group(self, uow: UnitOfWork, user_id: int, chat_id: int) -> tuple[ChatRow, Roster]:
        """Lock a group of the caller's; its roster is exact until the transaction ends."""
        locked = await uow.lock_chat(chat_id)
        if locked is None or user_id not in locked[1].members:
            raise chat_not_found()
        self._require_group(locked[0].type)
        return locked

    def _require_group(self, type: str) -> None:
        if type != "group":
            raise Conflict("not_a_group", "This can be done in groups only.")

    def _require_rank(self, roster: Roster, user_id: int, role: Role) -> None:
        self._require_role(roster.members[user_id].role, role)

    def _require_role(self, held: Role, role: Role) -> None:
        if RANK[held] < RANK[role]:
            raise Forbidden("not_allowed", f"Only the {'owner' if role == 'owner' else 'admins'} may do this.")

    def _require_room(self, members: int) -> None:
        if members > self._settings.max_group_members:
            raise Conflict("group_full", f"A group has at most {self._settings.max_group_members} members.")

    def _require_no_block(self, pair: PairRow, user_id: int) -> None:
        if pair.blocks(user_id):
            raise Forbidden("peer_blocked", "You have blocked this person; unblock them first.")
        if pair.blocked_by(user_id):
            raise peer_unavailable()

    async def _require_invitable(self, session: AsyncSession, user_id: int, others: Sequence[int]) -> None:
        """All of these exist, and none of them blocks the caller or is blocked."""
        if len(await users_repository.list_users(session, others)) != len(others):
            raise user_not_found()
        for pair in (await pairs_repository.find_pairs(session, user_id, others)).values():
            self._require_no_block(pair, user_id)

    def _service(
        self,
        chat_id: int,
        user_id: int,
        message_id: int,
        action: ServiceAction,
        user_ids: Sequence[int],
        text: str = "",
    ) -> SendService:
        return SendService(chat_id, user_id, message_id, {"action": action, "user_ids": list(user_ids), "text": text})


def _place(row: ChatListRow) -> str:
    return encode_cursor((row.last_activity_at - EPOCH) // timedelta(microseconds=1), row.id)
