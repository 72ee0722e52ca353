"""What Firebase's answers mean, where the tests of push do not come by."""

from __future__ import annotations

import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from app.services.firebase import _retry_after


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("2.5", 2.5), ("-3", 0), ("soon", None), ("", None)])
def test_a_retry_after_is_seconds(text: str, seconds: float | None) -> None:
    assert _retry_after(SimpleNamespace(headers={"Retry-After": text})) == seconds


def test_a_retry_after_may_be_a_date_and_may_be_missing() -> None:
    date = formatdate(time.time() + 100, usegmt=True)
    assert _retry_after(SimpleNamespace(headers={"Retry-After": date})) == pytest.approx(100, abs=5)
    assert _retry_after(SimpleNamespace(headers={})) is None
    assert _retry_after(None) is None
