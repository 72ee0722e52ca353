"""Blocks of ids: leased once for all who wait, and refused to all of them at once."""

from __future__ import annotations

import asyncio

import pytest

from app.core.errors import Unavailable
from app.core.ids import IdAllocator, Kind


class Leases:
    """A database that is silent until told otherwise."""

    def __init__(self) -> None:
        self.silent = True
        self.asked = 0

    async def __call__(self, kind: Kind, count: int) -> int:
        self.asked += 1
        await asyncio.sleep(0)  # others get in line
        if self.silent:
            raise Unavailable("database_unavailable", "The database does not answer; try again.")
        return 1000 * self.asked


async def test_who_waits_in_line_for_a_lease_that_fails_does_not_wait_for_one_of_their_own() -> None:
    leases = Leases()
    ids = IdAllocator(leases)
    outcomes = await asyncio.gather(*(ids.reserve("chat") for _ in range(100)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 100
    assert leases.asked == 1
    leases.silent = False
    given = await asyncio.gather(*(ids.reserve("chat") for _ in range(100)))
    assert len({one for some in given for one in some}) == 100
    assert leases.asked == 2


async def test_a_lease_that_fails_is_tried_again_by_who_comes_later() -> None:
    leases = Leases()
    ids = IdAllocator(leases)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await ids.reserve("message")
    assert leases.asked == 3
