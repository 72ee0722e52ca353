"""One question for many: what waits is asked together, and what cannot be asked keeps nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from app.core.errors import Unavailable
from app.services.coalescer import Coalescer


async def test_what_is_asked_for_while_an_answer_is_under_way_is_asked_for_together_after_it() -> None:
    asked: list[list[int]] = []
    began, may_answer = asyncio.Event(), asyncio.Event()

    async def look_up(keys: Sequence[int]) -> dict[int, int]:
        asked.append(list(keys))
        began.set()
        await may_answer.wait()
        return {key: key * 2 for key in keys if key < 9}

    coalescer = Coalescer(look_up, most=3)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(coalescer.get(1))
        await began.wait()
        others = [group.create_task(coalescer.get(key)) for key in (1, 2, 2, 3, 9)]
        await asyncio.sleep(0)
        may_answer.set()
    assert first.result() == 2
    assert [other.result() for other in others] == [2, 4, 4, 6, None]
    assert asked == [[1], [1, 2, 3], [9]]


async def test_who_waits_behind_a_question_that_the_database_does_not_answer_is_refused_with_it() -> None:
    asked = 0
    began, may_fail = asyncio.Event(), asyncio.Event()

    async def look_up(keys: Sequence[int]) -> dict[int, int]:
        nonlocal asked
        asked += 1
        began.set()
        await may_fail.wait()
        if asked == 1:
            raise Unavailable("database_unavailable", "It does not answer.")
        return dict.fromkeys(keys, 0)

    coalescer = Coalescer(look_up, most=1)
    waits = [asyncio.create_task(coalescer.get(key)) for key in range(5)]
    await began.wait()
    may_fail.set()
    for wait in waits:
        with pytest.raises(Unavailable):
            await wait
    assert asked == 1
    assert await coalescer.get(7) == 0
