"""SQL of what members set for a chat, for themselves alone; and who is muted.

Rows are written under their user's lock (`accounts.lock_account`, or numbering a change).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import Chat, ChatSettings, UserSettings
from app.db.repositories.keys import key_conditions

CHAT = cast(Table, Chat.__table__)
SETTINGS = cast(Table, ChatSettings.__table__)
USER_SETTINGS = cast(Table, UserSettings.__table__)


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


async def list_muted(
    session: AsyncSession, keys: Sequence[tuple[int, int]], now: datetime
) -> frozenset[tuple[int, int]]:
    """Which of these (chat_id, user_id) are not to be notified at a moment: they muted the chat, or all of its kind."""
    muted: set[tuple[int, int]] = set()
    for condition in key_conditions(SETTINGS.c.chat_id, SETTINGS.c.user_id, keys):
        by_chat = select(SETTINGS.c.chat_id, SETTINGS.c.user_id).where(condition, SETTINGS.c.muted_until > now)
        muted.update((row[0], row[1]) for row in await session.execute(by_chat))
    chat_ids, user_ids = {key[0] for key in keys}, {key[1] for key in keys}
    if not keys:
        return frozenset()
    off = or_(~USER_SETTINGS.c.notify_personal, ~USER_SETTINGS.c.notify_groups)
    quiet = select(USER_SETTINGS.c.user_id, USER_SETTINGS.c.notify_personal, USER_SETTINGS.c.notify_groups).where(
        USER_SETTINGS.c.user_id.in_(user_ids), off
    )
    wants = {row[0]: {"personal": row[1], "group": row[2]} for row in await session.execute(quiet)}
    if wants:
        result = await session.execute(select(CHAT.c.id, CHAT.c.type).where(CHAT.c.id.in_(chat_ids)))
        types: dict[int, str] = {row[0]: row[1] for row in result}
        muted.update(
            (chat_id, user_id)
            for chat_id, user_id in keys
            if not wants.get(user_id, {}).get(types.get(chat_id, ""), True)
        )
    return frozenset(muted)
