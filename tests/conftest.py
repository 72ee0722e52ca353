"""Fixtures: a database per test, the services on it, the application, real servers; and the watch over their logs.

A test that takes `settings`, directly or not, runs on SQLite, and again on MySQL when DIALECT_TEST_MYSQL_URL is set.
`@pytest.mark.settings(name=value)` changes settings for a test.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.core.config import Settings

# Before anything imports app.main, which builds an application from the environment: the developer's own settings
# must not reach the tests.
for _name in Settings.model_fields:
    os.environ.pop(_name.upper(), None)
os.environ["SECRET_KEY"] = "the key of the application that nobody starts"
Settings.model_config["env_file"] = None

from app import main  # noqa: E402
from app.core.logging import log_formatter  # noqa: E402
from app.db.database import Database  # noqa: E402
from app.main import create_app  # noqa: E402
from app.services.container import Services  # noqa: E402
from tests.support import libraries  # noqa: E402
from tests.support.contract import judge  # noqa: E402
from tests.support.databases import ENGINES, MYSQL_URL, MysqlDatabase, SqliteTemplate, make_settings  # noqa: E402
from tests.support.redis_server import RedisServer  # noqa: E402
from tests.support.secrets import PLANTED, check_log  # noqa: E402
from tests.support.servers import COMMANDS, Door, Server, environment  # noqa: E402


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Know the setting of pytest-timeout where there is none: pytest and pytest-asyncio alone run the suite, too."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "seconds that a test may take, where pytest-timeout is installed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as processors: a third of the time a test waits, for a deadline or for its server."""
    return math.ceil(len(os.sched_getaffinity(0)) * 1.5)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks of this suite. Fails where nothing may be left out and a library is missing."""
    if libraries.all_wanted() and (missing := libraries.missing()):
        raise pytest.UsageError(f"not installed: {', '.join(missing)}; {libraries.REMEDY}")
    if not config.pluginmanager.has_plugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): how long a test may take, where pytest-timeout is there")
    config.addinivalue_line("markers", "settings(**values): settings of the test's database, application and servers")
    config.addinivalue_line("markers", "by_command: servers are not forked from a process that has imported them")
    config.addinivalue_line("markers", "logs_errors: the test provokes a failure that is logged with its traceback")


def pytest_report_header() -> str | None:
    """Say what is left out, before all else."""
    if not (missing := libraries.missing()):
        return None
    return f"without {', '.join(missing)}: what needs them is skipped, and no answer is held against its schema"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that imports a library which only requirements-dev.txt brings is skipped where it is missing."""
    report = yield
    if report.failed and not libraries.all_wanted() and (name := libraries.wanted_by(str(report.longrepr))):
        report.outcome = "skipped"
        report.longrepr = (report.fspath, 0, f"Skipped: {libraries.reason(name)}")
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """DIALECT_TEST_ENGINES=mysql asks for the tests that MySQL can change: all others need no second run."""
    if ENGINES != ["mysql"]:
        return
    of_mysql = {
        "settings", "shared_server", "mysql_settings", "mysql_database", "servers", "place", "rows_examined",
    }  # fmt: skip
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        (chosen if of_mysql.intersection(getattr(item, "fixturenames", ())) else left_out).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=left_out)


