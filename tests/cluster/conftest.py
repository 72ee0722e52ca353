"""Two servers on one MySQL, joined by Redis: as on two machines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from app.core.config import Settings
from tests.support.databases import MYSQL_URL, MysqlDatabase, make_settings
from tests.support.redis_server import RedisServer
from tests.support.servers import COMMANDS, Server, environment, killed_at_the_end


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that nobody hurts."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Two servers that know of each other, shared by tests that bring people of their own."""
    if not MYSQL_URL:
        pytest.skip("DIALECT_TEST_MYSQL_URL is not set")
    redis: RedisServer = request.getfixturevalue("shared_redis")
    folder = tmp_path_factory.mktemp("cluster")
    mysql = MysqlDatabase(f"dialect_cluster_{os.getpid()}")
    settings = make_settings(
        **mysql.new(),
        redis_url=redis.url,
        # What the sweep and heartbeats would heal must come over the bus, or not at all.
        sweep_seconds=3600,
        socket_heartbeat_seconds=3600,
        limit_search_per_user="5/minute",
    )
    with killed_at_the_end() as started:
        for name in ("first", "second"):
            started.append(
                Server(
                    COMMANDS["tuned"],
                    cwd=folder,
                    env=environment(settings),
                    log_path=folder / f"{name}.log",
                    forked=True,
                )
            )
        for server in started:
            server.wait_until_ready()
            server.wait_for_log("worker_joined")
        yield started[0], started[1]
    mysql.close()


@pytest.fixture
def cluster_settings(mysql_settings: Settings, redis: RedisServer) -> Settings:
    """Settings of workers of one's own."""
    return mysql_settings.model_copy(update={"redis_url": SecretStr(redis.url)})
