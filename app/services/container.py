"""Wires the parts together: built once per process by `create_app`, started and stopped by its lifespan."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from redis.asyncio import Redis

from app.core.bloom_filter import UsernameFilter
from app.core.clock import Clock, SystemClock
from app.core.config import Settings
from app.core.errors import Unavailable
from app.core.ids import IdAllocator, Kind
from app.core.security import PasswordHasher
from app.core.tasks import supervise
from app.db.database import Database, database_name
from app.db.repositories import accounts as account_repository
from app.db.repositories import ids as id_repository
from app.db.repositories import users as user_repository
from app.services.admission import Admission
from app.services.auth_service import AuthService
from app.services.avatar_service import AvatarService
from app.services.block_service import BlockService
from app.services.bus import Bus, patient_redis_client, redis_client
from app.services.chat_log.append import Appender
from app.services.chat_log.catch_up import CatchUpService
from app.services.chat_log.changes import Appended, Remote
from app.services.chat_log.roster import RosterCache
from app.services.chat_log.sequencer import Sequencer
from app.services.chat_log.writer import Writer
from app.services.chat_service import ChatService
from app.services.chat_settings_service import ChatSettingsService
from app.services.cluster import AnnounceItem, Cluster
from app.services.connection_manager import ConnectionManager
from app.services.draft_service import DraftService
from app.services.fanout_marks import FanoutMarks
from app.services.file_service import FileService
from app.services.health_service import HealthService, State
from app.services.image_service import ImageService
from app.services.message_service import MessageService
from app.services.notification_service import NotificationService
from app.services.online import Online
from app.services.presence_service import PresenceService
from app.services.rate_limiter import RateLimiter
from app.services.storage import Storage, check_storage, open_storage
from app.services.telemetry import Telemetry
from app.services.ticket_store import MemoryTickets, RedisTickets
from app.services.token_bucket import AccountLimit
from app.services.trace_service import TraceService
from app.services.transport import dead_socket_seconds
from app.services.typing_service import TypingService
from app.services.unit_of_work import UnitOfWorkFactory
from app.services.user_service import UserService
from app.services.user_settings_service import UserSettingsService

log = logging.getLogger(__name__)

LAST_WORK_SECONDS = 0.5
"""A stop has at least so long for what is to be stored last, even if the drain took all of its time."""
WARMING_PAGE = 1_000
WARMING_PAUSE_SECONDS = 60.0
"""All usernames are read again no sooner, however often the bus loses something."""


@dataclass
class Services:
    """Everything the edge may call."""

    settings: Settings
    clock: Clock
    database: Database
    admission: Admission
    ids: IdAllocator
    rosters: RosterCache
    appender: Appender
    unit_of_work: UnitOfWorkFactory
    hasher: PasswordHasher
    usernames: UsernameFilter
    rate_limiter: RateLimiter
    online: Online
    cluster: Cluster
    redis: Redis | None
    """Where limits and tickets stand; the bus has a client of its own."""
    auth: AuthService
    users: UserService
    user_settings: UserSettingsService
    blocks: BlockService
    connections: ConnectionManager
    fanout: FanoutMarks
    sequencer: Sequencer
    writer: Writer
    catch_up: CatchUpService
    chats: ChatService
    chat_settings: ChatSettingsService
    drafts: DraftService
    messages: MessageService
    storage: Storage
    files: FileService
    avatars: AvatarService
    typing: TypingService
    presence: PresenceService
    notifications: NotificationService
    trace: TraceService
    telemetry: Telemetry
    health: HealthService
    _cooled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the filter of usernames may lack some."""
    _warming: asyncio.Task[None] | None = None
    _stop_by: float | None = None
    """By the loop's time; None where nothing was drained."""

    async def start(self) -> None:
        """Take the database into use and begin work. Raises StartupError with a sentence for the operator."""
        await self.database.start()
        if self.cluster.bus is not None:
            await self.cluster.bus.check()
        async with self.database.reading() as session:
            self.catch_up.epoch = await account_repository.epoch(session)
        self.admission.start()
        self.connections.start()
        self.presence.start()
        if self.cluster.bus is None:  # else once the bus is heard: a name taken before would be missed
            self.cool_usernames()
        self._warming = supervise("warm-usernames", self._keep_usernames_warm)
        self.files.start()
        await self.fanout.start()
        self.sequencer.start()
        self.writer.start()
        self.notifications.start()
        self.telemetry.start()
        self.cluster.start(self.catch_up.epoch)
        log.info("started", extra={"pid": os.getpid(), "database": database_name(self.settings)})

    async def drain(self) -> None:
        """Before a stop: answer what was taken, close every socket with 1012.

        Takes at most 3/4 of `shutdown_seconds`; the rest is the web server's, for requests still under way.
        """
        self._stop_by = asyncio.get_running_loop().time() + self.settings.shutdown_seconds
        await self.connections.drain(self.writer.drained, self.settings.shutdown_seconds * 3 / 4)

    async def stop(self) -> None:
        """Finish what was begun and give everything back; also after a start that failed half-way.

        What is to be stored or told last has until `shutdown_seconds` after the drain began, and never less than
        LAST_WORK_SECONDS: a database or a Redis that is silent holds up the end for no longer.
        """
        now = asyncio.get_running_loop().time()
        stop_by = now + self.settings.shutdown_seconds if self._stop_by is None else self._stop_by
        give_up_at = max(stop_by, now + LAST_WORK_SECONDS)
        await self.telemetry.stop()
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        await self.writer.stop()  # first: what it commits is pushed, marked and told by the others
        try:
            async with asyncio.timeout_at(give_up_at):
                # Together: each of them would wait for the same silence as long as if it were alone.
                ends = await asyncio.gather(
                    self.files.stop(),
                    self.notifications.stop(),
                    self.presence.stop(),
                    self.fanout.stop(),
                    self.auth.close(),
                    self.cluster.stop(),
                    return_exceptions=True,
                )
            for error in ends:
                if error is not None:
                    log.error("stop_failed", exc_info=error)
        except TimeoutError:
            log.warning("stop_cut_short")
        await self.connections.stop()
        await self.admission.stop()
        await self.sequencer.stop()
        if self.redis is not None:
            await self.redis.aclose()
        self.hasher.close()
        await self.database.close()

    def make_up_for_lost_hints(self) -> None:
        """What was learned from other workers may be outdated: ask the database again."""
        self.auth.forget_sessions()
        self.connections.recheck_sessions()
        self.rosters.clear()
        self.presence.recheck()
        self.cool_usernames()

    def cool_usernames(self) -> None:
        """The filter of usernames lacks some, or may: fill it again, and ask the database meanwhile."""
        self.usernames.cool()
        self._cooled.set()

    async def _keep_usernames_warm(self) -> None:
        while True:
            await self._cooled.wait()
            cooled = self.usernames.cooled
            await self._warm_usernames()
            if cooled == self.usernames.cooled:  # else names were missed meanwhile
                self.usernames.finish_warming()
                self._cooled.clear()
            await asyncio.sleep(WARMING_PAUSE_SECONDS)

    async def _warm_usernames(self) -> None:
        # In pages, each a session of its own: millions of names at once would outlast the session's deadline.
        after = 0
        while True:
            try:
                async with self.database.reading() as session:
                    page = await user_repository.list_usernames(session, after_id=after, limit=WARMING_PAGE)
            except Unavailable:
                await asyncio.sleep(1)
                continue
            if not page:
                break
            self.usernames.update(username for _, username in page)
            after = page[-1][0]


