"""SQL of people: their accounts and profiles, and finding them by the beginning of a name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import Conflict
from app.db.errors import violated_constraint
from app.db.models import User
from app.db.repositories.keys import in_order_of

USER = cast(Table, User.__table__)


class UserRow(NamedTuple):
    """A person as stored, without the password."""

    id: int
    phone: str
    username: str
    display_name: str
    bio: str
    avatar: str | None
    profile_version: int
    account_version: int
    created_at: datetime
    last_seen_at: datetime | None


USER_COLUMNS = [USER.c[name] for name in UserRow._fields]

_AFTER_ASCII = "\x7f"
_AFTER_UNICODE = "\U0010ffff"
"""Sorts after whatever may follow a prefix. A range uses the index on both databases; LIKE would depend on
collations and need its wildcards escaped."""


async def insert_user(session: AsyncSession, row: UserRow, *, display_name_key: str, password_hash: str) -> None:
    """Add a person. Raises Conflict when the phone or the username is taken."""
    try:
        await session.execute(
            insert(USER).values(**row._asdict(), display_name_key=display_name_key, password_hash=password_hash)
        )
    except IntegrityError as error:
        raise _taken(error) from None


def _taken(error: IntegrityError) -> Exception:
    match violated_constraint(error):
        case "uq_users_phone":
            return Conflict("phone_taken", "There is an account with this phone already.", field="phone")
        case "uq_users_username":
            return Conflict("username_taken", "Somebody has this username.", field="username")
        case _:
            return error


async def find_user(session: AsyncSession, user_id: int) -> UserRow | None:
    """A person by id."""
    row = (await session.execute(select(*USER_COLUMNS).where(USER.c.id == user_id))).first()
    return UserRow(*row) if row else None


async def list_users(session: AsyncSession, user_ids: Sequence[int]) -> list[UserRow]:
    """People by id, in no order; missing ones are left out."""
    if not user_ids:
        return []
    result = await session.execute(select(*USER_COLUMNS).where(USER.c.id.in_(user_ids)))
    return [UserRow(*row) for row in result]


async def find_credentials(session: AsyncSession, phone: str) -> tuple[int, str] | None:
    """(id, password_hash) of the account with a phone."""
    row = (await session.execute(select(USER.c.id, USER.c.password_hash).where(USER.c.phone == phone))).first()
    return (row[0], row[1]) if row else None


async def lock_password_hash(session: AsyncSession, user_id: int) -> str | None:
    """Lock a person's row and read their password hash as it stands."""
    statement = select(USER.c.password_hash).where(USER.c.id == user_id).with_for_update()
    return (await session.execute(statement)).scalar_one_or_none()


async def find_password(session: AsyncSession, user_id: int) -> tuple[UserRow, str] | None:
    """A person and their password hash."""
    row = (await session.execute(select(*USER_COLUMNS, USER.c.password_hash).where(USER.c.id == user_id))).first()
    return (UserRow(*row[:-1]), row[-1]) if row else None


async def update_password(session: AsyncSession, user_id: int, password_hash: str) -> None:
    """Store a new password hash."""
    await session.execute(update(USER).where(USER.c.id == user_id).values(password_hash=password_hash))


async def username_exists(session: AsyncSession, username: str) -> bool:
    """Whether somebody has a username, whatever the case."""
    return (await session.execute(select(USER.c.id).where(USER.c.username == username))).first() is not None


async def list_usernames(session: AsyncSession, *, after_id: int, limit: int) -> list[tuple[int, str]]:
    """(id, username) of people by id."""
    result = await session.execute(
        select(USER.c.id, USER.c.username).where(USER.c.id > after_id).order_by(USER.c.id).limit(limit)
    )
    return [(row[0], row[1]) for row in result]


async def update_profile(session: AsyncSession, row: UserRow, *, display_name_key: str) -> None:
    """Store a profile. Raises Conflict when the new username is taken."""
    try:
        await session.execute(
            update(USER)
            .where(USER.c.id == row.id)
            .values(
                username=row.username,
                display_name=row.display_name,
                display_name_key=display_name_key,
                bio=row.bio,
                avatar=row.avatar,
                profile_version=row.profile_version,
            )
        )
    except IntegrityError as error:
        raise _taken(error) from None


async def touch_last_seen(session: AsyncSession, user_ids: Sequence[int], at: datetime, *, now: datetime) -> None:
    """Remember when people were last online, where nothing later is known: another worker may have seen them since.
    What lies after `now` was left by a clock that was wrong."""
    seen = USER.c.last_seen_at
    older = or_(seen.is_(None), seen < at, seen > now)
    await session.execute(update(USER).where(USER.c.id.in_(user_ids), older).values(last_seen_at=at))


async def search_usernames(session: AsyncSession, prefix: str, *, after: str, limit: int) -> list[UserRow]:
    """People whose username begins with `prefix`, in the order of usernames, after the username `after`."""
    statement = (
        select(*USER_COLUMNS)
        .where(USER.c.username >= prefix, USER.c.username > after, USER.c.username < prefix + _AFTER_ASCII)
        .order_by(USER.c.username)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, USER, "uq_users_username"))
    return [UserRow(*row) for row in result]


async def search_display_names(
    session: AsyncSession, prefix: str, *, after: tuple[str, int], limit: int
) -> list[tuple[str, UserRow]]:
    """(display_name_key, person) of those whose folded display name begins with `prefix`, by name and id."""
    key, user_id = USER.c.display_name_key, USER.c.id
    statement = (
        select(key, *USER_COLUMNS)
        .where(
            key >= max(prefix, after[0]),
            key < prefix + _AFTER_UNICODE,
            or_(key > after[0], and_(key == after[0], user_id > after[1])),
        )
        .order_by(key, user_id)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, USER, "ix_users_display_name_key"))
    return [(row[0], UserRow(*row[1:])) for row in result]
