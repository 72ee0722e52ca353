"""Ids from leased blocks (hi/lo): no clock, no round trip per id, below 2**53.

A process leases a block from the database in a transaction of its own and hands its ids out from memory. Ids are
unique and dense enough to be short; they say nothing about order, and what a crash leaves of a block is never used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from app.core.errors import Unavailable

Kind = Literal["user", "session", "chat", "message", "file"]
BLOCK: dict[Kind, int] = {"user": 50, "session": 100, "chat": 100, "message": 5000, "file": 100}

Lease = Callable[[Kind, int], Awaitable[int]]
"""Leases `n` ids of a kind and returns the first."""


class IdAllocator:
    """Hands out ids. Reserve before the first statement of a transaction: on SQLite a lease inside one would wait
    for the connection that the transaction holds."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._next: dict[Kind, int] = dict.fromkeys(BLOCK, 0)
        self._end: dict[Kind, int] = dict.fromkeys(BLOCK, 0)
        self._locks: dict[Kind, asyncio.Lock] = {kind: asyncio.Lock() for kind in BLOCK}
        self._failures: dict[Kind, int] = dict.fromkeys(BLOCK, 0)

    async def reserve(self, kind: Kind, count: int = 1) -> range:
        """`count` fresh ids in a row. Raises Unavailable when the database does not answer."""
        if self._end[kind] - self._next[kind] < count:
            failures = self._failures[kind]
            async with self._locks[kind]:
                # Somebody may have leased while this caller waited for the lock.
                if self._end[kind] - self._next[kind] < count:
                    if self._failures[kind] != failures:
                        # Or tried to: each one in line would wait for a silent database once more, after all before it.
                        raise Unavailable("database_unavailable", "The database does not answer; try again.")
                    size = max(BLOCK[kind], count)
                    try:
                        first = await self._lease(kind, size)
                    except Unavailable:
                        self._failures[kind] += 1
                        raise
                    self._next[kind], self._end[kind] = first, first + size
                return self._take(kind, count)
        return self._take(kind, count)

    def _take(self, kind: Kind, count: int) -> range:
        first = self._next[kind]
        self._next[kind] = first + count
        return range(first, first + count)
