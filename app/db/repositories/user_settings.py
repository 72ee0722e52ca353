"""SQL of what people set for all their chats. Rows are written under their user's lock (`accounts.lock_account`)."""

from __future__ import annotations

from typing import NamedTuple, cast

from sqlalchemy import Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import UserSettings

SETTINGS = cast(Table, UserSettings.__table__)


class UserSettingsRow(NamedTuple):
    """What somebody has set; without a row in the table, nothing."""

    user_id: int
    notify_personal: bool = True
    notify_groups: bool = True
    account_version: int = 0


SETTINGS_COLUMNS = [SETTINGS.c[name] for name in UserSettingsRow._fields]


async def find_user_settings(session: AsyncSession, user_id: int) -> UserSettingsRow:
    """What a user has set."""
    row = (await session.execute(select(*SETTINGS_COLUMNS).where(SETTINGS.c.user_id == user_id))).first()
    return UserSettingsRow(*row) if row else UserSettingsRow(user_id)


async def save_user_settings(session: AsyncSession, row: UserSettingsRow, *, new: bool) -> None:
    """Store settings, in a `new` row or in that which is there."""
    if new:
        await session.execute(insert(SETTINGS).values(**row._asdict()))
    else:
        await session.execute(update(SETTINGS).where(SETTINGS.c.user_id == row.user_id).values(**row._asdict()))
