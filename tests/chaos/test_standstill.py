"""A server that stands still and goes on (a machine that swaps, a virtual one that is moved): nothing is lost by it."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.chaos.world import launched

FROZEN_SECONDS = scaled("SERVER_FROZEN", short=4, long=30)
STEP = 400


@pytest.mark.chaos("An acknowledged message is never lost, doubled or reordered")
@pytest.mark.timeout(120 + FROZEN_SECONDS * 4)
async def test_a_server_that_stood_still_goes_on_with_those_who_waited_and_those_who_gave_up(
    settings: Settings, launch: Launch, tmp_path: Path, rng: random.Random, report: SceneReport
) -> None:
    server = await launched(launch, settings)
    with Crowd(server.url, rng, tmp_path, STEP * 2) as crowd:
        await crowd.gather(users=6, devices=12, callers=2)
        crowd.up.set()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
            await crowd.after(STEP).wait()
            server.signal(signal.SIGSTOP)
            stopped_at = crowd.acked
            for device in crowd.devices[::2]:
                device.give_up()  # its patience is at an end; it knocks again, at a door that nobody opens yet
            await asyncio.sleep(FROZEN_SECONDS)  # how long it stands still is what we test
            # What was on its way when it stopped may arrive, and then nothing more.
            late = crowd.acked - stopped_at
            server.signal(signal.SIGCONT)
            for keeper in crowd.keepers:
                await keeper.finished.wait()
            for keeper in crowd.keepers:
                await keeper.settle()
            for task in tasks:
                task.cancel()
        checked = await crowd.check()
    report.tell("stood still for", FROZEN_SECONDS, "s")
    report.tell("acknowledged", checked.acked)
    report.tell("commands repeated", crowd.counts["retried"])
    assert late < len(crowd.devices) * 20
    assert crowd.counts["retried"] > 0, "nobody gave up with a command under way: this run shows nothing"
    crowd.hold(report, checked)
