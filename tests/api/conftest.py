"""A server that many tests share: each brings people of its own, and nothing else is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.databases import ENGINES, MysqlDatabase, SqliteTemplate, make_settings
from tests.support.secrets import check_log
from tests.support.servers import COMMANDS, Server, environment


@pytest.fixture(scope="session", params=ENGINES)
def shared_server(
    request: pytest.FixtureRequest, sqlite_template: SqliteTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server as `python -m app` starts it, for tests that need no settings and no ids of their own."""
    folder = tmp_path_factory.mktemp("shared")
    mysql = MysqlDatabase(f"dialect_shared_{os.getpid()}") if request.param == "mysql" else None
    settings = make_settings(**(mysql.new() if mysql else sqlite_template.new(folder)))
    server = Server(COMMANDS["tuned"], cwd=folder, env=environment(settings), log_path=folder / "server.log")
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        server.kill()
        if mysql:
            mysql.close()
    check_log(server.log, "the log of the shared server")
