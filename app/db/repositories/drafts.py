"""SQL of drafts. Rows are written under their user's lock (`accounts.lock_account`)."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import Draft

DRAFT = cast(Table, Draft.__table__)


class DraftRow(NamedTuple):
    """What somebody has begun to write in a chat; without a row in the table, nothing."""

    user_id: int
    chat_id: int
    content: str = ""
    reply_to_id: int | None = None
    updated_at: datetime | None = None
    account_version: int = 0


DRAFT_COLUMNS = [DRAFT.c[name] for name in DraftRow._fields]


async def find_draft(session: AsyncSession, user_id: int, chat_id: int) -> DraftRow:
    """A user's draft of a chat."""
    statement = select(*DRAFT_COLUMNS).where(DRAFT.c.user_id == user_id, DRAFT.c.chat_id == chat_id)
    row = (await session.execute(statement)).first()
    return DraftRow(*row) if row else DraftRow(user_id, chat_id)


async def save_draft(session: AsyncSession, row: DraftRow, *, new: bool) -> None:
    """Store a draft, in a `new` row or in that which is there."""
    if new:
        await session.execute(insert(DRAFT).values(**row._asdict()))
    else:
        key = (DRAFT.c.user_id == row.user_id, DRAFT.c.chat_id == row.chat_id)
        await session.execute(update(DRAFT).where(*key).values(**row._asdict()))


async def list_changed_drafts(session: AsyncSession, user_id: int, *, after: int) -> list[DraftRow]:
    """Drafts that changed after an account version, oldest change first; deleted ones are empty."""
    result = await session.execute(
        select(*DRAFT_COLUMNS)
        .where(DRAFT.c.user_id == user_id, DRAFT.c.account_version > after)
        .order_by(DRAFT.c.account_version)
    )
    return [DraftRow(*row) for row in result]
