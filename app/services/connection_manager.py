"""Open sockets: who is online, on which connections, and what each may still be sent.

Nothing here awaits a socket: sending is a non-blocking append, and a reader too slow for the bound is closed (4408)
and catches up later. A connection that is catching up on a chat holds that chat's live events back until it is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, NamedTuple

from app.core import metrics
from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.errors import Conflict, DialectError, TooManyRequests, Unavailable
from app.core.tasks import supervise
from app.db.database import Database
from app.db.events import AnyEvent, CatchUpEvent, HeartbeatEvent
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import chats as chats_repository
from app.db.repositories import sessions as sessions_repository
from app.db.repositories.chats import ChatCursor
from app.db.schemas import ResumeIn
from app.services.admission import Admission
from app.services.chat_log.roster import Roster
from app.services.coalescer import Coalescer
from app.services.transport import Frames, Transport

log = logging.getLogger(__name__)

DIGEST_PRIME = 65521
DIGEST_MODULUS = 2147483647
CATCH_UP_FLUSH_BYTES = 64 * 1024
HELD_FRAMES_MAX = 1000
CHECKED_AT_ONCE = 1000
"""Connections whose sessions are asked for together."""
LOADED_AT_ONCE = 64
"""Users whose chats are read together: with hundreds of chats each they still take the loop only for moments."""
TICK_SECONDS = 1.0
TOKEN_WARNING_SECONDS = 60.0


class CloseCode(IntEnum):
    """Why the server closes a socket (4000 to 4999 are the application's own, RFC 6455 section 7.4.2)."""

    RESTART = 1012
    TRY_LATER = 1013
    UNAUTHENTICATED = 4401
    SLOW = 4408
    REPLACED = 4409
    FLOODING = 4429


@dataclass(slots=True)
class _CatchUpRequest:
    """One chat to bring up to date; `since` None starts it afresh."""

    chat_id: int
    since: int | None


@dataclass(slots=True)
class _ResumeRequest:
    """Everything to bring up to date."""

    state: ResumeIn
    ref: str | None
    on_refused: Callable[[DialectError], None]


class Connection:
    """One open socket of a user."""

    __slots__ = (
        "_drained",
        "_flush_check",
        "_held",
        "_held_account",
        "_hold_all",
        "_manager",
        "_paced",
        "_released",
        "_requests",
        "_task",
        "closing",
        "expires_at",
        "next_check",
        "next_heartbeat",
        "ready",
        "session_id",
        "token_warned",
        "transport",
        "user",
        "watching",
    )

    def __init__(
        self,
        manager: ConnectionManager,
        transport: Transport,
        user: OnlineUser,
        session_id: int,
        expires_at: datetime,
    ) -> None:
        self._manager = manager
        self.transport = transport
        self.user = user
        self.session_id = session_id
        self.expires_at = expires_at
        self.closing = False
        self.ready = False
        """Whether it was said hello to. What happened before is in what it will resume."""
        self.watching: frozenset[int] = frozenset()
        self.next_heartbeat = 0.0
        self.next_check = 0.0
        """When the database is asked whether the session still stands. Apart from heartbeats, which wait while a
        connection catches up: who reads slowly enough would keep a session that ended."""
        self.token_warned = False
        self._hold_all = False
        self._released: set[int] = set()
        """While a resume is under way: the chats it is done with."""
        self._held: dict[int, list[tuple[int, Frames]] | None] = {}
        """Chats that are catching up, with the live events waiting behind; None once those grew too many."""
        self._held_account: list[tuple[int, Frames]] = []
        """Events of the account that wait behind what is being caught up."""
        self._requests: list[_CatchUpRequest | _ResumeRequest] = []
        self._task: asyncio.Task[None] | None = None
        self._drained: asyncio.Event | None = None
        self._flush_check = False
        self._paced = 0
        """Bytes of the page of catching up that the peer is reading: they do not count as slowness."""

    @property
    def user_id(self) -> int:
        """Whose socket it is."""
        return self.user.id

    @property
    def catching_up(self) -> bool:
        """Whether anything is held back."""
        return self._hold_all or bool(self._held)

    def send_event(self, event: AnyEvent) -> None:
        """Send one event to this connection only."""
        self.send(Frames.of(event))

    def send(self, frames: Frames) -> None:
        """Append frames; closes the connection when its peer has left too much unread."""
        if self.closing or not self.ready:
            return
        metrics.frames_sent.n += len(frames.payloads)
        self.transport.send(frames)
        if not self._flush_check and self.transport.unsent_bytes > self._manager.max_unsent_bytes + self._paced:
            # The bytes of this very turn are not on the wire yet: judge after the loop had its chance to write.
            self._flush_check = True
            asyncio.get_running_loop().call_later(0.05, self._close_if_slow)

    def send_droppable(self, frames: Frames) -> None:
        """Send what may be lost: nothing when the peer is behind."""
        if self.ready and not self.closing and self.transport.unsent_bytes < self._manager.max_unsent_bytes // 8:
            metrics.frames_sent.n += len(frames.payloads)
            self.transport.send(frames)

    def _close_if_slow(self) -> None:
        self._flush_check = False
        if not self.closing and self.transport.unsent_bytes > self._manager.max_unsent_bytes + self._paced:
            log.info("slow_reader_closed", extra={"user_id": self.user_id, "unsent": self.transport.unsent_bytes})
            self.close(CloseCode.SLOW, "reading too slowly")

    def close(self, code: CloseCode, reason: str) -> None:
        """Say goodbye after what is queued; the transport gives up on a peer that does not take it."""
        if not self.closing:
            self.closing = True
            if code is CloseCode.SLOW:
                metrics.slow_readers.inc()
            self.transport.close(code, reason)

    # --- live events of chats ---

    def deliver(self, chat_id: int, version: int, frames: Frames) -> None:
        """Send a chat's live events, or hold them behind its catching up."""
        if chat_id in self._held or (self._hold_all and chat_id not in self._released):
            waiting = self._held.setdefault(chat_id, [])
            if waiting is not None:
                waiting.append((version, frames))
                if len(waiting) > HELD_FRAMES_MAX:
                    self._held[chat_id] = None
        else:
            self.send(frames)

    def deliver_account(self, version: int, frames: Frames) -> None:
        """Send an event of the account's log, or hold it while something catches up: what was read before it
        must not arrive after it, or a chat that was just left would come back."""
        if self._task is None:
            self.send(frames)
            return
        self._held_account.append((version, frames))
        if len(self._held_account) > HELD_FRAMES_MAX:
            self.close(CloseCode.RESTART, "too much happened while catching up")

    def _release_account(self, known: int) -> None:
        held, self._held_account = self._held_account, []
        for version, frames in held:
            if version > known:
                self.send(frames)

    def _release(self, chat_id: int, version: int) -> None:
        """Let a chat's live events go on after `version`; catch up once more if too many had to be held."""
        if self._requested(chat_id):
            return
        if self._hold_all:
            self._released.add(chat_id)
        waiting = self._held.pop(chat_id, [])
        if waiting is None:
            self.catch_up(chat_id, version)
            return
        for held_version, frames in waiting:
            if held_version > version:
                self.send(frames)

    def _requested(self, chat_id: int) -> bool:
        return any(isinstance(request, _ResumeRequest) or request.chat_id == chat_id for request in self._requests)

    # --- catching up: one request after the other, at the pace of the reader ---

    def catch_up(self, chat_id: int, since: int | None) -> None:
        """Bring this connection up to date with a chat; `since` None starts it afresh."""
        if self.ready:
            self._held.setdefault(chat_id, [])
        self._request(_CatchUpRequest(chat_id, since))

    def resume(self, state: ResumeIn, ref: str | None, on_refused: Callable[[DialectError], None]) -> None:
        """Bring this connection up to date with everything. Live events of a chat wait until it is synced.

        `on_refused` is called when the account has asked for too much; then all is as it was before. Raises Conflict
        while an earlier resume is still under way.
        """
        if self._hold_all:
            raise Conflict("resume_in_progress", "An earlier resume is still being answered.")
        self._hold_all = True
        self._request(_ResumeRequest(state, ref, on_refused))

    def _request(self, request: _CatchUpRequest | _ResumeRequest) -> None:
        if self.closing or not self.ready:
            return
        self._requests.append(request)
        if self._task is None:
            self._task = self._manager.start_task(self._run_requests(), "catch-up")

    async def _run_requests(self) -> None:
        try:
            while self._requests and not self.closing:
                request = self._requests.pop(0)
                if isinstance(request, _ResumeRequest):
                    known = await self._resume(request)
                else:
                    known = await self._stream(self._manager.chat_events(self.user_id, request.chat_id, request.since))
                    # A chat that turned out not to be the user's has no `synced`; nothing of it may follow.
                    if not self._requested(request.chat_id) and not self._hold_all:
                        self._held.pop(request.chat_id, None)
                self._release_account(known)
        except Unavailable as error:
            log.info("catch_up_failed", extra={"user_id": self.user_id, "error": error.code})
            self.close(CloseCode.RESTART, "catching up failed")  # the client comes back and resumes
        except Exception:
            # Left open it would hold back its chats for ever.
            log.exception("catch_up_failed")
            self.close(CloseCode.RESTART, "catching up failed")
        finally:
            self._task = None

    async def _resume(self, request: _ResumeRequest) -> int:
        refused = False
        try:
            known = await self._stream(self._manager.resume_events(self.user, request.state, request.ref))
        except TooManyRequests as error:
            known, refused = 0, True
            request.on_refused(error)
        self._hold_all = False
        self._released.clear()
        # What is still held belongs to chats with a request of their own, or to nobody's; or nothing was answered.
        for chat_id in [chat_id for chat_id in self._held if not self._requested(chat_id)]:
            waiting = self._held.pop(chat_id)
            if refused:
                for _, frames in waiting or ():  # of too many to be held the client finds a hole
                    self.send(frames)
        return known

    async def _stream(self, events: AsyncIterator[CatchUpEvent]) -> int:
        """Send catch-up events no faster than the peer reads them; the account version they bring, or 0."""
        account_version = 0
        payloads: list[Frames] = []
        size = 0
        synced: list[tuple[int, int]] = []

        async def flush() -> None:
            nonlocal size
            if payloads:
                self._paced = size
                self.send(Frames([payload for frames in payloads for payload in frames.payloads]))
                payloads.clear()
                size = 0
            for chat_id, version in synced:
                self._release(chat_id, version)
            synced.clear()
            await self._wait_drained()

        async for event in events:
            if self.closing:
                return 0
            frames = Frames.of(event)
            payloads.append(frames)
            size += frames.size
            if event["type"] == "synced":
                synced.append((event["chat_id"], event["version"]))
            elif event["type"] == "resumed":
                account_version = event["account_version"]
            if size > CATCH_UP_FLUSH_BYTES:
                await flush()
        await flush()
        return account_version

    async def _wait_drained(self) -> None:
        if self._drained is None:
            self._drained = asyncio.Event()
        while not self.closing and (unsent := self.transport.unsent_bytes) > CATCH_UP_FLUSH_BYTES:
            self._drained.clear()
            try:
                await asyncio.wait_for(self._drained.wait(), self._manager.catch_up_patience)
            except TimeoutError:
                if self.transport.unsent_bytes >= unsent:  # however slowly: whoever reads may go on
                    self.close(CloseCode.SLOW, "reading too slowly")
        self._paced = 0

    def on_drained(self) -> None:
        """The transport has room again."""
        if self._drained is not None:
            self._drained.set()

    def on_gone(self) -> None:
        """The socket is closed: stop everything that was under way for it."""
        self.closing = True
        self.on_drained()
        if self._task is not None:
            self._task.cancel()


class OnlineUser:
    """A user with at least one open socket here."""

    __slots__ = ("account_version", "chats", "connections", "id", "loading", "moved")

    def __init__(self, user_id: int) -> None:
        self.id = user_id
        self.connections: list[Connection] = []
        self.chats: set[int] = set()
        self.account_version = 0
        self.loading = 0
        self.moved: set[int] = set()
        """Chats joined or left while the list of chats is being read: of these the list may be outdated."""


class Channel:
    """A chat with members online here: the last version let out, and the connections that get the next."""

    __slots__ = ("_audience", "chat_id", "connections", "healing", "version")

    def __init__(self, chat_id: int, version: int) -> None:
        self.chat_id = chat_id
        self.version = version
        self.connections: set[Connection] = set()
        self.healing = False
        self._audience: tuple[Roster, list[Connection]] | None = None

    def add(self, connection: Connection) -> None:
        self.connections.add(connection)
        self._audience = None

    def discard(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._audience = None

    def audience(self, roster: Roster) -> list[Connection]:
        """Connections of those who are members by this roster: checked at delivery, not at subscription."""
        if self._audience is None or self._audience[0] is not roster:
            members = roster.members
            self._audience = (roster, [c for c in self.connections if c.user_id in members])
        return self._audience[1]


class LoadedChats(NamedTuple):
    """A user's chats, and the account version that was read before them."""

    account_version: int
    cursors: list[ChatCursor]


ChatEvents = Callable[[int, int, int | None], AsyncIterator[CatchUpEvent]]
ResumeEvents = Callable[["OnlineUser", ResumeIn, str | None], AsyncIterator[CatchUpEvent]]
SocketsListener = Callable[[int, int | None], None]


class ConnectionManager:
    """All sockets of this process."""

    def __init__(self, *, settings: Settings, clock: Clock, database: Database, admission: Admission) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._admission = admission
        self._chats: Coalescer[int, LoadedChats] = Coalescer(self._read_chats, most=LOADED_AT_ONCE)
        self.users: dict[int, OnlineUser] = {}
        self.channels: dict[int, Channel] = {}
        self.max_unsent_bytes = settings.socket_max_unsent_bytes
        self.catch_up_patience = settings.socket_heartbeat_seconds + settings.socket_timeout_seconds
        self.chat_events: ChatEvents
        self.resume_events: ResumeEvents
        """Where catching up reads from; wired by the container, which builds that service from this one."""
        self.listeners: list[SocketsListener] = []
        """Called with a user when one of their sockets came or went, and with the session of one that went."""
        self.draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin heartbeats."""
        self._ticker = supervise("heartbeats", self._tick)

    async def stop(self) -> None:
        """Close what is still open and end all work."""
        self.close_all()
        if self._ticker is not None:
            self._ticker.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, *([self._ticker] if self._ticker else []), return_exceptions=True)

    async def drain(self, finished: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Before a stop: take nothing new, let what was taken be answered, then ask everybody to come back.

        Returns when the last socket is gone, or after `seconds`.
        """
        self.draining = True
        for user in self.users.values():
            for connection in user.connections:
                connection.transport.pause_reading()
        try:
            async with asyncio.timeout(seconds):
                await finished()
                self.close_all()
                await self._empty.wait()
        except TimeoutError:
            log.warning("drain_timed_out", extra={"sockets": self.count})

    def close_all(self) -> None:
        """Ask every client to come back later, not all at once."""
        self.draining = True
        count = self.count
        for user in list(self.users.values()):
            for connection in list(user.connections):
                connection.close(CloseCode.RESTART, f"server restarts; {self.retry_hint(count)}")

    def retry_hint(self, count: int) -> str:
        """What the reason of a close says of when to come back, to one of `count` who are told."""
        return f"retry-after={self._admission.return_in(count):.1f}"

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Run something beside; its failure is logged, never lost."""
        _task = self.start_task(coroutine, name)

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Like `spawn`, for who may want to cancel it."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            metrics.task_failures.labels(task.get_name()).inc()
            log.error("task_failed", exc_info=error, extra={"task": task.get_name()})

    # --- connections ---

    def is_online(self, user_id: int) -> bool:
        """Whether the user has an open socket."""
        return user_id in self.users

    def live_sessions(self, user_id: int) -> set[int]:
        """The user's sessions that have an open socket here."""
        user = self.users.get(user_id)
        if user is None:
            return set()
        return {connection.session_id for connection in user.connections if not connection.closing}

    def closing_sessions(self, user_id: int) -> set[int]:
        """The user's sessions that have a socket here whose end was not seen yet."""
        user = self.users.get(user_id)
        if user is None:
            return set()
        return {connection.session_id for connection in user.connections if connection.closing}

    @property
    def count(self) -> int:
        """Open sockets."""
        return sum(len(user.connections) for user in self.users.values())

    def add(self, transport: Transport, user_id: int, session_id: int, expires_at: datetime) -> Connection:
        """Register a new socket. It gets live events once `load_chats` has told its chats."""
        user = self.users.get(user_id)
        if user is None:
            user = self.users[user_id] = OnlineUser(user_id)
            self._empty.clear()
        connection = Connection(self, transport, user, session_id, expires_at)
        connection.next_heartbeat = self._clock.monotonic() + self._settings.socket_heartbeat_seconds
        connection.next_check = connection.next_heartbeat
        user.connections.append(connection)
        while len(user.connections) > self._settings.max_sockets_per_user:
            oldest = user.connections[0]
            oldest.close(CloseCode.REPLACED, "too many sockets of this account")
            self.remove(oldest)
        self._tell_listeners(user_id, None)
        return connection

    def remove(self, connection: Connection) -> None:
        """Forget a socket; does nothing the second time."""
        user = connection.user
        if connection not in user.connections:
            return
        user.connections.remove(connection)
        connection.on_gone()
        for chat_id in user.chats:
            channel = self.channels.get(chat_id)
            if channel is not None:
                channel.discard(connection)
                if not channel.connections:
                    del self.channels[chat_id]
        if not user.connections:
            del self.users[user.id]
            if not self.users:
                self._empty.set()
        self._tell_listeners(user.id, connection.session_id)

    def _tell_listeners(self, user_id: int, gone: int | None) -> None:
        for listener in self.listeners:
            listener(user_id, gone)

    async def load_chats(self, user: OnlineUser) -> LoadedChats:
        """Read a user's chats and subscribe their connections to exactly these.

        Whoever comes while others are read for is read for with the next, together: after a restart everybody comes.
        Raises Unavailable.
        """
        user.loading += 1
        try:
            loaded = await self._chats.get(user.id) or LoadedChats(0, [])
            if not user.connections:
                return loaded  # they left while this was read
            user.account_version = max(user.account_version, loaded.account_version)
            current = {chat.chat_id for chat in loaded.cursors}
            for chat_id in user.chats - current - user.moved:
                self.leave(user.id, chat_id)
            for chat in loaded.cursors:
                if chat.chat_id not in user.moved:
                    self._subscribe(user, chat.chat_id, chat.version)
        finally:
            user.loading -= 1
            if not user.loading:
                user.moved.clear()
        return loaded

    async def _read_chats(self, user_ids: Sequence[int]) -> dict[int, LoadedChats]:
        async with self._database.bulk_reads, self._database.reading() as session:
            # The version first: what changes meanwhile is told twice rather than never.
            versions = await accounts_repository.account_versions(session, user_ids)
            cursors = await chats_repository.list_cursors(session, user_ids)
        return {user_id: LoadedChats(versions.get(user_id, 0), cursors.get(user_id, [])) for user_id in user_ids}

    def _subscribe(self, user: OnlineUser, chat_id: int, version: int) -> None:
        channel = self.channels.get(chat_id)
        if channel is None:
            channel = self.channels[chat_id] = Channel(chat_id, version)
        user.chats.add(chat_id)
        for connection in user.connections:
            channel.add(connection)

    def join(self, user_id: int, chat_id: int, version: int) -> None:
        """A user who is online came into a chat: their connections get it afresh, then live."""
        user = self.users.get(user_id)
        if user is not None:
            if user.loading:
                user.moved.add(chat_id)
            self._subscribe(user, chat_id, version)
            for connection in user.connections:
                connection.catch_up(chat_id, None)

    def leave(self, user_id: int, chat_id: int) -> None:
        """A user is out of a chat."""
        user = self.users.get(user_id)
        if user is None:
            return
        if user.loading:
            user.moved.add(chat_id)
        user.chats.discard(chat_id)
        channel = self.channels.get(chat_id)
        if channel is not None:
            for connection in user.connections:
                channel.discard(connection)
            if not channel.connections:
                del self.channels[chat_id]

    def send_to_user(self, user_id: int, event: Mapping[str, Any]) -> None:
        """Send an event to all of a user's devices."""
        user = self.users.get(user_id)
        if user is None:
            return
        version = event.get("account_version")
        if isinstance(version, int):
            user.account_version = max(user.account_version, version)
        frames = Frames.of(event)
        for connection in user.connections:
            connection.deliver_account(version if isinstance(version, int) else 0, frames)

    def close_session(self, session_id: int) -> None:
        """A session ended: its sockets end with it."""
        for user in list(self.users.values()):
            for connection in list(user.connections):
                if connection.session_id == session_id:
                    connection.close(CloseCode.UNAUTHENTICATED, "session ended")

    def recheck_sessions(self) -> None:
        """Sessions may have ended unheard: ask the database for those of all sockets with the next tick, or once it
        answers."""
        for user in self.users.values():
            for connection in user.connections:
                connection.next_check = 0.0

    # --- heartbeats and tokens ---

    def digest(self, user: OnlineUser) -> int:
        """What a client that missed nothing computes from its own map of chat versions (docs/protocol.md)."""
        total = 0
        for chat_id in user.chats:
            channel = self.channels.get(chat_id)
            if channel is not None:
                total += (chat_id % DIGEST_PRIME + 1) * channel.version
        return total % DIGEST_MODULUS

    async def _tick(self) -> None:
        """Every second: heartbeats and checks of sessions that are due, tokens that run out."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self._beat()

    async def _beat(self) -> None:
        now, wall = self._clock.monotonic(), self._clock.now()
        later = now + self._settings.socket_heartbeat_seconds
        due: list[Connection] = []
        beating: list[Connection] = []
        for user in list(self.users.values()):
            for connection in list(user.connections):
                remaining = (connection.expires_at - wall).total_seconds()
                if remaining <= 0:
                    connection.close(CloseCode.UNAUTHENTICATED, "token expired")
                elif remaining <= TOKEN_WARNING_SECONDS and not connection.token_warned:
                    connection.token_warned = True
                    connection.send_event({"type": "token_expiring", "expires_in": int(remaining)})
                beats = connection.next_heartbeat <= now and not connection.catching_up
                if beats:
                    beating.append(connection)
                if beats or connection.next_check <= now:
                    connection.next_check = later  # before it is asked: a doubt that comes meanwhile must stand
                    due.append(connection)
        await self._ask_database(due, now)
        for connection in beating:
            connection.next_heartbeat = later
            heartbeat: HeartbeatEvent = {
                "type": "heartbeat",
                "account_version": connection.user.account_version,
                "digest": self.digest(connection.user),
                "server_time": timestamp(wall),
            }
            connection.send_event(heartbeat)

    async def _ask_database(self, due: Sequence[Connection], now: float) -> None:
        """Close connections whose sessions were ended by somebody who could not tell this process, and learn how far
        the accounts are. While the database is away memory still knows what was announced here."""
        ended = 0
        # In pages, each a session of its own: after a loss these are all connections.
        for start in range(0, len(due), CHECKED_AT_ONCE):
            some = due[start : start + CHECKED_AT_ONCE]
            try:
                async with self._database.reading() as session:
                    user_ids = sorted({connection.user_id for connection in some})
                    versions = await accounts_repository.account_versions(session, user_ids)
                    dead = await sessions_repository.list_ended(session, [c.session_id for c in some])
            except Unavailable:
                log.info("heartbeat_without_database")
                for connection in due[start:]:
                    connection.next_check = min(connection.next_check, now)
                break
            for connection in some:
                user = connection.user
                user.account_version = max(user.account_version, versions.get(user.id, 0))
                if connection.session_id in dead and not connection.closing:
                    ended += 1
                    connection.close(CloseCode.UNAUTHENTICATED, "session ended")
        if ended:
            log.info("ended_sessions_found", extra={"sockets": ended})
