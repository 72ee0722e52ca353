"""What the server stands on, by name: which of it answers, and whether requests can be served without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

FRESH_SECONDS = 0.25
"""Everybody may ask, and each check costs something: it is made once in so long, however many ask."""

State = Literal["ok", "down", "off"]
Ask = Callable[[], Awaitable[State]]


@dataclass(frozen=True, slots=True)
class Health:
    """What came of asking."""

    ready: bool
    checks: dict[str, State]


class HealthService:
    """Asks every dependency. Each part of the server adds its own."""

    def __init__(self, *, patience_seconds: float) -> None:
        self._patience = patience_seconds
        self._asks: dict[str, Ask] = {}
        self._needed: set[str] = set()
        self._asking = asyncio.Lock()
        self._last: tuple[float, Health] | None = None

    def add(self, name: str, ask: Ask, *, needed: bool) -> None:
        """Ask `ask` for the state of `name`, too. While what is `needed` is down, the server is not ready."""
        self._asks[name] = ask
        if needed:
            self._needed.add(name)

    async def check(self) -> Health:
        """The state of everything, at most `FRESH_SECONDS` old."""
        loop = asyncio.get_running_loop()
        async with self._asking:
            if self._last is not None and loop.time() - self._last[0] < FRESH_SECONDS:
                return self._last[1]
            states = await asyncio.gather(*(self._ask(name, ask) for name, ask in self._asks.items()))
            checks = dict(zip(self._asks, states, strict=True))
            health = Health(all(checks[name] != "down" for name in self._needed), checks)
            self._last = (loop.time(), health)
            return health

    async def _ask(self, name: str, ask: Ask) -> State:
        try:
            async with asyncio.timeout(self._patience):
                return await ask()
        except TimeoutError:
            return "down"
        except Exception:
            log.exception("health_check_failed", extra={"check": name})
            return "down"
