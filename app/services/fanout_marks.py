"""Notes which messages this worker has told of, and stores it behind their backs: a mark per chat, every few seconds.

Noting costs a send nothing but a look into a dict. What is noted has happened, so a mark is never ahead of the truth;
what a crash takes along is a few seconds' worth of marks, and the trace says less than it could.

Workers take turns in a chat. Which of the messages are whose stands on the messages themselves, as the number that the
worker took when it started: so one mark speaks of all of its own, whatever others committed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Literal, NamedTuple

from app.core.clock import Clock
from app.core.errors import Unavailable
from app.core.tasks import supervise
from app.db.database import Database
from app.db.events import ChatEvent
from app.db.repositories import trace as repository
from app.db.repositories.trace import FanoutRow
from app.services.chat_log.changes import Announcement

log = logging.getLogger(__name__)

STORE_SECONDS = 2.0
"""Each mark is a row that MySQL finds and compares: stored every second, those of a hundred chats took 6 ms of it."""
STORE_ROWS = 1000
"""Marks stored at once. More chats than this in a second take turns, so that what is stored costs no more."""
WAITING_MAX = 50_000
"""Marks that wait to be stored; beyond, messages of other chats leave none."""
KEPT_DAYS = 7
"""Of workers that are no more, what they told of a chat is deleted so long after, once somebody tells of it again."""
PRUNED_MAX = 100_000

Part = Literal["commit", "sockets"]
Key = tuple[int, Part]


class Run(NamedTuple):
    """The first and the last of the messages told of, and when that was."""

    first: int
    last: int
    at: datetime

    def joined(self, later: Run, part: Part) -> Run:
        """This run and another. Of `sockets` only when nothing lies between them, else the one that reaches further:
        what lies between own commits are those of others."""
        newer = later if later.last >= self.last else self
        if part == "commit" or (later.first <= self.last + 1 and later.last >= self.first - 1):
            return Run(min(self.first, later.first), newer.last, newer.at)
        return newer


def run_of(events: Iterable[ChatEvent]) -> tuple[int, int] | None:
    """(first, last) of the messages that events bring, without a gap up to the newest; None when they bring none."""
    seqs: set[int] = set()
    for event in events:
        if event["type"] == "new_message":
            seqs.add(event["message"]["seq"])
        elif event["type"] == "chat_changes":  # messages that were edited, too: whatever is in it was told of
            seqs.update(message["seq"] for message in event["messages"])
    if not seqs:
        return None
    first = last = max(seqs)
    while first - 1 in seqs:
        first -= 1
    return first, last


class FanoutMarks:
    """What this worker has told of. One per process."""

    def __init__(self, *, clock: Clock, database: Database, worker: str) -> None:
        self._clock = clock
        self._database = database
        self.worker = worker
        self.number: int | None = None
        """What stands on the messages that this worker commits; None until the database gave it one."""
        self._waiting: dict[Key, Run] = {}
        self._pruned: set[int] = set()
        """Chats whose old marks were looked for by this process."""
        self._storing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take a number, before anything is committed, and begin to store. Without one the server works, too."""
        log.info("worker_named", extra={"worker": self.worker})
        with contextlib.suppress(Unavailable):
            await self.take_number()
        self._task = supervise("fanout-marks", self._keep_storing)

    async def stop(self) -> None:
        """Store what waits, as far as the database is there, and end."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            while self._waiting:
                await self.store()
        except Unavailable:
            log.info("fanout_marks_not_stored", extra={"chats": len(self._waiting)})

    async def take_number(self) -> None:
        """Take a number, once. Raises Unavailable."""
        if self.number is None:
            async with self._database.writing() as session:
                number = await repository.add_worker(session, self.worker, self._now())
            self.number = number

    def _now(self) -> datetime:
        return self._clock.now().astimezone(UTC).replace(tzinfo=None)

    # --- noting ---

    def committed(self, announcement: Announcement) -> None:
        """This worker committed it, and nobody here waits for it any more."""
        self._note(announcement, "commit")

    def let_out(self, announcement: Announcement) -> None:
        """The sockets here have it in their buffers."""
        self._note(announcement, "sockets")

    def _note(self, announcement: Announcement, part: Part) -> None:
        run = run_of(announcement.events)
        if run is None:
            return
        key = (announcement.chat_id, part)
        later = Run(*run, self._now())
        earlier = self._waiting.get(key)
        if earlier is not None:
            self._waiting[key] = earlier.joined(later, part)
        elif len(self._waiting) < WAITING_MAX:
            self._waiting[key] = later

    def waiting(self, chat_id: int, part: Part) -> FanoutRow | None:
        """What this worker has told of a chat and not stored yet."""
        run = self._waiting.get((chat_id, part))
        return None if run is None else FanoutRow(chat_id, self.worker, part, *run)

    # --- storing ---

    async def _keep_storing(self) -> None:
        while True:
            await asyncio.sleep(STORE_SECONDS)
            try:
                await self.take_number()
                await self.store()
            except Unavailable:
                log.info("fanout_marks_not_stored", extra={"chats": len(self._waiting)})

    async def store(self) -> None:
        """Store what has waited longest, in one transaction. Raises Unavailable; then it goes on waiting."""
        async with self._storing:
            some = dict(islice(self._waiting.items(), STORE_ROWS))
            if not some:
                return
            rows = [FanoutRow(chat_id, self.worker, part, *run) for (chat_id, part), run in some.items()]
            new = sorted({chat_id for chat_id, _ in some} - self._pruned)
            async with self._database.writing() as session:
                await repository.save_fanout(session, rows)
                if new:
                    before = max(run.at for run in some.values()) - timedelta(days=KEPT_DAYS)
                    await repository.prune_fanout(session, new, before)
            if len(self._pruned) + len(new) > PRUNED_MAX:
                self._pruned.clear()
            self._pruned.update(new)
            for key, run in some.items():
                now_waiting = self._waiting.pop(key)
                if now_waiting is not run:  # more was told meanwhile: at the end of the line, behind whoever waits
                    self._waiting[key] = now_waiting
