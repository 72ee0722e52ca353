"""Endless background tasks: each is supervised, so that none can die unseen.

A task that ends by itself is logged, counted and started again, after a pause that grows while it goes on failing.
Only its cancellation, at a stop, ends it. What a loop expects (a database that is away) it handles itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from app.core import metrics

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.1
PAUSE_MAX_SECONDS = 5.0
STEADY_SECONDS = 30.0
"""After so long without a failure the next one is a first one again."""


def _never() -> bool:
    return False


def supervise(
    name: str, work: Callable[[], Coroutine[Any, Any, None]], *, until: Callable[[], bool] = _never
) -> asyncio.Task[None]:
    """Run `work` for as long as this task is not cancelled, or until it returns when `until` says that it may.

    `name` is a word of the code: it becomes a label of a metric.
    """
    return asyncio.create_task(keep_running(name, work, until=until), name=name)


async def keep_running(
    name: str, work: Callable[[], Coroutine[Any, Any, None]], *, until: Callable[[], bool] = _never
) -> None:
    """What `supervise` makes a task of; for who starts and ends tasks in a way of their own."""
    loop = asyncio.get_running_loop()
    pause = PAUSE_SECONDS
    while True:
        began = loop.time()
        error: BaseException | None = None
        try:
            await work()
            if until():
                return
        except asyncio.CancelledError as cancelled:
            if _is_cancelled():
                raise
            error = cancelled  # something that it awaited was cancelled: to die of that is how tasks get lost
        except Exception as failure:
            error = failure
        metrics.background_task_restarts.labels(name).inc()
        if loop.time() - began > STEADY_SECONDS:
            pause = PAUSE_SECONDS
        log.error(
            "background_task_restarted",
            exc_info=error,
            extra={"task": name, "error": "it returned" if error is None else type(error).__name__, "pause": pause},
        )
        await asyncio.sleep(pause)
        pause = min(pause * 2, PAUSE_MAX_SECONDS)


def _is_cancelled() -> bool:
    """Whether it is this task that somebody wants to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
