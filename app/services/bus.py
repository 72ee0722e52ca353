"""The bus between workers, over Redis: hints, never the only copy of anything.

Whoever posts neither waits nor fails. What gathers while one round trip is under way goes out with the next, as one
message per worker it is for, however many items and recipients that has. Messages are numbered, so that a worker knows
when it lost some; what they would have told is in the database, and is found there by the sweep and by heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, MaxConnectionsError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from app.core import metrics
from app.core.clock import Clock
from app.core.errors import StartupError
from app.core.tasks import supervise

log = logging.getLogger(__name__)

BUS_ERRORS = (RedisError, OSError, TimeoutError, RuntimeError)
"""What Redis raises when it is away. Its own time-outs and lost connections are among them; of a connection that was
just reset uvloop says RuntimeError."""
CALL_SECONDS = 1.0
"""Redis that is silent for so long is away."""
BEAT_SECONDS = 1.0
SILENT_SECONDS = 5.0
"""A worker not heard for so long is gone, and a bus on which one does not even hear oneself is down."""
BLIND_SECONDS = 30.0
"""While the bus is down nobody is heard: other workers are believed to be there for so long."""
OUTBOX_ITEMS_MAX = 20_000
"""Items waiting for Redis; what comes on top is lost, as anything on this bus may be."""

Item = Mapping[str, Any]
"""What one worker tells another: a `kind`, and what belongs to it (services/cluster.py)."""

EVERYBODY = ""


@dataclass(slots=True)
class _Peer:
    """Another worker, as far as it is heard."""

    heard_at: float
    everybody: int = 0
    """The number of its last message to everybody; 0 before the first that was heard."""
    own: int = 0
    """The number of its last message to this worker; 0 before the first that was heard."""


class _PatientPool(BlockingConnectionPool):
    """Whoever finds no free connection waits for one. Raises MaxConnectionsError to who waited in vain: the library's
    own error is the one of a Redis that is away."""

    async def get_connection(self, *_: Any, **__: Any) -> AbstractConnection:
        try:
            return cast(AbstractConnection, await super().get_connection())  # type: ignore[no-untyped-call]
        except RedisConnectionError as error:
            if isinstance(error.__cause__, TimeoutError):
                raise MaxConnectionsError(str(error)) from error
            raise


def redis_client(url: str) -> Redis:
    """A client of Redis that fails quickly, and leaves trying again to its caller. Raises ValueError for no URL."""
    return Redis.from_url(url, **_impatient())


def patient_redis_client(url: str, connections: int) -> Redis:
    """The same for many callers at once, who share so many connections: they wait CALL_SECONDS for one, then get
    MaxConnectionsError. Raises ValueError for no URL."""
    return Redis.from_pool(
        _PatientPool.from_url(url, max_connections=connections, timeout=CALL_SECONDS, **_impatient())
    )


def _impatient() -> dict[str, Any]:
    return {
        "socket_timeout": CALL_SECONDS,
        "socket_connect_timeout": CALL_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
    }


async def check_redis(redis: Redis) -> None:
    """Ask Redis once. Raises StartupError when it answers and will never do as REDIS_URL says, and what Redis raises
    when it is away."""
    try:
        await redis.ping()
    except AuthenticationError as error:
        raise StartupError("Redis refuses the password in REDIS_URL, or wants one.") from error
    except ResponseError as error:
        if "DB index" not in str(error):
            raise
        raise StartupError("Redis has no such database as REDIS_URL names: the number after the last slash.") from error


class Bus:
    """This worker's end of the bus. Set the callbacks, then `start`."""

    def __init__(self, redis: Redis, clock: Clock) -> None:
        self.worker_id = secrets.token_hex(6)
        self.on_item: Callable[[str, Item], None]
        """Called with who sent it, and an item."""
        self.on_peer: Callable[[str, bool], None]
        """Called with another worker, and whether it came or went."""
        self.on_lost: Callable[[], None]
        """Called when messages were lost, or may have been: what was learned from the bus may be outdated. Often, when
        many workers come and go."""
        self.beat: Callable[[], Item]
        """What to say of oneself every second."""
        self._redis = redis
        self._clock = clock
        self._prefix = ""
        self._outboxes: dict[str, list[Item]] = {}
        self._waiting = 0
        self._flushing = asyncio.Lock()
        self._leaving = False
        self._numbers: dict[str, int] = {}
        self._peers: dict[str, _Peer] = {}
        self._wake = asyncio.Event()
        self._echoed_at = -SILENT_SECONDS
        self._down_at: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def healthy(self) -> bool:
        """Whether this worker has lately heard itself on the bus."""
        return self._clock.monotonic() - self._echoed_at < SILENT_SECONDS

    @property
    def peers(self) -> list[str]:
        """The other workers, as far as they are heard."""
        return list(self._peers)

    async def check(self) -> None:
        """Raises StartupError when Redis will not serve this worker; whether it is there is for later to see."""
        with contextlib.suppress(*BUS_ERRORS):
            await check_redis(self._redis)

    def start(self, namespace: str) -> None:
        """Begin to send and to hear. Workers of one namespace hear each other."""
        self._prefix = f"dialect:{namespace}:"
        self._echoed_at = self._clock.monotonic()  # it is given the time to come up
        self._tasks = [
            supervise(name, run)
            for name, run in (("bus-read", self._read), ("bus-send", self._send), ("bus-beat", self._beat))
        ]

    async def stop(self) -> None:
        """Say what is left to say and goodbye, as far as Redis is there, and end."""
        if self._tasks:
            self._outboxes.setdefault(EVERYBODY, []).append({"kind": "bye"})
            self._leaving = True  # nobody hears what is said after it
            with contextlib.suppress(*BUS_ERRORS):
                async with asyncio.timeout(2 * CALL_SECONDS):
                    await self._flush()  # after the one under way, which a cancelled task would lose
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        with contextlib.suppress(*BUS_ERRORS):
            await self._redis.aclose()

    def post(self, item: Item, to: str = EVERYBODY) -> None:
        """Tell another worker, or everybody, something. Never waits and never fails; it may be lost."""
        if self._leaving or self._waiting >= OUTBOX_ITEMS_MAX:
            metrics.bus_dropped.inc()
            self._numbers[to] = self._numbers.get(to, 0) + 1  # by the hole they know that they missed something
            return
        self._waiting += 1
        self._outboxes.setdefault(to, []).append(item)
        self._wake.set()

    # --- sending ---

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._flush()
            except BUS_ERRORS as error:
                self._note_down(error)
                await asyncio.sleep(0.1)

    async def _flush(self) -> None:
        """Send what has gathered in one round trip, one after the other. Raises what Redis raises; then it is lost."""
        async with self._flushing:
            outboxes, self._outboxes, self._waiting = self._outboxes, {}, 0
            if outboxes:
                await self._publish(outboxes)

    async def _publish(self, outboxes: dict[str, list[Item]]) -> None:
        # Everybody's last: a heartbeat says how much was sent to each before it.
        everybody = outboxes.pop(EVERYBODY, None)
        pipeline = self._redis.pipeline(transaction=False)
        for to, items in outboxes.items():
            _ = pipeline.publish(self._prefix + to, self._message(to, items))
        if everybody:
            _ = pipeline.publish(self._prefix + "all", self._message(EVERYBODY, everybody))
        try:
            async with asyncio.timeout(2 * CALL_SECONDS):
                await pipeline.execute()
        except BaseException:
            metrics.bus_dropped.inc(sum(map(len, outboxes.values())) + len(everybody or ()))
            raise
        metrics.bus_sent.n += len(outboxes) + bool(everybody)

    def _message(self, to: str, items: Sequence[Item]) -> bytes:
        number = self._numbers[to] = self._numbers.get(to, 0) + 1
        return orjson.dumps({"from": self.worker_id, "to": to, "number": number, "items": items})

    async def _beat(self) -> None:
        while True:
            sent = {to: number for to, number in self._numbers.items() if to}
            self.post({**self.beat(), "kind": "beat", "sent": sent})
            self._expire()
            await asyncio.sleep(BEAT_SECONDS)

    def _expire(self) -> None:
        now = self._clock.monotonic()
        if self.healthy:
            if self._down_at is not None and self._down_at <= self._echoed_at:
                log.info("bus_is_up", extra={"down_seconds": round(now - self._down_at, 1)})
                self._down_at = None
                for peer in self._peers.values():
                    peer.heard_at = max(peer.heard_at, now)  # nobody could be heard until now
            patience = SILENT_SECONDS
        else:
            self._note_down(None)
            patience = BLIND_SECONDS
        silent = [worker for worker, peer in self._peers.items() if now - peer.heard_at > patience]
        for worker in silent:
            self._forget(worker)
        if silent:
            self.on_lost()  # it may have died between a commit and the word of it

    def _note_down(self, error: BaseException | None) -> None:
        if self._down_at is None:
            self._down_at = self._clock.monotonic()
            log.warning(
                "bus_is_down",
                extra={"error": type(error).__name__ if error else "silence", "retrying": "until it answers"},
            )

    # --- hearing ---

    async def _read(self) -> None:
        pause = 0.1
        while True:
            pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
            try:
                await pubsub.subscribe(self._prefix + "all", self._prefix + self.worker_id)
                self.on_lost()  # whatever was said before
                pause = 0.1
                heard_at = self._clock.monotonic()
                while self._clock.monotonic() - heard_at < SILENT_SECONDS:
                    message = await pubsub.get_message(timeout=BEAT_SECONDS)
                    if message is not None:
                        heard_at = self._clock.monotonic()
                        self._take(message["data"])
            except BUS_ERRORS as error:
                self._note_down(error)
            finally:
                with contextlib.suppress(*BUS_ERRORS):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    def _take(self, data: bytes) -> None:
        try:
            message = orjson.loads(data)
            sender, to, number, items = message["from"], message["to"], message["number"], message["items"]
            if sender == self.worker_id:
                self._echoed_at = self._clock.monotonic()
                return
            metrics.bus_received.n += 1
            self._count(cast(str, sender), cast(str, to), cast(int, number))
            for item in items:
                match item["kind"]:
                    case "bye":
                        self._forget(sender)
                    case "beat":
                        self._compare(sender, item["sent"].get(self.worker_id, 0))
                        self.on_item(sender, item)
                    case _:
                        self.on_item(sender, item)
        except Exception:
            # Another version's words, or a stranger's: the database has what they were about.
            log.exception("bus_message_not_understood")
            self.on_lost()

    def _count(self, sender: str, to: str, number: int) -> None:
        peer = self._peers.get(sender)
        if peer is None:
            peer = self._peers[sender] = _Peer(self._clock.monotonic())
            log.info("worker_joined", extra={"worker": sender})
            self.on_peer(sender, True)
        peer.heard_at = self._clock.monotonic()
        if to == EVERYBODY:
            before, peer.everybody = peer.everybody, number
        else:
            before, peer.own = peer.own, number
        self._miss(before, number - 1)

    def _compare(self, sender: str, sent: int) -> None:
        """The last message to this worker may be lost, too: the next heartbeat tells."""
        peer = self._peers[sender]
        if sent > peer.own:
            before, peer.own = peer.own, sent
            self._miss(before, sent)

    def _miss(self, before: int, last: int) -> None:
        """What came last was number `before`, and what should have is number `last`."""
        if last > before:
            # Of who is heard for the first time nobody knows how much was said to whom: a worker that was taken for
            # dead comes back like that, too.
            if before:
                metrics.bus_lost.inc(last - before)
            self.on_lost()

    def _forget(self, worker: str) -> None:
        if self._peers.pop(worker, None) is not None:
            log.info("worker_left", extra={"worker": worker})
            self.on_peer(worker, False)
