"""SQL of push: the devices that Firebase reaches, the chats that push lags behind in, and who is to hear of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    Table,
    and_,
    case,
    delete,
    exists,
    insert,
    or_,
    select,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import Unavailable
from app.db.log_connection import Row
from app.db.models import (
    Chat,
    ChatMember,
    ChatSettings,
    HiddenMessage,
    Message,
    PushDevice,
    Session,
    UserPair,
    UserSettings,
)
from app.db.repositories import chats
from app.db.repositories.chat_log import CHANGED_AT_SECONDS, database_now, is_mysql
from app.db.repositories.chats import Unread
from app.db.repositories.keys import in_order_of

CHAT = cast(Table, Chat.__table__)
MEMBER = cast(Table, ChatMember.__table__)
MESSAGE = cast(Table, Message.__table__)
HIDDEN = cast(Table, HiddenMessage.__table__)
PAIR = cast(Table, UserPair.__table__)
SESSION = cast(Table, Session.__table__)
CHAT_SETTINGS = cast(Table, ChatSettings.__table__)
USER_SETTINGS = cast(Table, UserSettings.__table__)
DEVICE = cast(Table, PushDevice.__table__)
_IS_PERSONAL = CHAT.c.type == "personal"


BADGE_CHATS = 25
"""Chats that are counted together for a badge: most badges are full before the next."""


class LaggingChat(NamedTuple):
    """A chat with messages that were not pushed, and where it stands among those that have some."""

    id: int
    last_seq: int
    changed_at: datetime


class DeviceRow(NamedTuple):
    """A device as registered."""

    session_id: int
    user_id: int
    kind: str
    token: str
    updated_at: datetime


class UnpushedChat(NamedTuple):
    """A chat and how far push has come in it."""

    id: int
    type: str
    last_seq: int
    pushed_seq: int
    member_count: int


class Span(NamedTuple):
    """Messages of a chat: after < seq <= last."""

    chat_id: int
    after: int
    last: int


class UnpushedMessage(NamedTuple):
    """What push needs to know of a message: not a word of it."""

    chat_id: int
    seq: int
    sender_id: int
    is_service: bool


class Target(NamedTuple):
    """A device of a member who is not muted, and the member's marks."""

    device: DeviceRow
    chat_id: int
    read_seq: int
    delivered_seq: int
    visible_from_seq: int
    joined_seq: int


# --- devices ----------------------------------------------------------------------------------------------------


async def save_device(session: AsyncSession, row: DeviceRow) -> None:
    """Register a session's device; the token is taken from whoever had it. The caller holds the session locked.

    Raises Unavailable (`busy`) when somebody else is registering the same token.
    """
    await session.execute(delete(DEVICE).where(DEVICE.c.session_id == row.session_id))
    await session.execute(delete(DEVICE).where(DEVICE.c.token == row.token))
    try:
        await session.execute(insert(DEVICE).values(**row._asdict()))
    except IntegrityError:
        raise Unavailable("busy", "Somebody else is changing the same thing; try again.", retry_after=0.5) from None


async def delete_devices(session: AsyncSession, session_ids: Sequence[int]) -> None:
    """Forget the devices of sessions."""
    await session.execute(delete(DEVICE).where(DEVICE.c.session_id.in_(session_ids)))


async def delete_dead_device(session: AsyncSession, row: DeviceRow) -> None:
    """Forget a device that Firebase does not know, unless it was registered anew since `row` was read."""
    await session.execute(
        delete(DEVICE).where(
            DEVICE.c.session_id == row.session_id,
            DEVICE.c.token == row.token,
            DEVICE.c.updated_at == row.updated_at,
        )
    )


# --- how far push has come --------------------------------------------------------------------------------------


async def list_unpushed(
    session: AsyncSession, *, seconds: int, after: LaggingChat | None = None, limit: int
) -> list[LaggingChat]:
    """Chats with messages not pushed, among those active in the last `seconds`, newest first; after the last of a page
    comes the next.

    Activity is by the server's clock, the search by the database's: both stand in the chat's row.
    """
    since = database_now(session, seconds_ago=seconds + CHANGED_AT_SECONDS)
    statement = (
        select(CHAT.c.id, CHAT.c.last_seq, CHAT.c.changed_at)
        .where(CHAT.c.changed_at >= since, CHAT.c.last_activity_at >= since, CHAT.c.pushed_seq < CHAT.c.last_seq)
        .order_by(CHAT.c.changed_at.desc(), CHAT.c.id.desc())
        .limit(limit)
    )
    if after is not None:
        # The first half is for MySQL, which finds no range in the second.
        earlier = or_(CHAT.c.changed_at < after.changed_at, CHAT.c.id < after.id)
        statement = statement.where(CHAT.c.changed_at <= after.changed_at, earlier)
    result = await session.execute(in_order_of(statement, CHAT, "ix_chats_changed_at"))
    return [LaggingChat(*row) for row in result]


async def find_chats(session: AsyncSession, chat_ids: Sequence[int]) -> list[UnpushedChat]:
    """How far push has come in chats, in no order; missing ones are left out."""
    result = await session.execute(
        select(*(CHAT.c[name] for name in UnpushedChat._fields)).where(CHAT.c.id.in_(chat_ids))
    )
    return [UnpushedChat(*row) for row in result]


async def find_chat(session: AsyncSession, chat_id: int) -> UnpushedChat | None:
    """The same of one."""
    rows = await find_chats(session, [chat_id])
    return rows[0] if rows else None