def build_services(settings: Settings, clock: Clock | None = None) -> Services:
    """All parts, wired and not started. Raises StartupError when the settings name what cannot be used."""
    clock = clock or SystemClock()
    database = Database(settings)
    admission = Admission(settings, clock, readers=database.readers)
    ids = IdAllocator(_lease(database))
    rosters = RosterCache()
    connections = ConnectionManager(settings=settings, clock=clock, database=database, admission=admission)
    online = Online(connections, clock, lately_seconds=dead_socket_seconds(settings))
    redis, bus = None, None
    if settings.redis_url is not None:
        url = settings.redis_url.get_secret_value()
        # Each a client of its own: the bus must not wait behind a burst of logins.
        redis, bus = patient_redis_client(url, settings.redis_pool_size), Bus(redis_client(url), clock)
    cluster = Cluster(clock=clock, connections=connections, online=online, bus=bus)
    fanout = FanoutMarks(clock=clock, database=database, worker=cluster.worker_id)
    appender = Appender(
        rosters, clock, receipts_members_max=settings.receipts_members_max, worker=lambda: fanout.number
    )
    sequencer = Sequencer(
        settings=settings, clock=clock, database=database, rosters=rosters, connections=connections, fanout=fanout
    )

    def announce(appended: Appended) -> None:
        try:
            sequencer.announce(appended)
        finally:
            cluster.announce(appended)
            notifications.hint(appended)

    unit_of_work = UnitOfWorkFactory(database, appender, ids, announce)
    writer = Writer(settings=settings, clock=clock, database=database, appender=appender, ids=ids, announce=announce)
    notifications = NotificationService(
        settings=settings, clock=clock, database=database, unit_of_work=unit_of_work, online=online
    )
    catch_up = CatchUpService(settings=settings, clock=clock, database=database, connections=connections)
    connections.chat_events = catch_up.chat
    connections.resume_events = catch_up.resume
    presence = PresenceService(
        settings=settings, clock=clock, database=database, connections=connections, online=online
    )
    typing = TypingService(
        settings=settings,
        clock=clock,
        database=database,
        rosters=rosters,
        connections=connections,
        cluster=cluster,
    )
    hasher = PasswordHasher(settings)
    usernames = UsernameFilter(settings.username_filter_capacity)
    rate_limiter = RateLimiter(settings, clock, redis)
    message_limit = AccountLimit(
        "limit_messages_per_second",
        settings.limit_messages_per_second,
        settings.limit_messages_burst,
        clock,
        refusal="Too many messages; slow down.",
    )
    storage, images = open_storage(settings), ImageService(settings)
    files = FileService(
        settings=settings,
        clock=clock,
        database=database,
        ids=ids,
        limiter=rate_limiter,
        storage=storage,
        images=images,
    )
    health = HealthService(patience_seconds=settings.db_timeout_seconds + 0.5)
    _add_checks(health, database, storage, notifications, cluster)
    services = Services(
        settings=settings,
        clock=clock,
        database=database,
        admission=admission,
        ids=ids,
        rosters=rosters,
        appender=appender,
        unit_of_work=unit_of_work,
        hasher=hasher,
        usernames=usernames,
        rate_limiter=rate_limiter,
        online=online,
        cluster=cluster,
        redis=redis,
        auth=AuthService(
            settings=settings,
            clock=clock,
            database=database,
            unit_of_work=unit_of_work,
            ids=ids,
            hasher=hasher,
            usernames=usernames,
            limiter=rate_limiter,
            tickets=RedisTickets(redis) if redis is not None else MemoryTickets(clock),
        ),
        users=UserService(
            settings=settings,
            clock=clock,
            database=database,
            usernames=usernames,
            limiter=rate_limiter,
            is_online=online.is_online,
        ),
        user_settings=UserSettingsService(database=database),
        blocks=BlockService(settings=settings, clock=clock, database=database),
        connections=connections,
        fanout=fanout,
        sequencer=sequencer,
        writer=writer,
        catch_up=catch_up,
        chats=ChatService(settings=settings, clock=clock, database=database, limiter=rate_limiter, limit=message_limit),
        chat_settings=ChatSettingsService(settings=settings, clock=clock),
        drafts=DraftService(settings=settings, clock=clock),
        messages=MessageService(
            settings=settings,
            clock=clock,
            database=database,
            writer=writer,
            unit_of_work=unit_of_work,
            typing=typing,
            limit=message_limit,
            online=online,
        ),
        storage=storage,
        files=files,
        avatars=AvatarService(settings=settings, clock=clock, files=files, storage=storage, images=images),
        typing=typing,
        presence=presence,
        notifications=notifications,
        trace=TraceService(
            settings=settings,
            clock=clock,
            database=database,
            fanout=fanout,
            is_online=online.is_online,
            push_is_on=notifications.enabled,
        ),
        telemetry=Telemetry(
            database=database,
            connections=connections,
            writer=writer,
            hasher=hasher,
            notifications=notifications,
            cluster=cluster,
            admission=admission,
        ),
        health=health,
    )
    services.auth.on_session_ended += [connections.close_session, cluster.end_session]
    services.blocks.on_blocked += [presence.separate, cluster.separate]
    usernames.on_taken.append(cluster.take_username)
    usernames.hears_others = lambda: cluster.reliable
    _listen(services)
    return services


