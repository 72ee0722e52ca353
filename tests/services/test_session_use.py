"""When sessions were last used: stored for many at once, and before a stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event, select

from app.core.config import Settings
from app.db.database import Database
from app.db.models import Session
from app.main import create_app
from app.services import auth_service
from app.services.container import Services
from tests.support.accounts import Account, register
from tests.support.clock import ManualClock


@asynccontextmanager
async def running(settings: Settings, clock: ManualClock) -> AsyncIterator[tuple[Services, httpx.AsyncClient]]:
    """The application until the end of the block, and a client of it."""
    app: FastAPI = create_app(settings, clock)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client,
    ):
        yield app.state.services, client


async def stored_uses(database: Database) -> list[datetime]:
    """When the sessions were last used, as the database has it."""
    async with database.reading() as session:
        return list((await session.execute(select(Session.last_seen_at))).scalars())


async def use(services: Services, accounts: list[Account]) -> None:
    """All come in at once."""
    await asyncio.gather(*(services.auth.authenticate(account.access_token) for account in accounts))


async def test_a_storm_of_reconnects_is_one_update(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth_service, "SEEN_DELAY_SECONDS", 0.2)
    clock = ManualClock()
    async with running(settings, clock) as (services, client):
        accounts = [await register(client) for _ in range(12)]
        clock.advance(120)
        updates: list[str] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if statement.startswith("UPDATE sessions"):
                updates.append(statement)

        engine = services.database.write_engine.sync_engine
        event.listen(engine, "before_cursor_execute", note)
        await use(services, accounts)
        assert updates == []  # nobody has waited
        background = services.auth._later
        assert background is not None
        await asyncio.wait_for(background, 10)
        assert set(await stored_uses(services.database)) == {clock.now().replace(tzinfo=None)}
        event.remove(engine, "before_cursor_execute", note)
        assert len(updates) == 1


async def test_a_use_just_before_a_graceful_stop_is_stored(settings: Settings) -> None:
    clock = ManualClock()
    async with running(settings, clock) as (services, client):
        accounts = [await register(client) for _ in range(3)]
        clock.advance(120)
        await use(services, accounts)
    database = Database(settings)
    await database.start()
    stored = await stored_uses(database)
    await database.close()
    assert stored == [clock.now().replace(tzinfo=None)] * 3


@pytest.mark.logs_errors
async def test_a_use_that_cannot_be_stored_is_logged_and_forgotten(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    async with running(settings, clock) as (services, client):
        account = await register(client)
        clock.advance(120)

        def fail() -> None:
            raise RuntimeError("nothing can be stored")

        with monkeypatch.context() as patch:
            patch.setattr(services.auth, "unit_of_work", fail)
            await use(services, [account])
            await services.auth.close()
        assert "sessions_seen_not_stored" in caplog.text
        before = await stored_uses(services.database)
        clock.advance(120)
        await use(services, [account])
        await services.auth.close()
        assert await stored_uses(services.database) > before
