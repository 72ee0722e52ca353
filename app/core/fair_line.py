"""A line for a few places, in which everybody waits for at most so many of each other account."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator


class _Account:
    """What one account has in the line."""

    __slots__ = ("count", "turns")

    def __init__(self, at_once: int) -> None:
        self.turns = asyncio.Semaphore(at_once)
        self.count = 0
        """Those who wait and those whose turn it is."""


class FairLine:
    """The line of those who wait for one of a few places.

    An account stands in it with so many of its own at a time, whatever number of them it has: the others wait apart,
    and hold nobody up.
    """

    def __init__(self, places: int, *, of_account: int = 1) -> None:
        """`of_account`: with how many an account stands in line, or has a place."""
        self._places = asyncio.Semaphore(max(1, places))
        self._of_account = of_account
        self._accounts: dict[int, _Account] = {}
        self.waiting = 0
        """How many wait for their turn."""

    def __contains__(self, user_id: int) -> bool:
        """Whether an account has somebody who waits or whose turn it is."""
        return user_id in self._accounts

    @property
    def accounts(self) -> int:
        """How many accounts have somebody who waits or whose turn it is."""
        return len(self._accounts)

    @contextlib.asynccontextmanager
    async def of(self, user_id: int) -> AsyncIterator[None]:
        """The turn of one of an account."""
        came_at = time.monotonic()
        account = self._accounts.setdefault(user_id, _Account(self._of_account))
        account.count += 1
        try:
            await self._wait(account.turns)
            try:
                await self._enter(came_at)
                try:
                    yield
                finally:
                    self._places.release()
            finally:
                account.turns.release()
        finally:
            account.count -= 1
            if not account.count:
                del self._accounts[user_id]

    async def __aenter__(self) -> None:
        """The turn of one who is of no account."""
        await self._enter(time.monotonic())

    async def __aexit__(self, *_: object) -> None:
        self._places.release()

    async def _enter(self, came_at: float) -> None:
        """Wait for a place, and have it unless this raises. `came_at`: of the monotonic clock."""
        await self._wait(self._places)

    async def _wait(self, turns: asyncio.Semaphore) -> None:
        self.waiting += 1
        try:
            await turns.acquire()
        finally:
            self.waiting -= 1
