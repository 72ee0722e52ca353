"""The processes of `python -m app`: one that serves, or a parent with several workers on one port."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from socket import socket

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.api.server import TunedConfig, server_config
from app.core.config import Settings
from app.core.logging import configure_logging
from app.core.metrics_folder import MetricsFolder, metrics_folder

log = logging.getLogger(__name__)

APPLICATION = "app.main:app"
RESTART_PAUSE_SECONDS = 1.0
"""A worker that cannot start, because the database is away, say, is tried again no sooner."""
STOP_SPARE_SECONDS = 1.0
"""So much longer than a graceful stop may take is waited for a worker's end."""


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve until a signal says stop. Exits with a status other than 0 when the server could not start."""
    raise_descriptor_limit()
    config = server_config(APPLICATION, settings, host, port, workers)
    if workers > 1:
        configure_logging(settings)
        with metrics_folder() as folder:
            os.environ |= folder.environment
            Workers(config, [config.bind_socket()], folder, settings.shutdown_seconds + STOP_SPARE_SECONDS).run()
        return
    server = uvicorn.Server(config)
    # After a stop by Ctrl+C uvicorn lets the signal go on, once all is closed: nothing is left to interrupt.
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def raise_descriptor_limit() -> None:
    """Take all file descriptors that the system allows: each connection is one, and a shell's default is 1024."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS says "unlimited" and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Workers(Multiprocess):
    """Starts processes that share a socket, and starts one anew that dies or hangs.

    SIGTERM and SIGINT stop all of them gracefully; SIGHUP replaces them one after the other, each once its successor
    serves.
    """

    def __init__(self, config: TunedConfig, sockets: list[socket], folder: MetricsFolder, stop_seconds: float) -> None:
        super().__init__(config, sockets)
        self._folder = folder
        self._stop_seconds = stop_seconds
        self._failed_at: dict[int, float] = {}
        self._asked_at: dict[Process, float] = {}
        """When workers were asked that have not answered yet."""
        self._served = False
        self._hopeless = False

    def run(self) -> None:
        """Supervise until a signal says stop. Exits with a status other than 0 when no worker could start."""
        super().run()
        if self._hopeless:
            sys.exit(STARTUP_FAILURE)

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have died or do not answer. Waits for none of them: it is called again and again."""
        for place, process in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if place in self._failed_at:
                if time.monotonic() - self._failed_at[place] >= RESTART_PAUSE_SECONDS:
                    del self._failed_at[place]
                    self._replace(place)
                continue
            alive = process.process.is_alive()
            if alive and not self._is_silent(process):
                continue
            process.kill()
            process.join()
            self._forget(process)
            if process.exitcode == STARTUP_FAILURE:
                if not self._served:  # it would fail the same way again
                    log.error("no_worker_can_start")
                    self._hopeless = True
                    self.should_exit.set()
                    return
                self._failed_at[place] = time.monotonic()
            log.error("worker_died", extra={"pid": process.pid, "exit_code": process.exitcode, "hung": alive})
            if place not in self._failed_at:
                self._replace(place)

    def _is_silent(self, process: Process) -> bool:
        """Ask a worker whether it serves, or look for its answer; whether it has owed one for too long."""
        asked_at = self._asked_at.get(process)
        try:
            if asked_at is None:
                process.parent_conn.send(b"ping")
                self._asked_at[process] = time.monotonic()
            elif process.parent_conn.poll():
                self._served |= bool(process.parent_conn.recv())
                del self._asked_at[process]
        except (OSError, EOFError):
            return True
        return asked_at is not None and time.monotonic() - asked_at > self.config.timeout_worker_healthcheck

    def _forget(self, process: Process) -> None:
        self._asked_at.pop(process, None)
        if process.pid is not None:
            self._folder.forget(process.pid)

    def restart_all(self) -> None:
        """Replace all workers, one after the other."""
        before = list(self.processes)
        super().restart_all()
        for process in before:
            if process not in self.processes:
                self._forget(process)

    def _replace(self, place: int) -> None:
        process = self.processes[place] = Process(self.config, self.sockets)
        process.start()
        log.info("worker_started", extra={"pid": process.pid})

    def join_all(self) -> None:
        """Wait for the workers' graceful stops, and for no longer than they may take."""
        give_up_at = time.monotonic() + self._stop_seconds
        for process in self.processes:
            process.process.join(max(0.0, give_up_at - time.monotonic()))
            if process.process.is_alive():
                log.error("worker_did_not_stop", extra={"pid": process.pid})
                process.process.kill()
                process.process.join()
