"""Connections of clients that end at any byte, or that one side believes in alone: nothing is lost, nothing doubled."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import httpx
import pytest

from app.core.config import Settings
from app.services.transport import CLOSE_SECONDS
from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.chaos.world import SLACK
from tests.support.proxy import FaultProxy
from tests.support.servers import Door, Server, free_port

CUTS = scaled("CUTS", short=60, long=600)
LOSSES = scaled("LOSSES", short=2, long=10)
STEP = 200
HEARTBEAT, TIMEOUT = 1.0, 1.0


async def _behind_a_proxy(launch: Launch, settings: Settings, door: Door) -> tuple[Server, FaultProxy]:
    server = launch(settings, free_port(), door)
    await asyncio.to_thread(server.wait_until_ready)
    address = httpx.URL(server.url)
    return server, FaultProxy(address.host, address.port or 80)


@pytest.mark.chaos("After a reconnect nothing is missing")
@pytest.mark.timeout(120 + CUTS)
@pytest.mark.parametrize("door", ["tuned", "plain"])
async def test_sockets_and_requests_cut_at_any_byte_in_either_direction_lose_and_double_nothing(
    sqlite_settings: Settings, launch: Launch, tmp_path: Path, rng: random.Random, report: SceneReport, door: Door
) -> None:
    server, through = await _behind_a_proxy(launch, sqlite_settings, door)
    with Crowd(server.url, rng, tmp_path, 1_000_000) as crowd:
        await crowd.gather(users=6, devices=10, callers=3)
        crowd.up.set()
        async with through as proxy:
            crowd.url = f"http://127.0.0.1:{proxy.port}"
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
                for number in range(CUTS):
                    proxy.cut_direction = rng.choice(["up", "down"])
                    proxy.bytes_left = rng.randrange(1, 3_000)
                    # A few messages between two cuts: whoever is always cut off says nothing.
                    await crowd.after(crowd.acked + 5).wait()
                    if number % 20 == 19:
                        proxy.reset()
                proxy.bytes_left = None
                crowd.target = crowd.acked + STEP
                for keeper in crowd.keepers:
                    await keeper.finished.wait()
                for keeper in crowd.keepers:
                    await keeper.settle()
                for task in tasks:
                    task.cancel()
            cuts = proxy.cuts_after_bytes
        crowd.url = server.url
        checked = await crowd.check()
    report.at_least("connections cut in the middle", cuts, CUTS // 4)
    report.tell("commands repeated", crowd.counts["retried"])
    report.tell("acknowledged", checked.acked)
    crowd.hold(report, checked)


@pytest.mark.chaos("After a reconnect nothing is missing")
@pytest.mark.settings(socket_heartbeat_seconds=HEARTBEAT, socket_timeout_seconds=TIMEOUT)
@pytest.mark.timeout(120 + LOSSES * 10)
async def test_half_open_connections_are_given_up_by_the_server_and_their_clients_miss_nothing(
    sqlite_settings: Settings, launch: Launch, tmp_path: Path, rng: random.Random, report: SceneReport
) -> None:
    server, through = await _behind_a_proxy(launch, sqlite_settings, "tuned")
    slowest, lost = 0.0, 0
    with Crowd(server.url, rng, tmp_path, 1_000_000) as crowd:
        await crowd.gather(users=6, devices=10, callers=0)
        crowd.up.set()
        async with through as proxy:
            crowd.url = f"http://127.0.0.1:{proxy.port}"
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
                for _ in range(LOSSES):
                    await crowd.after(crowd.acked + STEP).wait()
                    lost += proxy.lose()
                    begun = time.monotonic()
                    async with asyncio.timeout(30):
                        while proxy.lost:  # noqa: ASYNC110
                            await asyncio.sleep(0.02)  # a look at the proxy, which tells nobody
                    slowest = max(slowest, time.monotonic() - begun)
                crowd.target = crowd.acked + STEP
                for keeper in crowd.keepers:
                    await keeper.finished.wait()
                for keeper in crowd.keepers:
                    await keeper.settle()
                for task in tasks:
                    task.cancel()
        crowd.url = server.url
        checked = await crowd.check()
    report.tell("half-open connections", lost)
    # A ping is sent within a heartbeat, waits for its pong, and the farewell waits for an answer that nobody gives.
    report.at_most("the last given up after", slowest, HEARTBEAT + TIMEOUT + CLOSE_SECONDS + SLACK, "s")
    report.tell("commands repeated", crowd.counts["retried"])
    report.tell("acknowledged", checked.acked)
    crowd.hold(report, checked)
