"""SQL of the chat log: lock the chats, look up what came before, write rows in bulk, read what changed.

The hot statements move many rows in one round trip. Where a bulk UPDATE needs values per row, integers and times
that this module made itself are written into the statement: no text from outside ever is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import ColumnElement, Table, insert, literal_column, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from app.db.models import Chat, ChatMember, HiddenMessage, Message, User, UserPair
from app.db.repositories.keys import key_conditions

CHAT = cast(Table, Chat.__table__)
MEMBER = cast(Table, ChatMember.__table__)
MESSAGE = cast(Table, Message.__table__)
HIDDEN = cast(Table, HiddenMessage.__table__)
PAIR = cast(Table, UserPair.__table__)
USER = cast(Table, User.__table__)


class ChatRow(NamedTuple):
    """A chat's counters as they stand under the lock."""

    id: int
    type: str
    title: str
    description: str
    history_visible: bool
    last_seq: int
    version: int
    members_version: int
    info_version: int
    member_count: int


CHAT_COLUMNS = [CHAT.c[name] for name in ChatRow._fields]


class MessageRow(NamedTuple):
    """A message as stored."""

    chat_id: int
    seq: int
    id: int
    version: int
    sender_id: int
    client_id: bytes
    message_type: str
    content: str
    service: str | None
    reply_to_id: int | None
    reply_to_seq: int | None
    created_at: datetime
    edited_at: datetime | None
    deleted_at: datetime | None


_CREATED_AT = MessageRow._fields.index("created_at")
MESSAGE_COLUMNS = [MESSAGE.c[name] for name in MessageRow._fields]


class MemberRow(NamedTuple):
    """A membership as stored."""

    chat_id: int
    user_id: int
    role: str
    joined_at: datetime
    joined_seq: int
    joined_version: int
    visible_from_seq: int
    left_seq: int | None
    read_seq: int
    delivered_seq: int
    public_read_seq: int
    public_delivered_seq: int
    version: int
    account_version: int


MEMBER_COLUMNS = [MEMBER.c[name] for name in MemberRow._fields]


@dataclass(slots=True)
class ChatUpdate:
    """New counters of a chat."""

    id: int
    last_seq: int
    version: int
    members_version: int
    info_version: int
    member_count: int
    last_activity_at: datetime | None


@dataclass(slots=True)
class MarkUpdate:
    """Marks of one member; each only ever rises, so 0 leaves a column as it is."""

    chat_id: int
    user_id: int
    read_seq: int = 0
    delivered_seq: int = 0
    public_read_seq: int = 0
    public_delivered_seq: int = 0
    version: int = 0
    account_version: int = 0
    read_at: datetime | None = None


Executor = AsyncSession | AsyncConnection
"""What runs statements. Writing takes the bare connection: a session's bookkeeping costs more than a hot statement."""


def is_mysql(executor: Executor) -> bool:
    """Whether this talks to MySQL; otherwise it is SQLite."""
    bind = executor if isinstance(executor, AsyncConnection) else executor.get_bind()
    return bind.dialect.name == "mysql"


_NOW_MYSQL = "NOW(6)"
_NOW_SQLITE = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


def database_now(executor: Executor) -> ColumnElement[datetime]:
    """SQL for the database's own clock, UTC, six digits."""
    return literal_column(_NOW_MYSQL if is_mysql(executor) else _NOW_SQLITE)


def _values(executor: Executor, rows: Iterable[Sequence[int | datetime | None]]) -> str:
    """Rows of a VALUES clause. Only integers, times and NULL: anything else would be a bug, and raises."""
    prefix = "ROW" if is_mysql(executor) else ""
    return ",".join(f"{prefix}({','.join(_literal(value) for value in row)})" for row in rows)


def _literal(value: int | datetime | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, datetime):
        return f"'{_moment(value)}'"
    return str(int(value))


def _moment(value: datetime) -> str:
    return value.isoformat(" ", "microseconds")


# --- locking and looking up -------------------------------------------------------------------------------------


