"""SQL of the chat log: lock the chats, look up what came before, write rows in bulk, read what changed.

The hot statements move many rows at once, and run on a bare driver (`db/log_connection.py`) or in somebody's
SQLAlchemy transaction. They are whole when they leave here: values stand in them as literals that `_literal` writes,
but for SQLite's inserts, whose statements may not be long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, Table, and_, literal_column, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from app.db.log_connection import LogConnection, Row, Statement
from app.db.models import Chat, ChatMember, HiddenMessage, Message
from app.db.repositories.chat_settings import ChatSettingsRow
from app.db.repositories.keys import in_order_of

CHAT = cast(Table, Chat.__table__)
MEMBER = cast(Table, ChatMember.__table__)
MESSAGE = cast(Table, Message.__table__)
HIDDEN = cast(Table, HiddenMessage.__table__)


class ChatRow(NamedTuple):
    """A chat's counters as they stand under the lock."""

    id: int
    type: str
    title: str
    description: str
    avatar: str | None
    history_visible: bool
    last_seq: int
    version: int
    members_version: int
    info_version: int
    member_count: int


_CHAT_NAMES = ", ".join(ChatRow._fields)


class MessageRow(NamedTuple):
    """A message as stored, but for the worker that committed it, which only the delivery trace asks for."""

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
    attachments: str | None
    created_at: datetime
    edited_at: datetime | None
    deleted_at: datetime | None


MESSAGE_COLUMNS = [MESSAGE.c[name] for name in MessageRow._fields]
_MESSAGE_NAMES = ", ".join(MessageRow._fields)
_CREATED_AT = MessageRow._fields.index("created_at")
"""From here on a message's columns are times."""


def _message_row(row: Row) -> MessageRow:
    return MessageRow(*row[:_CREATED_AT], *map(_parsed, row[_CREATED_AT:]))


class FileRow(NamedTuple):
    """A file as a message shows it, and who may put it into one."""

    id: int
    owner_id: int
    kind: str
    media_type: str
    name: str
    size: int
    width: int | None
    height: int | None
    blurhash: str | None
    thumbnail_size: int | None
    ready: bool


class ChangedChat(NamedTuple):
    """A chat that changed lately, and where it stands among those that did."""

    id: int
    version: int
    changed_at: datetime


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
_JOINED_AT = MemberRow._fields.index("joined_at")


def _member_row(row: Row) -> MemberRow:
    return MemberRow._make((*row[:_JOINED_AT], _parsed(row[_JOINED_AT]), *row[_JOINED_AT + 1 :]))


@dataclass(slots=True)
class ChatUpdate:
    """New counters of a chat, and its row as it stands under the lock."""

    before: ChatRow
    last_seq: int
    version: int
    members_version: int
    info_version: int
    member_count: int
    last_activity_at: datetime | None

    def after(self, row: ChatRow) -> ChatRow:
        """The chat's row with these counters."""
        return row._replace(
            last_seq=self.last_seq,
            version=self.version,
            members_version=self.members_version,
            info_version=self.info_version,
            member_count=self.member_count,
        )


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

    @property
    def sent(self) -> bool:
        """Whether this is no more than what sending a message does to its sender's marks."""
        return (
            self.read_seq == self.delivered_seq == self.public_read_seq == self.public_delivered_seq
            and not self.version
            and not self.account_version
            and self.read_at is not None
        )


Executor = AsyncSession | AsyncConnection | LogConnection
"""What runs statements: somebody's transaction, or the writer's own connection."""


def is_mysql(executor: Executor) -> bool:
    """Whether this talks to MySQL; otherwise it is SQLite."""
    if isinstance(executor, LogConnection):
        return executor.is_mysql
    bind = executor if isinstance(executor, AsyncConnection) else executor.get_bind()
    return bind.dialect.name == "mysql"


async def _fetch(executor: Executor, *statements: Statement) -> list[list[Row]]:
    """The rows of each statement; on the writer's connection in one round trip."""
    if isinstance(executor, LogConnection):
        return await executor.fetch(*statements)
    connection = executor if isinstance(executor, AsyncConnection) else await executor.connection()
    return [[tuple(row) for row in await connection.exec_driver_sql(statement.sql)] for statement in statements]