async def check_start(settings: Settings) -> AsyncIterator[str]:
    """Try what every start needs, and start nothing: what to tell of each. Raises StartupError at the first failure."""
    services = build_services(settings)
    try:
        push = services.notifications.enabled
        yield f"push: {'ok (the service account is read; Firebase was not asked)' if push else 'off'}"
        yield f"storage: {await check_storage(settings, services.storage)}"
        await services.database.start()
        yield f"database: ok ({database_name(settings)}, reachable and up to date)"
    finally:
        await services.stop()


def _listen(services: Services) -> None:
    """Do here what other workers tell."""
    cluster, connections = services.cluster, services.connections

    def announce(item: AnnounceItem) -> None:
        services.appender.known.drop([item["chat_id"]])
        services.sequencer.receive(
            Remote(
                chat_id=item["chat_id"],
                prev=item["prev"],
                version=item["version"],
                members_version=item["members_version"],
                events=item["events"],
                seqs=item["seqs"],
                joined=frozenset(item["joined"]),
                left=frozenset(item["left"]),
            )
        )

    def type_(chat_id: int, user_id: int, active: bool) -> None:
        connections.spawn(services.typing.receive(chat_id, user_id, active=active), "typing")

    def end_session(session_id: int) -> None:
        services.auth.forget_session(session_id)
        connections.close_session(session_id)

    cluster.on_announce = announce
    cluster.on_roster = services.rosters.drop
    cluster.on_account = connections.send_to_user
    cluster.on_typing = type_
    cluster.on_session_ended = end_session
    cluster.on_separated = services.presence.separate
    cluster.on_username = services.usernames.add
    cluster.on_push = services.notifications.look_at
    cluster.on_lost = services.make_up_for_lost_hints
    cluster.pushes = lambda: services.notifications.leads


