"""The group-committing writer: what arrives from all connections during one commit is the next transaction.

No timer: an idle server commits a lone message at once, a busy one a few hundred together. An outcome is told after
the commit, never before. A transaction that fails for the database's reasons is tried again with the same client
ids, so that a commit whose outcome is unknown still makes one row; one that fails for its content is bisected, so
that one poisoned change fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import DialectError, Unavailable, chat_not_found
from app.core.ids import IdAllocator
from app.db.database import Database, deadline, describe, is_transient
from app.db.repositories import chat_log as repository
from app.services.chat_log.append import Appender
from app.services.chat_log.changes import Appended, Change, Deferred, Done, SendMessage

log = logging.getLogger(__name__)

STOP_SECONDS = 1.0
"""What a drain has not got done, a database that is away will not do in longer either."""

OnDone = Callable[[Done | DialectError], None]


@dataclass(slots=True, eq=False)
class _Pending:
    change: Change
    on_done: OnDone | None
    deadline: float

    def settle(self, outcome: Done | DialectError) -> None:
        """Tell the outcome, once: a change that timed out may still commit later."""
        on_done, self.on_done = self.on_done, None
        if on_done is not None:
            try:
                on_done(outcome)
            except Exception:
                log.exception("outcome_not_told")


class Writer:
    """Takes changes from everywhere and commits them in batches. One per process."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        appender: Appender,
        ids: IdAllocator,
        announce: Callable[[Appended], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._appender = appender
        self._ids = ids
        self._announce = announce
        self._queue: deque[_Pending] = deque()
        self._batch: list[_Pending] = []
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin committing."""
        self._tasks = [
            asyncio.create_task(self._run(), name="writer"),
            asyncio.create_task(self._expire(), name="writer-deadlines"),
        ]

    async def stop(self) -> None:
        """Refuse new changes, finish those waiting for at most `STOP_SECONDS`, end."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drained(), STOP_SECONDS)
        for pending in (*self._batch, *self._queue):
            pending.settle(_shutting_down())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def drained(self) -> None:
        """Return once nothing is waiting: everything taken so far has been committed or refused."""
        await self._idle.wait()

    @property
    def waiting(self) -> int:
        """Changes not yet committed."""
        return len(self._queue) + len(self._batch)

    def submit(self, change: Change, on_done: OnDone) -> None:
        """Queue a change; `on_done` is called with what came of it, after the commit.

        Raises Unavailable (`overloaded`) when too many wait, or when the server is stopping.
        """
        if self._stopping:
            raise _shutting_down()
        if len(self._queue) >= self._settings.writer_queue_max:
            raise Unavailable("overloaded", "Too much is waiting to be written; try again.", retry_after=2)
        deadline = self._clock.monotonic() + self._settings.write_timeout_seconds
        self._queue.append(_Pending(change, on_done, deadline))
        self._idle.clear()
        self._wake.set()

    async def write(self, change: Change) -> Done:
        """Queue a change and wait for it. Never call this while holding a transaction: on SQLite it would wait
        for itself. Raises what refused the change."""
        future: asyncio.Future[Done | DialectError] = asyncio.get_running_loop().create_future()

        def on_done(outcome: Done | DialectError) -> None:
            if not future.done():
                future.set_result(outcome)

        self.submit(change, on_done)
        outcome = await future
        if isinstance(outcome, DialectError):
            raise outcome
        return outcome

    # --- the loop ---

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                size = min(len(self._queue), self._settings.writer_batch_max)
                self._batch = [pending for pending in (self._queue.popleft() for _ in range(size)) if pending.on_done]
                try:
                    await self._commit(self._batch)
                except Exception:
                    log.exception("writer_failed")
                    for pending in self._batch:
                        pending.settle(DialectError("internal_error", "The server failed to store this."))
                self._batch = []
            self._idle.set()

    async def _expire(self) -> None:
        """Answer for changes that the database keeps waiting: nobody hangs, and a retry is safe."""
        while True:
            await asyncio.sleep(0.25)
            now = self._clock.monotonic()
            late = [pending for pending in (*self._batch, *self._queue) if pending.deadline <= now]
            for pending in late:
                pending.settle(
                    Unavailable("database_unavailable", "The database does not answer; try again.", retry_after=2)
                )

    async def _commit(self, batch: Sequence[_Pending]) -> None:
        pause = 0.02
        while batch := [pending for pending in batch if pending.on_done is not None]:
            try:
                appended = await self._transact(batch)
            except Exception as error:
                transient = isinstance(error, (Unavailable, OSError, TimeoutError, PoolTimeoutError)) or (
                    isinstance(error, DBAPIError) and is_transient(error)
                )
                if transient:
                    log.warning("batch_retried", extra={"changes": len(batch), "error": describe(error)})
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 0.5)
                    continue
                await self._bisect(batch, error)
                return
            self._tell(batch, appended)
            if any(isinstance(outcome, Deferred) for outcome in appended.outcomes):
                await self._requeue(batch, appended)
            return

    async def _transact(self, batch: Sequence[_Pending]) -> Appended:
        changes = [pending.change for pending in batch]
        sends = sum(isinstance(change, SendMessage) for change in changes)
        ids = await self._ids.reserve("message", sends) if sends else ()
        async with (
            deadline(self._settings.db_timeout_seconds),
            self._database.log_engine.begin() as connection,
        ):
            return await self._appender.append(connection, changes, ids, skip_locked=True)

    def _tell(self, batch: Sequence[_Pending], appended: Appended) -> None:
        """Truth before talk: the transaction is committed; acknowledge, then announce."""
        for pending, outcome in zip(batch, appended.outcomes, strict=True):
            if not isinstance(outcome, Deferred):
                pending.settle(outcome)
        try:
            self._announce(appended)
        except Exception:
            log.exception("announce_failed")  # the sweep finds what was not let out

    async def _bisect(self, batch: Sequence[_Pending], error: Exception) -> None:
        if len(batch) == 1:
            if isinstance(error, DBAPIError):
                log.error("change_refused_by_database", extra={"error": describe(error)})
            else:
                log.error("change_failed", exc_info=error)
            batch[0].settle(DialectError("internal_error", "The server failed to store this."))
            return
        middle = len(batch) // 2
        await self._commit(batch[:middle])
        await self._commit(batch[middle:])

    async def _requeue(self, batch: Sequence[_Pending], appended: Appended) -> None:
        """Put back, in order and first in line, what met a lock; refuse what has no chat at all."""
        deferred = [
            pending for pending, outcome in zip(batch, appended.outcomes, strict=True) if isinstance(outcome, Deferred)
        ]
        chat_ids = sorted({pending.change.chat_id for pending in deferred})
        try:
            async with self._database.reading() as session:
                existing = {row.id for row in await repository.find_chats(session, chat_ids)}
        except Unavailable:
            existing = set(chat_ids)  # unknown: the next round, or the deadline, decides
        for pending in reversed(deferred):
            if pending.change.chat_id in existing:
                self._queue.appendleft(pending)
            else:
                pending.settle(chat_not_found())
        if len(deferred) == len(batch):
            await asyncio.sleep(0.005)  # nothing but locked chats: let their holder finish


def _shutting_down() -> Unavailable:
    return Unavailable("shutting_down", "The server is restarting; try again.", retry_after=2)