async def _execute(executor: Executor, statement: Statement) -> None:
    """Run a statement that returns nothing; on the writer's connection, together with the next that does."""
    if isinstance(executor, LogConnection):
        executor.defer(statement)
        return
    connection = executor if isinstance(executor, AsyncConnection) else await executor.connection()
    rows = None if statement.rows is None else [tuple(row) for row in statement.rows]
    await connection.exec_driver_sql(statement.sql, rows)


CHANGED_AT_SECONDS = 5
"""`changed_at` of a busy chat may be older than its last change by so much."""


def _now(executor: Executor, *, seconds_ago: int = 0) -> str:
    if is_mysql(executor):
        return f"NOW(6) - INTERVAL {seconds_ago:d} SECOND"
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '-{seconds_ago:d} seconds')"


def database_now(executor: Executor, *, seconds_ago: int = 0) -> ColumnElement[datetime]:
    """SQL for the database's own clock, UTC, six digits."""
    return literal_column(_now(executor, seconds_ago=seconds_ago))


Value = int | str | bytes | datetime | None


def _literal(value: Value) -> str:
    """A value as MySQL reads it, and, but for text, SQLite. Text goes in as hexadecimal digits: nothing that
    anybody writes can end it."""
    match value:
        case None:
            return "NULL"
        case str():
            return f"_utf8mb4 X'{value.encode().hex()}'"
        case bytes():
            return f"X'{value.hex()}'"
        case datetime():
            return f"'{_moment(value)}'"
        case _:
            return str(int(value))


def _bindable(value: Value) -> int | str | bytes | None:
    """A value as SQLite's driver takes it."""
    return _moment(value) if isinstance(value, datetime) else value


def _moment(value: datetime) -> str:
    return value.isoformat(" ", "microseconds")


def _parsed(value: Any) -> Any:
    """A time as a bare driver reads it: SQLite keeps it as text."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def _values(executor: Executor, rows: Iterable[Sequence[Value]]) -> str:
    """Rows of a VALUES clause."""
    prefix = "ROW" if is_mysql(executor) else ""
    return ",".join(f"{prefix}({','.join(map(_literal, row))})" for row in rows)


def _ids(ids: Iterable[int]) -> str:
    return ",".join(f"{number:d}" for number in ids)


def _select(
    executor: Executor, columns: Sequence[str], table: str, keys: Sequence[str], rows: Sequence[Sequence[int | bytes]]
) -> Statement:
    """Rows of a table by keys of several columns, straight from its index: for an IN of several columns SQLite reads
    the whole table, and MySQL plans for longer than it reads."""
    shown, names = ", ".join(f"t.{name}" for name in columns), ", ".join(keys)
    on = " AND ".join(f"t.{name} = v.{name}" for name in keys)
    values = _values(executor, rows)
    if is_mysql(executor):
        return Statement(f"SELECT {shown} FROM (VALUES {values}) AS v ({names}) STRAIGHT_JOIN {table} t ON {on}")  # noqa: S608
    return Statement(f"WITH v({names}) AS (VALUES {values}) SELECT {shown} FROM v CROSS JOIN {table} t ON {on}")  # noqa: S608


# --- locking and looking up -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What a batch needs to know, read under the locks of its chats."""

    chats: list[ChatRow]
    earlier: list[MessageRow]
    messages: list[MessageRow]
    members: list[MemberRow]
    files: list[FileRow]
    marked_unread: set[tuple[int, int]]


