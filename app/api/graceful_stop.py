"""SIGTERM, before the server acts on it: in-flight sends are acknowledged, sockets are asked to come back (1012).

uvicorn would close every socket the moment it hears the signal, and the answers to what was being committed would
be lost. So the signal is held until the drain is over. Works under `python -m app` and plain uvicorn alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

log = logging.getLogger(__name__)


@contextlib.contextmanager
def graceful_stop(drain: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """While this lasts, the first SIGTERM or SIGINT runs `drain` before the server sees it; a second does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals; whoever runs us elsewhere stops us by other means
        return
    loop = asyncio.get_running_loop()
    draining: set[asyncio.Task[None]] = set()
    inner = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    async def drain_then_stop(number: int) -> None:
        try:
            await drain()
        except Exception:
            log.exception("drain_failed")
        _call(inner[signal.Signals(number)], number)

    def start(number: int) -> None:
        log.info("stopping", extra={"signal": signal.Signals(number).name})
        draining.add(loop.create_task(drain_then_stop(number), name="drain"))

    def on_signal(number: int, frame: FrameType | None) -> None:
        if draining:
            _call(inner[signal.Signals(number)], number)
        else:
            loop.call_soon_threadsafe(start, number)

    for number in inner:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in inner.items():
            if signal.getsignal(number) is on_signal:
                signal.signal(number, handler)


def _call(handler: object, number: int) -> None:
    if callable(handler):
        handler(number, None)
