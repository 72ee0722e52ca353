"""SIGTERM under load: everything taken is answered, everybody is asked to come back, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.support.servers import Door, free_port

EXIT_SECONDS = 10.0
STOP_AFTER = 600
"""Acknowledged sends before the signal, at most."""


@pytest.mark.chaos("A restart is clean")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("door", ["tuned", "plain"])
async def test_a_stop_under_load_is_quick_answers_what_it_took_and_loses_nothing(
    settings: Settings, launch: Launch, tmp_path: Path, rng: random.Random, door: Door, report: SceneReport
) -> None:
    port = free_port()
    server = launch(settings, port, door)
    await asyncio.to_thread(server.wait_until_ready)
    with Crowd(server.url, rng, tmp_path, STOP_AFTER * 2) as crowd:
        await crowd.gather(users=10, devices=12, callers=2)
        crowd.up.set()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
            await crowd.after(rng.randrange(STOP_AFTER // 2, STOP_AFTER)).wait()
            crowd.up.clear()
            begun = time.monotonic()
            server.signal(signal.SIGTERM)
            exit_code = await asyncio.to_thread(server.wait)
            took = time.monotonic() - begun
            async with asyncio.timeout(20):
                await asyncio.gather(*(device.gone() for device in crowd.devices))
            unanswered = {
                pending.frame["client_id"]
                for device in crowd.devices
                for pending in device.pending.values()
                if pending.frame["type"] == "new_message"
            }
            close_codes = dict(crowd.close_codes)
            server = launch(settings, port, door)
            await asyncio.to_thread(server.wait_until_ready)
            stored = await crowd.stored_places()
            crowd.up.set()
            for keeper in crowd.keepers:
                await keeper.finished.wait()
            for keeper in crowd.keepers:
                await keeper.settle()
            for task in tasks:
                task.cancel()
        checked = await crowd.check()
        report.at_most("stopped in", took, EXIT_SECONDS, "s")
        report.tell("acknowledged", checked.acked)
        # uvicorn ends by the signal it was sent, once it has cleaned up.
        assert exit_code in (0, -signal.SIGTERM)
        assert close_codes == {1012: len(crowd.devices)}
        # What was not acknowledged was not stored: nobody's retry is needed to learn what became of it.
        report.exactly("stored but not acknowledged", len(unanswered & stored.keys()), 0)
        crowd.hold(report, checked)
