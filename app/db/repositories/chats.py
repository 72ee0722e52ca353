"""SQL of chats as their members see them: the list, one chat, its members."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from typing import NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Select,
    Table,
    and_,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.log_connection import Row
from app.db.models import Chat, ChatMember, HiddenMessage, Message
from app.db.repositories.chat_log import MEMBER_COLUMNS, MESSAGE_COLUMNS, MemberRow, MessageRow, database_now, is_mysql
from app.db.repositories.chat_settings import SETTINGS, SETTINGS_COLUMNS, ChatSettingsRow
from app.db.repositories.drafts import DRAFT, DRAFT_COLUMNS, DraftRow
from app.db.repositories.keys import in_order_of, key_conditions

CHAT = cast(Table, Chat.__table__)
MEMBER = cast(Table, ChatMember.__table__)
MESSAGE = cast(Table, Message.__table__)
HIDDEN = cast(Table, HiddenMessage.__table__)

UNREAD_MAX = 1000
UNREAD_CHATS = 500
"""Chats whose unread messages are counted in one query. SQLite takes no more."""


class ChatCursor(NamedTuple):
    """Where one of a user's chats stands."""

    chat_id: int
    version: int
    joined_version: int


class ChatListRow(NamedTuple):
    """A chat with everything its row in a list shows to one member."""

    id: int
    type: str
    title: str
    description: str
    avatar: str | None
    history_visible: bool
    version: int
    last_seq: int
    member_count: int
    created_at: datetime
    last_activity_at: datetime
    role: str
    read_seq: int
    visible_from_seq: int
    joined_version: int
    info_version: int
    peer_id: int | None
    peer_read_seq: int | None
    peer_delivered_seq: int | None
    unread_count: int
    last_message_hidden: bool
    last_message: MessageRow | None
    settings: ChatSettingsRow
    draft: DraftRow


async def insert_chat(
    session: AsyncSession,
    *,
    chat_id: int,
    type: str,
    title: str,
    description: str,
    history_visible: bool,
    created_by: int,
    now: datetime,
) -> None:
    """Insert a chat with an empty log; its people are appended to it."""
    await session.execute(
        insert(CHAT).values(
            id=chat_id,
            type=type,
            title=title,
            description=description,
            history_visible=history_visible,
            created_by=created_by,
            created_at=now,
            last_seq=0,
            version=0,
            members_version=0,
            info_version=0,
            member_count=0,
            last_activity_at=now,
            changed_at=database_now(session),
            pushed_seq=0,
        )
    )


async def list_cursors(session: AsyncSession, user_ids: Sequence[int]) -> dict[int, list[ChatCursor]]:
    """All chats that users are in, with their versions, by user id; who is in none is left out."""
    result = await session.execute(
        select(MEMBER.c.user_id, CHAT.c.id, CHAT.c.version, MEMBER.c.joined_version)
        .select_from(MEMBER.join(CHAT, CHAT.c.id == MEMBER.c.chat_id))
        .where(MEMBER.c.user_id.in_(user_ids), MEMBER.c.left_seq.is_(None))
    )
    cursors: dict[int, list[ChatCursor]] = {}
    for user_id, *cursor in result:
        cursors.setdefault(user_id, []).append(ChatCursor(*cursor))
    return cursors


async def find_cursor(session: AsyncSession, chat_id: int, user_id: int) -> ChatCursor | None:
    """Where a chat stands for a user who is in it."""
    result = await session.execute(
        select(CHAT.c.id, CHAT.c.version, MEMBER.c.joined_version)
        .select_from(MEMBER.join(CHAT, CHAT.c.id == MEMBER.c.chat_id))
        .where(MEMBER.c.chat_id == chat_id, MEMBER.c.user_id == user_id, MEMBER.c.left_seq.is_(None))
    )
    row = result.first()
    return ChatCursor(*row) if row else None


