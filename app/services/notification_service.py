"""Push: tells Firebase of messages that reach nobody's open socket, without a word of what they say.

Push follows the log of each chat by `chats.pushed_seq`. What comes after it is looked at, told to the devices that
need to hear it, and only then is the cursor moved: a crash in between repeats a push, which replaces the first by its
collapse key, and loses none. Nothing here is waited for by anybody: a send leaves the id of its chat, and no more.

A device that fails is tried again by itself while the chat goes on; what is said meanwhile joins its next try. The
cursor stays before the first message that some device has not been told of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import Unauthenticated, Unavailable
from app.core.tasks import supervise
from app.db.database import Database
from app.db.leadership import Leadership
from app.db.repositories import push as repository
from app.db.repositories import sessions as session_repository
from app.db.repositories import trace as trace_repository
from app.db.repositories.push import DeviceRow, Span, Target, UnpushedChat, UnpushedMessage
from app.db.repositories.trace import PushRow
from app.db.schemas import PushDeviceIn
from app.services.caller import Caller
from app.services.chat_log.changes import Appended
from app.services.firebase import Firebase, Push
from app.services.online import Online
from app.services.transport import dead_socket_seconds
from app.services.unit_of_work import UnitOfWorkFactory

log = logging.getLogger(__name__)

LEAD_SECONDS = 3.0
"""Between looks whether this process pushes, or another one does."""
SEARCH_SECONDS = 5.0
"""Between searches for chats that nobody gave a hint of."""
SEARCH_WINDOW_SECONDS = 60
BACKLOG_SECONDS = 24 * 3600
"""After a start or an outage, what is older is not pushed any more."""
SEARCH_CHATS = 1000
LOOK_PAUSE_SECONDS = 0.25
"""Looks begin no closer to each other: what comes meanwhile is looked at together, for three queries in all."""
LOOK_CHATS = 100
LOOK_MEMBERS = 1000
"""A look ends with the chat that brings it to so many members, each with a device or several."""
LOOK_MESSAGES = 1000
"""And with the one that brings it to so many messages: they are read into memory together."""
STORE_SECONDS = 1.0
"""Between stores of cursors that have moved past a push: so much is pushed again after a crash."""
STORE_UNTOLD_SECONDS = 5.0
"""The same of those that have only moved past messages that nobody's device was to hear of: nothing is pushed again."""
STORE_BATCH = 200
"""Cursors moved by one transaction, which for a moment holds the rows that the writer wants."""
MARKS_MAX = 20_000
"""Answers of Firebase that wait to be stored with the cursors; beyond, the trace does not know of them."""
REASON_MAX = 64
HINTS_MAX = 50_000
JOBS_MAX = 20_000
"""Devices being told; beyond, chats wait, and their cursors in the database remember them."""
NEWEST_MAX = 200
UNREAD_MAX = 999
WATCH_SECONDS = 1.0
"""Between looks whether a socket that may be dead still stands."""
BACKOFF_SECONDS = 1.0
BACKOFF_MAX_SECONDS = 60.0
"""So late at most is a push after Firebase has come back, Retry-After aside."""
REGISTER_TRIES = 3


@dataclass(slots=True, eq=False)
class _Job:
    """A device that is to hear of a chat."""

    session_id: int
    user_id: int
    first: int
    """The first message that it has not been told of."""
    seq: int
    """The newest."""
    due: float
    wanted: int
    """With an open socket it has until `due` to mark this one delivered by itself."""
    sure_at: float = 0.0
    """Until then its socket is watched; see `_watch`."""
    trying: int = 0
    """The newest when the last try began."""
    backoff: float = 0.0
    """Of the last retry; 0 as long as no try has failed."""
    failing_since: float = 0.0
    failing_seq: int = 0
    """The newest then: what came later joins the next try, and has time of its own."""


