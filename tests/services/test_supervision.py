"""Every endless task of the server comes back after a failure that nobody thought of, and operators see it."""

from __future__ import annotations

import ast
import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.config import Settings
from app.core.logging import log_formatter
from app.core.tasks import keep_running
from app.services import (
    auth_service,
    connection_manager,
    container,
    fanout_marks,
    file_service,
    notification_service,
    presence_service,
)
from app.services.chat_log.changes import Done
from app.services.container import Services
from tests.services.test_writer import send
from tests.support.firebase import fake_google
from tests.support.metrics import value
from tests.support.people import contents, people

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0

# The tasks that never end, and something that each of them does all the time.
ENDLESS: dict[str, Callable[[Services], tuple[Any, str]]] = {
    "writer": lambda services: (services.writer, "_take"),
    "writer-deadlines": lambda services: (services.writer, "_all"),
    "sweep": lambda services: (services.sequencer, "sweep"),
    "heartbeats": lambda services: (services.connections, "_beat"),
    "collect-files": lambda services: (services.files, "collect"),
    "admission-lag": lambda services: (services.admission, "_note_lag"),
    "push-lead": lambda services: (services.notifications._leadership, "hold"),
    "push": lambda services: (services.notifications, "_search"),
    "push-cursors": lambda services: (services.notifications, "_store"),
    "fanout-marks": lambda services: (services.fanout, "store"),
    "last-seen": lambda services: (services.presence, "store"),
    "telemetry": lambda services: (services.telemetry, "_tick"),
}
# Those that mostly have nothing to do, or end when they have done it, and must not end before.
FINITE = {"warm-usernames", "sessions-seen"}
# Tasks of one request, socket or device: what they belong to ends with them.
OWNED = Counter(
    {
        "app/core/tasks.py": 1,  # supervise itself
        "app/services/connection_manager.py": 1,  # start_task: catching up, greetings, commands
        "app/services/notification_service.py": 1,  # one device
        "app/services/coalescer.py": 1,  # a question, which tells its failure to all who asked
        "app/api/asgi_transport.py": 2,  # the two halves of a socket
        "app/api/graceful_stop.py": 1,  # the drain
    }
)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_service, "COLLECT_SECONDS", 0.05)
    monkeypatch.setattr(container, "WARMING_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(notification_service, "LEAD_SECONDS", 0.05)
    monkeypatch.setattr(notification_service, "SEARCH_SECONDS", 0.05)
    monkeypatch.setattr(notification_service, "STORE_SECONDS", 0.05)
    monkeypatch.setattr(fanout_marks, "STORE_SECONDS", 0.05)
    monkeypatch.setattr(presence_service, "LAST_SEEN_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(auth_service, "SEEN_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(connection_manager, "TICK_SECONDS", 0.05)


@pytest.fixture
async def settings(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Settings]:
    """Push is on, so that its tasks run."""
    async with fake_google(tmp_path, monkeypatch) as google:
        yield settings.model_copy(update={"firebase_credentials_path": google.credentials_path, "sweep_seconds": 0.05})


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> asyncio.Event:
    """Let a method fail the next time it is called; set once it was called again after that."""
    real, again = getattr(owner, name), asyncio.Event()
    failed = False

    def method(*arguments: Any, **named: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise ZeroDivisionError("nobody thought of this")
        again.set()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, method)
    return again


def restarts_told(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    formatter = log_formatter("json")
    events = [json.loads(formatter.format(record)) for record in caplog.records if record.name == "app.core.tasks"]
    return [event for event in events if event["event"] == "background_task_restarted" and event["task"] == name]


async def scraped(services: Services) -> str:
    return (await services.telemetry.exposition()).decode()


@pytest.mark.logs_errors
@pytest.mark.parametrize("name", ENDLESS)
async def test_a_background_task_that_fails_is_started_again_logged_and_counted(
    client: httpx.AsyncClient,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    before = value(await scraped(services), "dialect_background_task_restarts_total", task=name)
    again = fail_once(monkeypatch, *ENDLESS[name](services))
    if name == "writer":
        assert (await asyncio.wait_for(ann.say(chat_id, "wakes it"), PATIENCE))["seq"] == 1
    await asyncio.wait_for(again.wait(), PATIENCE)
    assert value(await scraped(services), "dialect_background_task_restarts_total", task=name) == before + 1
    [told] = restarts_told(caplog, name)
    assert (told["level"], told["error"]) == ("error", "ZeroDivisionError")
    assert "nobody thought of this" in told["exception"]
    await asyncio.wait_for(ann.say(chat_id, "and all goes on"), PATIENCE)


@pytest.mark.logs_errors
@pytest.mark.parametrize("name", sorted(FINITE))
async def test_a_task_that_must_finish_its_work_is_started_again_until_it_has(
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    if name == "sessions-seen":
        again = fail_once(monkeypatch, services.auth, "_store_seen")
        services.auth._saw(1, services.clock.now().replace(tzinfo=None))
    else:
        again = fail_once(monkeypatch, services.usernames, "finish_warming")
        services.cool_usernames()
    await asyncio.wait_for(again.wait(), PATIENCE)
    [told] = restarts_told(caplog, name)
    assert told["error"] == "ZeroDivisionError"


@pytest.mark.logs_errors
async def test_a_writer_that_fails_between_its_commit_and_the_next_batch_writes_nothing_twice(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)

    class Fragile(deque[Any]):
        broken = False

        def extendleft(self, items: Any) -> None:
            if not self.broken and any(lane.batch for lane in services.writer._lanes):
                self.broken = True
                raise ZeroDivisionError("after the commit")
            super().extendleft(items)

    services.writer._queue = Fragile()
    changes = [send(chat_id, ann.id, str(number)) for number in range(5)]
    done = await asyncio.wait_for(asyncio.gather(*map(services.writer.write, changes)), PATIENCE)
    assert services.writer._queue.broken
    assert all(isinstance(outcome, Done) for outcome in done)
    await ann.say(chat_id, "and all goes on")
    assert contents(await bo.history(chat_id)) == ["0", "1", "2", "3", "4", "and all goes on"]


@pytest.mark.logs_errors
async def test_a_batch_that_the_failed_writer_held_is_written_by_its_successor(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    real, failed = services.writer._commit, False

    async def commit(lane: Any, batch: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise asyncio.CancelledError  # something that it awaits is cancelled, and it is not meant
        return await real(lane, batch)

    monkeypatch.setattr(services.writer, "_commit", commit)
    message = await asyncio.wait_for(ann.say(chat_id, "held"), PATIENCE)
    assert failed
    assert message["seq"] == 1
    assert contents(await bo.history(chat_id)) == ["held"]


async def test_all_endless_tasks_run_supervised(services: Services) -> None:
    async with asyncio.timeout(PATIENCE):
        while not services.notifications.leads:  # MySQL is asked whether this is the process that pushes
            await services.database.ping()
    running = {
        task.get_name()
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "cr_code", None) is keep_running.__code__
    }
    assert running - FINITE == ENDLESS.keys()


def test_no_task_is_started_in_another_way_but_those_that_something_owns() -> None:
    found: Counter[str] = Counter()
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("create_task", "ensure_future")):
                found[str(path.relative_to(ROOT))] += 1
    assert found == OWNED, "start endless tasks by app.core.tasks.supervise, and list here what ends by itself"


@pytest.mark.logs_errors
async def test_a_failed_task_of_one_socket_is_counted(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    before = value(await scraped(services), "dialect_task_failures_total", task="test-owned")

    async def work() -> None:
        raise ValueError("once")

    task = services.connections.start_task(work(), "test-owned")
    await asyncio.wait([task], timeout=PATIENCE)
    await asyncio.sleep(0)
    assert value(await scraped(services), "dialect_task_failures_total", task="test-owned") == before + 1
