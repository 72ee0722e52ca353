"""The server's clock jumps, back and forth: order and promises do not depend on it.

On MySQL alone: libfaketime 0.9.10 breaks `nanosleep` for a process whose monotonic clock it leaves alone, and SQLite
sleeps by that while it waits for its lock.
"""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from app.core.config import Settings
from tests.chaos.conftest import Launch, lacking
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.support.people import Person, people
from tests.support.secrets import plant
from tests.support.servers import free_port

LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
JUMPS = (+900, -900, 0, -900, +900)
"""Seconds between the server's clock and the true one, in turn: jumps of a quarter and of half an hour."""
STEP = 250


def find_library() -> str:
    """libfaketime, for processes with threads."""
    found = [path for pattern in LIBRARIES for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    if found:
        return str(found[0])
    return lacking("faketime is not installed (Debian: apt-get install faketime): nobody moves the clock")


async def _say_until_it_has_jumped(person: Person, chat_id: int, offset: int) -> str:
    """What the server calls now, once it sees the new time."""
    async with asyncio.timeout(20):
        while True:
            stamp: str = (await person.say(chat_id, f"it is {offset:+d}"))["created_at"]
            away = datetime.fromisoformat(stamp.replace("Z", "+00:00")) - datetime.now(UTC)
            if abs(away.total_seconds() - offset) < 60:
                return stamp


async def _redeem(ws_url: str, ticket: str) -> None:
    async with connect(f"{ws_url}?ticket={ticket}") as connection, asyncio.timeout(10):
        assert json.loads(await connection.recv())["type"] == "hello"


@pytest.mark.chaos("Changes of the clock do no harm")
@pytest.mark.settings(limit_login_per_account_and_ip="3/second", limit_messages_per_second=1000)
@pytest.mark.timeout(120)
async def test_jumps_of_a_quarter_of_an_hour_lock_nobody_out_and_change_no_order(
    mysql_settings: Settings, launch: Launch, tmp_path: Path, rng: random.Random, report: SceneReport
) -> None:
    dial = tmp_path / "clock"
    dial.write_text("+0\n")
    faked = [
        "env",
        f"LD_PRELOAD={find_library()}",
        f"FAKETIME_TIMESTAMP_FILE={dial}",
        "FAKETIME_CACHE_DURATION=1",  # reading the file at each look at the clock would cost more than the server does
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
        "DONT_FAKE_MONOTONIC=1",
    ]
    server = launch(mysql_settings, free_port(), through=faked)
    await asyncio.to_thread(server.wait_until_ready)
    times: list[str] = []
    tickets = logins = 0
    with Crowd(server.url, rng, tmp_path, 1_000_000) as crowd:
        await crowd.gather(users=6, devices=10, callers=2)
        crowd.up.set()
        async with server.client() as client, asyncio.TaskGroup() as group:
            ann, bo = await people(client, 2)
            chat_id = await ann.personal(bo)
            hearing = await bo.open(server)
            tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
            for offset in JUMPS:
                await crowd.after(crowd.acked + STEP).wait()
                # A ticket of before the jump is as good as a later one: its life is measured, not told by the clock.
                ticket = await ann.do("POST", "/auth/ws-ticket")
                plant(ticket["ticket"])
                dial.write_text(f"{offset:+d}\n")
                times.append(await _say_until_it_has_jumped(ann, chat_id, offset))
                await hearing.wait(type="new_message")
                await _redeem(server.ws_url, ticket["ticket"])
                tickets += 1
                form = {"username": ann.account.phone, "password": ann.account.password}
                logged_in = await client.post("/api/v1/auth/token", data=form)
                assert logged_in.status_code == 200, logged_in.text
                fresh = {"Authorization": f"Bearer {logged_in.json()['access_token']}"}
                assert (await client.get("/api/v1/users/me", headers=fresh)).status_code == 200
                refreshed = await client.post(
                    "/api/v1/auth/refresh", json={"refresh_token": logged_in.json()["refresh_token"]}
                )
                assert refreshed.status_code == 200, refreshed.text
                logins += 1
            crowd.target = crowd.acked + STEP
            for keeper in crowd.keepers:
                await keeper.finished.wait()
            for keeper in crowd.keepers:
                await keeper.settle()
            for task in tasks:
                task.cancel()
            page = await ann.history(chat_id)
            assert hearing.close_code is None
            await hearing.close()
        checked = await crowd.check()
    assert times != sorted(times), "the clock did not move: this run shows nothing"
    assert [message["seq"] for message in page["items"]] == sorted(message["seq"] for message in page["items"])
    report.tell("jumps", len(JUMPS))
    report.exactly("tickets of before a jump that still worked", tickets, len(JUMPS))
    report.exactly("logins and refreshes that worked", logins, len(JUMPS))
    report.exactly("sockets closed", sum(crowd.close_codes.values()), 0)
    report.tell("acknowledged", checked.acked)
    crowd.hold(report, checked)
