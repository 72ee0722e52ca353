"""Every hot query, as the services ask it, and how many rows MySQL reads for it.

The reads are those of the server's own book-keeping (`Handler_read%` in `performance_schema`: every row that is looked
up, found or not, or walked over, those of temporary tables too), so a lost index, a plan that reads from the
wrong end, or a count without a bound shows as a number, on any machine, however busy. `measure` leaves no trace: what a
probe writes is rolled back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pymysql
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.config import Settings
from app.db.repositories import accounts, chat_log, chats, pairs, push, sessions, trace, users
from app.db.schemas import ResumeIn
from app.services.chat_log.changes import Change, EditMessage, Mark, SendMessage
from app.services.container import Services, build_services
from bench.population import LAGGARD, READER, Size, phone_of, username_of

PAGE = 50
UNWRITTEN_ID = 2**52
"""Of a message that will be rolled back."""
RECENT = 10
"""Chats that have changed just now."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what is measured, in a database that was seeded."""

    size: Size
    services: Services
    last_seq: int
    """Of the largest chat, as well as its `version`."""
    version: int
    newest_id: int
    sender_id: int
    """Who sent its newest message."""
    account_version: int
    """The reader's."""
    versions: dict[str, int]
    """Of the reader's chats."""

    @property
    def chat(self) -> int:
        """The chat with the most messages."""
        return self.size.large_chat

    @classmethod
    async def find(cls, services: Services, size: Size) -> Cast:
        """Look them up."""
        async with services.database.reading() as session:
            [row] = await chat_log.find_chats(session, [size.large_chat])
            [newest] = await chats.list_messages(
                session, row.id, low=row.last_seq, high=row.last_seq, newest_first=True, limit=1
            )
            account_versions = await accounts.account_versions(session, [READER])
            cursors = (await chats.list_cursors(session, [READER]))[READER]
        return cls(
            size,
            services,
            row.last_seq,
            row.version,
            newest.id,
            newest.sender_id,
            account_versions[READER],
            {str(cursor.chat_id): cursor.version for cursor in cursors},
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing that the server does all the time."""

    name: str
    most: Callable[[Size], int]
    """Rows it may examine: by who is measured, never by how large the tables are."""
    run: Callable[[Cast], contextlib.AbstractAsyncContextManager[None]]
    """Does it; what it has written is undone when the context ends."""
    drawn: int = 0
    """So many rows more it may examine in another population, because who is in the measured chats is drawn."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What a probe cost."""

    rows: int
    statements: int


Counts = dict[int, Examined]
"""By MySQL's number of the thread, that is, of the connection."""


class Meter:
    """Reads what MySQL has counted for the connections to one database, its own left out."""

    def __init__(self, settings: Settings) -> None:
        self._name = settings.db_name
        self._connection = pymysql.connect(
            host=settings.db_host,
            port=settings.db_port,
            user=settings.db_user,
            password=settings.db_password.get_secret_value(),
            autocommit=True,
        )

    def read(self) -> Counts:
        """So far. Raises RuntimeError when some statement does not end."""
        give_up_at = time.monotonic() + 5
        # A statement is counted when it has ended, which is a moment after its answer was sent.
        while self._ask(
            "SELECT 1 FROM performance_schema.threads WHERE processlist_db = %s AND processlist_command <> 'Sleep'"
        ):
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"{self._name} does not come to rest: somebody else is using it")
        # Not `rows_examined`, which says nothing of what a subquery in the list of columns reads.
        rows = self._ask(
            "SELECT t.thread_id, (SELECT SUM(v.variable_value) FROM performance_schema.status_by_thread v"
            " WHERE v.thread_id = t.thread_id AND v.variable_name LIKE 'Handler_read%%'),"
            " (SELECT SUM(s.count_star) FROM performance_schema.events_statements_summary_by_thread_by_event_name s"
            " WHERE s.thread_id = t.thread_id AND s.event_name LIKE 'statement/sql/%%')"
            " FROM performance_schema.threads t WHERE t.processlist_db = %s"
        )
        return {thread: Examined(int(read or 0), int(count or 0)) for thread, read, count in rows}

    def _ask(self, statement: str) -> tuple[tuple[Any, ...], ...]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, (self._name,))
            return tuple(cursor.fetchall())

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def between(before: Counts, after: Counts) -> Examined:
    """What was examined by connections that are still there."""
    nothing = Examined(0, 0)
    return Examined(
        sum(count.rows - before.get(thread, nothing).rows for thread, count in after.items()),
        sum(count.statements - before.get(thread, nothing).statements for thread, count in after.items()),
    )


