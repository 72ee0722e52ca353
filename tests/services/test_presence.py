"""Presence where moments meet: a block during a subscription, a stop right after somebody went."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.core.config import Settings
from app.db.database import Database
from app.db.repositories import users as users_repository
from app.main import create_app
from app.services.connection_manager import Connection
from app.services.container import Services
from app.services.transport import Frames
from tests.support.people import Person, people


class Wire:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Frames] = []

    @property
    def unsent_bytes(self) -> int:
        return 0

    def send(self, frames: Frames) -> None:
        self.sent.append(frames)

    def close(self, code: int, reason: str = "") -> None:
        """Stay open: what the server does then is not looked at here."""

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""


def connect(services: Services, person: Person) -> Connection:
    """A socket of somebody, without a network."""
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    return services.connections.add(Wire(), person.id, 1, expires_at)


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
