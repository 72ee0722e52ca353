"""The bus notices what it has lost, and who has gone; who is online elsewhere follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest
from redis.asyncio.client import PubSub

from app.core import metrics
from app.core.clock import SystemClock
from app.services import bus as bus_module
from app.services.bus import BLIND_SECONDS, EVERYBODY, SILENT_SECONDS, Bus, Item, redis_client
from app.services.cluster import Cluster
from app.services.container import Services
from tests.services.test_sequencer import commit, message
from tests.support.clock import ManualClock
from tests.support.metrics import value
from tests.support.people import people
from tests.support.redis_server import RedisServer


class Heard:
    """A bus that is not connected, fed by hand, and what it makes of it."""

    def __init__(self, bus: Bus | None = None) -> None:
        self.clock = ManualClock()
        self.bus = bus or Bus(redis_client("redis://127.0.0.1:1/0"), self.clock)
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


def test_a_hole_in_the_numbers_is_noticed_and_what_was_said_before_a_worker_was_known_is_not_counted() -> None:
    heard = Heard()
    heard.take(7, {"kind": "x"})
    assert (heard.losses, heard.lost) == (1, 0)
    heard.take(8, {"kind": "y"})
    assert heard.losses == 1
    assert [item["kind"] for _, item in heard.items] == ["x", "y"]
    heard.take(10, {"kind": "z"})
    assert (heard.losses, heard.lost) == (2, 1)


def test_of_a_worker_that_is_heard_from_its_first_word_to_its_goodbye_nothing_is_lost() -> None:
    heard = Heard()
    me = heard.bus.worker_id
    heard.take(1, {"kind": "x"}, to=me)
    heard.take(1, {"kind": "beat", "sent": {me: 1}})
    heard.take(2, {"kind": "beat", "sent": {me: 1}}, {"kind": "bye"})
    assert heard.losses == 0


@pytest.mark.parametrize("first", ["to this worker", "to everybody"])
def test_what_a_worker_said_while_it_was_taken_for_dead_is_missed_once_it_is_back(first: str) -> None:
    heard = Heard()
    me = heard.bus.worker_id
    heard.later(0, echo=True)
    heard.take(1, {"kind": "x"}, to=me)
    heard.take(1, {"kind": "beat", "sent": {me: 1}})
    heard.later(SILENT_SECONDS + 1, echo=True)
    assert heard.peers == [("other", True), ("other", False)]
    before = heard.losses
    if first == "to this worker":  # as a busy worker sends them: what it says to one comes before its heartbeat
        heard.take(6, {"kind": "y"}, to=me)
    else:
        heard.take(10, {"kind": "beat", "sent": {me: 6}})
    assert heard.losses > before


@pytest.mark.logs_errors
def test_of_a_message_that_is_not_understood_the_rest_is_missed() -> None:
    heard = Heard()
    heard.take(1, {"kind": "x"}, {"what": "?"}, {"kind": "y"})
    assert [item["kind"] for _, item in heard.items] == ["x"]
    assert heard.losses == 1
    heard.bus._take(b"not a message")
    assert heard.losses == 2


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
    assert heard.losses == 0
    heard.later(SILENT_SECONDS + 1, echo=True)
    assert heard.peers == [("other", True), ("other", False)]
    assert heard.losses == 1  # killed between a commit and the word of it, perhaps


def test_many_workers_that_fall_silent_together_are_one_loss() -> None:
    heard = Heard()
    heard.later(0, echo=True)
    for number in range(50):
        heard.take(1, {"kind": "beat", "sent": {}}, sender=f"worker {number}")
    heard.later(SILENT_SECONDS + 1, echo=True)
    assert heard.bus.peers == []
    assert heard.losses == 1


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
    assert heard.losses == 0


# --- over a real Redis ------------------------------------------------------------------------------------------


class Worker(Heard):
    """A bus that is connected."""

    def __init__(self, redis: RedisServer) -> None:
        super().__init__(Bus(redis_client(redis.url), SystemClock()))
        self._told = asyncio.Event()
        self.bus.on_item = lambda sender, item: self._keep(self.items, (sender, item))
        self.bus.on_peer = lambda worker, came: self._keep(self.peers, (worker, came))

    def _keep(self, where: list[Any], what: Any) -> None:
        where.append(what)
        self._told.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Return once something that came has made this true."""
        async with asyncio.timeout(10):
            while not true():
                self._told.clear()
                await self._told.wait()

    @property
    def said(self) -> list[str]:
        """What it was told, heartbeats left out."""
        return [item["kind"] for _, item in self.items if item["kind"] != "beat"]


