"""MySQL dies, freezes, is shut down, takes no writes or no connections, under load: nothing acknowledged is lost,
everything is answered in time, and all goes on by itself once it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pymysql
import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.own_mysql import USER, OwnMysql
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.chaos.world import (
    ANSWER_SECONDS,
    RECOVERY_SECONDS,
    SLACK,
    Answer,
    ask_for_everything,
    launched,
    populated,
    recovery,
)

KILLS = scaled("MYSQL_KILLS", short=2, long=20)
FROZEN_SECONDS = scaled("MYSQL_FROZEN", short=6, long=30)
AWAY_SECONDS = 3
STEP = 150
"""Sends acknowledged between two outages, so that each one meets a load."""
CONNECTIONS = 12
"""All that MySQL gives, when it gives too few."""


@contextlib.contextmanager
def killed(mysql: OwnMysql) -> Iterator[None]:
    """A power cut of the database's machine, nearly: what the kernel holds stays."""
    mysql.kill()
    yield
    mysql.start()


@contextlib.contextmanager
def frozen(mysql: OwnMysql) -> Iterator[None]:
    """A disk or a machine that hangs."""
    mysql.freeze()
    yield
    mysql.thaw()


@contextlib.contextmanager
def shut_down(mysql: OwnMysql) -> Iterator[None]:
    """Somebody upgrades it."""
    mysql.stop()
    yield
    mysql.start()


@contextlib.contextmanager
def read_only(mysql: OwnMysql) -> Iterator[None]:
    """A failover has made it a replica."""
    mysql.execute("SET GLOBAL super_read_only = ON")
    yield
    mysql.execute("SET GLOBAL super_read_only = OFF", "SET GLOBAL read_only = OFF")


@contextlib.contextmanager
def no_connection_left(mysql: OwnMysql) -> Iterator[None]:
    """Others have taken every connection it gives."""
    [[before]] = mysql.execute("SELECT @@max_connections")
    with contextlib.ExitStack() as hogs, mysql.connect(autocommit=True) as administrator:
        held = 0
        with administrator.cursor() as cursor:
            cursor.execute(f"SET GLOBAL max_connections = {CONNECTIONS}")
            while held < CONNECTIONS:
                cursor.execute("SELECT id FROM information_schema.processlist WHERE user = %s", (USER,))
                for [other] in cursor.fetchall():
                    with contextlib.suppress(pymysql.Error):  # it may be gone by itself
                        cursor.execute(f"KILL {other}")
                with contextlib.suppress(pymysql.OperationalError):  # who was killed is not gone yet, or came back
                    while held < CONNECTIONS:
                        hogs.enter_context(mysql.connect())
                        held += 1
        yield
        with administrator.cursor() as cursor:
            cursor.execute(f"SET GLOBAL max_connections = {before}")


Outage = Callable[[OwnMysql], AbstractContextManager[None]]


@pytest.mark.chaos("Trouble with the database is no loss and no hang")
@pytest.mark.timeout(180 + KILLS * 30 + FROZEN_SECONDS * 4)
@pytest.mark.parametrize(
    ("outage", "rounds", "seconds"),
    [
        pytest.param(killed, KILLS, AWAY_SECONDS, id="killed"),
        pytest.param(frozen, 1, FROZEN_SECONDS, id="frozen"),
        pytest.param(shut_down, 1, AWAY_SECONDS, id="shut down"),
        pytest.param(read_only, 1, AWAY_SECONDS, id="read only"),
        pytest.param(no_connection_left, 1, AWAY_SECONDS, id="no connection left"),
    ],
)
async def test_mysql_in_trouble_under_load_costs_no_message_and_no_restart(
    killable_settings: Settings,
    killable_mysql: OwnMysql,
    launch: Launch,
    tmp_path: Path,
    rng: random.Random,
    report: SceneReport,
    outage: Outage,
    rounds: int,
    seconds: float,
) -> None:
    server = await launched(launch, killable_settings)
    answers: list[Answer] = []
    recoveries: list[float] = []
    async with populated(server) as world:
        async with server.client() as client:
            openapi = (await client.get("/openapi.json")).json()
        with Crowd(server.url, rng, tmp_path, 1_000_000) as crowd:
            await crowd.gather(users=4, devices=6, callers=1)
            crowd.up.set()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
                for _ in range(rounds):
                    await crowd.after(crowd.acked + STEP).wait()
                    trouble = outage(killable_mysql)
                    await asyncio.to_thread(trouble.__enter__)
                    begun = time.monotonic()
                    while not answers or time.monotonic() - begun < seconds:
                        answers += await ask_for_everything(world, openapi)
                    await asyncio.to_thread(trouble.__exit__, None, None, None)
                    recoveries.append(await recovery(world))
                crowd.target = crowd.acked + STEP
                for keeper in crowd.keepers:
                    await keeper.finished.wait()
                for keeper in crowd.keepers:
                    await keeper.settle()
                for task in tasks:
                    task.cancel()
            checked = await crowd.check()
    report.tell("outages", rounds)
    report.tell("requests meanwhile", len(answers))
    print(*sorted(answers, key=lambda answer: -answer.seconds)[:10], sep="\n")  # noqa: T201 - if one was too slow
    report.at_most("slowest answer", max(answer.seconds for answer in answers), ANSWER_SECONDS + SLACK, "s")
    assert [answer for answer in answers if not answer.status] == []
    assert [answer for answer in answers if answer.status >= 500 and answer.status != 503] == []
    assert [answer for answer in answers if answer.status == 503 and not answer.retry_after] == []
    refused = [answer for answer in answers if answer.status == 503]
    report.tell("of them 503 with Retry-After", len(refused))
    sends = [answer for answer in answers if answer.what.startswith("send")]
    assert {answer.code for answer in sends} == {"database_unavailable"}
    reads = [answer for answer in answers if answer.what.startswith("get /api/v1/chats")]
    assert {answer.status for answer in reads} == ({200} if outage is read_only else {503})
    ready = {answer.status for answer in answers if answer.what.startswith("get /health/ready")}
    assert 503 in ready  # also where reads go on: this is no server to send people to
    assert 200 not in ready or outage is read_only, "only a refused write shows that writes are refused"
    report.at_most("recovered in", max(recoveries), RECOVERY_SECONDS, "s")
    report.tell("acknowledged", checked.acked)
    crowd.hold(report, checked)