async def lock_chats(
    connection: AsyncConnection, chat_ids: Sequence[int], *, skip_locked: bool = False
) -> list[ChatRow]:
    """Lock chats, lowest id first, and read their counters. Missing ones, and with `skip_locked` those that
    somebody else holds, are left out."""
    lock = ""
    if is_mysql(connection):  # SQLite's writer holds the whole database
        lock = " FOR UPDATE SKIP LOCKED" if skip_locked else " FOR UPDATE"
    columns, ids = ", ".join(ChatRow._fields), ",".join(_literal(chat_id) for chat_id in chat_ids)
    result = await connection.exec_driver_sql(
        f"SELECT {columns} FROM chats WHERE id IN ({ids}) ORDER BY id{lock}"  # noqa: S608 - integers
    )
    return [ChatRow._make(row) for row in result]


async def find_chats(executor: Executor, chat_ids: Sequence[int]) -> list[ChatRow]:
    """Chats without a lock."""
    result = await executor.execute(select(*CHAT_COLUMNS).where(CHAT.c.id.in_(chat_ids)))
    return [ChatRow._make(row) for row in result]


async def find_by_client_ids(connection: AsyncConnection, keys: Sequence[tuple[int, int, bytes]]) -> list[MessageRow]:
    """Earlier messages with these (chat_id, sender_id, client_id)."""
    rows = ",".join(f"({chat_id:d},{sender_id:d},X'{client_id.hex()}')" for chat_id, sender_id, client_id in keys)
    # Almost always there are none: look by the index alone, and read whole rows only of those found.
    if is_mysql(connection):
        sql = f"SELECT id FROM messages WHERE (chat_id, sender_id, client_id) IN ({rows})"  # noqa: S608
    else:
        # SQLite would read the whole table for an IN of several columns.
        sql = (
            f"WITH v(chat_id, sender_id, client_id) AS (VALUES {rows})"  # noqa: S608
            " SELECT m.id FROM v CROSS JOIN messages m"
            " ON m.chat_id = v.chat_id AND m.sender_id = v.sender_id AND m.client_id = v.client_id"
        )
    result = await connection.exec_driver_sql(sql)
    ids = [row[0] for row in result]
    return await find_messages(connection, ids) if ids else []


async def find_messages(executor: Executor, message_ids: Sequence[int]) -> list[MessageRow]:
    """Messages by id."""
    result = await executor.execute(select(*MESSAGE_COLUMNS).where(MESSAGE.c.id.in_(message_ids)))
    return [MessageRow(*row) for row in result]


async def find_members(executor: Executor, keys: Sequence[tuple[int, int]]) -> list[MemberRow]:
    """Memberships, past ones included, by (chat_id, user_id)."""
    rows: list[MemberRow] = []
    for condition in key_conditions(MEMBER.c.chat_id, MEMBER.c.user_id, keys):
        rows.extend(MemberRow(*row) for row in await executor.execute(select(*MEMBER_COLUMNS).where(condition)))
    return rows


async def list_active_members(executor: Executor, chat_ids: Sequence[int]) -> list[tuple[int, int, str, int]]:
    """(chat_id, user_id, role, visible_from_seq) of all who are in the chats now."""
    result = await executor.execute(
        select(MEMBER.c.chat_id, MEMBER.c.user_id, MEMBER.c.role, MEMBER.c.visible_from_seq).where(
            MEMBER.c.chat_id.in_(chat_ids), MEMBER.c.left_seq.is_(None)
        )
    )
    return [(row[0], row[1], row[2], row[3]) for row in result]


async def list_blocks(executor: Executor, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool, bool]]:
    """(low_id, high_id, low_blocks_high, high_blocks_low) of pairs (low, high)."""
    columns = (PAIR.c.low_id, PAIR.c.high_id, PAIR.c.low_blocks_high, PAIR.c.high_blocks_low)
    rows: list[tuple[int, int, bool, bool]] = []
    for condition in key_conditions(PAIR.c.low_id, PAIR.c.high_id, pairs):
        result = await executor.execute(select(*columns).where(condition))
        rows.extend((row[0], row[1], row[2], row[3]) for row in result)
    return rows


# --- writing ----------------------------------------------------------------------------------------------------


