"""Reads the states that metrics show: sockets, queues, pools, memory. And the lag of the event loop, all the time."""

from __future__ import annotations

import asyncio
import os
import time

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from app.core import metrics, process
from app.core.security import PasswordHasher
from app.core.tasks import supervise
from app.db.database import Database
from app.services.admission import Admission
from app.services.chat_log.writer import Writer
from app.services.cluster import Cluster
from app.services.connection_manager import ConnectionManager
from app.services.notification_service import NotificationService

LAG_SECONDS = 0.25
SHARE_SECONDS = 1.0
"""Workers that show one view write their states so often: whichever is asked can only read the others' files."""


class Telemetry:
    """One per process."""

    def __init__(
        self,
        *,
        database: Database,
        connections: ConnectionManager,
        writer: Writer,
        hasher: PasswordHasher,
        notifications: NotificationService,
        cluster: Cluster,
        admission: Admission,
    ) -> None:
        self._database = database
        self._connections = connections
        self._writer = writer
        self._hasher = hasher
        self._notifications = notifications
        self._cluster = cluster
        self._admission = admission
        self._task: asyncio.Task[None] | None = None
        self._cpu = 0.0
        self._share_at = 0.0
        metrics.started_at.set(time.time())

    def start(self) -> None:
        """Begin to watch the event loop."""
        metrics.workers.set(1)
        self._task = supervise("telemetry", self._run)

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        metrics.workers.set(0)

    async def exposition(self) -> bytes:
        """All metrics as they are now, in Prometheus' text format."""
        self.publish()
        return await asyncio.to_thread(metrics.exposition)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._tick(loop.time(), due)

    def _tick(self, now: float, due: float) -> None:
        metrics.event_loop_lag.observe(max(0.0, now - due))
        if metrics.SHARED and now >= self._share_at:
            self.publish()
            self._share_at = now + SHARE_SECONDS

    def publish(self) -> None:
        """Let the metrics show how things are now."""
        metrics.move_tallies()
        metrics.sockets_open.set(self._connections.count)
        metrics.http_connections.set(self._admission.open_connections)
        metrics.users_online.set(len(self._connections.users))
        metrics.writer_queue.set(self._writer.waiting)
        metrics.catch_up_waiting.set(self._database.bulk_reads.waiting)
        metrics.bulk_reads_waiting.set(self._admission.bulk.waiting)
        metrics.argon2_queue.set(self._hasher.waiting)
        metrics.bus_up.set(self._cluster.reliable)
        metrics.bus_workers.set(len(self._cluster.bus.peers) if self._cluster.bus is not None else 0)
        metrics.push_devices.set(self._notifications.devices_waiting)
        metrics.push_chats.set(self._notifications.chats_waiting)
        for pool, engine in (("read", self._database.read_engine), ("write", self._database.write_engine)):
            in_use, most = _pool(engine)
            metrics.database_connections.labels(pool).set(in_use)
            metrics.database_connections_max.labels(pool).set(most)
        metrics.asyncio_tasks.set(len(asyncio.all_tasks()))
        metrics.resident_bytes.set(process.resident_bytes())
        metrics.open_fds.set(process.open_fds())
        metrics.max_fds.set(process.max_fds())
        cpu = sum(os.times()[:2])
        metrics.cpu_seconds.inc(max(0.0, cpu - self._cpu))
        self._cpu = cpu


def _pool(engine: AsyncEngine) -> tuple[int, int]:
    """(connections in use, connections at most)."""
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        raise TypeError("a pool without bounds")
    return pool.checkedout(), pool.size()
