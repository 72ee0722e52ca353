"""One session, one transaction, and what to announce once it is committed.

Everything but the group-committing writer goes through here. A clean exit commits and then announces; an error
rolls back and forgets. Services never commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from weakref import WeakValueDictionary

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import DialectError, Unavailable
from app.core.ids import IdAllocator
from app.db.database import Database
from app.db.events import AccountEvent
from app.db.repositories import chat_log as repository
from app.services.chat_log.append import Appender
from app.services.chat_log.changes import Appended, Change, Deferred
from app.services.chat_log.roster import Roster, load_rosters

log = logging.getLogger(__name__)

Announce = Callable[[Appended], None]


class UnitOfWork:
    """A transaction in progress. Reserve ids (`ids.reserve`) before the first statement."""

    def __init__(self, session: AsyncSession, appender: Appender, ids: IdAllocator) -> None:
        self.session = session
        self.ids = ids
        self._appender = appender
        self.appended: list[Appended] = []
        self.actions: list[Callable[[], None]] = []

    async def append(self, *changes: Change) -> Appended:
        """Append changes to chats; they are announced after the commit.

        Raises the first error among the outcomes: a unit of work is all or nothing.
        """
        appended = await self._appender.append(self.session, changes)
        for outcome in appended.outcomes:
            if isinstance(outcome, DialectError):
                raise outcome
            if isinstance(outcome, Deferred):
                raise RuntimeError("a unit of work waits for locks; nothing is deferred")
        self.appended.append(appended)
        return appended

    async def lock_chat(self, chat_id: int) -> tuple[repository.ChatRow, Roster] | None:
        """Lock a chat and read who is in it, exactly; None when there is no such chat."""
        row = await repository.lock_chat(self.session, chat_id)
        if row is None:
            return None
        [roster] = await load_rosters(self.session, [row])
        return row, roster

    async def next_account_version(self, user_id: int) -> int:
        """Number a change that only this user sees. Locks the user's row: after pairs and chats."""
        before = await repository.bump_account_versions(self.session, {user_id: 1})
        return before[user_id] + 1

    def announce_account(self, user_id: int, event: AccountEvent) -> None:
        """Tell a user's devices of a private change once it is committed."""
        self.appended.append(Appended([], account_events=[(user_id, event)]))

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run something once the change is durable. Its failure does not undo the change."""
        self.actions.append(action)


class _Turns:
    """The line of one account."""

    def __init__(self, at_once: int) -> None:
        self.free = asyncio.Semaphore(at_once)
        self.failed_at = -math.inf
        """When the database last failed one of them."""


class UnitOfWorkFactory:
    """Opens units of work."""

    def __init__(self, database: Database, appender: Appender, ids: IdAllocator, announce: Announce) -> None:
        self.database = database
        self.ids = ids
        self._appender = appender
        self._announce = announce
        self._turns: WeakValueDictionary[int, _Turns] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def of(self, user_id: int) -> AsyncIterator[UnitOfWork]:
        """A unit of work for somebody, `CHANGES_PER_USER` at a time: most would wait for the lock of the user's row
        anyway, each with a connection that others need. Never open one inside another.

        Raises Unavailable: when it is not its turn in time, or when the database failed the one before.
        """
        settings = self.database.settings
        turns = self._turns.setdefault(user_id, _Turns(settings.changes_per_user))
        came_at = time.monotonic()
        try:
            async with asyncio.timeout(settings.db_timeout_seconds):
                await turns.free.acquire()
        except TimeoutError:
            raise Unavailable("busy", "Too many changes of yours are waiting; try again.", retry_after=1) from None
        try:
            if turns.failed_at > came_at:  # each would wait for as long, and for as little
                raise Unavailable("database_unavailable", "The database does not answer; try again.", retry_after=2)
            try:
                async with self() as uow:
                    yield uow
            except Unavailable as error:
                if error.code == "database_unavailable":
                    turns.failed_at = time.monotonic()
                raise
        finally:
            turns.free.release()

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[UnitOfWork]:
        """A unit of work. Raises Unavailable when the database does not answer in time."""
        async with self.database.writing() as session:
            uow = UnitOfWork(session, self._appender, self.ids)
            yield uow
        for result in uow.appended:
            self._appender.known.put(result.chats)
        announce_all(uow.appended, self._announce)
        for action in uow.actions:
            try:
                action()
            except Exception:
                # The change is committed and the caller must hear so; the sweep and resuming heal the rest.
                log.exception("after_commit_failed")


def announce_all(appended: Sequence[Appended], announce: Announce) -> None:
    """Announce what was committed; a failure is logged, and healed by the sweep."""
    for result in appended:
        try:
            announce(result)
        except Exception:
            log.exception("announce_failed")