async def insert_messages(connection: AsyncConnection, rows: Sequence[MessageRow]) -> None:
    """Insert new messages in one multi-row statement."""
    mark = "%s" if is_mysql(connection) else "?"
    columns, marks = ", ".join(MessageRow._fields), ", ".join([mark] * len(MessageRow._fields))
    # Past SQLAlchemy's typing of each value: the drivers take what is here, but for SQLite's lack of a time type.
    moments = {row.created_at: _moment(row.created_at) for row in rows}
    await connection.exec_driver_sql(
        f"INSERT INTO messages ({columns}) VALUES ({marks})",  # noqa: S608 - names of columns
        [(*row[:_CREATED_AT], moments[row.created_at], *row[_CREATED_AT + 1 :]) for row in rows],
    )


async def update_messages(connection: AsyncConnection, rows: Sequence[MessageRow]) -> None:
    """Store the new state of edited or deleted messages."""
    for row in rows:
        await connection.execute(
            update(MESSAGE)
            .where(MESSAGE.c.chat_id == row.chat_id, MESSAGE.c.seq == row.seq)
            .values(
                version=row.version,
                content=row.content,
                service=row.service,
                edited_at=row.edited_at,
                deleted_at=row.deleted_at,
            )
        )


async def update_chats(connection: AsyncConnection, rows: Sequence[ChatUpdate]) -> None:
    """Store counters of locked chats, all in one statement, and stamp `changed_at` with the database's clock."""
    names = "id, last_seq, version, members_version, info_version, member_count, last_activity_at"
    values = _values(
        connection,
        (
            (
                row.id,
                row.last_seq,
                row.version,
                row.members_version,
                row.info_version,
                row.member_count,
                row.last_activity_at,
            )
            for row in rows
        ),
    )
    sets = {name: f"v.{name}" for name in ("last_seq", "version", "members_version", "info_version", "member_count")}
    sets["last_activity_at"] = "COALESCE(v.last_activity_at, {t}.last_activity_at)"
    sets["changed_at"] = _NOW_MYSQL if is_mysql(connection) else _NOW_SQLITE
    await _update_from(connection, "chats", names, values, sets, "{t}.id = v.id")


async def update_marks(connection: AsyncConnection, rows: Sequence[MarkUpdate]) -> None:
    """Raise the marks of members, all in one statement."""
    names = (
        "chat_id, user_id, read_seq, delivered_seq, public_read_seq, public_delivered_seq, version, account_version,"
        " read_at"
    )
    values = _values(
        connection,
        (
            (
                row.chat_id,
                row.user_id,
                row.read_seq,
                row.delivered_seq,
                row.public_read_seq,
                row.public_delivered_seq,
                row.version,
                row.account_version,
                row.read_at,
            )
            for row in rows
        ),
    )
    greatest = "GREATEST" if is_mysql(connection) else "MAX"
    rising = (
        "read_seq",
        "delivered_seq",
        "public_read_seq",
        "public_delivered_seq",
        "version",
        "account_version",
    )
    sets = {name: f"{greatest}({{t}}.{name}, v.{name})" for name in rising}
    sets["read_at"] = "COALESCE(v.read_at, {t}.read_at)"
    on = "{t}.chat_id = v.chat_id AND {t}.user_id = v.user_id"
    await _update_from(connection, "chat_members", names, values, sets, on)


async def _update_from(
    connection: AsyncConnection, table: str, names: str, values: str, sets: dict[str, str], on: str
) -> None:
    """Update `table` from the rows of a VALUES clause; `{t}` stands for the table in `sets` and `on`."""
    if is_mysql(connection):
        assignments = ", ".join(f"t.{name} = {value}" for name, value in sets.items())
        # Straight: from the values to the rows. The other way round would look at, and lock, rows of strangers.
        sql = f"UPDATE (VALUES {values}) AS v ({names}) STRAIGHT_JOIN {table} t ON {on} SET {assignments}"  # noqa: S608
        sql = sql.replace("{t}", "t")
    else:
        assignments = ", ".join(f"{name} = {value}" for name, value in sets.items())
        sql = f"WITH v({names}) AS (VALUES {values}) UPDATE {table} SET {assignments} FROM v WHERE {on}"  # noqa: S608
        sql = sql.replace("{t}", table)
    await connection.exec_driver_sql(sql)


