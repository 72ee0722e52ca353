"""SQL of sessions, that is devices logged in, and of their refresh tokens.

Whoever changes a session's tokens holds the session's row locked; the row of its user is locked before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import RefreshToken, Session

SESSION = cast(Table, Session.__table__)
TOKEN = cast(Table, RefreshToken.__table__)


class SessionRow(NamedTuple):
    """A session as stored."""

    id: int
    user_id: int
    device_name: str
    platform: str
    ip: str
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime
    ended_at: datetime | None

    def is_alive(self, now: datetime) -> bool:
        """Whether it is neither ended nor expired; `now` is naive UTC."""
        return self.ended_at is None and self.expires_at > now


SESSION_COLUMNS = [SESSION.c[name] for name in SessionRow._fields]


class TokenRow(NamedTuple):
    """A refresh token as stored."""

    session_id: int
    used_at: datetime | None


async def insert_session(session: AsyncSession, row: SessionRow, token_hash: bytes) -> None:
    """Add a session with its first refresh token."""
    await session.execute(insert(SESSION).values(**row._asdict()))
    await insert_token(session, token_hash, row.id, row.created_at)


async def find_sessions(session: AsyncSession, session_ids: Sequence[int]) -> list[SessionRow]:
    """Sessions by id, in no order; missing ones are left out."""
    result = await session.execute(select(*SESSION_COLUMNS).where(SESSION.c.id.in_(session_ids)))
    return [SessionRow(*row) for row in result]


async def lock_session(session: AsyncSession, session_id: int) -> SessionRow | None:
    """A session by id, locked."""
    statement = select(*SESSION_COLUMNS).where(SESSION.c.id == session_id).with_for_update()
    row = (await session.execute(statement)).first()
    return SessionRow(*row) if row else None


async def list_alive(session: AsyncSession, user_id: int, now: datetime) -> list[SessionRow]:
    """Sessions of a user that are neither ended nor expired, the last used first."""
    result = await session.execute(
        select(*SESSION_COLUMNS)
        .where(SESSION.c.user_id == user_id, SESSION.c.ended_at.is_(None), SESSION.c.expires_at > now)
        .order_by(SESSION.c.last_seen_at.desc(), SESSION.c.id.desc())
    )
    return [SessionRow(*row) for row in result]


async def end_sessions(session: AsyncSession, session_ids: Sequence[int], at: datetime, reason: str) -> None:
    """End sessions; those ended already keep their first reason."""
    await session.execute(
        update(SESSION)
        .where(SESSION.c.id.in_(session_ids), SESSION.c.ended_at.is_(None))
        .values(ended_at=at, end_reason=reason)
    )


async def touch_sessions(session: AsyncSession, session_ids: Sequence[int], at: datetime) -> None:
    """Remember when sessions were last used."""
    await session.execute(update(SESSION).where(SESSION.c.id.in_(session_ids)).values(last_seen_at=at))


# --- refresh tokens ---


async def insert_token(session: AsyncSession, token_hash: bytes, session_id: int, at: datetime) -> None:
    """Add a refresh token."""
    await session.execute(insert(TOKEN).values(token_hash=token_hash, session_id=session_id, created_at=at))


async def find_token(session: AsyncSession, token_hash: bytes) -> TokenRow | None:
    """A refresh token by its hash."""
    statement = select(TOKEN.c.session_id, TOKEN.c.used_at).where(TOKEN.c.token_hash == token_hash)
    row = (await session.execute(statement)).first()
    return TokenRow(*row) if row else None


async def rotate_token(
    session: AsyncSession,
    row: SessionRow,
    *,
    used: bytes,
    successor: bytes,
    at: datetime,
    forget_before: datetime,
) -> None:
    """Replace a refresh token by its successor, and forget tokens used before `forget_before`.

    The caller holds the session locked, as `row` says it shall be from now on.
    """
    await session.execute(update(TOKEN).where(TOKEN.c.token_hash == used).values(used_at=at))
    await insert_token(session, successor, row.id, at)
    await session.execute(
        update(SESSION)
        .where(SESSION.c.id == row.id)
        .values(ip=row.ip, last_seen_at=row.last_seen_at, expires_at=row.expires_at)
    )
    await session.execute(delete(TOKEN).where(TOKEN.c.session_id == row.id, TOKEN.c.used_at < forget_before))


async def prune_and_list_alive(
    session: AsyncSession, user_id: int, now: datetime
) -> tuple[list[int], list[SessionRow]]:
    """Delete the sessions of a user that have expired, with their tokens. The user is locked.

    Returns the ids of those, and the sessions that are alive, in no order: in one look, for a login on SQLite keeps
    all other writes waiting.
    """
    result = await session.execute(
        select(*SESSION_COLUMNS).where(
            SESSION.c.user_id == user_id, or_(SESSION.c.ended_at.is_(None), SESSION.c.expires_at <= now)
        )
    )
    rows = [SessionRow(*row) for row in result]
    expired = [row.id for row in rows if row.expires_at <= now]
    if expired:
        await session.execute(delete(SESSION).where(SESSION.c.id.in_(expired)))
        await session.execute(delete(TOKEN).where(TOKEN.c.session_id.in_(expired)))
    return expired, [row for row in rows if row.is_alive(now)]


async def list_ended(session: AsyncSession, session_ids: Sequence[int]) -> set[int]:
    """Which of these sessions have ended."""
    result = await session.execute(
        select(SESSION.c.id).where(SESSION.c.id.in_(session_ids), SESSION.c.ended_at.is_not(None))
    )
    return set(result.scalars())
