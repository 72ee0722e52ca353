"""Limits of the hot path: who is limited stays so, whatever others do."""

from __future__ import annotations

from app.services.token_bucket import TokenBuckets
from tests.support.clock import ManualClock


def test_who_asks_all_the_time_stays_limited_however_many_others_ask() -> None:
    buckets = TokenBuckets(0.001, 2, ManualClock(), most=2)
    assert [buckets.take(account) for account in (1, 2, 1)] == [0, 0, 0]
    assert buckets.take(3) == 0  # makes 2, the silent one, go
    assert buckets.take(1) > 0
