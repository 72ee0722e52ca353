"""SQL of what members set for a chat, for themselves alone.

Rows are written under their user's lock (`accounts.lock_account`, or numbering a change).
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import ChatSettings

SETTINGS = cast(Table, ChatSettings.__table__)


class ChatSettingsRow(NamedTuple):
    """What a member has set for a chat; without a row in the table, nothing."""

    user_id: int
    chat_id: int
    muted_until: datetime | None = None
    pin_order: int = 0
    archived: bool = False
    marked_unread: bool = False
    account_version: int = 0


SETTINGS_COLUMNS = [SETTINGS.c[name] for name in ChatSettingsRow._fields]


async def find_chat_settings(session: AsyncSession, user_id: int, chat_id: int) -> ChatSettingsRow:
    """What a user has set for a chat."""
    statement = select(*SETTINGS_COLUMNS).where(SETTINGS.c.user_id == user_id, SETTINGS.c.chat_id == chat_id)
    row = (await session.execute(statement)).first()
    return ChatSettingsRow(*row) if row else ChatSettingsRow(user_id, chat_id)


async def save_chat_settings(session: AsyncSession, row: ChatSettingsRow, *, new: bool) -> None:
    """Store settings, in a `new` row or in that which is there."""
    if new:
        await session.execute(insert(SETTINGS).values(**row._asdict()))
    else:
        key = (SETTINGS.c.user_id == row.user_id, SETTINGS.c.chat_id == row.chat_id)
        await session.execute(update(SETTINGS).where(*key).values(**row._asdict()))


async def count_pinned(session: AsyncSession, user_id: int) -> int:
    """How many chats a user has pinned."""
    result = await session.execute(
        select(func.count()).select_from(SETTINGS).where(SETTINGS.c.user_id == user_id, SETTINGS.c.pin_order > 0)
    )
    return result.scalar_one()


async def list_changed_chat_settings(session: AsyncSession, user_id: int, *, after: int) -> list[ChatSettingsRow]:
    """Settings that changed after an account version, oldest change first."""
    result = await session.execute(
        select(*SETTINGS_COLUMNS)
        .where(SETTINGS.c.user_id == user_id, SETTINGS.c.account_version > after)
        .order_by(SETTINGS.c.account_version)
    )
    return [ChatSettingsRow(*row) for row in result]
