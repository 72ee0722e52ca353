"""SQL of the id blocks."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import IdBlock


async def lease_ids(session: AsyncSession, kind: str, count: int) -> int:
    """Take the next `count` ids of a kind and return the first of them."""
    statement = select(IdBlock.next_id).where(IdBlock.kind == kind).with_for_update()
    first = (await session.execute(statement)).scalar_one()
    await session.execute(update(IdBlock).where(IdBlock.kind == kind).values(next_id=first + count))
    return first