@pytest.fixture
async def pair(redis: RedisServer) -> AsyncIterator[tuple[Worker, Worker]]:
    """Two workers that have heard each other."""
    first, second = Worker(redis), Worker(redis)
    for worker in (first, second):
        worker.bus.start("test")
    await first.until(lambda: first.bus.peers == [second.bus.worker_id])
    await second.until(lambda: second.bus.peers == [first.bus.worker_id])
    first.losses = second.losses = 0
    yield first, second
    for worker in (first, second):
        await worker.bus.stop()


async def test_what_waits_when_a_worker_leaves_is_said_before_its_goodbye(pair: tuple[Worker, Worker]) -> None:
    leaving, staying = pair
    leaving.bus.post({"kind": "x"})
    leaving.bus.post({"kind": "y"}, staying.bus.worker_id)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not leaving.bus._outboxes  # they are under way
    leaving.bus.post({"kind": "z"})
    await leaving.bus.stop()
    await staying.until(lambda: staying.peers[-1] == (leaving.bus.worker_id, False))
    assert sorted(staying.said) == ["x", "y", "z"]
    assert staying.losses == 0


@pytest.mark.parametrize("to_all", [True, False])
async def test_whoever_is_told_too_much_at_once_learns_that_something_was_left_out(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch, to_all: bool
) -> None:
    telling, told = pair
    monkeypatch.setattr(bus_module, "OUTBOX_ITEMS_MAX", 2)
    for number in range(5):
        telling.bus.post({"kind": str(number)}, EVERYBODY if to_all else told.bus.worker_id)
    monkeypatch.undo()
    await told.until(lambda: told.said == ["0", "1"])
    await told.until(lambda: told.losses > 0)


@pytest.mark.settings(sweep_seconds=3600)
async def test_a_batch_crosses_the_bus_once_for_each_worker_however_many_of_its_people_it_concerns(
    client: httpx.AsyncClient, services: Services, redis: RedisServer
) -> None:
    everybody = await people(client, 9)
    chats = [await everybody[0].group(*everybody[1:8]) for _ in range(2)]
    bus, online = Bus(redis_client(redis.url), SystemClock()), services.online
    cluster = Cluster(clock=SystemClock(), connections=services.connections, online=online, bus=bus)
    cluster.on_lost = lambda: None
    where = {"one": everybody[:4], "two": everybody[4:8], "three": everybody[8:]}
    for worker, some in where.items():
        bus._count(worker, EVERYBODY, 1)
        online.replace(worker, {person.id: frozenset({1, 2}) for person in some})
    listener = redis_client(redis.url)
    async with listener.pubsub(ignore_subscribe_messages=True) as channels:
        await channels.subscribe(*(f"dialect:test:{worker}" for worker in where))
        cluster.start("test")
        try:
            for _ in where:  # each is asked who is online there
                await hear(channels)
            batch = await commit(services, *(message(chat, everybody[0]) for chat in chats for _ in range(25)))
            cluster.announce(batch)
            bus.post({"kind": "nothing else"}, "three")
            told = [await hear(channels) for _ in where]
        finally:
            await cluster.stop()
    await listener.aclose()
    items = {message["to"]: message["items"] for message in told}
    assert [item["kind"] for item in items.pop("three")] == ["nothing else"]
    assert sorted(items) == ["one", "two"]
    for announced in items.values():
        assert [item["kind"] for item in announced] == ["announce"] * 2
        assert [len(item["events"]) for item in announced] == [25, 25]


async def hear(channels: PubSub) -> Any:
    """The next message to one of these workers."""
    async with asyncio.timeout(10):
        while (message := await channels.get_message(timeout=10)) is None:
            pass
    return orjson.loads(message["data"])
