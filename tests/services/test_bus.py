"""The bus notices what it has lost, and who has gone; who is online elsewhere follows."""

from __future__ import annotations

from typing import Any

import orjson

from app.core import metrics
from app.services.bus import BLIND_SECONDS, EVERYBODY, SILENT_SECONDS, Bus, Item, redis_client
from tests.support.clock import ManualClock
from tests.support.metrics import value


class Heard:
    """A bus that is not connected, fed by hand, and what it makes of it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.bus = Bus(redis_client("redis://127.0.0.1:1/0"), self.clock)
        self.items: list[tuple[str, Item]] = []
        self.peers: list[tuple[str, bool]] = []
        self.losses = 0
        self._lost_before = self._lost_so_far()
        self.bus.on_item = lambda sender, item: self.items.append((sender, item))
        self.bus.on_peer = lambda worker, came: self.peers.append((worker, came))
        self.bus.on_lost = self._lose
        self.bus.beat = dict

    @staticmethod
    def _lost_so_far() -> float:
        return value(metrics.exposition().decode(), "dialect_bus_messages_lost_total")

    @property
    def lost(self) -> float:
        """Messages that were missed, as operators see it."""
        return self._lost_so_far() - self._lost_before

    def _lose(self) -> None:
        self.losses += 1

    def take(self, number: int, *items: dict[str, Any], to: str = EVERYBODY, sender: str = "other") -> None:
        """A message arrives."""
        self.bus._take(orjson.dumps({"from": sender, "to": to, "number": number, "items": items}))

    def later(self, seconds: float, *, echo: bool) -> None:
        """Time passes; with `echo` the worker still hears itself."""
        self.clock.advance(seconds)
        if echo:
            self.take(1, {"kind": "beat", "sent": {}}, sender=self.bus.worker_id)
        self.bus._expire()


def test_a_hole_in_the_numbers_is_noticed_and_what_came_before_a_worker_was_known_is_none() -> None:
    heard = Heard()
    heard.take(7, {"kind": "x"})
    heard.take(8, {"kind": "y"})
    assert heard.losses == 0
    assert [item["kind"] for _, item in heard.items] == ["x", "y"]
    heard.take(10, {"kind": "z"})
    assert heard.losses == 1
    assert heard.lost == 1


def test_a_lost_last_message_is_noticed_by_the_next_heartbeat() -> None:
    heard = Heard()
    me = heard.bus.worker_id
    heard.take(1, {"kind": "x"}, to=me)
    heard.take(1, {"kind": "beat", "sent": {me: 1}})
    assert heard.losses == 0
    heard.take(2, {"kind": "beat", "sent": {me: 3}})
    assert heard.losses == 1
    assert heard.lost == 2
    heard.take(3, {"kind": "beat", "sent": {me: 3}})
    heard.take(4, {"kind": "y"}, to=me)
    assert heard.losses == 1


def test_a_worker_that_falls_silent_is_gone_unless_the_bus_itself_is_down() -> None:
    heard = Heard()
    heard.later(0, echo=True)
    heard.take(1, {"kind": "beat", "sent": {}})
    assert heard.peers == [("other", True)]
    heard.later(SILENT_SECONDS + 1, echo=False)  # nobody is heard, not even oneself
    assert heard.peers == [("other", True)]
    heard.later(0, echo=True)  # it is back, and the other has its time again
    assert heard.peers == [("other", True)]
    heard.later(SILENT_SECONDS + 1, echo=True)
    assert heard.peers == [("other", True), ("other", False)]


def test_a_bus_that_stays_down_leaves_nobody() -> None:
    heard = Heard()
    heard.later(0, echo=True)
    heard.take(1, {"kind": "beat", "sent": {}})
    heard.later(BLIND_SECONDS + 1, echo=False)
    assert heard.peers == [("other", True), ("other", False)]


def test_a_worker_that_says_goodbye_is_gone_at_once() -> None:
    heard = Heard()
    heard.take(1, {"kind": "beat", "sent": {}})
    heard.take(2, {"kind": "bye"})
    assert heard.peers == [("other", True), ("other", False)]
    assert heard.bus.peers == []