def verdict(probe: Probe, size: Size, least: Examined, found: Examined) -> str:
    """What is wrong with what a probe examined in a database, beside the smallest one; empty when nothing is."""
    most = probe.most(size)
    if found.rows > most:
        return f"examined {found.rows:,} rows, more than {most:,}"
    if found.rows > least.rows + probe.drawn:
        return f"examined {found.rows:,} rows, where the smallest database had {least.rows:,}: it grows"
    return ""


async def measure(settings: Settings, size: Size) -> dict[str, Examined]:
    """What each probe examines in a database that was seeded with this size and that nobody else uses."""
    services = build_services(settings)
    meter = Meter(settings)
    await services.database.start()
    found: dict[str, Examined] = {}
    try:
        cast = await Cast.find(services, size)
        for probe in PROBES:
            async with probe.run(cast):
                pass  # once for what is remembered afterwards: connections, rosters
            before = meter.read()
            async with probe.run(cast):
                after = meter.read()
            found[probe.name] = between(before, after)
    finally:
        meter.close()
        await services.stop()
    return found


PROBES: list[Probe] = []


def _probe(
    name: str, most: int | Callable[[Size], int], drawn: int = 0
) -> Callable[[Callable[[Cast], Awaitable[object]]], None]:
    """A probe that only reads."""

    def add(read: Callable[[Cast], Awaitable[object]]) -> None:
        @contextlib.asynccontextmanager
        async def run(cast: Cast) -> AsyncIterator[None]:
            await read(cast)
            yield

        PROBES.append(Probe(name, most if callable(most) else lambda _: most, run, drawn))

    return add


class _RollBack(Exception):
    """Nothing of it happened."""


def _query(
    name: str, most: int | Callable[[Size], int], drawn: int = 0
) -> Callable[[Callable[[Cast, AsyncSession], Awaitable[object]]], None]:
    """A probe that runs in a transaction of its own, and may prepare there what it looks for."""

    def add(ask: Callable[[Cast, AsyncSession], Awaitable[object]]) -> None:
        @contextlib.asynccontextmanager
        async def run(cast: Cast) -> AsyncIterator[None]:
            with contextlib.suppress(_RollBack):
                async with cast.services.database.writing() as session:
                    await ask(cast, session)
                    yield
                    raise _RollBack

        PROBES.append(Probe(name, most if callable(most) else lambda _: most, run, drawn))

    return add


def _append(name: str, most: int | Callable[[Size], int], *changes: Callable[[Cast], Change]) -> None:
    """A probe of the writer's transaction."""

    @contextlib.asynccontextmanager
    async def run(cast: Cast) -> AsyncIterator[None]:
        with contextlib.suppress(_RollBack):
            async with cast.services.database.appending() as connection:
                made = [change(cast) for change in changes]
                ids = [UNWRITTEN_ID + number for number in range(len(made))]
                # Waits for locks, unlike the writer: the probe before may not be rolled back yet.
                appended = await cast.services.appender.append(connection, made, ids, skip_locked=False)
                for outcome in appended.outcomes:
                    if isinstance(outcome, Exception):
                        raise outcome
                for roster in appended.rosters:  # as the writer does: rosters are read once
                    cast.services.appender.rosters.put(roster)
                await connection.fetch()  # what was deferred for the commit
                yield
                raise _RollBack

    PROBES.append(Probe(name, most if callable(most) else lambda _: most, run))


# --- history ----------------------------------------------------------------------------------------------------


def _history(name: str, most: int, **where: Callable[[Cast], int]) -> None:
    @_probe(f"history: {name}", most)
    async def _(cast: Cast) -> object:
        place: dict[str, int | None] = {"before": None, "after": None, "around": None}
        place |= {key: find(cast) for key, find in where.items()}
        return await cast.services.messages.history(READER, cast.chat, limit=PAGE, **place)