async def lock_and_find(
    executor: Executor,
    chat_ids: Sequence[int],
    *,
    client_ids: Sequence[tuple[int, int, bytes]],
    message_ids: Sequence[int],
    member_keys: Sequence[tuple[int, int]],
    file_ids: Sequence[int] = (),
    reader_keys: Sequence[tuple[int, int]] = (),
    skip_locked: bool,
) -> Found:
    """Lock chats, lowest id first, and read their counters; then the messages sent earlier under these (chat_id,
    sender_id, client_id), messages by id, memberships by (chat_id, user_id), past ones included, files, locked, so that
    nobody collects them before they are attached, and which of the readers (chat_id, user_id) have marked the chat as
    unread.

    Chats that are missing, and with `skip_locked` those that somebody else holds, are left out.
    """
    lock = ""
    if is_mysql(executor):  # SQLite's writer holds the whole database
        lock = " FOR UPDATE SKIP LOCKED" if skip_locked else " FOR UPDATE"
    statements = [
        Statement(f"SELECT {_CHAT_NAMES} FROM chats WHERE id IN ({_ids(chat_ids)}) ORDER BY id{lock}")  # noqa: S608
    ]
    if client_ids:
        # Almost always there are none: look by the index alone, and read whole rows only of those found.
        statements.append(_select_sent(executor, client_ids))
    if message_ids:
        statements.append(_select_messages(message_ids))
    if member_keys:
        statements.append(_select(executor, MemberRow._fields, "chat_members", ["chat_id", "user_id"], member_keys))
    if file_ids:
        sql = f"SELECT {', '.join(FileRow._fields)} FROM files WHERE id IN ({_ids(file_ids)}) ORDER BY id"  # noqa: S608
        statements.append(Statement(sql + (" FOR UPDATE" if is_mysql(executor) else "")))
    if reader_keys:
        columns = ["chat_id", "user_id", "marked_unread"]
        statements.append(_select(executor, columns, "chat_settings", columns[:2], reader_keys))
    results = iter(await _fetch(executor, *statements))
    found = Found([ChatRow._make(row) for row in next(results)], [], [], [], [], set())
    earlier = [row[0] for row in next(results)] if client_ids else []
    if message_ids:
        found.messages = [_message_row(row) for row in next(results)]
    if member_keys:
        found.members = [_member_row(row) for row in next(results)]
    if file_ids:
        found.files = [FileRow._make(row) for row in next(results)]
    if reader_keys:
        found.marked_unread = {(row[0], row[1]) for row in next(results) if row[2]}
    if earlier:
        found.earlier = await find_messages(executor, earlier)
    return found


SQLITE_MIN = "-9223372036854775807 - 1"
"""The least integer: it has no absolute value (https://sqlite.org/lang_corefunc.html#abs)."""
CHATS_BY_NAME_MAX = 20
"""More of them are cheaper to compare with a table of values than by name."""


async def require_unchanged(executor: Executor, chats: Sequence[ChatRow]) -> None:
    """Lock chats that are as in these rows, together with what is written next.

    If one has moved on, or is held by somebody else, all of that is refused (`db.errors.is_outdated`).
    """
    rows = sorted((chat.id, chat.version, chat.members_version) for chat in chats)
    names = ("id", "version", "members_version")
    on = " AND ".join(f"t.{name} = v.{name}" for name in names)
    # A number too large for either database is an error, at which all that follows is left out.
    if not is_mysql(executor):
        values = f"WITH v({', '.join(names)}) AS (VALUES {_values(executor, rows)})"
        checked = f"abs(CASE COUNT(*) WHEN {len(rows):d} THEN 0 ELSE {SQLITE_MIN} END)"
        await _execute(executor, Statement(f"{values} SELECT {checked} FROM v CROSS JOIN chats t ON {on}"))  # noqa: S608
        return
    if len(rows) <= CHATS_BY_NAME_MAX:
        same = " OR ".join(f"(id={number:d} AND version={v:d} AND members_version={m:d})" for number, v, m in rows)
        found = f"chats FORCE INDEX (PRIMARY) WHERE {same} FOR UPDATE NOWAIT"
    else:
        values = f"(VALUES {_values(executor, rows)}) AS v ({', '.join(names)})"
        found = f"{values} STRAIGHT_JOIN chats t FORCE INDEX (PRIMARY) ON {on} FOR UPDATE OF t NOWAIT"
    await _execute(executor, Statement(f"SELECT EXP(IF(COUNT(*) = {len(rows):d}, 0, 999)) FROM {found}"))  # noqa: S608


def _select_sent(executor: Executor, client_ids: Sequence[tuple[int, int, bytes]]) -> Statement:
    return _select(executor, ["id"], "messages", ["chat_id", "sender_id", "client_id"], client_ids)


async def find_sent(executor: Executor, client_ids: Sequence[tuple[int, int, bytes]]) -> list[MessageRow]:
    """Messages sent under these (chat_id, sender_id, client_id)."""
    [rows] = await _fetch(executor, _select_sent(executor, client_ids))
    return await find_messages(executor, [row[0] for row in rows]) if rows else []


async def lock_chat(executor: Executor, chat_id: int) -> ChatRow | None:
    """Lock one chat and read its counters; None when there is no such chat."""
    found = await lock_and_find(
        executor, [chat_id], client_ids=(), message_ids=(), member_keys=(), file_ids=(), skip_locked=False
    )
    return found.chats[0] if found.chats else None


