"""The law of catching up: a client that applied events and resumed, through any sequence of drops, equals a client
that fetched everything afresh.

Short walks run with every `make test`. For a long hunt, with a seed and a number of steps of one's own:
`DIALECT_LAW_SEEDS=20 DIALECT_LAW_STEPS=500 pytest -m slow tests/law`. With `DIALECT_LAW_SHRINK=1` a walk that fails
is made as short as it can be, which takes minutes; what races may need more than one try.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.core.config import Settings
from tests.conftest import StartServer
from tests.law.walk import NAMES, Step, World
from tests.support.redis_server import RedisServer
from tests.support.servers import Server

SEEDS = int(os.environ.get("DIALECT_LAW_SEEDS", "3"))
STEPS = int(os.environ.get("DIALECT_LAW_STEPS", "300"))
SHRINK = bool(os.environ.get("DIALECT_LAW_SHRINK"))

pytestmark = pytest.mark.settings(
    # Small, so that a walk reaches the corners; and no sweep, which would heal what must not be lost to begin with.
    receipts_members_max=3,
    resume_max_changes=30,
    socket_heartbeat_seconds=0.5,
    sweep_seconds=600,
    access_token_expire_minutes=600,
)


def steps(count: int, *more: str) -> st.SearchStrategy[list[Step]]:
    """Walks of one length; a walk shrinks to steps that do nothing."""
    number = st.integers(0, 255)
    step = st.tuples(st.sampled_from([*NAMES, *more]), number, number, number, st.booleans())
    return st.lists(step, min_size=count, max_size=count)


def walk(
    servers: list[Server],
    strategy: st.SearchStrategy[list[Step]],
    *,
    examples: int,
    restart: Callable[[], Server] | None,
) -> Callable[[], None]:
    """A test of so many walks over these servers. The first, of steps that do nothing, counts too."""

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if SHRINK else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(steps=strategy)
    def test(steps: list[Step]) -> None:
        world = World(servers, restart)
        try:
            asyncio.run(world.walk(steps))
        finally:
            servers[:] = world.servers

    return test


@pytest.mark.timeout(600)  # a few seconds when all is well; the rest is for shrinking
def test_law(settings: Settings, start_server: StartServer) -> None:
    hypothesis.seed(1)(walk([start_server(settings)], steps(40), examples=4, restart=None))()


@pytest.mark.timeout(600)  # a few seconds when all is well; the rest is for shrinking
@pytest.mark.settings(sweep_seconds=0.5)
def test_law_when_the_server_is_killed(settings: Settings, start_server: StartServer) -> None:
    kills = steps(30, *["kill"] * 4)
    hypothesis.seed(2)(walk([start_server(settings)], kills, examples=3, restart=lambda: start_server(settings)))()


@pytest.fixture
def worker_settings(mysql_settings: Settings, redis: RedisServer) -> Settings:
    """Settings of several workers on one MySQL."""
    return mysql_settings.model_copy(update={"redis_url": SecretStr(redis.url)})


@pytest.mark.timeout(600)
@pytest.mark.settings(sweep_seconds=0.5)  # what is committed while its reader comes online elsewhere, the sweep brings
def test_law_on_two_workers(worker_settings: Settings, start_server: StartServer) -> None:
    workers = [start_server(worker_settings), start_server(worker_settings)]
    hypothesis.seed(3)(walk(workers, steps(40), examples=3, restart=None))()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.settings(sweep_seconds=0.5)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_law_on_two_workers_that_are_killed_at_length(
    worker_settings: Settings, start_server: StartServer, seed: int
) -> None:
    workers = [start_server(worker_settings), start_server(worker_settings)]
    strategy = steps(STEPS, *["kill"] * 2)
    hypothesis.seed(2000 + seed)(walk(workers, strategy, examples=2, restart=lambda: start_server(worker_settings)))()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_law_at_length(settings: Settings, start_server: StartServer, seed: int) -> None:
    hypothesis.seed(1000 + seed)(walk([start_server(settings)], steps(STEPS), examples=2, restart=None))()