async def find_cursors(session: AsyncSession, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], ChatCursor]:
    """Like `find_cursor`, of many (chat_id, user_id); who is not in the chat is left out."""
    found: dict[tuple[int, int], ChatCursor] = {}
    for condition in key_conditions(MEMBER.c.chat_id, MEMBER.c.user_id, places):
        result = await session.execute(
            select(MEMBER.c.user_id, CHAT.c.id, CHAT.c.version, MEMBER.c.joined_version)
            .select_from(MEMBER.join(CHAT, CHAT.c.id == MEMBER.c.chat_id))
            .where(condition, MEMBER.c.left_seq.is_(None))
        )
        found.update({(row[1], row[0]): ChatCursor(*row[1:]) for row in result})
    return found


def _page_of_chats(
    user_id: int,
    *,
    chat_ids: Sequence[int] | None,
    before: tuple[datetime, int] | None,
    pinned: bool | None,
    archived: bool | None,
    limit: int,
) -> Select[int]:
    """Which chats stand on a page of the list. To put a user's chats in order takes two rows of each; all that is
    shown of a chat, its unread messages above all, is read for those on the page alone."""
    source: FromClause = MEMBER.join(CHAT, CHAT.c.id == MEMBER.c.chat_id)
    conditions: list[ColumnElement[bool]] = [MEMBER.c.user_id == user_id, MEMBER.c.left_seq.is_(None)]
    if chat_ids is not None:
        conditions.append(MEMBER.c.chat_id.in_(chat_ids))
    if before is not None:
        moment, chat_id = before
        conditions.append(
            or_(CHAT.c.last_activity_at < moment, and_(CHAT.c.last_activity_at == moment, CHAT.c.id < chat_id))
        )
    if pinned is not None or archived is not None:
        source = source.outerjoin(SETTINGS, and_(SETTINGS.c.user_id == user_id, SETTINGS.c.chat_id == MEMBER.c.chat_id))
    if pinned is not None:
        conditions.append((func.coalesce(SETTINGS.c.pin_order, 0) > 0).is_(pinned))
    if archived is not None:
        conditions.append(func.coalesce(SETTINGS.c.archived, False).is_(archived))
    return (
        select(MEMBER.c.chat_id)
        .select_from(source)
        .where(*conditions)
        .order_by(CHAT.c.last_activity_at.desc(), CHAT.c.id.desc())
        .limit(limit)
    )


