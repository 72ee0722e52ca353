"""One question for many: what is asked for while an answer is under way goes into the next question, all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar

from app.core.errors import Unavailable

K = TypeVar("K")
V = TypeVar("V")


class Coalescer(Generic[K, V]):
    """Looks keys up, many by one question, however many ask at once. Waits on no timer."""

    def __init__(self, look_up: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]], *, most: int) -> None:
        """`look_up` answers for at most `most` keys; what is missing from its answer does not exist."""
        self._look_up = look_up
        self._most = most
        self._waiting: dict[K, asyncio.Future[V | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V | None:
        """What belongs to a key, by a question asked after this call. Raises what `look_up` raises."""
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
            future.add_done_callback(_notice)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="coalescer")
        return await asyncio.shield(future)  # who gives up does so alone

    async def _run(self) -> None:
        batch: dict[K, asyncio.Future[V | None]] = {}
        try:
            while self._waiting:
                batch = {key: self._waiting.pop(key) for key in list(islice(self._waiting, self._most))}
                try:
                    found = await self._look_up(list(batch))
                except Unavailable as error:
                    # Whoever stands in line is refused with the first: each would wait as long, and for as little.
                    for future in (*batch.values(), *self._waiting.values()):
                        future.set_exception(error)
                    self._waiting.clear()
                except Exception as error:
                    for future in batch.values():
                        future.set_exception(error)
                else:
                    for key, future in batch.items():
                        future.set_result(found.get(key))
        finally:
            self._task = None
            for future in (*batch.values(), *self._waiting.values()):
                future.cancel()  # does nothing to those that are answered
            self._waiting.clear()


def _notice(future: asyncio.Future[V | None]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not future.cancelled():
        future.exception()
