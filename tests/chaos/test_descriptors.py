"""More connections than the process may hold: who is connected goes on, the others are turned away, nothing spins."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import httpx
import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.world import ANSWER_SECONDS, RECOVERY_SECONDS
from tests.support.people import people
from tests.support.servers import free_port
from tests.support.watch import Bystander, undisturbed

DESCRIPTORS = 128
CALLERS = 400
WATCHED_SECONDS = 2.0


def cpu_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def descriptors(pid: int) -> int:
    """How many a process holds."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.chaos("A slow or dead reader hurts only itself")
@pytest.mark.timeout(90)
async def test_without_file_descriptors_left_who_is_connected_goes_on_and_nothing_spins(
    settings: Settings, launch: Launch, report: SceneReport
) -> None:
    server = launch(settings, free_port(), through=["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"])
    await asyncio.to_thread(server.wait_until_ready)
    address = httpx.URL(server.url)
    async with server.client() as client, contextlib.AsyncExitStack() as stack:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        bystander = Bystander(ann, await stack.enter_async_context(await ann.open(server)), chat_id)
        hearing = await stack.enter_async_context(await bo.open(server))
        callers = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(CALLERS)]
        async with undisturbed(bystander, ANSWER_SECONDS):
            for caller in callers:
                caller.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    caller.connect((address.host, address.port))
            before, begun = cpu_seconds(server.pid), time.monotonic()
            bystander.rounds, rounds = 0, 0
            while time.monotonic() - begun < WATCHED_SECONDS:
                await hearing.wait(type="new_message")
                rounds += 1
            busy = (cpu_seconds(server.pid) - before) / (time.monotonic() - begun)
        longest = bystander.longest
        # What is left of one message's cost at a full core would be a loop that turns for nothing.
        idle_before, begun = cpu_seconds(server.pid), time.monotonic()
        await asyncio.sleep(WATCHED_SECONDS)  # what it does while nobody asks it for anything
        idle = (cpu_seconds(server.pid) - idle_before) / (time.monotonic() - begun)
        held = descriptors(server.pid)
        for caller in callers:
            caller.close()
        begun = time.monotonic()
        async with asyncio.timeout(RECOVERY_SECONDS * 2):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    async with server.client() as newcomer:
                        if (await newcomer.get("/health/ready")).status_code == 200:
                            break
        recovered = time.monotonic() - begun
        await (await bo.open(server)).close()
        assert (await bystander.socket.say(chat_id, "and all is well"))["type"] == "ack"
    assert server.exit_code is None
    report.tell("descriptors held", held)
    report.at_least("messages heard meanwhile", rounds, 1)
    report.at_most("longest wait of who was connected", longest, ANSWER_SECONDS, "s")
    report.tell("CPU while they chatted", busy * 100, "%")
    report.at_most("CPU while nobody did", idle * 100, 25, "%")
    report.at_most("newcomers served again after", recovered, RECOVERY_SECONDS, "s")
