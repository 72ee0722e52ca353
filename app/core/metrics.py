"""What operators see of a running server: every metric is declared here, and nowhere else.

Cheap where it matters: per batch, not per message; what happens for every frame is a plain integer (`Tally`), and
states are read when somebody asks (`services/telemetry.py`). Labels hold only what the code itself names: codes, kinds,
routes. Never ids, phones, addresses or words of people, for those are secret and without bound.

Several workers show one view when they share a folder, which has to be set up before this module is imported
(`metrics_folder.py`). A single process needs none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from app.core.metrics_folder import FOLDER_NAME

disable_created_metrics()  # type: ignore[no-untyped-call]

SHARED = bool(os.environ.get(FOLDER_NAME))
"""Whether the metrics of several workers are shown together. The library decides when it is imported."""

registry = CollectorRegistry()


@dataclass(frozen=True, slots=True)
class Described:
    """A metric, for the documentation."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


CATALOG: list[Described] = []
"""All metrics, in the order of this file."""


def _describe(name: str, kind: Literal["counter", "gauge", "histogram"], labels: Sequence[str], text: str) -> None:
    CATALOG.append(Described(name, kind, tuple(labels), text))


def _counter(name: str, text: str, *labels: str) -> Counter:
    _describe(name, "counter", labels, text)
    return Counter(name, text, labels, registry=registry)


def _gauge(
    name: str, text: str, *labels: str, over_workers: Literal["livesum", "livemax", "livemin"] = "livesum"
) -> Gauge:
    _describe(name, "gauge", labels, text)
    return Gauge(name, text, labels, registry=registry, multiprocess_mode=over_workers)


