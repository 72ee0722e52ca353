"""The processes of `python -m app`: one that serves, or a parent with several workers on one port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import sys
import time
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.api.server import TunedConfig, server_config
from app.core.config import Settings
from app.core.errors import StartupError
from app.core.logging import configure_logging
from app.core.metrics_folder import MetricsFolder, metrics_folder
from app.services.container import check_start

log = logging.getLogger(__name__)

APPLICATION = "app.main:app"
RESTART_PAUSE_SECONDS = 1.0
"""A worker that cannot start, because the database is away, say, is tried again no sooner."""
STOP_SPARE_SECONDS = 1.0
"""So much longer than a graceful stop may take is waited for a worker's end."""


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve until a signal says stop.

    Raises StartupError, or exits with a status other than 0, when the server could not start.
    """
    raise_descriptor_limit()
    config = server_config(APPLICATION, settings, host, port, workers)
    sockets = bind(host, port)
    if workers > 1:
        configure_logging(settings)
        asyncio.run(_check(settings))  # here, once: the workers would say the same thing each
        _tell_address(host, sockets)
        with metrics_folder() as folder:
            os.environ |= folder.environment
            Workers(config, sockets, folder, settings.shutdown_seconds + STOP_SPARE_SECONDS).run()
        return
    server = OneProcess(config)
    # After a stop by Ctrl+C uvicorn lets the signal go on, once all is closed: nothing is left to interrupt.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)
    if not server.started:
        sys.exit(STARTUP_FAILURE)


async def _check(settings: Settings) -> None:
    async for _ in check_start(settings):
        pass


def bind(host: str, port: int) -> list[socket.socket]:
    """Take the port on every address that a host has, before anything else is begun.

    Raises StartupError with what the operator can do.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        # As asyncio does where uvicorn leaves it to that. The empty host is all addresses.
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            if not port and sockets:  # any port, but the same one on all addresses
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bind(family, address))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error  # localhost is ::1, too, where there is no IPv6
        if not sockets and absent:
            raise absent
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise StartupError(_cannot_bind(host, port, error)) from error
    return sockets


def _bind(family: int, address: Any) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _cannot_bind(host: str, port: int, error: OSError) -> str:
    other = port + 1 if port < 65535 else 8000
    if isinstance(error, socket.gaierror):
        return f"The host {host} to listen on is not known; name an address of this machine: --host 127.0.0.1"
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} is taken by another program: stop it, or choose another: python -m app --port {other} "
            f'(make run ARGS="--port {other}").'
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"This machine has no address {host}; name one that it has: --host 127.0.0.1, or 0.0.0.0 for all."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"This user may not listen on port {port}; choose one above 1023: python -m app --port 8000"
    return f"Port {port} of {host} cannot be used ({error.strerror})."


def _tell_address(host: str, sockets: list[socket.socket]) -> None:
    address, port = sockets[0].getsockname()[:2]
    host = host or address
    shown = f"[{host}]" if ":" in host else host
    logging.getLogger("uvicorn.error").info("Uvicorn running on http://%s:%d (Press CTRL+C to quit)", shown, port)


class OneProcess(uvicorn.Server):
    """The server on sockets that are bound already: uvicorn does not say where it listens then."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        try:
            await super().startup(sockets)
        except OSError as error:  # somebody bound the same port at the same time, and listened first
            await self.lifespan.shutdown()
            raise StartupError(_cannot_bind(self.config.host, self.config.port, error)) from error
        _tell_address(self.config.host, sockets or [])


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

    def __init__(
        self, config: TunedConfig, sockets: list[socket.socket], folder: MetricsFolder, stop_seconds: float
    ) -> None:
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
