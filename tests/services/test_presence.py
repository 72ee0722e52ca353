"""Presence where moments meet: a block during a subscription, a stop right after somebody went."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.core.clock import SystemClock, timestamp
from app.core.config import Settings
from app.core.errors import Unavailable
from app.db.database import Database
from app.db.repositories import pairs as pairs_repository
from app.db.repositories import users as users_repository
from app.main import create_app
from app.services import presence_service
from app.services.admission import Admission
from app.services.bus import Bus, redis_client
from app.services.cluster import Cluster
from app.services.connection_manager import CloseCode, Connection, ConnectionManager
from app.services.container import Services
from app.services.online import Online
from tests.conftest import StartServer
from tests.support.clock import ManualClock
from tests.support.locks import held
from tests.support.no_network import Wire
from tests.support.people import Person, people
from tests.support.statements import statements


def connect(services: Services, user_id: int) -> Connection:
    """A socket of somebody, without a network."""
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    return services.connections.add(Wire(), user_id, 1, expires_at)


async def last_seen(database: Database, *people: Person) -> list[datetime | None]:
    """When people were last seen, as the database has it."""
    async with database.reading() as session:
        rows = {row.id: row for row in await users_repository.list_users(session, [person.id for person in people])}
    return [rows[person.id].last_seen_at for person in people]


@pytest.fixture
def clock(services: Services, monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The clock of presence, which then stores only when the test says so."""
    clock = ManualClock()
    monkeypatch.setattr(services.presence, "_clock", clock)
    assert services.presence._storer is not None
    services.presence._storer.cancel()
    return clock


def stamp(clock: ManualClock) -> datetime:
    """Now, as it is stored."""
    return clock.now().replace(tzinfo=None, microsecond=0)


async def test_sessions_that_lost_their_socket_here_or_elsewhere_are_remembered_for_a_while(
    settings: Settings, database: Database
) -> None:
    clock = ManualClock()
    connections = ConnectionManager(
        settings=settings, clock=clock, database=database, admission=Admission(settings, clock, readers=10)
    )
    online = Online(connections, clock, lately_seconds=45)
    ann, bo = 1, 2
    expires_at = clock.now() + timedelta(hours=1)
    here, _stays = connections.add(Wire(), ann, 10, expires_at), connections.add(Wire(), ann, 11, expires_at)
    online.update("other", [(ann, frozenset({12})), (bo, frozenset({20}))])
    assert online.recent_sessions(ann) == {10, 11, 12}
    here.close(CloseCode.RESTART, "the client has not answered yet")
    assert online.live_sessions(ann) == {11, 12}
    assert online.recent_sessions(ann) == {10, 11, 12}
    connections.remove(here)
    clock.advance(30)
    online.forget("other")
    assert online.recent_sessions(ann) == {10, 11, 12}
    clock.advance(15)
    assert online.recent_sessions(ann) == {11, 12}
    clock.advance(30)
    assert online.recent_sessions(ann) == {11}
    assert online.recent_sessions(bo) == set()


async def test_who_was_there_without_a_socket_is_told_to_the_worker_that_pushes(
    settings: Settings, database: Database
) -> None:
    clock = ManualClock()

    def worker() -> tuple[Cluster, Online, Bus]:
        """One that has not started: what it has to say stays in the outbox."""
        connections = ConnectionManager(
            settings=settings, clock=clock, database=database, admission=Admission(settings, clock, readers=10)
        )
        online, bus = Online(connections, clock, lately_seconds=45), Bus(redis_client("redis://127.0.0.1:1/0"), clock)
        return Cluster(clock=clock, connections=connections, online=online, bus=bus), online, bus

    (here, online, bus), (pusher, online_there, _) = worker(), worker()
    online.visit(1, 10)  # nobody pushes yet, and nobody has to know
    assert (online.recent_sessions(1), bus._outboxes) == ({10}, {})
    here._pusher = pusher.worker_id
    online.visit(1, 10)
    [item] = bus._outboxes[pusher.worker_id]
    pusher._on_item(here.worker_id, item)
    assert online_there.recent_sessions(1) == {10}