def _histogram(name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
    _describe(name, "histogram", labels, text)
    return Histogram(name, text, labels, registry=registry, buckets=buckets)


class Tally:
    """A counter for what happens with every frame: `tally.n += 1` costs next to nothing."""

    __slots__ = ("_counter", "_moved", "n")

    def __init__(self, name: str, text: str) -> None:
        self._counter = _counter(name, text)
        self._moved = 0
        self.n = 0

    def move(self) -> None:
        """Let the counter show what was counted."""
        n = self.n
        self._counter.inc(n - self._moved)
        self._moved = n


def _tally(name: str, text: str) -> Tally:
    tally = Tally(name, text)
    _TALLIES.append(tally)
    return tally


_TALLIES: list[Tally] = []

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# --- sockets ---

sockets_open = _gauge("dialect_sockets_open", "Open sockets.")
users_online = _gauge("dialect_users_online", "Users with at least one open socket, counted by each worker.")
socket_connects = _counter("dialect_socket_connects_total", "Sockets opened, by whom a token or ticket named.")
socket_refusals = _counter("dialect_socket_refusals_total", "Sockets refused before they were open.", "code")
socket_closes = _counter(
    "dialect_socket_closes_total", "Sockets that ended, by close code; `other` is what only peers use.", "code"
)
slow_readers = _counter(
    "dialect_slow_readers_closed_total", "Sockets closed (4408) because their peer read too slowly."
)
frames_received = _tally("dialect_frames_received_total", "Messages that came in on sockets.")
frames_sent = _tally("dialect_frames_sent_total", "Messages handed to sockets, one for each that gets it.")
commands_refused = _counter("dialect_commands_refused_total", "Commands on sockets answered by an error.", "code")

# --- the writer ---

messages_acknowledged = _counter(
    "dialect_messages_acknowledged_total", "Sends that were committed and acknowledged, over sockets and REST."
)
commit_changes = _histogram(
    "dialect_commit_changes",
    "Changes (sends, edits, deletions, marks) in one transaction of the writer.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
commit_seconds = _histogram(
    "dialect_commit_seconds", "One transaction of the writer, from its beginning to its commit.", buckets=_LATENCIES
)
writer_queue = _gauge("dialect_writer_queue", "Changes not yet committed.")
batches_retried = _counter(
    "dialect_batches_retried_total", "Transactions of the writer tried again, for the database's reasons."
)
batches_outdated = _counter(
    "dialect_batches_outdated_total",
    "Transactions of the writer begun again with a look at their chats, which somebody else had changed or held.",
)
batches_bisected = _counter(
    "dialect_batches_bisected_total", "Transactions of the writer cut in two, to find a change that cannot be stored."
)
changes_expired = _counter(
    "dialect_changes_expired_total", "Changes refused because they were not committed within WRITE_TIMEOUT_SECONDS."
)

# --- from the commit to the sockets ---

announcements = _tally("dialect_announcements_total", "Committed changes of chats let out to sockets of this server.")
deliveries = _tally("dialect_deliveries_total", "Announcements times the sockets that each was for.")
typing_repeats = _tally("dialect_typing_repeats_total", "Typing that was told just before, and not passed on again.")
holes_healed = _counter(
    "dialect_holes_healed_total",
    "Changes that were let out late, read from the database, for their announcement was lost.",
)
heals_failed = _counter(
    "dialect_heals_failed_total",
    "Tries to read what a chat's sockets had missed that failed for a reason of that chat.",
)
sweeps = _counter("dialect_sweeps_total", "Searches for changes that nobody announced.")

# --- several workers ---

bus_up = _gauge(
    "dialect_bus_up", "1 while this worker hears itself over Redis, or needs no Redis.", over_workers="livemin"
)
bus_workers = _gauge("dialect_bus_workers", "Other workers that this one hears.", over_workers="livemin")
bus_sent = _tally("dialect_bus_messages_sent_total", "Messages to other workers.")
bus_received = _tally("dialect_bus_messages_received_total", "Messages of other workers.")
bus_lost = _counter("dialect_bus_messages_lost_total", "Messages of other workers that never came here.")
bus_dropped = _counter("dialect_bus_items_dropped_total", "Items given up because Redis was away or slow.")
presence_rechecks = _counter(
    "dialect_presence_rechecks_total",
    "Times that the database was asked who may watch whom, after the bus lost something.",
)

# --- catching up ---

resumes = _counter("dialect_resumes_total", "Clients that asked for what they missed.", "door")
catch_up_chats = _counter("dialect_catch_up_chats_total", "Chats brought up to date for a client.")
catch_up_resets = _counter("dialect_catch_up_resets_total", "Chats that a client had to start afresh.")
catch_up_pages = _counter("dialect_catch_up_pages_total", "Pages of missed changes sent to clients.")
catch_up_waiting = _gauge("dialect_catch_up_waiting", "Reads of what clients missed that wait for their turn.")

# --- push ---

push_outcomes = _counter("dialect_push_outcomes_total", "What Firebase said to a push, and pushes given up.", "outcome")
push_seconds = _histogram("dialect_push_seconds", "One request to Firebase.", buckets=_LATENCIES)
push_devices = _gauge("dialect_push_devices", "Devices being told of messages, those that wait for a retry included.")
push_chats = _gauge("dialect_push_chats_waiting", "Chats with messages that push has not looked at yet.")

# --- the database ---

database_connections = _gauge("dialect_database_connections_in_use", "Connections of a pool that are in use.", "pool")
database_connections_max = _gauge("dialect_database_connections_max", "Connections that a pool may have.", "pool")
database_unavailable = _counter(
    "dialect_database_unavailable_total",
    "Transactions that the database did not answer in time, or refused for its own reasons.",
)

# --- requests ---

http_requests = _counter(
    "dialect_http_requests_total",
    "REST requests answered, by template of the path; `other` is no route.",
    "method",
    "route",
    "status",
)
http_seconds = _histogram(
    "dialect_http_request_seconds",
    "From a REST request to the beginning of its answer.",
    "method",
    "route",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
http_cut = _counter(
    "dialect_http_connections_cut_total",
    "HTTP connections cut, by what their client did not do in time (`head`, `body`, `reading`), or to make room for "
    "another (`crowded`).",
    "reason",
)
http_refused = _counter("dialect_http_connections_refused_total", "Connections refused when they came.", "code")
http_connections = _gauge("dialect_http_connections_open", "Open connections that are no sockets.")
uploads = _counter("dialect_uploads_total", "Files taken in.", "kind")
upload_bytes = _tally("dialect_upload_bytes_total", "Bytes of files that came in, whatever became of them.")
storage_failures = _counter(
    "dialect_storage_failures_total",
    "What the folder or the bucket of files failed at (`put`, `read`, `delete`), each time it was tried.",
    "action",
)
rate_limited = _counter("dialect_rate_limited_total", "Requests and commands refused by a limit.", "limit")
bulk_reads_waiting = _gauge("dialect_bulk_reads_waiting", "Searches, lists and histories that wait for their turn.")
bulk_reads_refused = _counter(
    "dialect_bulk_reads_refused_total", "Searches, lists and histories refused (`overloaded`) so that sends are not."
)
argon2_queue = _gauge("dialect_argon2_queue", "Passwords being hashed or waiting for it.")
argon2_refusals = _counter("dialect_argon2_refusals_total", "Passwords refused because too many were waiting.")

# --- the process ---

workers = _gauge("dialect_workers", "Processes that serve.")
background_task_restarts = _counter(
    "dialect_background_task_restarts_total", "Endless tasks that ended by a failure and were started again.", "task"
)
task_failures = _counter("dialect_task_failures_total", "Tasks of a single request or socket that failed.", "task")
event_loop_lag = _histogram(
    "dialect_event_loop_lag_seconds",
    "How much later than it should a timer of the event loop went off.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
asyncio_tasks = _gauge("dialect_asyncio_tasks", "Tasks of the event loop.")
resident_bytes = _gauge("dialect_process_resident_bytes", "Memory held by the processes.")
open_fds = _gauge(
    "dialect_process_open_fds", "Open file descriptors of the process that has most.", over_workers="livemax"
)
max_fds = _gauge("dialect_process_max_fds", "How many a process may open (`ulimit -n`).", over_workers="livemin")
cpu_seconds = _counter("dialect_process_cpu_seconds_total", "CPU time used.")
started_at = _gauge(
    "dialect_process_start_seconds", "When the youngest process started, in Unix time.", over_workers="livemax"
)

CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def count_close(code: int, *, ours: bool) -> None:
    """Count a socket that ended. A code of the application counts by name only when this server chose it."""
    socket_closes.labels(str(code) if ours or code in CLOSE_CODES else "other").inc()


def count_request(method: str, route: str, status: int, seconds: float) -> None:
    """Count an answered request; `route` is a template, empty for what is no route."""
    method, route = method if method in METHODS else "other", route or "other"
    http_requests.labels(method, route, f"{status // 100}xx").inc()
    http_seconds.labels(method, route).observe(seconds)


def move_tallies() -> None:
    """Bring the counters up to what was tallied in this process."""
    for tally in _TALLIES:
        tally.move()


def exposition() -> bytes:
    """All metrics as Prometheus reads them; of all workers, where they share a folder. Reads files there."""
    if not SHARED:
        return generate_latest(registry)
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return generate_latest(together)