async def list_chats(
    session: AsyncSession,
    user_id: int,
    *,
    chat_ids: Sequence[int] | None = None,
    before: tuple[datetime, int] | None = None,
    pinned: bool | None = None,
    archived: bool | None = None,
    limit: int,
) -> list[ChatListRow]:
    """Chats of a user by last activity, newest first, in two queries whatever their number.

    `pinned` and `archived` leave out those that are not so, or with False those that are.
    """
    page = _page_of_chats(
        user_id, chat_ids=chat_ids, before=before, pinned=pinned, archived=archived, limit=limit
    ).subquery("page")
    peer = MEMBER.alias("peer")
    last = MESSAGE.alias("last")
    last_hidden = (
        exists()
        .where(HIDDEN.c.user_id == user_id, HIDDEN.c.chat_id == CHAT.c.id, HIDDEN.c.seq == CHAT.c.last_seq)
        .correlate(CHAT)
    )
    source = (
        page.join(MEMBER, and_(MEMBER.c.chat_id == page.c.chat_id, MEMBER.c.user_id == user_id))
        .join(CHAT, CHAT.c.id == page.c.chat_id)
        .outerjoin(
            peer,
            # NULL, which nothing equals, for groups: a condition beside the join would read all their members first.
            and_(peer.c.chat_id == case((CHAT.c.type == "personal", CHAT.c.id)), peer.c.user_id != MEMBER.c.user_id),
        )
        .outerjoin(
            last,
            and_(
                last.c.chat_id == CHAT.c.id,
                last.c.seq == CHAT.c.last_seq,
                last.c.seq >= MEMBER.c.visible_from_seq,
            ),
        )
        .outerjoin(SETTINGS, and_(SETTINGS.c.user_id == user_id, SETTINGS.c.chat_id == MEMBER.c.chat_id))
        .outerjoin(DRAFT, and_(DRAFT.c.user_id == user_id, DRAFT.c.chat_id == MEMBER.c.chat_id))
    )
    statement = (
        select(
            CHAT.c.id,
            CHAT.c.type,
            CHAT.c.title,
            CHAT.c.description,
            CHAT.c.avatar,
            CHAT.c.history_visible,
            CHAT.c.version,
            CHAT.c.last_seq,
            CHAT.c.member_count,
            CHAT.c.created_at,
            CHAT.c.last_activity_at,
            MEMBER.c.role,
            MEMBER.c.read_seq,
            MEMBER.c.visible_from_seq,
            MEMBER.c.joined_version,
            CHAT.c.info_version,
            peer.c.user_id.label("peer_id"),
            peer.c.public_read_seq.label("peer_read_seq"),
            peer.c.public_delivered_seq.label("peer_delivered_seq"),
            literal(0).label("unread_count"),  # counted below
            last_hidden.label("last_message_hidden"),
            *(last.c[column.name].label(f"last_{column.name}") for column in MESSAGE_COLUMNS),
            *(column.label(f"settings_{column.name}") for column in SETTINGS_COLUMNS),
            *(column.label(f"draft_{column.name}") for column in DRAFT_COLUMNS),
        )
        .select_from(source)
        .order_by(CHAT.c.last_activity_at.desc(), CHAT.c.id.desc())
        .prefix_with("STRAIGHT_JOIN", dialect="mysql")  # from the page, or it would read every chat of the user
    )
    rows: list[ChatListRow] = []
    for row in await session.execute(statement):
        fields = iter(row)
        own = list(islice(fields, len(ChatListRow._fields) - 3))
        message = list(islice(fields, len(MESSAGE_COLUMNS)))
        settings = list(islice(fields, len(SETTINGS_COLUMNS)))
        draft = list(fields)
        rows.append(
            ChatListRow._make(
                (
                    *own,
                    MessageRow._make(message) if message[0] is not None else None,
                    ChatSettingsRow._make(settings) if settings[0] is not None else ChatSettingsRow(user_id, own[0]),
                    DraftRow._make(draft) if draft[0] is not None else DraftRow(user_id, own[0]),
                )
            )
        )
    behind = [Unread(row.id, max(row.read_seq, row.visible_from_seq - 1), row.last_seq) for row in rows]
    counts = await count_unread(session, user_id, behind, limit=UNREAD_MAX)
    return [row._replace(unread_count=counts.get(row.id, 0)) for row in rows]


class Unread(NamedTuple):
    """The messages of a chat that somebody may not have read: after < seq <= last."""

    chat_id: int
    after: int
    last: int


async def count_unread(session: AsyncSession, user_id: int, chats: Sequence[Unread], *, limit: int) -> dict[int, int]:
    """How many of these messages are unread by a user, by chat, counted no further than `limit` in each.

    Not their own ones, nor those that were deleted, for everybody or for them.
    """
    # Each with its own constants: MySQL cannot begin in the middle of a chat at a place that stands in another row, it
    # would read a chat of a million messages from its beginning. As text: objects would cost more than the query.
    behind = [chat for chat in chats if chat.after < chat.last]
    index = " FORCE INDEX (PRIMARY)" if is_mysql(session) else ""
    counts: dict[int, int] = {}
    for start in range(0, len(behind), UNREAD_CHATS):
        parts = [
            f"SELECT {chat_id:d}, COUNT(*) FROM (SELECT 1 FROM messages m{index} WHERE m.chat_id = {chat_id:d}"  # noqa: S608
            f" AND m.seq > {after:d} AND m.seq <= {last:d} AND m.sender_id <> {user_id:d} AND m.deleted_at IS NULL"
            f" AND NOT EXISTS (SELECT 1 FROM hidden_messages h WHERE h.user_id = {user_id:d}"
            f" AND h.chat_id = {chat_id:d} AND h.seq = m.seq) LIMIT {limit:d}) AS found"
            for chat_id, after, last in behind[start : start + UNREAD_CHATS]
        ]
        connection = await session.connection()
        rows: list[Row] = [tuple(row) for row in await connection.exec_driver_sql(" UNION ALL ".join(parts))]
        counts |= {row[0]: row[1] for row in rows}
    return counts