def _add_checks(
    health: HealthService,
    database: Database,
    storage: Storage,
    notifications: NotificationService,
    cluster: Cluster,
) -> None:
    async def reads() -> State:
        return "ok" if await database.ping() else "down"

    async def writes() -> State:
        if database.writes_work:
            return "ok"
        # Asked only after a failure, and by a write that leaves a trace: a disk that is full takes all others.
        try:
            async with database.writing() as session:
                await id_repository.lease_ids(session, "message", 1)
        except Unavailable as error:
            return "ok" if error.code == "busy" else "down"
        database.writes_work = True
        return "ok"

    async def files() -> State:
        return "ok" if await storage.works() else "down"

    async def bus() -> State:
        if cluster.bus is None:
            return "off"
        return "ok" if cluster.reliable else "down"

    async def push() -> State:
        if not notifications.enabled:
            return "off"
        return "ok" if notifications.firebase_answers else "down"

    health.add("database", reads, needed=True)
    health.add("database_writes", writes, needed=True)
    health.add("storage", files, needed=False)
    health.add("push", push, needed=False)
    health.add("redis", bus, needed=False)  # only hints go that way


def _lease(database: Database) -> Callable[[Kind, int], Awaitable[int]]:
    async def lease(kind: Kind, count: int) -> int:
        async with database.writing() as session:
            return await id_repository.lease_ids(session, kind, count)

    return lease