async def find_chats(executor: Executor, chat_ids: Sequence[int]) -> list[ChatRow]:
    """Chats without a lock."""
    sql = f"SELECT {_CHAT_NAMES} FROM chats WHERE id IN ({_ids(chat_ids)})"  # noqa: S608 - integers
    [rows] = await _fetch(executor, Statement(sql))
    return [ChatRow._make(row) for row in rows]


def _select_messages(message_ids: Sequence[int]) -> Statement:
    return Statement(f"SELECT {_MESSAGE_NAMES} FROM messages WHERE id IN ({_ids(message_ids)})")  # noqa: S608


async def find_messages(executor: Executor, message_ids: Sequence[int]) -> list[MessageRow]:
    """Messages by id."""
    [rows] = await _fetch(executor, _select_messages(message_ids))
    return [_message_row(row) for row in rows]


async def list_active_members(executor: Executor, chat_ids: Sequence[int]) -> list[tuple[int, int, str, int]]:
    """(chat_id, user_id, role, visible_from_seq) of all who are in the chats now."""
    columns = "chat_id, user_id, role, visible_from_seq"
    sql = f"SELECT {columns} FROM chat_members WHERE chat_id IN ({_ids(chat_ids)}) AND left_seq IS NULL"  # noqa: S608
    [rows] = await _fetch(executor, Statement(sql))
    return [(row[0], row[1], row[2], row[3]) for row in rows]


async def list_blocks(executor: Executor, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool, bool]]:
    """(low_id, high_id, low_blocks_high, high_blocks_low) of pairs (low, high)."""
    if not pairs:
        return []
    columns = ["low_id", "high_id", "low_blocks_high", "high_blocks_low"]
    [rows] = await _fetch(executor, _select(executor, columns, "user_pairs", ["low_id", "high_id"], pairs))
    return [(row[0], row[1], bool(row[2]), bool(row[3])) for row in rows]


# --- writing ----------------------------------------------------------------------------------------------------


async def insert_messages(executor: Executor, rows: Sequence[MessageRow], worker: int | None) -> None:
    """Insert new messages in one multi-row statement; `worker`: number of this process."""
    await _insert(executor, "messages", (*MessageRow._fields, "worker"), [(*row, worker) for row in rows])


async def update_messages(executor: Executor, rows: Sequence[MessageRow]) -> None:
    """Store the new state of edited or deleted messages."""
    names = ["chat_id", "seq", "version", "content", "service", "attachments", "edited_at", "deleted_at"]
    values = [
        (row.chat_id, row.seq, row.version, row.content, row.service, row.attachments, row.edited_at, row.deleted_at)
        for row in rows
    ]
    await _update(executor, "messages", names, values)


async def attach_files(executor: Executor, rows: Sequence[tuple[int, int, int]]) -> None:
    """Put files into messages, by (file_id, chat_id, seq): whoever sees the message may fetch the file."""
    await _insert(executor, "attachments", ["file_id", "chat_id", "seq"], rows)
    ids = _ids({row[0] for row in rows})
    await _execute(executor, Statement(f"UPDATE files SET collect_at = NULL WHERE id IN ({ids})"))  # noqa: S608


async def detach_files(executor: Executor, rows: Sequence[tuple[int, int, int]], now: datetime) -> None:
    """Take files out of messages, by (file_id, chat_id, seq); what no other message holds can be collected."""
    for file_id, chat_id, seq in rows:
        where = f"file_id = {file_id:d} AND chat_id = {chat_id:d} AND seq = {seq:d}"
        await _execute(executor, Statement(f"DELETE FROM attachments WHERE {where}"))  # noqa: S608 - integers
    ids = _ids({row[0] for row in rows})
    sql = f"UPDATE files SET collect_at = {_literal(now)} WHERE id IN ({ids})"  # noqa: S608 - integers and a time
    await _execute(executor, Statement(sql))


async def note_empty_chats(executor: Executor, chat_ids: Sequence[int]) -> None:
    """The last members of these have left: the collector takes the files out of their messages, a page at a time."""
    await _insert(executor, "empty_chats", ["chat_id"], [(chat_id,) for chat_id in chat_ids])