# --- databases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> SqliteTemplate:
    """A migrated SQLite file."""
    return SqliteTemplate(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def mysql_database(request: pytest.FixtureRequest) -> Iterator[MysqlDatabase]:
    """A migrated MySQL database for this test process alone."""
    database = MysqlDatabase(f"dialect_test_{os.getpid()}")
    yield database
    database.close()


@pytest.fixture(params=ENGINES)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings that lead to a fresh, migrated database."""
    if request.param == "mysql":
        values = request.getfixturevalue("mysql_database").new()
    else:
        values = request.getfixturevalue("sqlite_template").new(tmp_path)
    values["upload_path"] = tmp_path / "uploads"
    return make_settings(**values | _marked(request))


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("settings"))):
        values |= mark.kwargs
    return values


@pytest.fixture
def mysql_settings(request: pytest.FixtureRequest) -> Settings:
    """A fresh database on MySQL."""
    if not MYSQL_URL:
        pytest.skip("DIALECT_TEST_MYSQL_URL is not set")
    mysql: MysqlDatabase = request.getfixturevalue("mysql_database")
    return make_settings(**{**mysql.new(), **_marked(request)})


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis to hurt."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """The connections alone. SQLite serves one owner: a test that has `services` uses `services.database`."""
    database = Database(settings)
    await database.start()
    yield database
    await database.close()


# --- the application in this process ----------------------------------------------------------------------------


@pytest.fixture
async def app(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FastAPI]:
    """The application, started."""
    monkeypatch.setattr(main, "build_routes", _share_routes)
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        yield app


def _share_routes(app: FastAPI) -> None:
    """Take those that `app.main.app` has built: to build them takes a tenth of a second, and for each test minutes."""
    built = {id(route.original_router): route for route in main.app.routes if hasattr(route, "original_router")}
    for index, route in enumerate(app.routes):
        if hasattr(route, "original_router"):
            app.router.routes[index] = built[id(route.original_router)]


@pytest.fixture
def services(app: FastAPI) -> Services:
    """The services of `app`, started."""
    services: Services = app.state.services
    return services


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, without a socket between. Answers that are not documented fail the test."""
    transport = httpx.ASGITransport(app=app)
    hooks = {"response": [judge]}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", event_hooks=hooks) as client:
        yield client


# --- servers ----------------------------------------------------------------------------------------------------

StartServer = Callable[..., Server]


@pytest.fixture
def start_server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StartServer]:
    """Starts servers: `start_server(settings, door="plain")`. What still runs at the end of the test is stopped."""
    started: list[Server] = []
    numbers = itertools.count(1)
    by_command = any(map(request.node.get_closest_marker, ("by_command", "chaos", "soak")))

    def start(settings: Settings, door: Door = "tuned", *, ready: bool = True, **variables: str) -> Server:
        server = Server(
            COMMANDS[door],
            cwd=tmp_path,
            env=environment(settings, **variables),
            log_path=tmp_path / f"server-{next(numbers)}.log",
            forked=not by_command and not variables,  # some of which are read by imports
        )
        started.append(server)
        if ready:
            server.wait_until_ready()
        return server

    yield start
    for server in started:
        try:
            server.stop()
        finally:
            server.kill()
    for server in started:
        check_log(server.log, server.log_path.name, tracebacks_allowed=_provokes_errors(request))


@pytest.fixture
def server(settings: Settings, start_server: StartServer) -> Server:
    """A server as `python -m app` starts it."""
    return start_server(settings)


@pytest.fixture(scope="session", params=ENGINES)
def shared_server(
    request: pytest.FixtureRequest, sqlite_template: SqliteTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that many tests share: each brings people of its own, and nothing else is looked at."""
    folder = tmp_path_factory.mktemp("shared")
    mysql = MysqlDatabase(f"dialect_shared_{os.getpid()}") if request.param == "mysql" else None
    settings = make_settings(**(mysql.new() if mysql else sqlite_template.new(folder)))
    server = Server(
        COMMANDS["tuned"], cwd=folder, env=environment(settings), log_path=folder / "server.log", forked=True
    )
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        server.kill()
        if mysql:
            mysql.close()
    check_log(server.log, "the log of the shared server")


# --- the watch over the logs ------------------------------------------------------------------------------------


class _Collector(logging.Handler):
    """Keeps what the log of this process would have shown."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(log_formatter("json"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="session", autouse=True)
def _collector() -> Iterator[_Collector]:
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    yield collector
    logging.getLogger().removeHandler(collector)
    # Once more with all that was planted since: a secret may have been logged before a test knew that it was one.
    check_log("\n".join(collector.lines), "the log of all tests", tracebacks_allowed=True)


@pytest.fixture(autouse=True)
def _clean_log(_collector: _Collector, request: pytest.FixtureRequest) -> Iterator[None]:
    begin, planted = len(_collector.lines), len(PLANTED)
    yield
    text = "\n".join(_collector.lines[begin:])
    # Its own secrets: those of earlier tests are looked for once, at the end.
    provokes = _provokes_errors(request)
    check_log(text, "the log of this test", tracebacks_allowed=provokes, planted_since=planted)


def _provokes_errors(request: pytest.FixtureRequest) -> bool:
    return request.node.get_closest_marker("logs_errors") is not None
