"""A mixed load for as long as DIALECT_SOAK_MINUTES says (30): memory stays flat, and what it opened is given back.

How leaks are told from noise. *Memory*: the server's RSS is read every two seconds while the load runs; after a warm-up
a line is fitted by Theil and Sen's method (the median of the slopes between all pairs, which a spike cannot bend), and
what that line rises from the end of the warm-up to the end of the run must be less than GROWTH_MIB. *Tasks and file
descriptors*: between the warm-up and the run, and again after the run, everybody goes; what the server holds without a
client must be the same both times.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from dataclasses import dataclass

import httpx
import pytest

from app.core.config import Settings
from tests.conftest import StartServer
from tests.soak.load import Load
from tests.support.metrics import samples
from tests.support.servers import Server

MINUTES = float(os.environ.get("DIALECT_SOAK_MINUTES", "30"))
USERS = 12
WARMUP_SHARE, WARMUP_SECONDS_MAX = 0.25, 180.0
SAMPLE_SECONDS = 2.0
GROWTH_MIB = 8.0
SPARE_FDS = 3
"""The pools of the database open connections when they first need them, and keep them."""
PATIENCE = 30.0
UNHURRIED = {"db_timeout_seconds": 60.0, "write_timeout_seconds": 60.0, "bulk_wait_seconds": 60.0}
"""A disk that others keep busy slows this down; it is no test of how that is answered."""
MIB = 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """What the server said of itself."""

    at: float
    rss: float
    fds: float
    tasks: float
    sockets: float
    lag: float
    """Seconds of event-loop lag in all, so far."""


async def sample(client: httpx.AsyncClient) -> Sample:
    """Ask now."""
    try:
        answer = await client.get("/metrics")
    except httpx.TransportError:  # a connection that was closed for being idle in the very moment it was used
        answer = await client.get("/metrics")
    shown = samples(answer.text)

    def value(name: str) -> float:
        return shown[name, ()]

    return Sample(
        time.monotonic(),
        value("dialect_process_resident_bytes"),
        value("dialect_process_open_fds"),
        value("dialect_asyncio_tasks"),
        value("dialect_sockets_open"),
        value("dialect_event_loop_lag_seconds_sum") / max(1.0, value("dialect_event_loop_lag_seconds_count")),
    )


def slope(points: list[tuple[float, float]]) -> float:
    """Rise per second of the line through points, by Theil and Sen."""
    rises = [
        (y2 - y1) / (x2 - x1) for index, (x1, y1) in enumerate(points) for x2, y2 in points[index + 1 :] if x2 > x1
    ]
    return statistics.median(rises)


def say(text: str) -> None:
    """A line for who waits."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


async def at_rest(client: httpx.AsyncClient) -> Sample:
    """The least that the server holds once everybody has gone."""
    seen: list[Sample] = []
    async with asyncio.timeout(PATIENCE):
        while True:
            now = await sample(client)
            if now.sockets == 0:
                seen.append(now)
                # Three seconds at rest: what is stored late has been stored, what lingers has ended.
                if now.at - seen[0].at > 3.0:
                    break
            await asyncio.sleep(0.2)
    return Sample(now.at, now.rss, min(one.fds for one in seen), min(one.tasks for one in seen), 0, now.lag)


class Watch:
    """Samples while the load runs, and a line a minute."""

    def __init__(self, client: httpx.AsyncClient, load: Load) -> None:
        self.client = client
        self.load = load
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        began = told_at = time.monotonic()
        before = dict(self.load.done)
        while True:
            now = await sample(self.client)
            self.samples.append(now)
            if now.at - told_at >= 60:
                done = {name: count - before.get(name, 0) for name, count in self.load.done.items()}
                say(
                    f"  minute {round((now.at - began) / 60):>3}: {now.rss / MIB:6.1f} MiB, {now.fds:.0f} fds, "
                    f"{now.tasks:.0f} tasks, {now.sockets:.0f} sockets, {now.lag * 1000:.2f} ms mean lag; "
                    f"{done.get('acked', 0)} sends acked, {done.get('events', 0)} events seen, "
                    f"{done.get('drop', 0)} drops, "
                    + ", ".join(f"{done.get(what, 0)} {what}" for what in ("upload", "search", "login", "group"))
                )
                told_at, before = now.at, dict(self.load.done)
            await asyncio.sleep(SAMPLE_SECONDS)


