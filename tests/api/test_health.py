"""Health: which dependency is down, and whether requests can be served without it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app.core.config import Settings
from app.services import health_service
from app.services.container import Services
from app.services.health_service import Ask, HealthService, State
from app.services.storage import INCOMING
from tests.api.test_edge import assert_problem
from tests.conftest import StartServer
from tests.support.people import people
from tests.support.servers import Door

ALL_WELL = {"database": "ok", "database_writes": "ok", "storage": "ok", "push": "off", "redis": "off"}


@pytest.fixture(autouse=True)
def _ask_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_service, "FRESH_SECONDS", 0.0)


@pytest.fixture
def make_read_only(services: Services, settings: Settings) -> Callable[[bool], None]:
    """Lets the database refuse writes, as one does that a failover has made a replica; and take them again."""
    state = {"on": False}

    def checkout(connection: DBAPIConnection, *_: object) -> None:
        name = "SET SESSION transaction_read_only" if settings.uses_mysql else "PRAGMA query_only"
        cursor = connection.cursor()
        cursor.execute(f"{name}={int(state['on'])}")
        cursor.close()

    event.listen(services.database.write_engine.sync_engine, "checkout", checkout)

    def switch(on: bool) -> None:
        state["on"] = on

    return switch


async def test_a_healthy_server_is_alive_and_ready(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health/live")).json() == {"status": "ok"}
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "checks": ALL_WELL})


@pytest.mark.parametrize("door", ["tuned", "plain"])
async def test_who_asks_for_the_head_of_an_answer_alone_gets_it(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        for path in ("/health/live", "/health/ready"):
            for _ in range(2):  # what came of the first leaves nothing behind in the connection
                head, whole = await client.head(path), await client.get(path)
                assert (head.status_code, head.content) == (200, b"")
                assert head.headers["content-length"] == str(len(whole.content))
                assert head.headers["content-type"] == whole.headers["content-type"]


async def test_the_head_of_an_answer_says_that_a_database_is_away(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_answer() -> bool:
        return False

    monkeypatch.setattr(services.database, "ping", no_answer)
    response = await client.head("/health/ready")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")


async def test_without_its_database_it_lives_and_is_not_ready(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_answer() -> bool:
        return False

    monkeypatch.setattr(services.database, "ping", no_answer)
    response = await client.get("/health/ready")
    problem = assert_problem(response, 503, "not_ready")
    assert problem["checks"] == {**ALL_WELL, "database": "down"}
    assert response.headers["retry-after"] == "2"
    assert (await client.get("/health/live")).status_code == 200


async def test_a_database_that_refuses_writes_shows_after_the_first_and_until_it_takes_them_again(
    client: httpx.AsyncClient, make_read_only: Callable[[bool], None]
) -> None:
    ann, bo = await people(client, 2)
    make_read_only(True)
    assert (await client.get("/health/ready")).status_code == 200  # nobody has tried yet
    assert await ann.refused("POST", "/chats/personal", {"user_id": bo.id}) == (503, "database_unavailable")
    for _ in range(2):
        problem = assert_problem(await client.get("/health/ready"), 503, "not_ready")
        assert problem["checks"] == {**ALL_WELL, "database_writes": "down"}
    make_read_only(False)
    # Nobody writes while the load balancer stays away: the question itself must find out.
    assert (await client.get("/health/ready")).json()["checks"] == ALL_WELL
    await ann.personal(bo)


async def test_a_failed_commit_of_the_writer_shows_too_and_its_next_one_ends_it(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    append, worked = services.appender.append, []

    async def broken_once(*arguments: Any, **named: Any) -> Any:
        worked.append(services.database.writes_work)
        if len(worked) == 1:
            raise OSError(28, "No space left on device")
        return await append(*arguments, **named)

    monkeypatch.setattr(services.appender, "append", broken_once)
    await asyncio.wait_for(ann.say(chat_id, "there was no room, and now there is"), 10)
    assert worked == [True, False]
    assert services.database.writes_work


async def test_somebody_elses_lock_is_no_failed_write(services: Services) -> None:
    services.database._note_failed_write(TimeoutError())
    assert not services.database.writes_work
    services.database.writes_work = True
    for error in (
        sqlite3.OperationalError("database is locked"),
        PoolTimeoutError("the pool is empty"),
    ):
        services.database._note_failed_write(error)
        assert services.database.writes_work


async def test_a_folder_of_files_that_cannot_be_written_is_told_and_everything_else_served(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    incoming = settings.upload_path / INCOMING
    assert list(incoming.iterdir()) == []
    incoming.rmdir()
    incoming.touch()  # no folder, and so nothing can be put into it, whoever this runs as
    ready = await client.get("/health/ready")
    assert (ready.status_code, ready.json()["checks"]) == (200, {**ALL_WELL, "storage": "down"})
    incoming.unlink()
    incoming.mkdir()
    assert (await client.get("/health/ready")).json()["checks"] == ALL_WELL
    assert list(incoming.iterdir()) == []


# --- the checks themselves ---


def answering(state: State, asked: list[str] | None = None, name: str = "") -> Ask:
    async def ask() -> State:
        if asked is not None:
            asked.append(name)
        return state

    return ask


@pytest.mark.parametrize(
    ("needed", "state", "ready"), [(True, "down", False), (True, "off", True), (False, "down", True)]
)
async def test_only_what_serving_needs_makes_it_unready(needed: bool, state: State, ready: bool) -> None:
    health = HealthService(patience_seconds=1)
    health.add("first", answering("ok"), needed=True)
    health.add("bus", answering(state), needed=needed)
    found = await health.check()
    assert (found.ready, found.checks) == (ready, {"first": "ok", "bus": state})


async def test_a_dependency_that_hangs_is_down_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang() -> State:
        await asyncio.Event().wait()
        return "ok"

    health = HealthService(patience_seconds=0.05)
    for number in range(20):
        health.add(f"hangs-{number}", hang, needed=False)
    async with asyncio.timeout(5):
        assert set((await health.check()).checks.values()) == {"down"}


@pytest.mark.logs_errors
async def test_a_check_that_fails_is_down() -> None:
    async def fail() -> State:
        raise ValueError("a mistake")

    health = HealthService(patience_seconds=1)
    health.add("broken", fail, needed=True)
    assert await health.check() == health_service.Health(False, {"broken": "down"})


async def test_however_many_ask_at_once_each_dependency_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_service, "FRESH_SECONDS", 60.0)
    asked: list[str] = []
    health = HealthService(patience_seconds=1)
    health.add("one", answering("ok", asked, "one"), needed=True)
    await asyncio.gather(*(health.check() for _ in range(100)))
    assert asked == ["one"]
