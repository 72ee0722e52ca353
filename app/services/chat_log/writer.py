"""The group-committing writer: what arrives from all connections during one commit is the next transaction, or the
next two.

No timer: an idle server commits a lone message at once, a busy one a few hundred together. One batch is under way at
a time: two would be smaller ones, and dearer per message, and now and then MySQL holds up two commits that meet for
100 ms (docs/performance.md). Only beside a commit that takes long does the next one begin, with chats of its own. An
outcome is told after the commit, never before; while it is told, the next batch is on its way to the database.

What this process wrote last it remembers: sends to such chats go to the database together with the commit, and it
refuses them all when a chat has moved on since; then they are written again, after a look. A transaction that fails
for the database's reasons is tried again with the same client ids, so that a commit whose outcome is unknown still
makes one row; one that fails for its content is bisected, so that one poisoned change fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import DialectError, Unavailable, shutting_down
from app.core.ids import IdAllocator
from app.core.tasks import supervise
from app.db.database import MYSQL_LOG_CONNECTIONS, Database
from app.db.errors import DATABASE_ERRORS, describe, is_outdated, is_sent_before, is_transient
from app.services.chat_log.append import Appender
from app.services.chat_log.changes import Appended, Change, Deferred, Done, EditMessage, SendMessage

log = logging.getLogger(__name__)

STOP_SECONDS = 0.5
"""What a drain has not got done, a database that is away will not do in longer either."""

BATCH_CHARACTERS_MAX = 500_000
"""Text in one transaction: in one packet to MySQL it takes up to eight bytes per character."""

MYSQL_BATCH_FLOOR = 100
"""So many changes go to MySQL together; of twice as many that wait, or more, half. If all went at once, all those who
wait for their outcomes would send again at once, and the server and MySQL would only ever work in turns. SQLite works
in turns."""

SLOW_COMMIT_SECONDS = 0.004
"""A commit that takes longer hangs: over a lock, on the disk, in MySQL itself. The next batch then begins beside it."""

LOOK_UP_SECONDS = 30.0
"""After a retry was met, more are likely: so long earlier sends are looked up before anything is written."""

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


@dataclass(slots=True, eq=False)
class _Lane:
    """A batch under way, if there is one."""

    batch: list[_Pending] = field(default_factory=list)
    chats: set[int] = field(default_factory=set)
    committing_since: float | None = None
    """Since when all that is left is the commit: it waits for nobody's lock any more."""

    def begin(self, batch: list[_Pending]) -> None:
        self.batch, self.chats, self.committing_since = batch, {pending.change.chat_id for pending in batch}, None

    def clear(self) -> None:
        self.begin([])


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
        self._lanes = [_Lane() for _ in range(MYSQL_LOG_CONNECTIONS if database.is_mysql else 1)]
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._look_up_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin committing."""
        self._tasks = [
            *(supervise("writer", partial(self._run, lane)) for lane in self._lanes),
            supervise("writer-deadlines", self._expire),
        ]

    async def stop(self) -> None:
        """Refuse new changes, finish those waiting for at most `STOP_SECONDS`, end."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drained(), STOP_SECONDS)
        for pending in self._all():
            pending.settle(shutting_down())
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
        return len(self._all())

    def _all(self) -> list[_Pending]:
        return [*(pending for lane in self._lanes for pending in lane.batch), *self._queue]

    def submit(self, change: Change, on_done: OnDone) -> None:
        """Queue a change; `on_done` is called with what came of it, after the commit.

        Raises Unavailable (`overloaded`) when too many wait, or when the server is stopping.
        """
        if self._stopping:
            raise shutting_down()
        if len(self._queue) >= self._settings.writer_queue_max:
            raise Unavailable("overloaded", "Too much is waiting to be written; try again.", retry_after=2)
        deadline = self._clock.monotonic() + self._settings.write_timeout_seconds
        self._queue.append(_Pending(change, on_done, deadline))
        self._idle.clear()
        self._begin_another()

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

    async def _run(self, lane: _Lane) -> None:
        # What a run before this one was at when it failed. What that committed makes no second row.
        self._queue.extendleft(reversed(lane.batch))
        lane.clear()
        while True:
            while not (batch := self._take()):
                asyncio.get_running_loop().call_soon(self._rest)  # behind the telling of what was just committed
                self._wake.clear()
                await self._wake.wait()
            lane.begin(batch)
            deferred: list[_Pending] = []
            try:
                deferred = await self._commit(lane, batch)
            except Exception:
                log.exception("writer_failed")
                for pending in batch:
                    pending.settle(DialectError("internal_error", "The server failed to store this."))
            if len(deferred) == len(batch):
                await asyncio.sleep(0.005)  # nothing but locked chats: let their holder finish
            self._queue.extendleft(reversed(deferred))
            lane.clear()

    def _rest(self) -> None:
        if not self._queue and not any(lane.batch for lane in self._lanes):
            self._idle.set()

    def _may_begin(self) -> bool:
        """Whether a batch may begin now: alone, or beside commits that take long. So two of this process's own never
        wait for each other's locks in a ring."""
        slow_since = time.monotonic() - SLOW_COMMIT_SECONDS
        return all(
            lane.committing_since is not None and lane.committing_since <= slow_since
            for lane in self._lanes
            if lane.batch
        )

    def _begin_another(self) -> None:
        if self._queue and self._may_begin():
            self._wake.set()

    def _take(self) -> list[_Pending]:
        """The next batch, if one may begin: what is first in line and still wanted, but for chats that are under way,
        which it would find locked."""
        batch: list[_Pending] = []
        if not self._may_begin():
            return batch
        busy = {chat_id for lane in self._lanes for chat_id in lane.chats}
        left: list[_Pending] = []
        characters = 0
        most = self._settings.writer_batch_max
        if self._database.is_mysql:
            most = min(most, max(MYSQL_BATCH_FLOOR, len(self._queue) // 2))
        while self._queue and len(batch) < most and characters < BATCH_CHARACTERS_MAX:
            pending = self._queue.popleft()
            if pending.on_done is None:
                continue
            if pending.change.chat_id in busy:
                left.append(pending)
                continue
            batch.append(pending)
            if isinstance(pending.change, (SendMessage, EditMessage)):
                characters += len(pending.change.content)
        if left:
            self._queue.extendleft(reversed(left))
        return batch

    async def _expire(self) -> None:
        """Answer for changes that the database keeps waiting: nobody hangs, and a retry is safe."""
        while True:
            await asyncio.sleep(0.25)
            now = self._clock.monotonic()
            for pending in self._all():
                if pending.deadline <= now and pending.on_done is not None:
                    metrics.changes_expired.inc()
                    pending.settle(
                        Unavailable("database_unavailable", "The database does not answer; try again.", retry_after=2)
                    )

    async def _commit(self, lane: _Lane, batch: Sequence[_Pending]) -> list[_Pending]:
        """Commit a batch, whatever it takes until its deadlines. Returns what met a lock, in order."""
        pause = 0.02
        recall = True
        while batch := [pending for pending in batch if pending.on_done is not None]:
            look_up = self._clock.monotonic() < self._look_up_until
            try:
                appended = await self._transact(lane, batch, look_up=look_up, recall=recall)
            except Exception as error:
                if recall and is_outdated(error):
                    recall = False
                    metrics.batches_outdated.inc()
                    self._appender.known.drop(pending.change.chat_id for pending in batch)
                    continue
                if not look_up and is_sent_before(error):
                    self._look_up_until = self._clock.monotonic() + LOOK_UP_SECONDS
                    continue
                if not is_transient(error):
                    return await self._bisect(lane, batch, error)
                metrics.batches_retried.inc()
                log.warning("batch_retried", extra={"changes": len(batch), "error": describe(error)})
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)
            else:
                # The next batch is on its way to the database before this one is told: both cost time, on two sides.
                asyncio.get_running_loop().call_soon(self._tell, batch, appended)
                return [
                    pending
                    for pending, outcome in zip(batch, appended.outcomes, strict=True)
                    if isinstance(outcome, Deferred)
                ]
        return []

    async def _transact(self, lane: _Lane, batch: Sequence[_Pending], *, look_up: bool, recall: bool) -> Appended:
        lane.committing_since = None
        changes = [pending.change for pending in batch]
        sends = sum(isinstance(change, SendMessage) for change in changes)
        ids = await self._ids.reserve("message", sends) if sends else ()
        began = time.perf_counter()
        async with self._database.appending() as connection:
            appended = await self._appender.append(
                connection, changes, ids, skip_locked=True, look_up=look_up, recall=recall
            )
            lane.committing_since = time.monotonic()
            # A millisecond later, for timers are as coarse as that.
            asyncio.get_running_loop().call_later(SLOW_COMMIT_SECONDS + 0.001, self._begin_another)
        self._appender.known.put(appended.chats)
        metrics.commit_seconds.observe(time.perf_counter() - began)
        metrics.commit_changes.observe(len(changes))
        return appended

    def _tell(self, batch: Sequence[_Pending], appended: Appended) -> None:
        """Truth before talk: the transaction is committed; acknowledge, then announce."""
        sent = 0
        for pending, outcome in zip(batch, appended.outcomes, strict=True):
            if not isinstance(outcome, Deferred):
                pending.settle(outcome)
                sent += isinstance(outcome, Done) and isinstance(pending.change, SendMessage)
        metrics.messages_acknowledged.inc(sent)
        try:
            self._announce(appended)
        except Exception:
            log.exception("announce_failed")  # the sweep finds what was not let out

    async def _bisect(self, lane: _Lane, batch: Sequence[_Pending], error: Exception) -> list[_Pending]:
        if len(batch) == 1:
            if isinstance(error, DATABASE_ERRORS):
                log.error("change_refused_by_database", extra={"error": describe(error)})
            else:
                log.error("change_failed", exc_info=error)
            batch[0].settle(DialectError("internal_error", "The server failed to store this."))
            return []
        metrics.batches_bisected.inc()
        middle = len(batch) // 2
        deferred = await self._commit(lane, batch[:middle])
        # What follows in a chat that was just found locked must not overtake, should the lock be free by now.
        locked = {pending.change.chat_id for pending in deferred}
        rest = batch[middle:]
        deferred += [pending for pending in rest if pending.change.chat_id in locked]
        return deferred + await self._commit(
            lane, [pending for pending in rest if pending.change.chat_id not in locked]
        )