@dataclass(slots=True, eq=False)
class _Chat:
    """A chat that push is busy with."""

    id: int
    stored: int
    """The cursor in the database."""
    seen: int
    """Up to here every message has been looked at."""
    stored_at: float
    slots: asyncio.Semaphore
    retry_slots: asyncio.Semaphore
    told: bool = False
    """Whether a device was to hear of something that the cursor in the database is not past."""
    jobs: dict[int, _Job] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Up to here nobody has to be told any more."""
        return min((job.first - 1 for job in self.jobs.values()), default=self.seen)


class NotificationService:
    """Registers devices and pushes to them. One per process; of those on one database only one pushes."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        unit_of_work: UnitOfWorkFactory,
        online: Online,
    ) -> None:
        """Raises StartupError when there is a service account that cannot be used."""
        self._settings = settings
        self._clock = clock
        self._database = database
        self._unit_of_work = unit_of_work
        self._online = online
        self._firebase = open_firebase(settings)
        self._slots = asyncio.Semaphore(settings.push_threads)
        self._retry_slots = asyncio.Semaphore(max(1, settings.push_threads // 2))
        """What fails again and again, or hangs, may do so for hours: the rest is for what was not tried yet."""
        self._hints: dict[int, None] = {}
        self._chats: dict[int, _Chat] = {}
        self._marks: dict[tuple[int, int], PushRow] = {}
        """What Firebase said of each session and chat, for the delivery trace."""
        self.firebase_answers = True
        """Whether Firebase took or refused the last push, rather than being out of order or out of reach."""
        self._behind = True
        """Whether hints may have been lost, so that the next search must reach far back."""
        self._wake = asyncio.Event()
        self._leadership = Leadership(database, "push")
        self._leading: asyncio.Task[None] | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def enabled(self) -> bool:
        """Whether there is anybody to push through."""
        return self._firebase is not None

    @property
    def devices_waiting(self) -> int:
        """Devices being told, those that wait for a retry included."""
        return len(self._tasks)

    @property
    def chats_waiting(self) -> int:
        """Chats with messages that were not looked at yet."""
        return len(self._hints)

    def start(self) -> None:
        """Begin pushing, with what an earlier process left; without a service account say so, once."""
        if self._firebase is None:
            hint = "set FIREBASE_CREDENTIALS_PATH to push messages to phones"
            if path := self._settings.firebase_credentials_path:
                hint = f"there is no file {path} (FIREBASE_CREDENTIALS_PATH)"
            log.info("push_is_off", extra={"hint": hint})
            return
        self._leading = supervise("push-lead", self._lead)

    async def stop(self) -> None:
        """End. What was not told yet is told after the next start, or by another process: the cursors know."""
        if self._leading is not None:
            self._leading.cancel()
            await asyncio.gather(self._leading, return_exceptions=True)
            self._leading = None
        if self._firebase is not None:
            await self._firebase.close()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that pushes."""
        return self._leadership.since is not None

    async def _lead(self) -> None:
        """Push for as long as nobody else does."""
        try:
            while True:
                leads = False
                with contextlib.suppress(Unavailable):
                    leads = await self._leadership.hold()
                if leads and not self._loops:
                    log.info("push_leads")
                    self._behind = True
                    self._loops = [supervise("push", self._run), supervise("push-cursors", self._keep_storing)]
                elif not leads and self._loops:
                    log.info("push_follows")
                    await self._stop_pushing()
                await asyncio.sleep(LEAD_SECONDS)
        finally:
            try:
                await self._stop_pushing()
            finally:  # a stop may cut it short
                self._leadership.release()

    async def _stop_pushing(self) -> None:
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        try:
            if self._loops:
                await self._store(everything=True)
        except Unavailable:
            log.info("push_cursors_not_stored")
        finally:  # even where a stop cuts it short
            self._loops = []
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._hints.clear()
            self._chats.clear()
            self._marks.clear()

    # --- devices ---

    async def register_device(self, caller: Caller, body: PushDeviceIn) -> None:
        """Push to the caller's session by this token from now on, and to no other session by it.

        Raises Unauthenticated when the session has just ended, and Unavailable.
        """
        for tries_left in reversed(range(REGISTER_TRIES)):
            try:
                await self._register(caller, body)
            except Unavailable as error:
                if error.code != "busy" or not tries_left:
                    raise
            else:
                return

    async def _register(self, caller: Caller, body: PushDeviceIn) -> None:
        now = self._now()
        async with self._unit_of_work.of(caller.user_id) as uow:
            # Under the lock: a device registered while its session ends would outlive it.
            row = await session_repository.lock_session(uow.session, caller.session_id)
            if row is None or not row.is_alive(now):
                raise Unauthenticated
            device = DeviceRow(caller.session_id, caller.user_id, body.kind, body.token, now)
            await repository.save_device(uow.session, device)

    async def forget_device(self, caller: Caller) -> None:
        """Push nothing to the caller's session any more."""
        async with self._unit_of_work.of(caller.user_id) as uow:
            await repository.delete_devices(uow.session, [caller.session_id])

    # --- hints ---

    def hint(self, appended: Appended) -> None:
        """Something was committed: look at the chats that got messages. Costs the sender nothing else."""
        if not self._loops:
            return
        for announcement in appended.announcements:
            if any(event["type"] == "new_message" for event in announcement.events):
                self._hint(announcement.chat_id)

    def look_at(self, chat_id: int) -> None:
        """Another process committed something to a chat."""
        if self._loops:
            self._hint(chat_id)

    def _hint(self, chat_id: int) -> None:
        if len(self._hints) >= HINTS_MAX:
            self._behind = True
            return
        self._hints[chat_id] = None
        self._wake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_search = 0.0
        while True:
            begun = loop.time()
            try:
                if begun >= next_search:
                    await self._search()
                    next_search = loop.time() + SEARCH_SECONDS
                # Those of now: what comes meanwhile would be looked at one by one.
                hints = deque(self._hints)
                while hints and self.devices_waiting < JOBS_MAX and loop.time() < next_search:
                    some = [hints.popleft() for _ in range(min(LOOK_CHATS, len(hints)))]
                    hints.extendleft(reversed(await self._look(some)))
            except Unavailable:
                log.info("push_without_database")
                self._behind = True
                await asyncio.sleep(1)
            self._wake.clear()
            if not self._hints or self.devices_waiting >= JOBS_MAX:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(next_search):
                        await self._wake.wait()
            await asyncio.sleep(begun + LOOK_PAUSE_SECONDS - loop.time())

    async def _search(self) -> None:
        """Find chats that lag behind: after a start what a crash left, later what no hint told of."""
        seconds = BACKLOG_SECONDS if self._behind else SEARCH_WINDOW_SECONDS
        self._behind = False
        last: repository.LaggingChat | None = None
        try:
            # To the end: those that lag longest come last, behind all that are busy now.
            while not self._behind:
                async with self._database.reading() as session:
                    found = await repository.list_unpushed(session, seconds=seconds, after=last, limit=SEARCH_CHATS)
                for row in found:
                    chat = self._chats.get(row.id)
                    if chat is None or chat.seen < row.last_seq:
                        self._hint(row.id)
                if len(found) < SEARCH_CHATS:
                    break
                last = found[-1]
        except Exception:
            self._behind = True  # whatever it was: the next search looks as far back
            raise

    # --- who is to hear of it ---

    async def _look(self, chat_ids: Sequence[int]) -> list[int]:
        """Read what came to chats, and begin to tell those who need to hear it. Returns the chats that were too much
        for one look; their hints stay, first in line."""
        for chat_id in chat_ids:
            self._hints.pop(chat_id, None)
        try:
            return await self._look_together(chat_ids)
        except Unavailable:
            self._put_back(chat_ids)
            raise
        except Exception:
            self._behind = True  # the next search finds them all again
            if len(chat_ids) == 1:
                log.exception("push_look_failed", extra={"chat_id": chat_ids[0]})
                return []
        # One of them may be what fails each time: it holds up no other.
        self._put_back(chat_ids)
        for chat_id in chat_ids:
            await self._look([chat_id])
        return []

    def _put_back(self, chat_ids: Sequence[int]) -> None:
        """Hints for the next look, before all that came meanwhile."""
        self._hints = {**dict.fromkeys(chat_ids), **self._hints}

    async def _look_together(self, chat_ids: Sequence[int]) -> list[int]:
        async with self._database.reading() as session:
            rows = {row.id: row for row in await repository.find_chats(session, chat_ids)}
            chats, left = self._choose([rows[chat_id] for chat_id in chat_ids if chat_id in rows])
            if not chats:
                return []
            spans = [Span(chat.id, chat.seen, last_seq) for chat, last_seq in chats]
            newest = await repository.list_newest(session, spans, limit=NEWEST_MAX)
            targets = await repository.list_targets(session, [span.chat_id for span in spans], now=self._now())
        self._put_back(left)
        messages = {chat_id: list(of_chat) for chat_id, of_chat in groupby(newest, key=lambda message: message.chat_id)}
        firsts: dict[int, int] = {}
        for chat, last_seq in chats:
            firsts[chat.id] = chat.seen + 1
            self._chats[chat.id] = chat  # it may have been idle, and forgotten, while this was read
            chat.seen = last_seq
        for target in targets:
            if seq := _newest_for(target, messages.get(target.chat_id, ())):
                self._tell(self._chats[target.chat_id], target.device, firsts[target.chat_id], seq)
        return left

    def _choose(self, rows: Sequence[UnpushedChat]) -> tuple[list[tuple[_Chat, int]], list[int]]:
        """The chats with something new, and their last message; and those that are beyond a look."""
        chosen: list[tuple[_Chat, int]] = []
        left: list[int] = []
        members = messages = 0
        for row in rows:
            chat = self._chats.get(row.id)
            if chat is None:
                threads = self._settings.push_threads  # half of each kind is for other chats
                slots, retry_slots = asyncio.Semaphore(max(1, threads // 2)), asyncio.Semaphore(max(1, threads // 4))
                now = asyncio.get_running_loop().time()
                chat = _Chat(row.id, row.pushed_seq, row.pushed_seq, now, slots, retry_slots)
            chat.seen = max(chat.seen, row.pushed_seq)
            if row.last_seq <= chat.seen:
                continue
            if members >= LOOK_MEMBERS or messages >= LOOK_MESSAGES:
                left.append(row.id)
                continue
            members += row.member_count
            messages += min(row.last_seq - chat.seen, NEWEST_MAX)
            chosen.append((chat, row.last_seq))
        return chosen, left

    def _tell(self, chat: _Chat, device: DeviceRow, first: int, seq: int) -> None:
        chat.told = True
        job = chat.jobs.get(device.session_id)
        if job is not None:
            job.seq = seq  # its next try tells of this one, too
            return
        now = asyncio.get_running_loop().time()
        job = chat.jobs[device.session_id] = _Job(device.session_id, device.user_id, first, seq, now, seq)
        self._give_grace(job)
        self._spawn(self._deliver(chat, job))

    def _give_grace(self, job: _Job) -> None:
        """Let a device with an open socket mark the newest delivered before it is pushed to."""
        job.due, job.wanted, job.sure_at = asyncio.get_running_loop().time(), job.seq, 0.0
        if job.session_id in self._online.live_sessions(job.user_id):
            job.due += self._settings.push_grace_seconds

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine, name="push-device")
        self._tasks.add(task)
        task.add_done_callback(self._make_room)

    def _make_room(self, task: asyncio.Task[None]) -> None:
        # Here, and not at the end of the task itself: one that is cancelled before its first step never gets there.
        self._tasks.discard(task)
        self._wake.set()

    # --- telling one device ---

    async def _deliver(self, chat: _Chat, job: _Job) -> None:
        """Tell a device of a chat until it knows, need not know, or cannot be told."""
        try:
            while True:
                job.trying = job.seq
                try:
                    wait = await self._attempt(chat, job)
                except Exception as error:
                    # Ours or the database's, and of this moment or of this device: tried as long as a failing Google.
                    log.exception("push_failed")
                    wait = self._retry(chat, job, type(error).__name__)
                if wait is not None:
                    await asyncio.sleep(wait)
                elif job.seq == job.trying:
                    return
                else:  # more was said while that was under way
                    job.first, job.backoff = job.trying + 1, 0.0
                    self._give_grace(job)
        finally:
            del chat.jobs[job.session_id]

    async def _attempt(self, chat: _Chat, job: _Job) -> float | None:
        """Try once; the seconds until it is worth trying again, or None when this is over."""
        loop = asyncio.get_running_loop()
        if job.due > loop.time():
            return job.due - loop.time()
        if loop.time() < job.sure_at and job.session_id in self._online.live_sessions(job.user_id):
            job.trying = job.wanted
            return WATCH_SECONDS  # the database has nothing new to say
        # First what is only the chat's: whoever waits there keeps no other chat waiting.
        lane = (chat.retry_slots, self._retry_slots) if job.backoff else (chat.slots, contextlib.nullcontext())
        async with lane[0], lane[1], self._slots:
            job.trying = job.seq
            try:
                # Again, now: whoever has read it, left, blocked or logged out since must not hear of it.
                async with self._database.reading() as session:
                    targets = await repository.list_targets(
                        session, [chat.id], now=self._now(), session_id=job.session_id
                    )
                    unread = await repository.count_unread(session, job.user_id, limit=UNREAD_MAX)
            except Unavailable:
                job.failing_since = loop.time()  # it is not Firebase that is to be given up
                return 2.0
            if not targets or targets[0].read_seq >= job.trying:
                return None
            [target] = targets
            live = self._online.live_sessions(job.user_id)
            if job.session_id in live and target.delivered_seq >= job.wanted:
                job.trying = job.wanted
                return self._watch(job)
            return await self._send(chat, job, target.device, unread)

    def _watch(self, job: _Job) -> float | None:
        """A device with an open socket of whom somebody says it got the message.

        The mark is the user's: with several devices it may be another's, that may have gone since. A socket that
        outlives the next ping is not dead, so that its device has the message, too; one that closes before is pushed
        to.
        """
        if self._online.recent_sessions(job.user_id) == {job.session_id}:
            return None
        job.sure_at = job.due + dead_socket_seconds(self._settings)
        return None if asyncio.get_running_loop().time() >= job.sure_at else WATCH_SECONDS

    async def _send(self, chat: _Chat, job: _Job, device: DeviceRow, unread: int) -> float | None:
        if self._firebase is None:
            raise RuntimeError("push is off")
        data = {"type": "new_message", "chat_id": str(chat.id), "seq": str(job.trying), "unread": str(unread)}
        with metrics.push_seconds.time():
            outcome = await self._firebase.send(Push(device.kind, device.token, f"chat-{chat.id}", data))
        metrics.push_outcomes.labels(outcome.kind).inc()
        self.firebase_answers = outcome.kind != "retry"
        where = {"chat_id": chat.id, "session_id": job.session_id, "reason": outcome.reason}
        match outcome.kind:
            case "sent":
                self._note(self._mark(chat, job, "sent"))
                return None
            case "dead":
                log.info("push_device_is_dead", extra=where)
                mark = self._mark(chat, job, "dead", outcome.reason)
                try:
                    async with self._database.writing() as session:
                        await repository.delete_dead_device(session, device)
                        # With it, not after it: what is deleted is not tried again, and nobody would know why.
                        await trace_repository.save_pushed(session, [mark])
                except Unavailable:
                    log.info("push_device_not_deleted", extra=where)  # the next message finds it dead again
                return None
            case "refused":
                log.warning("push_refused", extra=where)
                self._note(self._mark(chat, job, "refused", outcome.reason))
                return None
            case "retry":
                return self._retry(chat, job, outcome.reason, outcome.retry_after)

    def _retry(self, chat: _Chat, job: _Job, reason: str, retry_after: float | None = None) -> float | None:
        """Seconds until the next try, each time more; None when it has failed for too long.

        A try follows whatever is waited for, also a Retry-After that ends later than all patience.
        """
        now = asyncio.get_running_loop().time()
        where = {"chat_id": chat.id, "session_id": job.session_id, "reason": reason}
        if not job.backoff:
            job.failing_since, job.failing_seq = now, job.trying
        elif now >= job.failing_since + self._settings.push_give_up_seconds:
            if job.trying == job.failing_seq:
                log.warning("push_given_up", extra=where)
                metrics.push_outcomes.labels("given_up").inc()
                self._note(self._mark(chat, job, "given_up", reason))
                return None
            # The newer ones stand for these. In a chat that goes on the cursor must, too.
            job.first, job.failing_since, job.failing_seq = job.failing_seq + 1, now, job.trying
        self._note(self._mark(chat, job, "retry", reason))
        log.info("push_retried", extra=where)
        job.backoff = min(job.backoff * 2 or BACKOFF_SECONDS, BACKOFF_MAX_SECONDS)
        wanted = min(retry_after or 0.0, self._settings.push_retry_after_max_seconds)
        return max(job.backoff * random.uniform(0.5, 1), wanted)

    # --- marks for the trace ---

    def _mark(self, chat: _Chat, job: _Job, answer: str, reason: str = "") -> PushRow:
        sent_seq = job.trying if answer == "sent" else 0
        return PushRow(job.session_id, chat.id, sent_seq, job.trying, answer, reason[:REASON_MAX], self._now())

    def _note(self, mark: PushRow) -> None:
        """Remember what Firebase said until the cursors are stored."""
        key = (mark.session_id, mark.chat_id)
        earlier = self._marks.get(key)
        if earlier is not None:
            self._marks[key] = mark._replace(sent_seq=max(earlier.sent_seq, mark.sent_seq))
        elif len(self._marks) < MARKS_MAX:
            self._marks[key] = mark

    # --- cursors ---

    async def _keep_storing(self) -> None:
        while True:
            await asyncio.sleep(STORE_SECONDS)
            try:
                await self._store()
            except Unavailable:
                log.info("push_cursors_not_stored")

    async def _store(self, *, everything: bool = False) -> None:
        """Move the cursors of chats that are done with something; forget chats that are done with everything."""
        now = asyncio.get_running_loop().time()
        moved = [
            (chat, done)
            for chat in self._chats.values()
            if (done := chat.done) > chat.stored
            and (everything or chat.told or now >= chat.stored_at + STORE_UNTOLD_SECONDS)
        ]
        marks: dict[int, list[PushRow]] = {}
        for mark in self._marks.values():
            marks.setdefault(mark.chat_id, []).append(mark)
        for start in range(0, len(moved), STORE_BATCH):
            some = moved[start : start + STORE_BATCH]
            answers = [mark for chat, _ in some for mark in marks.pop(chat.id, ())]
            async with self._database.writing() as session:
                await repository.advance_pushed(session, [(chat.id, done) for chat, done in some])
                # In one: before the cursor, what no mark tells of needed no push.
                await trace_repository.save_pushed(session, answers)
            for chat, done in some:
                chat.stored, chat.stored_at = done, now
                chat.told = chat.told and done < chat.seen
            self._forget_marks(answers)
        if rest := [mark for of_chat in marks.values() for mark in of_chat]:  # of chats whose cursor waits
            async with self._database.writing() as session:
                await trace_repository.save_pushed(session, rest)
            self._forget_marks(rest)
        for chat in list(self._chats.values()):
            if not chat.jobs and chat.stored == chat.seen:
                del self._chats[chat.id]

    def _forget_marks(self, stored: list[PushRow]) -> None:
        for mark in stored:
            key = (mark.session_id, mark.chat_id)
            if self._marks.get(key) is mark:  # else Firebase has said something else meanwhile
                del self._marks[key]

    def _now(self) -> datetime:
        return self._clock.now().astimezone(UTC).replace(tzinfo=None)


def open_firebase(settings: Settings) -> Firebase | None:
    """Firebase by the settings; None when push is off. Raises StartupError.

    In development a file that is not there means off: the settings of the README name one that a newcomer lacks.
    """
    path = settings.firebase_credentials_path
    if path is None or not push_is_configured(settings):
        return None
    return Firebase(path, timeout_seconds=settings.push_timeout_seconds)


def push_is_configured(settings: Settings) -> bool:
    """Whether a server with these settings pushes, if it starts."""
    path = settings.firebase_credentials_path
    return path is not None and (settings.environment != "development" or path.exists())


def _newest_for(target: Target, newest: Sequence[UnpushedMessage]) -> int:
    """The newest message that a member shall hear of, or 0: not their own, not the server's but that they joined."""
    for message in newest:
        if message.seq <= target.read_seq:
            break
        if message.seq < target.visible_from_seq or message.sender_id == target.device.user_id:
            continue
        if not message.is_service or message.seq == target.joined_seq:
            return message.seq
    return 0
