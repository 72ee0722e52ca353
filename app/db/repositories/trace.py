"""SQL of the delivery trace: how far each chat was told of by which worker, how far each device was pushed to, and
what else stands between a message and its recipients.

Marks are written many at once: one statement, whole rows, compared with what is there, so that none ever goes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import ColumnElement, Table, and_, delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import (
    ChatMember,
    ChatSettings,
    FanoutMark,
    Message,
    PushDevice,
    PushMark,
    Session,
    UserSettings,
    Worker,
)
from app.db.repositories.chat_log import is_mysql
from app.db.repositories.keys import in_order_of

WORKER = cast(Table, Worker.__table__)
MESSAGE = cast(Table, Message.__table__)
FANOUT = cast(Table, FanoutMark.__table__)
PUSHED = cast(Table, PushMark.__table__)
MEMBER = cast(Table, ChatMember.__table__)
SESSION = cast(Table, Session.__table__)
DEVICE = cast(Table, PushDevice.__table__)
CHAT_SETTINGS = cast(Table, ChatSettings.__table__)
USER_SETTINGS = cast(Table, UserSettings.__table__)

ROWS_MAX = 1000
"""Rows of one statement: SQLite takes no more than some thousand, with their values."""


class FanoutRow(NamedTuple):
    """The messages that a worker has told of: of its own ones (`commit`), or of all (`sockets`)."""

    chat_id: int
    worker: str
    part: str
    first_seq: int
    last_seq: int
    at: datetime

    def covers(self, seq: int, committed_by: str | None) -> bool:
        """Whether it told of this message of that worker's."""
        return self.first_seq <= seq <= self.last_seq and (self.part != "commit" or self.worker == committed_by)


class PushRow(NamedTuple):
    """How far a session was pushed to in a chat."""

    session_id: int
    chat_id: int
    sent_seq: int
    tried_seq: int
    answer: str
    reason: str
    at: datetime


class RecipientRow(NamedTuple):
    """A membership as a trace needs it, past ones included."""

    user_id: int
    role: str
    joined_seq: int
    left_seq: int | None
    visible_from_seq: int
    read_seq: int
    read_at: datetime | None
    delivered_seq: int
    public_read_seq: int
    public_delivered_seq: int


class PhoneRow(NamedTuple):
    """A session, the device that is registered for it (`kind` is None without one), and how far it was pushed to."""

    session_id: int
    user_id: int
    device_name: str
    platform: str
    last_seen_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    kind: str | None
    registered_at: datetime | None
    pushed: PushRow | None


# --- writing marks ----------------------------------------------------------------------------------------------


async def add_worker(session: AsyncSession, name: str, started_at: datetime) -> int:
    """Number a process."""
    row = Worker(name=name, started_at=started_at)
    session.add(row)
    await session.flush()
    return row.number


async def save_fanout(session: AsyncSession, rows: Sequence[FanoutRow]) -> None:
    """Store runs, each joined to the one that is there; of `sockets`, if nothing lies between, else the newer one
    stays."""
    joined = (
        "({new}.part = 'commit' OR ({new}.first_seq <= {old}.last_seq + 1 AND {new}.last_seq >= {old}.first_seq - 1))"
    )
    # In this order: MySQL assigns from left to right, and each looks at what is assigned after it.
    sets = {
        "at": "CASE WHEN {new}.last_seq >= {old}.last_seq THEN {new}.at ELSE {old}.at END",
        "first_seq": (
            f"CASE WHEN {joined} AND {{old}}.first_seq <= {{new}}.first_seq THEN {{old}}.first_seq"
            f" WHEN {joined} OR {{new}}.last_seq > {{old}}.last_seq THEN {{new}}.first_seq ELSE {{old}}.first_seq END"
        ),
        "last_seq": _greatest("last_seq"),
    }
    await _upsert(session, "fanout_marks", ("chat_id", "worker", "part"), FanoutRow._fields, rows, sets)


async def save_pushed(session: AsyncSession, rows: Sequence[PushRow]) -> None:
    """Store how far devices were pushed to; the answer is that to the newest message."""
    newest = "CASE WHEN {new}.tried_seq >= {old}.tried_seq THEN {new}.%s ELSE {old}.%s END"
    sets = {name: newest.replace("%s", name) for name in ("answer", "reason", "at")}
    sets |= {name: _greatest(name) for name in ("tried_seq", "sent_seq")}
    await _upsert(session, "push_marks", ("session_id", "chat_id"), PushRow._fields, rows, sets)


def _greatest(name: str) -> str:
    return f"CASE WHEN {{new}}.{name} > {{old}}.{name} THEN {{new}}.{name} ELSE {{old}}.{name} END"


async def _upsert(
    session: AsyncSession,
    table: str,
    keys: Sequence[str],
    names: Sequence[str],
    rows: Sequence[tuple[int | str | datetime, ...]],
    sets: Mapping[str, str],
) -> None:
    """Insert rows, by their keys' order, or change those that are there by `sets`, of the `{old}` and `{new}` row."""
    # As text: an insert of a thousand rows through SQLAlchemy's objects would hold up the loop for a tenth of a second.
    mysql = is_mysql(session)
    mark, new, change = ("%s", "new", " AS new ON DUPLICATE KEY UPDATE ") if mysql else (
        "?", "excluded", f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET "
    )  # fmt: skip
    assignments = ", ".join(f"{name} = {value}" for name, value in sets.items())
    assignments = assignments.replace("{old}", table).replace("{new}", new)
    places = f"({', '.join([mark] * len(names))})"
    connection = await session.connection()
    rows = sorted(rows, key=lambda row: row[: len(keys)])  # whoever locks several does so in one order
    for start in range(0, len(rows), ROWS_MAX):
        some = rows[start : start + ROWS_MAX]
        sql = f"INSERT INTO {table} ({', '.join(names)}) VALUES {', '.join([places] * len(some))}{change}{assignments}"  # noqa: S608 - names of columns
        await connection.exec_driver_sql(sql, tuple(_bindable(value) for row in some for value in row))