async def find_membership(session: AsyncSession, chat_id: int, user_id: int) -> MemberRow | None:
    """A user's membership of a chat if it lasts."""
    result = await session.execute(
        select(*MEMBER_COLUMNS).where(
            MEMBER.c.chat_id == chat_id, MEMBER.c.user_id == user_id, MEMBER.c.left_seq.is_(None)
        )
    )
    row = result.first()
    return MemberRow(*row) if row else None


async def find_memberships(
    session: AsyncSession, places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], MemberRow]:
    """Like `find_membership`, of many (chat_id, user_id)."""
    found: dict[tuple[int, int], MemberRow] = {}
    for condition in key_conditions(MEMBER.c.chat_id, MEMBER.c.user_id, places):
        result = await session.execute(select(*MEMBER_COLUMNS).where(condition, MEMBER.c.left_seq.is_(None)))
        found.update({(row[0], row[1]): MemberRow(*row) for row in result})
    return found


async def list_members(session: AsyncSession, chat_id: int, *, after: int, limit: int) -> list[MemberRow]:
    """Who is in a chat, by user id."""
    statement = (
        select(*MEMBER_COLUMNS)
        .where(MEMBER.c.chat_id == chat_id, MEMBER.c.user_id > after, MEMBER.c.left_seq.is_(None))
        .order_by(MEMBER.c.user_id)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, MEMBER))
    return [MemberRow(*row) for row in result]


async def chat_version(session: AsyncSession, chat_id: int) -> int:
    """The version of a chat; 0 when there is none."""
    result = await session.execute(select(CHAT.c.version).where(CHAT.c.id == chat_id))
    return result.scalar_one_or_none() or 0


async def list_messages(
    session: AsyncSession, chat_id: int, *, low: int, high: int, newest_first: bool, limit: int
) -> list[MessageRow]:
    """Messages with low <= seq <= high, from either end, always returned by rising seq."""
    order = MESSAGE.c.seq.desc() if newest_first else MESSAGE.c.seq.asc()
    statement = (
        select(*MESSAGE_COLUMNS)
        .where(MESSAGE.c.chat_id == chat_id, MESSAGE.c.seq >= low, MESSAGE.c.seq <= high)
        .order_by(order)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, MESSAGE))
    rows = [MessageRow(*row) for row in result]
    return rows[::-1] if newest_first else rows


async def list_readers(
    session: AsyncSession, chat_id: int, seq: int, *, public: bool
) -> list[tuple[int, int, datetime | None]]:
    """(user_id, read_seq, read_at) of members whom a message has reached, by their public or their true marks.

    Not of those who came later: their marks begin at the end of the chat.
    """
    read, delivered = (
        (MEMBER.c.public_read_seq, MEMBER.c.public_delivered_seq)
        if public
        else (MEMBER.c.read_seq, MEMBER.c.delivered_seq)
    )
    result = await session.execute(
        select(MEMBER.c.user_id, read, MEMBER.c.read_at).where(
            MEMBER.c.chat_id == chat_id,
            MEMBER.c.left_seq.is_(None),
            MEMBER.c.joined_seq <= seq,
            delivered >= seq,
        )
    )
    return [(row[0], row[1], row[2]) for row in result]