async def test_who_is_stored_does_not_stay_locked_while_another_is_waited_for(
    client: httpx.AsyncClient, services: Services, clock: ManualClock
) -> None:
    if not services.settings.uses_mysql:
        pytest.skip("SQLite has one lock for all")
    ann, bo, cy = await people(client, 3)
    at = stamp(clock)
    for person in (ann, cy):
        services.connections.remove(connect(services, person.id))
    clock.advance(1)
    services.connections.remove(connect(services, bo.id))
    # Whoever locks users does so in the order of their ids, and would wait for cy with bo in hand.
    with held(services.settings, f"users WHERE id = {bo.id}"):
        storing = asyncio.create_task(services.presence.store())
        async with asyncio.timeout(20):
            while await last_seen(services.database, ann, cy) != [at, at]:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.02)
    await storing


async def test_a_block_during_a_subscription_keeps_the_two_from_seeing_each_other(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo, cy = await people(client, 3)
    await ann.personal(bo)
    await ann.personal(cy)
    read = users_repository.list_users
    reads = 0

    async def read_while_a_block_commits(*arguments: Any) -> list[users_repository.UserRow]:
        nonlocal reads
        reads += 1
        rows = await read(*arguments)
        if reads == 1:
            await bo.block(ann)
        return rows

    connection = connect(services, ann.id)
    monkeypatch.setattr(users_repository, "list_users", read_while_a_block_commits)
    await services.presence.subscribe(connection, [bo.id, cy.id])
    assert reads == 2
    assert connection.watching == {cy.id}


async def test_after_a_loss_the_database_says_who_may_still_watch_whom_as_soon_as_it_answers(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_service, "RECHECKED_AT_ONCE", 1)
    monkeypatch.setattr(presence_service, "RECHECK_PAUSE_SECONDS", 0.0)
    ann, bo, cy, dan = await people(client, 4)
    for friend in (bo, cy, dan):
        await ann.personal(friend)
    connection, his = connect(services, ann.id), connect(services, bo.id)
    await services.presence.subscribe(connection, [bo.id, cy.id, dan.id])
    await services.presence.subscribe(his, [ann.id])
    services.blocks.on_blocked.clear()  # nobody tells this worker
    await bo.block(ann)
    read, reads = pairs_repository.list_pairs, 0

    async def read_at_the_second_try(*arguments: Any) -> list[pairs_repository.PairRow]:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise Unavailable("database_unavailable", "The database does not answer.")
        if reads == 4:  # one more is lost when it was asked for already: once more from the beginning
            await cy.block(ann)
            services.make_up_for_lost_hints()
        return await read(*arguments)

    monkeypatch.setattr(pairs_repository, "list_pairs", read_at_the_second_try)
    services.make_up_for_lost_hints()
    async with asyncio.timeout(10):
        assert services.presence._rechecking is not None
        await services.presence._rechecking
    assert reads == 1 + 3 + 2
    assert connection.watching == {dan.id}
    assert his.watching == frozenset()
    assert services.presence._watchers == {dan.id: {connection}}


async def test_when_somebody_was_last_seen_is_stored_as_they_come_while_they_stay_and_as_they_go(
    client: httpx.AsyncClient, services: Services, clock: ManualClock
) -> None:
    every = services.settings.last_seen_seconds
    ann, bo = await people(client, 2)
    assert await last_seen(services.database, ann, bo) == [None, None]
    came = stamp(clock)
    phone, desktop = connect(services, ann.id), connect(services, ann.id)
    await services.presence.store()
    assert await last_seen(services.database, ann, bo) == [came, None]
    clock.advance(every - 1)
    services.connections.remove(phone)  # she stays, by the other one
    await services.presence.store()
    assert await last_seen(services.database, ann) == [came]
    clock.advance(1)
    await services.presence.store()
    assert await last_seen(services.database, ann) == [stamp(clock)]
    clock.advance(2)
    services.connections.remove(desktop)
    went = stamp(clock)
    clock.advance(every * 2)
    await services.presence.store()
    assert await last_seen(services.database, ann) == [went]


async def test_many_idle_sockets_cost_a_few_statements_each_time(services: Services, clock: ManualClock) -> None:
    crowd = 1200
    batches = 3
    for user_id in range(1, crowd + 1):
        connect(services, user_id)
    for seconds, wanted in ((0, batches), (1, 0), (services.settings.last_seen_seconds, batches)):
        clock.advance(seconds)
        with statements(services.database) as seen:
            await services.presence.store()
        assert len([sql for sql in seen if sql.startswith("UPDATE users")]) == wanted


async def test_what_a_silent_database_did_not_take_is_stored_later_as_of_when_people_went_and_undoes_nothing_newer(
    client: httpx.AsyncClient, services: Services, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo, cy = await people(client, 3)
    for person in (ann, bo, cy):
        services.connections.remove(connect(services, person.id))
    went = stamp(clock)

    async def fail(*_arguments: Any, **_named: Any) -> None:
        raise Unavailable("database_unavailable", "The database does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(users_repository, "touch_last_seen", fail)
        await services.presence.store()
    clock.advance(60)
    elsewhere = stamp(clock)
    async with services.database.writing() as session:  # on another worker
        await users_repository.touch_last_seen(session, [bo.id], elsewhere, now=elsewhere)
        wrong = elsewhere + timedelta(days=1)  # by a clock that was ahead
        await users_repository.touch_last_seen(session, [cy.id], wrong, now=wrong)
    assert await last_seen(services.database, ann, bo, cy) == [None, elsewhere, wrong]
    clock.advance(60)
    await services.presence.store()
    assert await last_seen(services.database, ann, bo, cy) == [went, elsewhere, went]


@pytest.mark.logs_errors
async def test_people_whom_the_database_refuses_hold_up_nobody_else(
    client: httpx.AsyncClient, services: Services, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_service, "LAST_SEEN_BATCH", 1)
    ann, bo = await people(client, 2)
    touch = users_repository.touch_last_seen

    async def refuse_ann(session: Any, user_ids: list[int], at: datetime, *, now: datetime) -> None:
        if ann.id in user_ids:
            raise ValueError("nothing can be stored")
        await touch(session, user_ids, at, now=now)

    monkeypatch.setattr(users_repository, "touch_last_seen", refuse_ann)
    for person in (ann, bo):
        connect(services, person.id)
    await services.presence.store()
    assert await last_seen(services.database, ann, bo) == [None, stamp(clock)]
    assert services.presence._seen == {}


async def test_after_a_crash_nobody_was_last_seen_before_they_came(
    settings: Settings, start_server: StartServer
) -> None:
    server, before = start_server(settings), SystemClock().now().replace(tzinfo=None, microsecond=0)
    database = Database(settings)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        await ann.personal(bo)
        async with await ann.open(server):
            await database.start_reading()
            async with asyncio.timeout(10):
                while await last_seen(database, ann) == [None]:
                    pass
            server.kill()
        await database.close()
    server = start_server(settings)
    async with server.client() as client:
        profile = await Person(client, bo.account).do("GET", f"/users/{ann.id}")
    assert not profile["online"]
    assert profile["last_seen_at"] >= timestamp(before)


async def test_who_is_connected_at_a_graceful_stop_or_went_just_before_was_seen_then(settings: Settings) -> None:
    clock = ManualClock()
    app: FastAPI = create_app(settings, clock)
    async with app.router.lifespan_context(app):
        services: Services = app.state.services
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            ann, bo = await people(client, 2)
        connections = [connect(services, person.id) for person in (ann, bo)]
        await services.presence.store()
        clock.advance(60)
        services.connections.remove(connections[0])
    database = Database(settings)
    await database.start()
    assert await last_seen(database, ann, bo) == [stamp(clock)] * 2
    await database.close()