def _bindable(value: int | str | datetime) -> int | str:
    """A value as both drivers take it."""
    return value.isoformat(" ", "microseconds") if isinstance(value, datetime) else value


async def prune_fanout(session: AsyncSession, chat_ids: Sequence[int], before: datetime) -> None:
    """Delete the runs in these chats that ended before a moment: workers that are no more left them."""
    keys = [FANOUT.c.chat_id, FANOUT.c.worker, FANOUT.c.part]
    # Looked for first, without a lock: two workers that prune the same chats would wait for each other's rows.
    found = await session.execute(select(*keys).where(FANOUT.c.chat_id.in_(chat_ids), FANOUT.c.at < before))
    for key in sorted(tuple(row) for row in found):
        await session.execute(
            delete(FANOUT).where(
                *(column == value for column, value in zip(keys, key, strict=True)), FANOUT.c.at < before
            )
        )


async def delete_pushed(session: AsyncSession, session_ids: Sequence[int]) -> None:
    """Forget how far sessions were pushed to."""
    await session.execute(delete(PUSHED).where(PUSHED.c.session_id.in_(session_ids)))


# --- reading ----------------------------------------------------------------------------------------------------


async def find_worker(session: AsyncSession, chat_id: int, seq: int) -> str | None:
    """Name of the worker that committed a message; None when it is not known."""
    result = await session.execute(
        select(WORKER.c.name)
        .select_from(MESSAGE.join(WORKER, WORKER.c.number == MESSAGE.c.worker))
        .where(MESSAGE.c.chat_id == chat_id, MESSAGE.c.seq == seq)
    )
    return result.scalar_one_or_none()


async def list_fanout(session: AsyncSession, chat_id: int) -> list[FanoutRow]:
    """All runs of a chat, the newest first."""
    result = await session.execute(
        select(*(FANOUT.c[name] for name in FanoutRow._fields))
        .where(FANOUT.c.chat_id == chat_id)
        .order_by(FANOUT.c.at.desc(), FANOUT.c.worker, FANOUT.c.part)
    )
    return [FanoutRow(*row) for row in result]


async def list_recipients(
    session: AsyncSession, chat_id: int, *, after: int, limit: int, of: tuple[int, int] | None = None
) -> list[RecipientRow]:
    """Memberships of a chat by user id; `of` (seq, sender_id): only those whom this message is for."""
    conditions: list[ColumnElement[bool]] = [MEMBER.c.chat_id == chat_id, MEMBER.c.user_id > after]
    if of is not None:
        seq, sender_id = of
        conditions += [MEMBER.c.left_seq.is_(None), MEMBER.c.joined_seq <= seq, MEMBER.c.user_id != sender_id]
    statement = (
        select(*(MEMBER.c[name] for name in RecipientRow._fields))
        .where(*conditions)
        .order_by(MEMBER.c.user_id)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, MEMBER))
    return [RecipientRow(*row) for row in result]


async def list_phones(
    session: AsyncSession, chat_id: int, user_ids: Sequence[int], *, alive_at: datetime | None = None
) -> dict[int, list[PhoneRow]]:
    """The sessions of users, with how far each was pushed to in a chat; `alive_at`: only those alive then."""
    if not user_ids:
        return {}
    conditions: list[ColumnElement[bool]] = [SESSION.c.user_id.in_(user_ids)]
    if alive_at is not None:
        conditions += [SESSION.c.ended_at.is_(None), SESSION.c.expires_at > alive_at]
    result = await session.execute(
        select(
            SESSION.c.id,
            *(SESSION.c[name] for name in PhoneRow._fields[1:8]),
            DEVICE.c.kind,
            DEVICE.c.updated_at,
            *(PUSHED.c[name].label(f"pushed_{name}") for name in PushRow._fields),
        )
        .select_from(
            SESSION.outerjoin(DEVICE, DEVICE.c.session_id == SESSION.c.id).outerjoin(
                PUSHED, and_(PUSHED.c.session_id == SESSION.c.id, PUSHED.c.chat_id == chat_id)
            )
        )
        .where(*conditions)
        .order_by(SESSION.c.user_id, SESSION.c.id)
    )
    phones: dict[int, list[PhoneRow]] = {}
    for row in result:
        pushed = PushRow._make(row[10:]) if row[10] is not None else None
        phones.setdefault(row.user_id, []).append(PhoneRow(*row[:10], pushed))
    return phones


async def list_silent(
    session: AsyncSession, chat_id: int, user_ids: Sequence[int], now: datetime, *, personal: bool
) -> dict[int, datetime | None]:
    """Users who want no push from a chat, with until when they have muted it; None: all chats of its kind."""
    notify = USER_SETTINGS.c.notify_personal if personal else USER_SETTINGS.c.notify_groups
    kinds = select(USER_SETTINGS.c.user_id).where(USER_SETTINGS.c.user_id.in_(user_ids), ~notify)
    silent: dict[int, datetime | None] = dict.fromkeys((await session.execute(kinds)).scalars())
    muted = select(CHAT_SETTINGS.c.user_id, CHAT_SETTINGS.c.muted_until).where(
        CHAT_SETTINGS.c.user_id.in_(user_ids), CHAT_SETTINGS.c.chat_id == chat_id, CHAT_SETTINGS.c.muted_until > now
    )
    silent |= {row[0]: row[1] for row in await session.execute(muted)}
    return silent
