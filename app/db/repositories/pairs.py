"""SQL of two people: their personal chat and their blocks, on one row that is locked before anything else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, select, union_all, update
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import UserPair
from app.db.repositories.keys import key_conditions

PAIR = cast(Table, UserPair.__table__)


class PairRow(NamedTuple):
    """What stands between two people."""

    low_id: int
    high_id: int
    chat_id: int | None
    low_blocks_high: bool
    high_blocks_low: bool
    low_blocked_at: datetime | None
    high_blocked_at: datetime | None

    def blocks(self, user_id: int) -> bool:
        """Whether this one of the two blocks the other."""
        return self.low_blocks_high if user_id == self.low_id else self.high_blocks_low

    def blocked_by(self, user_id: int) -> bool:
        """Whether the other one blocks this one."""
        return self.high_blocks_low if user_id == self.low_id else self.low_blocks_high

    @property
    def any_block(self) -> bool:
        """Whether either blocks the other."""
        return self.low_blocks_high or self.high_blocks_low

    def was_apart_at(self, moment: datetime) -> bool:
        """Whether a block that stands now stood at this moment."""
        since = (self.low_blocked_at, self.high_blocked_at)
        return self.any_block and min((at for at in since if at is not None), default=moment) <= moment

    @property
    def may_watch(self) -> bool:
        """Whether they may see of each other who is online."""
        return self.chat_id is not None and not self.any_block


PAIR_COLUMNS = [PAIR.c[name] for name in PairRow._fields]


def pair_key(a: int, b: int) -> tuple[int, int]:
    """(low_id, high_id) of two people."""
    return (a, b) if a < b else (b, a)


async def lock_pair(session: AsyncSession, a: int, b: int) -> PairRow:
    """Lock the pair of two people, making its row where they have none yet. First of all locks."""
    low, high = pair_key(a, b)
    locked = select(*PAIR_COLUMNS).where(PAIR.c.low_id == low, PAIR.c.high_id == high).with_for_update()
    row = (await session.execute(locked)).first()
    if row is None:
        values = {"low_id": low, "high_id": high}
        if session.get_bind().dialect.name == "mysql":
            # Not INSERT IGNORE: it shares the lock on a twin's row, and two who then want it whole deadlock.
            upsert = mysql.insert(PAIR).values(values)
            await session.execute(upsert.on_duplicate_key_update(low_id=PAIR.c.low_id))
        else:
            await session.execute(sqlite.insert(PAIR).values(values).on_conflict_do_nothing())
        row = (await session.execute(locked)).one()
    return PairRow(*row)


async def set_pair_chat(session: AsyncSession, a: int, b: int, chat_id: int) -> None:
    """Store the personal chat of a locked pair."""
    await _update_pair(session, a, b, {"chat_id": chat_id})


async def set_block(session: AsyncSession, user_id: int, other_id: int, blocked_at: datetime | None) -> None:
    """Let `user_id` block the other one of a locked pair from a moment on; None unblocks."""
    side, peer = ("low", "high") if user_id < other_id else ("high", "low")
    await _update_pair(
        session,
        user_id,
        other_id,
        {f"{side}_blocks_{peer}": blocked_at is not None, f"{side}_blocked_at": blocked_at},
    )


async def stamp_block(session: AsyncSession, user_id: int, other_id: int, account_version: int) -> None:
    """Number the last change of `user_id`'s block for their own devices."""
    side = "low" if user_id < other_id else "high"
    await _update_pair(session, user_id, other_id, {f"{side}_account_version": account_version})


async def _update_pair(session: AsyncSession, a: int, b: int, values: dict[str, object]) -> None:
    low, high = pair_key(a, b)
    await session.execute(update(PAIR).where(PAIR.c.low_id == low, PAIR.c.high_id == high).values(values))


async def find_pairs(session: AsyncSession, user_id: int, other_ids: Sequence[int]) -> dict[int, PairRow]:
    """What stands between a person and others, by the others' ids; pairs without a row are left out."""
    pairs = await list_pairs(session, [pair_key(user_id, other_id) for other_id in other_ids])
    return {pair.high_id if pair.low_id == user_id else pair.low_id: pair for pair in pairs}


async def list_pairs(session: AsyncSession, keys: Sequence[tuple[int, int]]) -> list[PairRow]:
    """The pairs with these (low, high) ids; those without a row are left out."""
    pairs: list[PairRow] = []
    for condition in key_conditions(PAIR.c.low_id, PAIR.c.high_id, keys):
        pairs.extend(PairRow(*row) for row in await session.execute(select(*PAIR_COLUMNS).where(condition)))
    return pairs


async def list_blocked(session: AsyncSession, user_id: int, after_id: int, limit: int) -> list[int]:
    """Ids of those a person blocks, rising, after an id."""
    lower = select(PAIR.c.low_id.label("other_id")).where(
        PAIR.c.high_id == user_id, PAIR.c.low_id > after_id, PAIR.c.high_blocks_low
    )
    higher = select(PAIR.c.high_id.label("other_id")).where(
        PAIR.c.low_id == user_id, PAIR.c.high_id > after_id, PAIR.c.low_blocks_high
    )
    both = union_all(lower, higher).subquery()
    result = await session.execute(select(both.c.other_id).order_by(both.c.other_id).limit(limit))
    return list(result.scalars())
