"""Several workers over Redis: one dies, all are replaced, Redis is away or forgets; they go on being one server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.support.proxy import FaultProxy
from tests.support.redis_messages import LosesMessages
from tests.support.redis_server import RedisServer
from tests.support.servers import Server, free_port

KILLS = scaled("WORKER_KILLS", short=4, long=40)
RESTARTS = scaled("ROLLING_RESTARTS", short=1, long=5)
AWAY_SECONDS = scaled("REDIS_AWAY", short=4, long=30)
COMPLETE_SECONDS = 30.0
STEP = 300


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis to hurt."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    yield server
    server.kill()


def children(pid: int) -> list[int]:
    """The workers of a parent, Python's own helper aside."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def until_there_are(server: Server, count: int, others_than: set[int]) -> None:
    """Return once so many workers run and serve, and none of those."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(FileNotFoundError):
                now = set(children(server.pid))
                started = [line for line in server.log.splitlines() if '"event":"started"' in line]
                serving = all(any(f'"pid":{pid},' in line for line in started) for pid in now)
                if len(now) == count and serving and not now & others_than:
                    return
            await asyncio.sleep(0.05)  # a look at the processes, which tell nobody


@pytest.mark.chaos("Several workers behave as one")
@pytest.mark.timeout(180 + KILLS * 10 + RESTARTS * 20)
@pytest.mark.parametrize("how", ["one is killed", "all are replaced one by one"])
async def test_workers_that_die_or_are_replaced_under_load_cost_a_reconnect_and_no_message(
    mysql_settings: Settings,
    redis: RedisServer,
    launch: Launch,
    tmp_path: Path,
    rng: random.Random,
    report: SceneReport,
    how: str,
) -> None:
    server = launch(mysql_settings.model_copy(update={"redis_url": SecretStr(redis.url), "workers": 2}), free_port())
    await asyncio.to_thread(server.wait_until_ready)
    await until_there_are(server, 2, set())
    times = KILLS if how == "one is killed" else RESTARTS
    with Crowd(server.url, rng, tmp_path, 1_000_000) as crowd:
        await crowd.gather(users=8, devices=14, callers=2)
        crowd.up.set()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
            for _ in range(times):
                await crowd.after(crowd.acked + STEP).wait()
                workers = children(server.pid)
                if how == "one is killed":
                    victims = {rng.choice(workers)}
                    os.kill(min(victims), signal.SIGKILL)
                else:
                    victims = set(workers)
                    server.signal(signal.SIGHUP)
                await until_there_are(server, 2, victims)
            crowd.target = crowd.acked + STEP
            for keeper in crowd.keepers:
                await keeper.finished.wait()
            for keeper in crowd.keepers:
                await keeper.settle()
            for task in tasks:
                task.cancel()
        checked = await crowd.check()
    report.tell("times", times)
    report.tell("reconnects", sum(device.connections for device in crowd.devices) - len(crowd.devices))
    report.tell("commands repeated", crowd.counts["retried"])
    report.tell("refused and repeated", sum(n for what, n in crowd.counts.items() if what.startswith("refused")))
    report.tell("acknowledged", checked.acked)
    crowd.hold(report, checked)
    if how != "one is killed":
        assert crowd.close_codes.keys() <= {1012}, crowd.close_codes


Trouble = Callable[[RedisServer, FaultProxy], AbstractContextManager[None]]


@contextlib.contextmanager
def killed(redis: RedisServer, _: FaultProxy) -> Iterator[None]:
    """It dies, and comes back empty."""
    redis.kill()
    yield
    redis.start()


@contextlib.contextmanager
def frozen(redis: RedisServer, _: FaultProxy) -> Iterator[None]:
    """It hangs."""
    redis.signal(signal.SIGSTOP)
    yield
    redis.signal(signal.SIGCONT)


@contextlib.contextmanager
def flushed(redis: RedisServer, _: FaultProxy) -> Iterator[None]:
    """It forgets everything."""
    redis.flush()
    yield


@contextlib.contextmanager
def restarted(redis: RedisServer, _: FaultProxy) -> Iterator[None]:
    """It is there again at once, and has forgotten everything."""
    redis.kill()
    redis.start()
    yield


class _Losing:
    """It is there, and so many of a hundred of its messages get lost, from beginning to end."""

    def __init__(self, percent: int) -> None:
        self.percent = percent

    @contextlib.contextmanager
    def __call__(self, _redis: RedisServer, proxy: FaultProxy) -> Iterator[None]:
        chance = random.Random(self.percent)
        proxy.edit_answers = lambda: LosesMessages(lambda _: chance.random() * 100 < self.percent)
        proxy.reset()  # connections of before have no such losses
        yield


@pytest.mark.chaos("Several workers behave as one")
@pytest.mark.timeout(180 + AWAY_SECONDS * 3)
# A quick heartbeat, which tells of what is private; the sweep tells of the rest.
@pytest.mark.settings(limit_login_per_ip="1000/minute", socket_heartbeat_seconds=5)
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(killed, id="killed"),
        pytest.param(frozen, id="frozen"),
        pytest.param(restarted, id="restarted"),
        pytest.param(flushed, id="flushed"),
        pytest.param(_Losing(10), id="10 percent lost"),
        pytest.param(_Losing(100), id="all lost"),
    ],
)
async def test_with_redis_in_trouble_everybody_is_complete_without_a_reconnect(
    mysql_settings: Settings,
    redis: RedisServer,
    launch: Launch,
    tmp_path: Path,
    rng: random.Random,
    report: SceneReport,
    trouble: Trouble,
) -> None:
    async with FaultProxy("127.0.0.1", redis.port) as proxy:
        url = SecretStr(f"redis://127.0.0.1:{proxy.port}/0")
        servers = [launch(mysql_settings.model_copy(update={"redis_url": url}), free_port()) for _ in range(2)]
        for server in servers:
            await asyncio.to_thread(server.wait_until_ready)
            await asyncio.to_thread(server.wait_for_log, "worker_joined")
        with Crowd(servers[0].url, rng, tmp_path, 1_000_000, other_urls=[servers[1].url]) as crowd:
            await crowd.gather(users=7, devices=14, callers=2)
            crowd.up.set()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
                await crowd.after(STEP).wait()
                hurting = trouble(redis, proxy)
                await asyncio.to_thread(hurting.__enter__) if trouble in (killed, restarted) else hurting.__enter__()
                begun = time.monotonic()
                await crowd.after(crowd.acked + STEP).wait()
                report.at_most("as many messages again took", time.monotonic() - begun, COMPLETE_SECONDS, "s")
                if trouble in (killed, frozen):
                    report.exactly("logins let in meanwhile", await _logins(crowd, servers[0]), 0)
                    await asyncio.sleep(max(0.0, begun + AWAY_SECONDS - time.monotonic()))  # how long it is away
                crowd.target = crowd.acked
                for keeper in crowd.keepers:
                    await keeper.finished.wait()
                begun = time.monotonic()
                await crowd.wait_until_complete()
                complete = time.monotonic() - begun
                connections = sum(device.connections for device in crowd.devices)
                await asyncio.to_thread(hurting.__exit__, None, None, None)
                if trouble in (killed, frozen):
                    async with asyncio.timeout(COMPLETE_SECONDS):
                        while not await _logins(crowd, servers[0]):
                            pass
                for keeper in crowd.keepers:
                    await keeper.settle()
                for task in tasks:
                    task.cancel()
            checked = await crowd.check()
    report.at_most("complete, by what they were told, in", complete, COMPLETE_SECONDS, "s")
    report.exactly("reconnects", connections - len(crowd.devices), 0)
    report.tell("acknowledged", checked.acked)
    crowd.hold(report, checked)


async def _logins(crowd: Crowd, server: Server) -> int:
    """How many of a few logins work; the others must be refused as what may be tried again."""
    done = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        for account in crowd.accounts[:3]:
            form = {"username": account.phone, "password": account.password}
            answer = await client.post("/api/v1/auth/token", data=form)
            assert answer.status_code in (200, 503), answer.text
            assert answer.status_code == 200 or answer.headers["retry-after"]
            done += answer.status_code == 200
    return done
