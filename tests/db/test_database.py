"""The pools: how many connections, what a reader sees, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.config import Settings
from app.db.database import MYSQL_LOG_CONNECTIONS, ROOT, Database
from app.db.leadership import Leadership
from app.db.repositories import sessions as session_repository
from app.db.repositories.pairs import lock_pair
from app.main import create_app
from app.services.container import Services
from tests.support.accounts import register


class Opened:
    """The driver's connections of a database, and which of them are still open."""

    def __init__(self, database: Database) -> None:
        self._open: set[int] = set()
        self.count = 0
        for engine in (database.read_engine, database.write_engine):
            event.listen(engine.sync_engine, "connect", self._on_connect)
            event.listen(engine.sync_engine, "close", self._on_close)

    def _on_connect(self, connection: Any, _record: object) -> None:
        self.count += 1
        self._open.add(id(connection))

    def _on_close(self, connection: Any, _record: object) -> None:
        self._open.discard(id(connection))

    @property
    def left(self) -> int:
        """How many are open."""
        return len(self._open)


@pytest.mark.parametrize("end", ["returns", "is cancelled"])
@pytest.mark.parametrize("kind", ["reading", "writing"])
async def test_a_connection_in_use_while_the_database_closes_is_closed_when_it_is_given_back(
    settings: Settings, kind: Literal["reading", "writing"], end: Literal["returns", "is cancelled"]
) -> None:
    database = Database(settings)
    opened = Opened(database)
    await database.start()
    uses, may_end = asyncio.Event(), asyncio.Event()

    async def use() -> None:
        async with database.reading() if kind == "reading" else database.writing() as session:
            await session.execute(text("SELECT 1"))
            uses.set()
            await may_end.wait()

    user = asyncio.create_task(use())
    await uses.wait()
    await database.close()
    assert (opened.count, opened.left) == (2, 1)
    if end == "returns":
        may_end.set()
    else:
        user.cancel()
    await asyncio.gather(user, return_exceptions=True)
    assert user.cancelled() == (end == "is cancelled")
    assert opened.left == 0


async def test_whoever_is_cancelled_while_a_connection_is_closed_leaves_no_task_that_never_ends(
    settings: Settings,
) -> None:
    database = Database(settings)
    await database.start()
    uses = asyncio.Event()

    async def use() -> None:
        async with database.reading() as session:
            await session.execute(text("SELECT 1"))
            uses.set()
            await asyncio.Event().wait()

    user = asyncio.create_task(use())
    await uses.wait()
    await database.close()
    user.cancel()
    async with asyncio.timeout(5):
        while True:  # it gives its connection back, and a task of SQLAlchemy closes that
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            closing = [task for task in tasks if "_terminate_graceful_close" in repr(task)]
            if closing:
                break
            await asyncio.sleep(0)
    await asyncio.sleep(0)  # it begins
    # As the end of the loop does; what waits for the closing is told first.
    for task in (*(tasks - set(closing)), *closing):
        task.cancel()
    _, left = await asyncio.wait(tasks, timeout=5)
    assert not left


async def test_a_connection_opened_after_the_database_closed_does_not_stay_open(settings: Settings) -> None:
    database = Database(settings)
    opened = Opened(database)
    await database.start()
    await database.close()
    assert await database.ping()
    assert (opened.count, opened.left) == (3, 0)


async def test_a_question_that_outlives_the_request_and_the_server_leaves_no_connection_open(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings)
    services: Services = app.state.services
    opened = Opened(services.database)
    asked, may_answer = asyncio.Event(), asyncio.Event()
    find_sessions = session_repository.find_sessions

    async def find_slowly(session: AsyncSession, session_ids: Sequence[int]) -> Sequence[session_repository.SessionRow]:
        found = await find_sessions(session, session_ids)
        asked.set()
        await may_answer.wait()
        return found

    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            someone = await register(client)
            services.auth.forget_sessions()
            monkeypatch.setattr(session_repository, "find_sessions", find_slowly)
            request = asyncio.create_task(client.get("/api/v1/users/me", headers=someone.headers))
            await asked.wait()
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
    assert opened.left == 1
    [question] = [task for task in asyncio.all_tasks() if task.get_name() == "coalescer"]
    may_answer.set()
    await question
    assert opened.left == 0


@pytest.mark.settings(db_pool_size=3)
async def test_a_worker_takes_as_many_connections_of_mysql_as_the_operator_is_told(mysql_settings: Settings) -> None:
    database = Database(mysql_settings)
    watcher = await database.connect_mysql()
    cursor = watcher.cursor()

    async def connections() -> int:
        await cursor.execute("SELECT COUNT(*) FROM performance_schema.processlist WHERE db = DATABASE()")
        [count] = await cursor.fetchone()
        return int(count)

    others = await connections()
    await database.start()
    lead = Leadership(database, "push")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(mysql_settings.db_pool_size):
            for session in (database.reading(), database.writing()):
                await (await stack.enter_async_context(session)).execute(text("SELECT 1"))
        for _ in range(MYSQL_LOG_CONNECTIONS):
            await stack.enter_async_context(database.appending())
        assert await lead.hold()
        taken = await connections() - others
    lead.release()
    watcher.close()
    await database.close()
    told = re.findall(r"2 . DB_POOL_SIZE \+ (\d+)", (ROOT / "docs/operations.md").read_text(encoding="utf-8"))
    assert len(told) == 2
    assert {2 * mysql_settings.db_pool_size + int(rest) for rest in told} == {taken}


async def test_a_reader_sees_what_is_committed_meanwhile_on_mysql_and_one_moment_on_sqlite(database: Database) -> None:
    count = text("SELECT COUNT(*) FROM user_pairs")
    async with database.reading() as session:
        before = await session.scalar(count)
        async with database.writing() as writer:
            await lock_pair(writer, 1, 2)
        after = await session.scalar(count)
    assert (before, after) == ((0, 1) if database.is_mysql else (0, 0))
