"""kill -9 under load: nothing acknowledged is lost, nothing is doubled, everybody sees one order."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.support.servers import free_port

KILLS = scaled("KILLS", short=20, long=200)
ACKED = scaled("ACKED", short=10_000, long=100_000)


@pytest.mark.chaos("An acknowledged message is never lost, doubled or reordered")
@pytest.mark.timeout(120 + KILLS * 5 + ACKED // 50)
async def test_nothing_acknowledged_is_lost_or_doubled_by_kills_at_random_moments(
    settings: Settings, launch: Launch, tmp_path: Path, rng: random.Random, report: SceneReport
) -> None:
    begun = time.monotonic()
    port = free_port()
    server = launch(settings, port)
    await asyncio.to_thread(server.wait_until_ready)
    with Crowd(server.url, rng, tmp_path, ACKED) as crowd:
        await crowd.gather(users=10, devices=18, callers=2)
        crowd.up.set()
        stop_at = sorted(rng.sample(range(1, ACKED), KILLS))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
            for count in stop_at:
                await crowd.after(count).wait()
                if rng.random() < 0.5:
                    # Somewhere within the next commits, not always right behind an ack.
                    await asyncio.sleep(rng.uniform(0, 0.02))
                crowd.up.clear()
                server.kill()
                crowd.counts["unanswered at a kill"] += sum(len(device.pending) for device in crowd.devices)
                server = launch(settings, port)
                await asyncio.to_thread(server.wait_until_ready)
                crowd.up.set()
            for keeper in crowd.keepers:
                await keeper.finished.wait()
            for keeper in crowd.keepers:
                await keeper.settle()
            for task in tasks:
                task.cancel()
        checking = time.monotonic()
        checked = await crowd.check()
        print(  # noqa: T201 - the figures of the run
            f"{KILLS} kills, {checked}; {dict(crowd.counts)}; "
            f"{checking - begun:.0f} s of chatting, {time.monotonic() - checking:.0f} s of checking"
        )
        report.tell("kills", KILLS)
        report.tell("commands without an answer at a kill, repeated", crowd.counts["retried"])
        report.at_least("acknowledged", checked.acked, ACKED)
        crowd.hold(report, checked)
        assert crowd.counts["retried"] > 0, "no kill met a command under way: this run shows nothing"