_history("newest", PAGE + 5)
_history("oldest", PAGE + 5, after=lambda cast: 0)
_history("before the middle", PAGE + 5, before=lambda cast: cast.last_seq // 2)
_history("after the middle", PAGE + 5, after=lambda cast: cast.last_seq // 2)
_history("around the middle", PAGE + 5, around=lambda cast: cast.last_seq // 2)


@_probe("one message by id", 5)
async def _one(cast: Cast) -> object:
    return await cast.services.messages.get(READER, cast.chat, cast.newest_id)


@_probe("readers of a message", lambda size: 3 * size.large_chat_members + 10, 10)
async def _readers(cast: Cast) -> object:
    return await cast.services.messages.readers(READER, cast.chat, cast.newest_id)


@_probe("the trace of a message", lambda size: 6 * min(PAGE, size.large_chat_members) + 20, 60)
async def _trace(cast: Cast) -> object:
    return await cast.services.trace.trace(cast.sender_id, cast.newest_id, cursor=None, limit=PAGE)


@_probe("the trace of a message, for the operator", lambda size: 12 * size.large_chat_members + 30, 60)
async def _trace_full(cast: Cast) -> object:
    return await cast.services.trace.full(cast.newest_id)


@_query("marks of fan-out of 10 chats", 6 * RECENT)
async def _fanout_marks(cast: Cast, session: AsyncSession) -> None:
    now = cast.services.clock.now().replace(tzinfo=None)
    chat_ids = range(1, RECENT + 1)
    rows = [trace.FanoutRow(chat_id, "probe", "commit", 1, 1, now) for chat_id in chat_ids]
    await trace.save_fanout(session, rows)
    await trace.prune_fanout(session, chat_ids, datetime(2000, 1, 1))  # noqa: DTZ001 - naive UTC


# --- the list of chats ------------------------------------------------------------------------------------------


def _list_page(size: Size) -> int:
    return size.reader_chats // 5


def _list_most(size: Size) -> int:
    """To put the reader's chats in order, and then for each that is shown: the chat, both memberships, the last
    message and its sender, settings, a draft, and its unread messages."""
    return 5 * size.reader_chats + 20 * (_list_page(size) + 1)


@_probe("list of chats: first page", _list_most, 100)
async def _list(cast: Cast) -> object:
    return await cast.services.chats.list_chats(READER, cursor=None, limit=_list_page(cast.size))


@_probe("list of chats: two pages", lambda size: 2 * _list_most(size), 200)
async def _list_second(cast: Cast) -> object:
    limit = _list_page(cast.size)
    first = await cast.services.chats.list_chats(READER, cursor=None, limit=limit)
    return await cast.services.chats.list_chats(READER, cursor=first["next"], limit=limit)


@_probe("list of chats: pinned only", _list_most, 100)
async def _list_pinned(cast: Cast) -> object:
    return await cast.services.chats.list_chats(READER, cursor=None, limit=_list_page(cast.size), pinned=True)


@_probe("one chat", 40)
async def _chat(cast: Cast) -> object:
    return await cast.services.chats.get(READER, cast.chat)


@_probe("members of a large group", 120, 20)
async def _members(cast: Cast) -> object:
    chat_id = cast.size.largest_chat_by_members
    return await cast.services.chats.list_members(READER, chat_id, cursor=None, limit=20)


# --- unread -----------------------------------------------------------------------------------------------------


@_probe("unread of a chat never read", 3 * chats.UNREAD_MAX + 50)
async def _unread(cast: Cast) -> object:
    return await cast.services.chats.get(LAGGARD, cast.chat)


@_query("unread of all chats, for a badge", lambda size: 6 * size.reader_chats + 300)
async def _badge(cast: Cast, session: AsyncSession) -> object:
    return await push.count_unread(session, READER, limit=100)


# --- finding people ---------------------------------------------------------------------------------------------


@_probe("search: a common name", 300)
async def _search(cast: Cast) -> object:
    return await cast.services.users.search(READER, "anna", None, 20)


@_probe("search: one username", 5)
async def _search_exact(cast: Cast) -> object:
    return await cast.services.users.search(READER, "@" + username_of(cast.size.users // 2), None, 20)


@_probe("search: a name in Cyrillic", 300)
async def _search_cyrillic(cast: Cast) -> object:
    return await cast.services.users.search(READER, "анна", None, 20)


@_probe("a profile", 3)
async def _profile(cast: Cast) -> object:
    return await cast.services.users.profile(READER, cast.size.users // 2)


@_query("whether a username is taken", 1)
async def _taken(cast: Cast, session: AsyncSession) -> object:
    return await users.username_exists(session, username_of(cast.size.users // 2))


@_query("the blocked", lambda size: size.reader_chats + 100)
async def _blocked(cast: Cast, session: AsyncSession) -> object:
    return await pairs.list_blocked(session, READER, 0, 50)


# --- catching up ------------------------------------------------------------------------------------------------


def _resume(name: str, most: Callable[[Size], int], *, missed: int = 0, account: int = 0, afresh: bool = False) -> None:
    @_probe(f"resume: {name}", most)
    async def _(cast: Cast) -> object:
        known = {**cast.versions, str(cast.chat): cast.version - missed}
        if afresh:
            del known[str(cast.chat)]
        state = ResumeIn(epoch=None, account_version=cast.account_version - account, chats=known)
        return await cast.services.catch_up.resume_page(READER, state)


_resume("nothing missed", lambda size: 2 * size.reader_chats + 5)
_resume("1 message missed", lambda size: 2 * size.reader_chats + 25, missed=1)
_resume("100 messages missed", lambda size: 2 * size.reader_chats + 250, missed=100)
_resume("10 private changes missed", lambda size: 5 * size.reader_chats + 60, account=10)
_resume("the largest chat afresh", lambda size: 2 * size.reader_chats + 6 * size.large_chat_members + 200, afresh=True)


# --- what happens by itself -------------------------------------------------------------------------------------


async def _change_some(cast: Cast, session: AsyncSession) -> None:
    ids = ", ".join(str(number * cast.size.chats // RECENT) for number in range(1, RECENT + 1))
    sets = "changed_at = NOW(6), last_activity_at = NOW(6), pushed_seq = last_seq - 1"
    await session.execute(text(f"UPDATE chats SET {sets} WHERE id IN ({ids})"))


@_query("the sweep, 10 chats changed", 5 * RECENT)
async def _sweep(cast: Cast, session: AsyncSession) -> object:
    await _change_some(cast, session)
    return await chat_log.list_changed_chats(session, 30, limit=1000)


@_query("what is to be pushed, 10 chats changed", 5 * RECENT)
async def _unpushed(cast: Cast, session: AsyncSession) -> object:
    await _change_some(cast, session)
    return await push.list_unpushed(session, seconds=300, limit=500)


@_query("who is to hear of a message", lambda size: 6 * size.large_chat_members, 200)
async def _targets(cast: Cast, session: AsyncSession) -> object:
    now = cast.services.clock.now().replace(tzinfo=None)
    return await push.list_targets(session, [cast.chat], now=now)


@_query("newest messages, for a push", 15)
async def _newest(cast: Cast, session: AsyncSession) -> object:
    return await push.list_newest(session, [push.Span(cast.chat, 0, cast.last_seq)], limit=5)


def _busy(size: Size) -> list[int]:
    """Chats that got messages at once: all of the reader's but the large ones, a hundred at most."""
    return size.chats_of_reader()[2:102]


@_query("who is to hear of messages in many chats", lambda size: 100 * len(_busy(size)), 6000)
async def _targets_of_many(cast: Cast, session: AsyncSession) -> object:
    now = cast.services.clock.now().replace(tzinfo=None)
    return await push.list_targets(session, _busy(cast.size), now=now)


@_query("newest messages of many chats, for a push", lambda size: 15 * len(_busy(size)))
async def _newest_of_many(cast: Cast, session: AsyncSession) -> object:
    spans = [push.Span(chat_id, 0, 10) for chat_id in _busy(cast.size)]
    return await push.list_newest(session, spans, limit=5)


@_query("moving the cursors of 10 chats", 3 * RECENT)
async def _advance(cast: Cast, session: AsyncSession) -> None:
    await push.advance_pushed(session, [(chat_id, 2**40) for chat_id in _busy(cast.size)[:RECENT]])


@_query("what stands between somebody and 100 others", 220, 150)
async def _pairs(cast: Cast, session: AsyncSession) -> object:
    step = cast.size.users // 101
    return await pairs.find_pairs(session, READER, [READER + step * place for place in range(1, 101)])


# --- logging in and connecting ----------------------------------------------------------------------------------


@_query("the session of a request", 1)
async def _session(cast: Cast, session: AsyncSession) -> object:
    return await sessions.find_sessions(session, [READER])


@_query("logging in", 5)
async def _log_in(cast: Cast, session: AsyncSession) -> object:
    found = await users.find_credentials(session, phone_of(cast.size.users // 2))
    assert found is not None
    return await sessions.list_alive(session, found[0], cast.services.clock.now().replace(tzinfo=None))


@_query("the sessions of who logs in", 10)
async def _prune(cast: Cast, session: AsyncSession) -> object:
    return await sessions.prune_and_list_alive(session, READER, cast.services.clock.now().replace(tzinfo=None))


@_query("the chats of a connection", lambda size: 2 * size.reader_chats + 5)
async def _cursors(cast: Cast, session: AsyncSession) -> object:
    return await chats.list_cursors(session, [READER])


# --- the writer -------------------------------------------------------------------------------------------------


def _send(cast: Cast) -> Change:
    return SendMessage(cast.chat, READER, b"0123456789abcdef", "hello", reply_to=cast.newest_id)


_append("append: a message", 15, _send)
_append("append: a mark", 25, lambda cast: Mark(cast.chat, LAGGARD, cast.newest_id, "read"))
_append("append: an edit", 15, lambda cast: EditMessage(cast.chat, cast.sender_id, cast.newest_id, "changed"))