async def advance_pushed(session: AsyncSession, done: Sequence[tuple[int, int]]) -> None:
    """Move cursors forward, of (chat_id, seq): compared and set, so that none ever goes back."""
    # One statement: many would hold the rows, which the writer wants, for as many round trips.
    seqs = " ".join(f"WHEN {chat_id:d} THEN {seq:d}" for chat_id, seq in done)
    ids = ", ".join(f"{chat_id:d}" for chat_id, _ in done)
    connection = await session.connection()
    await connection.exec_driver_sql(
        f"UPDATE chats SET pushed_seq = CASE id {seqs} END WHERE id IN ({ids}) AND pushed_seq < CASE id {seqs} END"  # noqa: S608
    )


async def list_newest(session: AsyncSession, spans: Sequence[Span], *, limit: int) -> list[UnpushedMessage]:
    """The newest messages of each span that are not deleted, `limit` of each at most, each chat's newest first.

    Of 500 chats at once: SQLite takes no longer a union.
    """
    # As text, with constants of its own for each chat: see `chats.count_unread`.
    index = " FORCE INDEX (PRIMARY)" if is_mysql(session) else ""
    parts = [
        "SELECT * FROM (SELECT chat_id, seq, sender_id, message_type = 'service'"  # noqa: S608
        f" FROM messages{index} WHERE chat_id = {span.chat_id:d} AND seq > {span.after:d} AND seq <= {span.last:d}"
        f" AND deleted_at IS NULL ORDER BY seq DESC LIMIT {limit:d}) AS newest"
        for span in spans
    ]
    connection = await session.connection()
    rows: list[Row] = [tuple(row) for row in await connection.exec_driver_sql(" UNION ALL ".join(parts))]
    # A union promises no order.
    return sorted((UnpushedMessage(row[0], row[1], row[2], bool(row[3])) for row in rows), key=_newest_first)


def _newest_first(message: UnpushedMessage) -> tuple[int, int]:
    return message.chat_id, -message.seq


# --- who is to hear of it ---------------------------------------------------------------------------------------


def is_muted(now: datetime) -> ColumnElement[bool]:
    """Whether a member (a row of chat_members, joined with its chat) wants no push at a moment.

    They muted the chat, or all of its kind.
    """
    notify = case((_IS_PERSONAL, USER_SETTINGS.c.notify_personal), else_=USER_SETTINGS.c.notify_groups)
    return or_(
        exists().where(
            CHAT_SETTINGS.c.user_id == MEMBER.c.user_id,
            CHAT_SETTINGS.c.chat_id == MEMBER.c.chat_id,
            CHAT_SETTINGS.c.muted_until > now,
        ),
        exists().where(USER_SETTINGS.c.user_id == MEMBER.c.user_id, ~notify).correlate(MEMBER, CHAT),
    )


def _is_blocked() -> ColumnElement[bool]:
    """Whether a member's personal chat is with somebody who blocks them, or whom they block."""
    peer = MEMBER.alias("peer")
    # By the pair's key. Of two conditions, one for each order, MySQL makes a walk over all pairs there are.
    member_is_low = MEMBER.c.user_id < peer.c.user_id
    return and_(
        _IS_PERSONAL,
        exists()
        .where(
            peer.c.chat_id == MEMBER.c.chat_id,
            PAIR.c.low_id == case((member_is_low, MEMBER.c.user_id), else_=peer.c.user_id),
            PAIR.c.high_id == case((member_is_low, peer.c.user_id), else_=MEMBER.c.user_id),
            or_(PAIR.c.low_blocks_high, PAIR.c.high_blocks_low),
        )
        .correlate(MEMBER),
    )


async def list_targets(
    session: AsyncSession, chat_ids: Sequence[int], *, now: datetime, session_id: int | None = None
) -> list[Target]:
    """Devices of those who are in these chats and may be told of them: all, or that of one session.

    Left out are sessions that have ended, members who are muted, and in a personal chat both when either blocks.
    """
    conditions = [
        MEMBER.c.chat_id.in_(chat_ids),
        MEMBER.c.left_seq.is_(None),
        SESSION.c.ended_at.is_(None),
        SESSION.c.expires_at > now,
        ~is_muted(now),
        ~_is_blocked(),
    ]
    if session_id is not None:
        conditions.append(DEVICE.c.session_id == session_id)
    result = await session.execute(
        select(
            *(DEVICE.c[name] for name in DeviceRow._fields),
            MEMBER.c.chat_id,
            MEMBER.c.read_seq,
            MEMBER.c.delivered_seq,
            MEMBER.c.visible_from_seq,
            MEMBER.c.joined_seq,
        )
        .select_from(
            MEMBER.join(CHAT, CHAT.c.id == MEMBER.c.chat_id)
            .join(DEVICE, DEVICE.c.user_id == MEMBER.c.user_id)
            .join(SESSION, SESSION.c.id == DEVICE.c.session_id)
        )
        .where(*conditions)
    )
    width = len(DeviceRow._fields)
    return [Target(DeviceRow(*row[:width]), *row[width:]) for row in result]


async def count_unread(session: AsyncSession, user_id: int, *, limit: int) -> int:
    """Unread messages of a user in all chats together, counted no further than `limit`."""
    result = await session.execute(
        select(MEMBER.c.chat_id, MEMBER.c.read_seq, MEMBER.c.visible_from_seq, CHAT.c.last_seq)
        .select_from(MEMBER.join(CHAT, and_(CHAT.c.id == MEMBER.c.chat_id, CHAT.c.last_seq > MEMBER.c.read_seq)))
        .where(MEMBER.c.user_id == user_id, MEMBER.c.left_seq.is_(None))
    )
    behind = [Unread(row[0], max(row[1], row[2] - 1), row[3]) for row in result]
    total = 0
    for start in range(0, len(behind), BADGE_CHATS):
        counts = await chats.count_unread(session, user_id, behind[start : start + BADGE_CHATS], limit=limit)
        total = min(limit, total + sum(counts.values()))
        if total == limit:
            break
    return total
