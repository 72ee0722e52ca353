"""The benchmark's command line: what it refuses, and that it never passes over MySQL silently."""

from __future__ import annotations

import pytest

from bench.__main__ import choose_databases, parse
from bench.servers import MYSQL_URL_NAME, Failed, MySQL, raised_limits


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
    "arguments", [["--only", "p9"], ["--db", "oracle"], ["--db", ""], ["--repeat", "0"], ["--scale", "5k"]]
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)


def test_every_rate_limit_is_switched_off() -> None:
    limits = raised_limits()

    assert limits["LIMIT_REGISTER_PER_IP"] == ""
    assert limits["LIMIT_MESSAGES_PER_SECOND"] == "0"
    assert all(value in ("", "0") for value in limits.values())
