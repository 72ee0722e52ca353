"""`python -m app --workers N`: processes that are started, replaced and stopped together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.accounts import register
from tests.support.people import Person
from tests.support.servers import PATIENCE, Server, environment, killed_at_the_end, run


@pytest.fixture
def parent(cluster_settings: Settings, tmp_path: Path) -> Iterator[Server]:
    """A parent with two workers that know of each other."""
    with killed_at_the_end() as started:
        arguments = [sys.executable, "-m", "app", "--host", "127.0.0.1", "--port", "0", "--workers", "2"]
        server = Server(arguments, cwd=tmp_path, env=environment(cluster_settings), log_path=tmp_path / "parent.log")
        started.append(server)
        server.wait_until_ready()
        server.wait_for_log("worker_joined")
        yield server


def children(server: Server) -> set[int]:
    """The processes that a parent has started to serve."""
    found = set()
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(int(pid))
    return found


def replaced(server: Server, before: set[int], gone: int) -> set[int]:
    """The workers once so many of those before are gone and there are two again."""
    now: set[int] = set()

    def changed() -> bool:
        nonlocal now
        now = children(server)
        return len(now) == 2 and len(before - now) >= gone

    wait_until(changed)
    return now


def alive(pids: set[int]) -> bool:
    """Whether any of these processes is left."""
    return any(os.path.exists(f"/proc/{pid}") for pid in pids)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once something outside of this process is so: four processes may have to start before."""
    give_up_at = time.monotonic() + 3 * PATIENCE
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


async def serves(server: Server) -> None:
    """Return once requests are answered."""
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=server.url) as client:
        while True:
            try:
                assert (await client.get("/health/ready")).status_code == 200
            except httpx.HTTPError:
                continue
            return


@pytest.mark.timeout(240)
async def test_a_worker_that_is_killed_is_replaced_and_the_other_serves_meanwhile(parent: Server) -> None:
    before = children(parent)
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    async with parent.client() as client:
        # Twice: the connection that met the killed worker may be cut.
        person = Person(client, await register(client))
        assert (await person.do("GET", "/users/me"))["id"] == person.id
    assert max(before) in await asyncio.to_thread(replaced, parent, before, 1)
    await serves(parent)
    assert parent.stop() == 0


@pytest.mark.timeout(240)
async def test_workers_are_replaced_one_after_the_other_at_sighup_and_stopped_together(parent: Server) -> None:
    before = children(parent)
    parent.signal(signal.SIGHUP)
    now = await asyncio.to_thread(replaced, parent, before, 2)
    await serves(parent)
    assert parent.stop() == 0
    assert not alive(before | now)


@pytest.mark.timeout(240)
def test_workers_do_not_outlive_a_killed_parent(parent: Server) -> None:
    before = children(parent)
    parent.signal(signal.SIGKILL)
    wait_until(lambda: not alive(before))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "2 workers need MySQL"),
        ({"DB_NAME": "somewhere"}, "2 workers need REDIS_URL"),
        ({"DB_NAME": "somewhere", "REDIS_URL": "http://redis"}, "REDIS_URL cannot be used"),
    ],
)
def test_workers_that_could_not_be_one_server_are_refused_with_a_sentence(
    tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    ended = run([sys.executable, "-m", "app", "--workers", "2"], cwd=tmp_path, env=environment(None, **variables))
    assert ended.returncode == 1
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.timeout(120)
def test_a_server_that_cannot_start_ends_with_its_workers(
    cluster_settings: Settings, start_server: StartServer, tmp_path: Path
) -> None:
    variables = {"DB_PORT": "1", "REDIS_URL": cluster_settings.redis_url.get_secret_value()}  # type: ignore[union-attr]
    ended = run(
        [sys.executable, "-m", "app", "--port", "0", "--workers", "2"],
        cwd=tmp_path,
        env=environment(cluster_settings, **variables),
    )
    assert ended.returncode != 0
    [line] = (ended.stdout + ended.stderr).splitlines()  # and not one of each worker
    assert line.startswith("MySQL at ")
