"""`python -m app --workers N`: processes that are started, replaced and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
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
from tests.support.servers import PATIENCE, ROOT, Server, environment, killed_at_the_end, run


@pytest.fixture
def parent(cluster_settings: Settings, tmp_path: Path) -> Iterator[Server]:
    """A parent with two workers that know of each other. A worker's event loop hangs at SIGUSR1.

    What `.env` says is in none of their environments.
    """
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))\n"
    )
    (tmp_path / ".env").write_text("REQUEST_HEAD_SECONDS=60\n")
    env = environment(cluster_settings, PYTHONPATH=f"{hooks}:{ROOT}")
    del env["REQUEST_HEAD_SECONDS"]
    with killed_at_the_end() as started:
        arguments = [sys.executable, "-m", "app", "--host", "127.0.0.1", "--port", "0", "--workers", "2"]
        server = Server(arguments, cwd=tmp_path, env=env, log_path=tmp_path / "parent.log")
        started.append(server)
        server.wait_until_ready()
        server.wait_for_log("worker_joined")
        yield server


def children(server: Server) -> set[int]:
    """The processes that a parent has started to serve."""
    found = set()
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
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
@pytest.mark.settings(worker_timeout_seconds=60, shutdown_seconds=2)
async def test_a_hung_worker_holds_up_neither_the_replacement_of_all_nor_the_stop(parent: Server) -> None:
    before = children(parent)
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    parent.signal(signal.SIGHUP)
    now = await asyncio.to_thread(replaced, parent, before, 2)
    await serves(parent)
    os.kill(min(now), signal.SIGSTOP)
    parent.signal(signal.SIGHUP)
    wait_until(lambda: len(children(parent)) == 3)  # a successor is starting
    assert parent.stop() == 0
    assert not alive(before | now)


@pytest.mark.timeout(240)
@pytest.mark.settings(worker_timeout_seconds=8)
async def test_a_parent_that_was_paused_blames_none_of_its_workers(parent: Server) -> None:
    before = children(parent)
    parent.signal(signal.SIGSTOP)
    resume_at = time.monotonic() + 9
    while time.monotonic() < resume_at:
        await serves(parent)
    parent.signal(signal.SIGCONT)
    os.kill(min(before), signal.SIGKILL)  # once it has seen this, it has looked at the other, too
    assert max(before) in await asyncio.to_thread(replaced, parent, before, 1)
    assert parent.log.count("worker_died") == 1


@pytest.mark.timeout(240)
@pytest.mark.settings(worker_timeout_seconds=8)
async def test_a_worker_whose_event_loop_hangs_is_replaced(parent: Server) -> None:
    before = children(parent)
    os.kill(min(before), signal.SIGUSR1)
    now = await asyncio.to_thread(replaced, parent, before, 1)
    assert before - now == {min(before)}
    assert re.search(r"worker_died.*hung.*true", parent.log, re.IGNORECASE)
    await serves(parent)


@pytest.mark.timeout(240)
async def test_sighup_brings_in_what_env_says_by_then_and_nothing_if_that_cannot_be_used(
    parent: Server, tmp_path: Path
) -> None:
    before = children(parent)
    (tmp_path / ".env").write_text("REQUEST_HEAD_SECONDS=soon\n")
    parent.signal(signal.SIGHUP)
    assert "REQUEST_HEAD_SECONDS" in await asyncio.to_thread(lambda: parent.wait_for_log("restart_given_up.*").group())
    assert children(parent) == before
    (tmp_path / ".env").write_text("REQUEST_HEAD_SECONDS=0.5\n")
    parent.signal(signal.SIGHUP)
    await asyncio.to_thread(replaced, parent, before, 2)
    # Well before the 60 s of the settings that it started with.
    with socket.create_connection(("127.0.0.1", int(parent.url.rpartition(":")[2])), PATIENCE) as silent:
        assert await asyncio.to_thread(silent.recv, 1) == b""


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