async def update_chats(executor: Executor, rows: Sequence[ChatUpdate]) -> None:
    """Store counters of locked chats, and stamp `changed_at` with the database's clock.

    A stamp is good for `CHANGED_AT_SECONDS`: to move it costs an index entry, a quarter of the update.
    """
    changed_at = (
        f"CASE WHEN {{t}}.changed_at > {_now(executor, seconds_ago=CHANGED_AT_SECONDS)} THEN {{t}}.changed_at"
        f" ELSE {_now(executor)} END"
    )
    # Most chats of a batch got a message or two and nothing else: steps that many rows share are cheaper to take
    # than values of each row's own.
    steps: dict[tuple[int, int, datetime | None], list[int]] = {}
    others: list[ChatUpdate] = []
    for row in rows:
        before = row.before
        if (row.members_version, row.info_version, row.member_count) == (
            before.members_version,
            before.info_version,
            before.member_count,
        ):
            step = (row.last_seq - before.last_seq, row.version - before.version, row.last_activity_at)
            steps.setdefault(step, []).append(before.id)
        else:
            others.append(row)
    for (messages, versions, moment), ids in steps.items():
        activity = "" if moment is None else f", last_activity_at = {_literal(moment)}"
        sql = (
            f"UPDATE chats SET last_seq = last_seq + {messages:d}, version = version + {versions:d}{activity},"  # noqa: S608
            f" changed_at = {changed_at.replace('{t}', 'chats')} WHERE id IN ({_ids(ids)})"
        )
        await _execute(executor, Statement(sql))
    if others:
        names = ["id", "last_seq", "version", "members_version", "info_version", "member_count", "last_activity_at"]
        values = [
            (
                row.before.id,
                row.last_seq,
                row.version,
                row.members_version,
                row.info_version,
                row.member_count,
                row.last_activity_at,
            )
            for row in others
        ]
        sets = {name: f"v.{name}" for name in names[1:]}
        sets["last_activity_at"] = "COALESCE(v.last_activity_at, {t}.last_activity_at)"
        sets["changed_at"] = changed_at
        await _update_from(executor, "chats", names, values, sets, "{t}.id = v.id")


MARKS_BY_NAME_MAX = 50
"""More rows than this MySQL may rather look for in the whole table."""


async def update_marks(executor: Executor, rows: Sequence[MarkUpdate]) -> None:
    """Raise the marks of members."""
    on = "{t}.chat_id = v.chat_id AND {t}.user_id = v.user_id"
    marks = ["read_seq", "delivered_seq", "public_read_seq", "public_delivered_seq"]
    # Those who sent something have all their marks at it, and nobody's can be further: it is the newest.
    if sent := [row for row in rows if row.sent]:
        moment = sent[0].read_at
        if is_mysql(executor) and len(sent) <= MARKS_BY_NAME_MAX and len({row.chat_id for row in sent}) == len(sent):
            # A few rows are named for less than a table of their values costs. The other marks take the first's new
            # value: MySQL assigns from left to right.
            seqs = " ".join(f"WHEN {row.chat_id:d} THEN {row.read_seq:d}" for row in sent)
            keys = " OR ".join(f"chat_id = {row.chat_id:d} AND user_id = {row.user_id:d}" for row in sent)
            sql = (
                f"UPDATE chat_members FORCE INDEX (PRIMARY) SET read_seq = CASE chat_id {seqs} END,"  # noqa: S608
                f" {', '.join(f'{name} = read_seq' for name in marks[1:])}, read_at = {_literal(moment)} WHERE {keys}"
            )
            await _execute(executor, Statement(sql))
            sent = []
    if sent:
        at = [(row.chat_id, row.user_id, row.read_seq, row.read_at) for row in sent]
        sets = {**dict.fromkeys(marks, "v.seq"), "read_at": "v.read_at"}
        await _update_from(executor, "chat_members", ["chat_id", "user_id", "seq", "read_at"], at, sets, on)
    if others := [row for row in rows if not row.sent]:
        rising = [*marks, "version", "account_version"]
        values = [
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
            for row in others
        ]
        greatest = "GREATEST" if is_mysql(executor) else "MAX"
        sets = {name: f"{greatest}({{t}}.{name}, v.{name})" for name in rising}
        sets["read_at"] = "COALESCE(v.read_at, {t}.read_at)"
        await _update_from(executor, "chat_members", ["chat_id", "user_id", *rising, "read_at"], values, sets, on)


