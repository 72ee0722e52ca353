"""Supervised tasks: one that ends is told of, counted, and started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from app.core import metrics, tasks
from app.core.tasks import supervise

pytestmark = pytest.mark.logs_errors


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before each new start, none of which is waited for."""
    taken: list[float] = []
    sleep = asyncio.sleep

    async def no_sleep(seconds: float) -> None:
        taken.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    return taken


def failing(times: int, fail: Callable[[], None]) -> tuple[Callable[[], object], asyncio.Event]:
    """Work that fails so often and then goes on for ever; set once it does."""
    steady = asyncio.Event()
    left = times

    async def work() -> None:
        nonlocal left
        if left:
            left -= 1
            fail()
            return
        steady.set()
        await asyncio.Event().wait()

    return work, steady


def restarts(name: str) -> float:
    return metrics.background_task_restarts.labels(name)._value.get()  # type: ignore[no-any-return]


def break_it() -> None:
    raise ZeroDivisionError("something nobody thought of")


def cancel_something_else() -> None:
    raise asyncio.CancelledError


def just_return() -> None:
    pass


@pytest.mark.parametrize(
    ("fail", "told"),
    [(break_it, "ZeroDivisionError"), (cancel_something_else, "CancelledError"), (just_return, "it returned")],
)
async def test_a_task_that_ends_is_logged_counted_and_started_again_after_growing_pauses(
    fail: Callable[[], None], told: str, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    name = f"test-{told}"
    work, steady = failing(9, fail)
    task = supervise(name, work)  # type: ignore[arg-type]
    await asyncio.wait_for(steady.wait(), 10)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert restarts(name) == 9
    lines = [record for record in caplog.records if record.getMessage() == "background_task_restarted"]
    assert len(lines) == 9
    assert {(line.__dict__["task"], line.__dict__["error"], line.levelno) for line in lines} == {
        (name, told, logging.ERROR)
    }
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert restarts(name) == 9


async def test_cancelling_it_ends_it_even_while_it_pauses() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        break_it()

    task = supervise("test-pause", work)
    await asyncio.wait_for(begun.wait(), 10)
    await asyncio.sleep(0)  # into the pause
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 0.09)


async def test_work_that_may_end_ends_when_it_is_done_and_not_before(pauses: list[float]) -> None:
    left = 3

    async def work() -> None:
        nonlocal left
        left -= 1

    await asyncio.wait_for(supervise("test-until", work, until=lambda: not left), 10)
    assert left == 0
    assert restarts("test-until") == 2


async def test_a_failure_after_a_steady_time_is_a_first_one_again(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "STEADY_SECONDS", -1.0)
    work, steady = failing(4, break_it)
    task = supervise("test-steady", work)  # type: ignore[arg-type]
    await asyncio.wait_for(steady.wait(), 10)
    assert pauses == [0.1, 0.1, 0.1, 0.1]
    task.cancel()