async def loaded(client: httpx.AsyncClient, load: Load, seconds: float) -> list[Sample]:
    """The samples of a while under load."""
    watch = Watch(client, load)
    watching = asyncio.create_task(watch.run())
    await load.run(seconds)
    watching.cancel()
    result = (await asyncio.gather(watching, return_exceptions=True))[0]
    assert isinstance(result, asyncio.CancelledError), result
    return watch.samples


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 300)
async def test_under_a_long_mixed_load_memory_stays_flat_and_everything_is_given_back(
    settings: Settings, start_server: StartServer
) -> None:
    server = start_server(settings.model_copy(update={"argon2_memory_kib": 1024, "argon2_time_cost": 1, **UNHURRIED}))
    await soak(server, "MySQL" if settings.uses_mysql else "SQLite")


async def soak(server: Server, database: str) -> None:
    """The run."""
    seed = int(os.environ.get("DIALECT_SOAK_SEED", str(time.time_ns() % 1_000_000)))
    load = Load(server, USERS, seed)
    seconds = MINUTES * 60
    warmup = min(seconds * WARMUP_SHARE, WARMUP_SECONDS_MAX)
    say(f"\n{database}: {MINUTES:g} minutes, {warmup:.0f} s of them to warm up; DIALECT_SOAK_SEED={seed}")
    await load.prepare()
    async with load.client() as client:
        await loaded(client, load, warmup)
        before = await at_rest(client)
        run = await loaded(client, load, seconds - warmup)
        after = await at_rest(client)
    await load.check()
    points = [(one.at, one.rss / MIB) for one in run[2:]]  # after a rest the first are not under load yet
    rise = slope(points)
    grown = rise * (points[-1][0] - points[0][0])
    first, last = statistics.median(y for _, y in points[:10]), statistics.median(y for _, y in points[-10:])
    say(
        f"{database}: {load.done['acked']} sends acknowledged over sockets and {load.done['send']} over REST, "
        f"{load.done['events']} events seen, {load.done['drop']} drops and resumes, {load.done['upload']} uploads, "
        f"{load.done['search']} searches, {load.done['login']} logins, {load.done['group']} groups made and left\n"
        f"{database}: memory from {first:.1f} to {last:.1f} MiB: fitted {rise * 60:+.3f} MiB a minute, {grown:+.2f} in "
        f"all (< {GROWTH_MIB:g}); at rest {before.fds:.0f} and {after.fds:.0f} fds, "
        f"{before.tasks:.0f} and {after.tasks:.0f} tasks; faults: {len(load.faults)}"
    )
    assert not load.faults, load.faults
    assert load.done["acked"] > seconds, "hardly anything was said"
    assert grown < GROWTH_MIB, f"memory grows by {rise * 3600:.1f} MiB an hour"
    assert after.tasks <= before.tasks, "tasks are left behind"
    assert after.fds <= before.fds + SPARE_FDS, "file descriptors are left open"


# --- the measure itself, in every run of the tests ---


def test_the_fitted_line_sees_a_small_leak_in_great_noise_and_none_in_noise_alone() -> None:
    noise = [0, 5, -3, 2, -6, 4, 1, -2, 30, 0]
    flat = [(float(x), 100.0 + noise[x * 7 % 10]) for x in range(300)]
    leaking = [(x, y + x * 0.02) for x, y in flat]
    assert abs(slope(flat)) * 300 < 1
    assert 5 < slope(leaking) * 300 < 7
