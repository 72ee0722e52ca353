"""SQL of push: the devices that Firebase reaches, the chats that push lags behind in, and who is to hear of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import Unavailable
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
from app.db.repositories.chat_log import CHANGED_AT_SECONDS, database_now
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


BADGE_CHATS = 25
"""Chats that are counted together for a badge: most badges are full before the next."""


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


class UnpushedMessage(NamedTuple):
    """What push needs to know of a message: not a word of it."""

    seq: int
    sender_id: int
    is_service: bool


class Target(NamedTuple):
    """A device of a member who is not muted, and the member's marks."""

    device: DeviceRow
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


async def list_unpushed(session: AsyncSession, *, seconds: int, limit: int) -> list[tuple[int, int]]:
    """(chat_id, last_seq) of chats with messages not pushed, among those active in the last `seconds`, newest first.

    Activity is by the server's clock, the search by the database's: both stand in the chat's row.
    """
    since = database_now(session, seconds_ago=seconds + CHANGED_AT_SECONDS)
    result = await session.execute(
        select(CHAT.c.id, CHAT.c.last_seq)
        .where(CHAT.c.changed_at >= since, CHAT.c.last_activity_at >= since, CHAT.c.pushed_seq < CHAT.c.last_seq)
        .order_by(CHAT.c.changed_at.desc(), CHAT.c.id.desc())
        .limit(limit)
    )
    return [(row[0], row[1]) for row in result]


async def find_chat(session: AsyncSession, chat_id: int) -> UnpushedChat | None:
    """How far push has come in a chat."""
    statement = select(CHAT.c.id, CHAT.c.type, CHAT.c.last_seq, CHAT.c.pushed_seq).where(CHAT.c.id == chat_id)
    row = (await session.execute(statement)).first()
    return UnpushedChat(*row) if row else None


async def advance_pushed(session: AsyncSession, done: Sequence[tuple[int, int]]) -> None:
    """Move cursors forward, of (chat_id, seq): compared and set, so that none ever goes back."""
    statement = (
        update(CHAT)
        .where(CHAT.c.id == bindparam("chat_id"), CHAT.c.pushed_seq < bindparam("done"))
        .values(pushed_seq=bindparam("done"))
    )
    connection = await session.connection()
    await connection.execute(statement, [{"chat_id": chat_id, "done": seq} for chat_id, seq in sorted(done)])


async def list_newest(
    session: AsyncSession, chat_id: int, *, after: int, last: int, limit: int
) -> list[UnpushedMessage]:
    """The newest messages with after < seq <= last that are not deleted, newest first."""
    statement = (
        select(MESSAGE.c.seq, MESSAGE.c.sender_id, MESSAGE.c.message_type == "service")
        .where(
            MESSAGE.c.chat_id == chat_id, MESSAGE.c.seq > after, MESSAGE.c.seq <= last, MESSAGE.c.deleted_at.is_(None)
        )
        .order_by(MESSAGE.c.seq.desc())
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, MESSAGE))
    return [UnpushedMessage(row[0], row[1], bool(row[2])) for row in result]


# --- who is to hear of it ---------------------------------------------------------------------------------------


def is_muted(now: datetime, *, personal: bool) -> ColumnElement[bool]:
    """Whether a member (a row of chat_members) wants no push at a moment: they muted the chat, or all of its kind."""
    notify = USER_SETTINGS.c.notify_personal if personal else USER_SETTINGS.c.notify_groups
    return or_(
        exists().where(
            CHAT_SETTINGS.c.user_id == MEMBER.c.user_id,
            CHAT_SETTINGS.c.chat_id == MEMBER.c.chat_id,
            CHAT_SETTINGS.c.muted_until > now,
        ),
        exists().where(USER_SETTINGS.c.user_id == MEMBER.c.user_id, ~notify),
    )


async def list_targets(
    session: AsyncSession, chat_id: int, *, personal: bool, now: datetime, session_id: int | None = None
) -> list[Target]:
    """Devices of those who are in a chat and may be told of it: all, or that of one session.

    Left out are sessions that have ended, members who are muted, and in a personal chat both when either blocks.
    """
    conditions = [
        MEMBER.c.chat_id == chat_id,
        MEMBER.c.left_seq.is_(None),
        SESSION.c.ended_at.is_(None),
        SESSION.c.expires_at > now,
        ~is_muted(now, personal=personal),
    ]
    if session_id is not None:
        conditions.append(DEVICE.c.session_id == session_id)
    if personal:
        peer = MEMBER.alias("peer")
        conditions.append(
            ~exists()
            .where(
                peer.c.chat_id == chat_id,
                or_(
                    and_(PAIR.c.low_id == MEMBER.c.user_id, PAIR.c.high_id == peer.c.user_id),
                    and_(PAIR.c.high_id == MEMBER.c.user_id, PAIR.c.low_id == peer.c.user_id),
                ),
                or_(PAIR.c.low_blocks_high, PAIR.c.high_blocks_low),
            )
            .correlate(MEMBER)
        )
    result = await session.execute(
        select(
            *(DEVICE.c[name] for name in DeviceRow._fields),
            MEMBER.c.read_seq,
            MEMBER.c.delivered_seq,
            MEMBER.c.visible_from_seq,
            MEMBER.c.joined_seq,
        )
        .select_from(
            MEMBER.join(DEVICE, DEVICE.c.user_id == MEMBER.c.user_id).join(SESSION, SESSION.c.id == DEVICE.c.session_id)
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
