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

import uvicorn

from app.core.config import Settings

log = logging.getLogger(__name__)


def requests_seconds(settings: Settings) -> int:
    """What is left of a stop's time for the requests still under way once the sockets are drained."""
    return max(1, round(settings.shutdown_seconds / 4))


@contextlib.contextmanager
def graceful_stop(drain: Callable[[], Awaitable[None]], settings: Settings) -> Iterator[None]:
    """While this lasts, the first SIGTERM or SIGINT runs `drain` before the server sees it; a second does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals; whoever runs us elsewhere stops us by other means
        return
    loop = asyncio.get_running_loop()
    draining: set[asyncio.Task[None]] = set()
    inner = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    server = getattr(inner[signal.SIGTERM], "__self__", None)
    if isinstance(server, uvicorn.Server) and server.config.timeout_graceful_shutdown is None:
        # Started as `uvicorn app.main:app`, it would wait for ever for a client that does not read its download.
        server.config.timeout_graceful_shutdown = requests_seconds(settings)

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
            if isinstance(server, uvicorn.Server):
                server.force_exit = True  # which it does by itself at a second SIGINT only
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
