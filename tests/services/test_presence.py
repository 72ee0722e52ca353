"""Presence where moments meet: a block during a subscription, a stop right after somebody went."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.core.config import Settings
from app.core.errors import Unavailable
from app.db.database import Database
from app.db.repositories import pairs as pairs_repository
from app.db.repositories import users as users_repository
from app.main import create_app
from app.services import presence_service
from app.services.admission import Admission
from app.services.connection_manager import CloseCode, Connection, ConnectionManager
from app.services.container import Services
from app.services.online import Online
from tests.support.clock import ManualClock
from tests.support.no_network import Wire
from tests.support.people import Person, people


def connect(services: Services, person: Person) -> Connection:
    """A socket of somebody, without a network."""
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    return services.connections.add(Wire(), person.id, 1, expires_at)


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

    connection = connect(services, ann)
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
    connection, his = connect(services, ann), connect(services, bo)
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


async def test_who_went_just_before_a_graceful_stop_was_seen_then(settings: Settings) -> None:
    app: FastAPI = create_app(settings)
    async with app.router.lifespan_context(app):
        services: Services = app.state.services
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            [ann] = await people(client, 1)
        before = datetime.now(UTC).replace(tzinfo=None)
        services.connections.remove(connect(services, ann))
    database = Database(settings)
    await database.start()
    async with database.reading() as session:
        row = await users_repository.find_user(session, ann.id)
    await database.close()
    assert row is not None
    assert row.last_seen_at is not None
    assert row.last_seen_at >= before