async def save_members(executor: Executor, rows: Sequence[MemberRow], existing: frozenset[tuple[int, int]]) -> None:
    """Insert new memberships and store the new state of those in `existing`."""
    if new := [row for row in rows if (row.chat_id, row.user_id) not in existing]:
        await _insert(executor, "chat_members", MemberRow._fields, new)
    if known := [row for row in rows if (row.chat_id, row.user_id) in existing]:
        await _update(executor, "chat_members", MemberRow._fields, known)


async def update_chat_info(
    executor: Executor, chat_id: int, *, title: str, description: str, avatar: str | None, history_visible: bool
) -> None:
    """Store what a group shows of itself."""
    names = ["id", "title", "description", "avatar", "history_visible"]
    await _update(executor, "chats", names, [(chat_id, title, description, avatar, history_visible)], keys=1)


async def list_chat_settings(executor: Executor, keys: Sequence[tuple[int, int]]) -> list[ChatSettingsRow]:
    """What members (chat_id, user_id) have set for a chat, exact under the users' locks."""
    names = ChatSettingsRow._fields
    [rows] = await _fetch(executor, _select(executor, names, "chat_settings", ["chat_id", "user_id"], keys))
    return [
        ChatSettingsRow(row[0], row[1], _parsed(row[2]), row[3], bool(row[4]), bool(row[5]), row[6]) for row in rows
    ]


async def save_marked_unread(executor: Executor, rows: Sequence[ChatSettingsRow]) -> None:
    """Store whether chats are marked as unread, under the users' locks."""
    names = ["user_id", "chat_id", "marked_unread", "account_version"]
    values = [(row.user_id, row.chat_id, row.marked_unread, row.account_version) for row in rows]
    await _update(executor, "chat_settings", names, values)


async def forget_private(executor: Executor, keys: Iterable[tuple[int, int]]) -> None:
    """Delete settings and drafts of those (chat_id, user_id) who have left, under the users' locks."""
    for chat_id, user_id in keys:
        for table in ("chat_settings", "drafts"):
            sql = f"DELETE FROM {table} WHERE user_id = {user_id:d} AND chat_id = {chat_id:d}"  # noqa: S608 - integers
            await _execute(executor, Statement(sql))


async def bump_account_versions(executor: Executor, steps: dict[int, int]) -> dict[int, int]:
    """Raise the account versions of users by `steps`, locking them lowest id first.

    Returns the version before, per user: the caller stamps version+1, version+2, ...
    """
    lock = " FOR UPDATE" if is_mysql(executor) else ""
    sql = f"SELECT id, account_version FROM users WHERE id IN ({_ids(steps)}) ORDER BY id{lock}"  # noqa: S608
    [rows] = await _fetch(executor, Statement(sql))
    sets = {"account_version": "{t}.account_version + v.step"}
    await _update_from(executor, "users", ["id", "step"], sorted(steps.items()), sets, "{t}.id = v.id")
    return {row[0]: row[1] for row in rows}


