"""The watch over the logs, watched: it must see what it is there for."""

from __future__ import annotations

import pytest

from tests.support import secrets
from tests.support.secrets import check_log


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "PLANTED", {"79990000000": None})


@pytest.mark.parametrize("line", ["+79990000000", "%2B79990000000", "phone=79990000000 called"])
def test_it_sees_a_secret(line: str) -> None:
    with pytest.raises(AssertionError, match="shows the secret"):
        check_log(f"one line\n{line}\nanother", "a log")


@pytest.mark.parametrize("before", ["", "    ", '{"exception": "'])
def test_it_sees_a_traceback(before: str) -> None:
    text = f"{before}Traceback (most recent call last):\n  File ..."
    with pytest.raises(AssertionError, match="has a traceback"):
        check_log(text, "a log")
    check_log(text, "a log", tracebacks_allowed=True)


def test_it_lets_an_honest_log_pass() -> None:
    check_log("request method=GET status=200 phone=***00", "a log")
