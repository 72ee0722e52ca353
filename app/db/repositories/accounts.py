"""SQL of the account's log: what only one user sees, by the account version of its last change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from sqlalchemy import Table, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import ChatMember, HiddenMessage, ServerState, User, UserPair

USER = cast(Table, User.__table__)
PAIR = cast(Table, UserPair.__table__)
MEMBER = cast(Table, ChatMember.__table__)
HIDDEN = cast(Table, HiddenMessage.__table__)


class ChangedBlock(NamedTuple):
    """A block the user set or lifted."""

    user_id: int
    blocked: bool
    account_version: int


class ChangedMark(NamedTuple):
    """A membership that began or ended, or whose own read mark moved unseen by others."""

    chat_id: int
    left: bool
    read_seq: int
    account_version: int


class ChangedHidden(NamedTuple):
    """A message the user deleted for themselves."""

    chat_id: int
    seq: int
    message_id: int
    account_version: int


async def list_changed_blocks(session: AsyncSession, user_id: int, *, after: int) -> list[ChangedBlock]:
    """Blocks that changed after an account version."""
    result = await session.execute(
        select(PAIR).where(
            or_(
                (PAIR.c.low_id == user_id) & (PAIR.c.low_account_version > after),
                (PAIR.c.high_id == user_id) & (PAIR.c.high_account_version > after),
            )
        )
    )
    return [
        ChangedBlock(row.high_id, row.low_blocks_high, row.low_account_version)
        if row.low_id == user_id
        else ChangedBlock(row.low_id, row.high_blocks_low, row.high_account_version)
        for row in result
    ]


async def list_changed_marks(session: AsyncSession, user_id: int, *, after: int) -> list[ChangedMark]:
    """Memberships and own marks that changed after an account version."""
    result = await session.execute(
        select(MEMBER.c.chat_id, MEMBER.c.left_seq, MEMBER.c.read_seq, MEMBER.c.account_version).where(
            MEMBER.c.user_id == user_id, MEMBER.c.account_version > after
        )
    )
    return [ChangedMark(row[0], row[1] is not None, row[2], row[3]) for row in result]


async def list_changed_hidden(session: AsyncSession, user_id: int, *, after: int, limit: int) -> list[ChangedHidden]:
    """Messages deleted for oneself after an account version, oldest deletion first; each has a version of its own."""
    result = await session.execute(
        select(HIDDEN.c.chat_id, HIDDEN.c.seq, HIDDEN.c.message_id, HIDDEN.c.account_version)
        .where(HIDDEN.c.user_id == user_id, HIDDEN.c.account_version > after)
        .order_by(HIDDEN.c.account_version)
        .limit(limit)
    )
    return [ChangedHidden(*row) for row in result]


async def epoch(session: AsyncSession) -> str:
    """The name of this database."""
    return (await session.execute(select(ServerState.epoch))).scalar_one()


async def lock_account(session: AsyncSession, user_id: int) -> None:
    """Lock a user's row: what only they see, their memberships included, stays as it is until the transaction ends.

    After pairs and chats; joining and leaving number themselves under the same lock.
    """
    await session.execute(select(USER.c.id).where(USER.c.id == user_id).with_for_update())


async def account_versions(session: AsyncSession, user_ids: Sequence[int]) -> dict[int, int]:
    """Account versions by user id."""
    result = await session.execute(select(USER.c.id, USER.c.account_version).where(USER.c.id.in_(user_ids)))
    return {row[0]: row[1] for row in result}


async def profile_version(session: AsyncSession, user_id: int) -> int:
    """The version of a user's own profile."""
    result = await session.execute(select(USER.c.profile_version).where(USER.c.id == user_id))
    return result.scalar_one_or_none() or 0


async def hide_message(
    session: AsyncSession, *, user_id: int, chat_id: int, seq: int, message_id: int, account_version: int
) -> None:
    """Delete a message for one user. The caller has made sure, under the user's lock, that it is not hidden yet."""
    await session.execute(
        insert(HIDDEN).values(
            user_id=user_id, chat_id=chat_id, seq=seq, message_id=message_id, account_version=account_version
        )
    )