async def _insert(executor: Executor, table: str, names: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
    into = f"INSERT INTO {table} ({', '.join(names)}) VALUES "  # noqa: S608 - names of columns
    if is_mysql(executor):
        await _execute(executor, Statement(into + ",".join(f"({','.join(map(_literal, row))})" for row in rows)))
    else:
        marks = f"({', '.join('?' * len(names))})"
        await _execute(executor, Statement(into + marks, [tuple(map(_bindable, row)) for row in rows]))


async def _update(
    executor: Executor, table: str, names: Sequence[str], rows: Sequence[Sequence[Value]], *, keys: int = 2
) -> None:
    """Store rows as they are; the first `keys` of their columns are the primary key."""
    if is_mysql(executor):
        on = " AND ".join(f"{{t}}.{name} = v.{name}" for name in names[:keys])
        await _update_from(executor, table, names, rows, {name: f"v.{name}" for name in names[keys:]}, on)
        return
    sets = ", ".join(f"{name} = ?" for name in names[keys:])
    where = " AND ".join(f"{name} = ?" for name in names[:keys])
    bound = [tuple(map(_bindable, (*row[keys:], *row[:keys]))) for row in rows]
    await _execute(executor, Statement(f"UPDATE {table} SET {sets} WHERE {where}", bound))  # noqa: S608 - names


async def _update_from(
    executor: Executor,
    table: str,
    names: Sequence[str],
    rows: Sequence[Sequence[Value]],
    sets: dict[str, str],
    on: str,
) -> None:
    """Update `table` from the rows of a VALUES clause; `{t}` stands for the table in `sets` and `on`."""
    columns, values = ", ".join(names), _values(executor, rows)
    if is_mysql(executor):
        assignments = ", ".join(f"t.{name} = {value}" for name, value in sets.items())
        # Straight: from the values to the rows. The other way round would look at, and lock, rows of strangers.
        head = f"UPDATE (VALUES {values}) AS v ({columns}) STRAIGHT_JOIN {table} t"
        sql = f"{head} ON {on.replace('{t}', 't')} SET {assignments.replace('{t}', 't')}"
    else:
        assignments = ", ".join(f"{name} = {value}" for name, value in sets.items()).replace("{t}", table)
        head = f"WITH v({columns}) AS (VALUES {values}) UPDATE {table}"
        sql = f"{head} SET {assignments} FROM v WHERE {on.replace('{t}', table)}"
    await _execute(executor, Statement(sql))


# --- catching up ------------------------------------------------------------------------------------------------


async def list_changed_chats(
    session: AsyncSession, seconds: float, *, after: ChangedChat | None = None, limit: int
) -> list[ChangedChat]:
    """Chats that changed in the last `seconds` by the database's clock, and a few more, in order of their stamps.

    After the last of a page comes the next. A chat that changes meanwhile moves to the end, where it is found again.
    """
    if after is None:
        beyond: ColumnElement[bool] = CHAT.c.changed_at >= database_now(
            session, seconds_ago=CHANGED_AT_SECONDS + int(seconds)
        )
    else:
        # The first half is for MySQL, which finds no range in the second.
        later = or_(CHAT.c.changed_at > after.changed_at, CHAT.c.id > after.id)
        beyond = and_(CHAT.c.changed_at >= after.changed_at, later)
    statement = (
        select(CHAT.c.id, CHAT.c.version, CHAT.c.changed_at)
        .where(beyond)
        .order_by(CHAT.c.changed_at, CHAT.c.id)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, CHAT, "ix_chats_changed_at"))
    return [ChangedChat(*row) for row in result]


async def list_changed_messages(
    session: AsyncSession, chat_id: int, *, after: int, visible_from: int, limit: int
) -> list[MessageRow]:
    """Messages stamped after a version, by version."""
    statement = (
        select(*MESSAGE_COLUMNS)
        .where(MESSAGE.c.chat_id == chat_id, MESSAGE.c.version > after, MESSAGE.c.seq >= visible_from)
        .order_by(MESSAGE.c.version)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, MESSAGE, "ix_messages_version"))
    return [MessageRow(*row) for row in result]


async def list_changed_members(session: AsyncSession, chat_id: int, *, after: int, limit: int) -> list[MemberRow]:
    """Memberships stamped after a version, by version; those of one version together or not at all."""
    statement = (
        select(*MEMBER_COLUMNS)
        .where(MEMBER.c.chat_id == chat_id, MEMBER.c.version > after)
        .order_by(MEMBER.c.version, MEMBER.c.user_id)
        .limit(limit)
    )
    result = await session.execute(in_order_of(statement, MEMBER, "ix_chat_members_version"))
    return [MemberRow(*row) for row in result]


async def list_hidden(session: AsyncSession, user_id: int, chat_id: int, seqs: Sequence[int]) -> frozenset[int]:
    """Which of these messages the user deleted for themselves."""
    if not seqs:
        return frozenset()
    result = await session.execute(
        select(HIDDEN.c.seq).where(HIDDEN.c.user_id == user_id, HIDDEN.c.chat_id == chat_id, HIDDEN.c.seq.in_(seqs))
    )
    return frozenset(result.scalars())


async def list_hidden_among(
    session: AsyncSession, user_ids: Sequence[int], chat_ids: Sequence[int], seqs: Sequence[int]
) -> set[tuple[int, int, int]]:
    """(user_id, chat_id, seq) of messages that some of these people deleted for themselves."""
    if not seqs:
        return set()
    result = await session.execute(
        select(HIDDEN.c.user_id, HIDDEN.c.chat_id, HIDDEN.c.seq).where(
            HIDDEN.c.user_id.in_(user_ids), HIDDEN.c.chat_id.in_(chat_ids), HIDDEN.c.seq.in_(seqs)
        )
    )
    return {(row[0], row[1], row[2]) for row in result}
