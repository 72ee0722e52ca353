"""Tickets kept in memory: bounded, and quickly forgotten."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import pytest

from app.core.errors import Unavailable
from app.services import ticket_store
from app.services.caller import Caller
from app.services.ticket_store import MemoryTickets
from tests.support.clock import ManualClock

LATER = datetime(2100, 1, 1, tzinfo=UTC)


async def test_a_full_store_refuses_until_its_tickets_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_store, "TICKETS", 3)
    clock = ManualClock()
    tickets = MemoryTickets(clock)
    for session_id in range(3):
        await tickets.issue(Caller(1, session_id, LATER), 30)
    with pytest.raises(Unavailable, match="Too many sockets") as refused:
        await tickets.issue(Caller(1, 9, LATER), 30)
    assert refused.value.code == "overloaded"
    clock.advance(30)
    caller = Caller(1, 9, LATER)
    assert await tickets.redeem(await tickets.issue(caller, 30)) == caller


async def test_a_ticket_costs_the_same_among_ten_thousand() -> None:
    tickets = MemoryTickets(ManualClock())
    lines = 0

    def count(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    async def lines_run_for(session_id: int) -> int:
        nonlocal lines
        lines = 0
        before = sys.gettrace()
        sys.settrace(count)
        try:
            await tickets.issue(Caller(1, session_id, LATER), 30)
        finally:
            sys.settrace(before)
        return lines

    first = await lines_run_for(1)
    for session_id in range(2, ticket_store.TICKETS):
        await tickets.issue(Caller(1, session_id, LATER), 30)
    assert await lines_run_for(0) <= first + 5  # it is the only one that finds a ticket before it