async def save_members(
    connection: AsyncConnection, rows: Sequence[MemberRow], existing: frozenset[tuple[int, int]]
) -> None:
    """Insert new memberships and store the new state of those in `existing`."""
    new = [row._asdict() for row in rows if (row.chat_id, row.user_id) not in existing]
    if new:
        await connection.execute(insert(MEMBER), new)
    for row in rows:
        if (row.chat_id, row.user_id) in existing:
            values = row._asdict()
            key = (MEMBER.c.chat_id == values.pop("chat_id"), MEMBER.c.user_id == values.pop("user_id"))
            await connection.execute(update(MEMBER).where(*key).values(values))


async def update_chat_info(
    connection: AsyncConnection, chat_id: int, *, title: str, description: str, history_visible: bool
) -> None:
    """Store what a group shows of itself."""
    await connection.execute(
        update(CHAT)
        .where(CHAT.c.id == chat_id)
        .values(title=title, description=description, history_visible=history_visible)
    )


async def bump_account_versions(connection: AsyncConnection, steps: dict[int, int]) -> dict[int, int]:
    """Raise the account versions of users by `steps`, locking them lowest id first.

    Returns the version before, per user: the caller stamps version+1, version+2, ...
    """
    before: dict[int, int] = {}
    ids = sorted(steps)
    for start in range(0, len(ids), 500):
        chunk = ids[start : start + 500]
        result = await connection.execute(
            select(USER.c.id, USER.c.account_version).where(USER.c.id.in_(chunk)).order_by(USER.c.id).with_for_update()
        )
        before.update((row.id, row.account_version) for row in result)
        for step in {steps[i] for i in chunk}:
            await connection.execute(
                update(USER)
                .where(USER.c.id.in_([i for i in chunk if steps[i] == step]))
                .values(account_version=USER.c.account_version + step)
            )
    return before


# --- catching up ------------------------------------------------------------------------------------------------


async def list_changed_chats(session: AsyncSession, seconds: float) -> list[tuple[int, int]]:
    """(chat_id, version) of chats that changed in the last `seconds`, by the database's clock."""
    if is_mysql(session):
        since = text(f"NOW(6) - INTERVAL {int(seconds)} SECOND")
    else:
        since = text(f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '-{int(seconds)} seconds')")
    result = await session.execute(select(CHAT.c.id, CHAT.c.version).where(CHAT.c.changed_at >= since))
    return [(row[0], row[1]) for row in result]


async def list_changed_messages(
    session: AsyncSession, chat_id: int, *, after: int, visible_from: int, limit: int
) -> list[MessageRow]:
    """Messages stamped after a version, by version."""
    result = await session.execute(
        select(*MESSAGE_COLUMNS)
        .where(MESSAGE.c.chat_id == chat_id, MESSAGE.c.version > after, MESSAGE.c.seq >= visible_from)
        .order_by(MESSAGE.c.version)
        .limit(limit)
    )
    return [MessageRow(*row) for row in result]


async def list_changed_members(session: AsyncSession, chat_id: int, *, after: int, limit: int) -> list[MemberRow]:
    """Memberships stamped after a version, by version; those of one version together or not at all."""
    result = await session.execute(
        select(*MEMBER_COLUMNS)
        .where(MEMBER.c.chat_id == chat_id, MEMBER.c.version > after)
        .order_by(MEMBER.c.version, MEMBER.c.user_id)
        .limit(limit)
    )
    return [MemberRow(*row) for row in result]


async def list_hidden(session: AsyncSession, user_id: int, chat_id: int, seqs: Sequence[int]) -> frozenset[int]:
    """Which of these messages the user deleted for themselves."""
    if not seqs:
        return frozenset()
    result = await session.execute(
        select(HIDDEN.c.seq).where(HIDDEN.c.user_id == user_id, HIDDEN.c.chat_id == chat_id, HIDDEN.c.seq.in_(seqs))
    )
    return frozenset(result.scalars())
