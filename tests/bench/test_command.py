"""The benchmark's command line: what it refuses, and that it never passes over MySQL silently."""

from __future__ import annotations

import pytest

from bench.__main__ import Plan, choose_databases, parse
from bench.failure import Failed
from bench.servers import MYSQL_URL_NAME, MySQL, raised_limits


@pytest.fixture(autouse=True)
def _no_mysql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MYSQL_URL_NAME, raising=False)
    monkeypatch.delenv("CI", raising=False)


def test_without_mysql_a_short_run_in_ci_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")

    with pytest.raises(Failed, match=MYSQL_URL_NAME):
        choose_databases(["sqlite", "mysql"], short=True)


def test_without_mysql_a_developer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_databases(["sqlite", "mysql"], short=False) == (["sqlite"], None)
    assert "MySQL IS LEFT OUT" in capsys.readouterr().err


def test_only_mysql_without_mysql_fails() -> None:
    with pytest.raises(Failed, match="make mysql"):
        choose_databases(["mysql"], short=False)


@pytest.mark.parametrize("url", ["sqlite:///x", "mysql://", "nonsense"])
def test_a_url_that_is_no_mysql_is_refused(url: str) -> None:
    with pytest.raises(Failed, match="mysql://"):
        MySQL.from_url(url)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--only", "p9"], ["--db", "oracle"], ["--db", ""], ["--repeat", "0"], ["--scale", "5k"]),
        *(["--workers", "3"], ["--workers", ""]),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([1], [("sqlite", "dialect"), ("mysql", "dialect")]),
        ([2], [("sqlite", "dialect"), ("mysql", "workers")]),
        ([1, 2], [("sqlite", "dialect"), ("mysql", "dialect"), ("mysql", "workers")]),
    ],
)
def test_two_workers_are_measured_on_mysql_alone(workers: list[int], expected: list[tuple[str, str]]) -> None:
    plan = Plan([], ["sqlite", "mysql"], 1, 1.0, 0.0, 1, workers=workers)
    assert plan.variants == expected


def test_every_rate_limit_is_switched_off() -> None:
    limits = raised_limits()

    assert limits["LIMIT_REGISTER_PER_IP"] == ""
    assert limits["LIMIT_MESSAGES_PER_SECOND"] == "0"
    assert all(value in ("", "0") for value in limits.values())
