"""Servers that are killed and come back on the same port, and the two databases one at a time."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.support.databases import MYSQL_URL, MysqlDatabase, SqliteTemplate, make_settings
from tests.support.servers import COMMANDS, Door, Server, environment, killed_at_the_end

Launch = Callable[..., Server]


def free_port() -> int:
    """A port that stays ours while the server is down: below those that the kernel gives to clients."""
    picker = random.SystemRandom()
    while True:
        port = picker.randrange(15_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts servers on a given port: `launch(settings, port)`; does not wait until they are ready."""
    with killed_at_the_end() as started:

        def start(settings: Settings, port: int, door: Door = "tuned", *, through: Sequence[str] = ()) -> Server:
            server = Server(
                [*through, *COMMANDS[door][:-1], str(port)],
                cwd=tmp_path,
                env=environment(settings),
                log_path=tmp_path / f"launched-{len(started)}.log",
            )
            started.append(server)
            return server

        yield start


@pytest.fixture(autouse=True)
def _quiet_httpx() -> Iterator[None]:
    """Thousands of requests, each a line, tell nothing."""
    logger = logging.getLogger("httpx")
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(level)


@pytest.fixture
def rng() -> random.Random:
    """Chance that can be repeated: the seed is printed, and DIALECT_CRASH_SEED sets it."""
    seed = int(os.environ.get("DIALECT_CRASH_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DIALECT_CRASH_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
    return random.Random(seed)


def _marked(request: pytest.FixtureRequest) -> dict[str, object]:
    values: dict[str, object] = {}
    for mark in reversed(list(request.node.iter_markers("settings"))):
        values |= mark.kwargs
    return values


@pytest.fixture
def sqlite_settings(sqlite_template: SqliteTemplate, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """A fresh database on SQLite, whatever else is there."""
    return make_settings(**{**sqlite_template.new(tmp_path), **_marked(request)})


@pytest.fixture
def mysql_settings(request: pytest.FixtureRequest) -> Settings:
    """A fresh database on MySQL."""
    if not MYSQL_URL:
        pytest.skip("DIALECT_TEST_MYSQL_URL is not set")
    mysql: MysqlDatabase = request.getfixturevalue("mysql_database")
    return make_settings(**{**mysql.new(), **_marked(request)})
