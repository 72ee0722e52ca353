"""Servers that are killed and come back on the same port, the two databases one at a time, and the report."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from app.core.config import Settings
from app.db.database import migrate
from tests.chaos import report as chaos_report
from tests.chaos.own_mysql import OwnMysql, missing, own_mysql
from tests.chaos.report import Row, SceneReport
from tests.chaos.scale import FORM
from tests.support.databases import MYSQL_URL, SqliteTemplate, make_settings
from tests.support.servers import COMMANDS, Door, Server, environment, killed_at_the_end

Launch = Callable[..., Server]
FIGURES = "chaos"


# --- the report -------------------------------------------------------------------------------------------------


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[SceneReport]:
    """Takes a scene's figures and holds each against its bar."""
    report = SceneReport()
    yield report
    mark = request.node.get_closest_marker("chaos")
    assert mark is not None, "a scene with figures says what it promises: @pytest.mark.chaos(...)"
    request.node.user_properties.append((FIGURES, chaos_report.dumps(mark.args[0], request.node.name, report.figures)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what was measured, and write it into the page that DIALECT_CHAOS_REPORT names."""
    outcomes: dict[str, tuple[float, bool]] = {}
    rows: list[Row] = []
    for reports in terminalreporter.stats.values():
        for one in reports:
            if not isinstance(one, pytest.TestReport):
                continue
            seconds, passed = outcomes.get(one.nodeid, (0.0, True))
            outcomes[one.nodeid] = (max(seconds, one.duration), passed and one.passed)
    for reports in terminalreporter.stats.values():
        for one in reports:
            # The figures of a test come with the last of its phases.
            if isinstance(one, pytest.TestReport) and one.when == "teardown":
                seconds, passed = outcomes[one.nodeid]
                rows += [
                    Row.loads(str(text), seconds=seconds, passed=passed)
                    for name, text in one.user_properties
                    if name == FIGURES
                ]
    if not rows:
        return
    terminalreporter.section(f"chaos, {FORM} form")
    for promise in sorted({row.promise for row in rows}):
        terminalreporter.write_line(promise)
        for row in rows:
            if row.promise == promise:
                for line in row.told():
                    terminalreporter.write_line(f"  {line}")
    if page := os.environ.get("DIALECT_CHAOS_REPORT"):
        chaos_report.write(Path(page), FORM, rows)
        terminalreporter.write_line(f"written to {page}")


# --- servers and databases --------------------------------------------------------------------------------------


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
    """Chance that can be repeated: the seed is printed, and DIALECT_CHAOS_SEED sets it."""
    seed = int(os.environ.get("DIALECT_CHAOS_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DIALECT_CHAOS_SEED={seed}")  # noqa: T201 - pytest shows it when the test fails
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


def lacking(reason: str) -> NoReturn:
    """Leave a scene out for want of something, and say so; CI has everything, so there it fails."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def killable_mysql() -> Iterator[OwnMysql]:
    """A MySQL for this run alone, to be killed and frozen."""
    if not MYSQL_URL:
        pytest.skip("DIALECT_TEST_MYSQL_URL is not set")
    if reason := missing():
        lacking(reason)
    with own_mysql() as mysql:
        yield mysql


@pytest.fixture
def killable_settings(killable_mysql: OwnMysql, tmp_path: Path) -> Settings:
    """A fresh database on it."""
    settings = make_settings(**killable_mysql.new("dialect_chaos"), upload_path=tmp_path / "uploads")
    migrate(settings)
    return settings
