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
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.api.server import TunedConfig, server_config
from app.core.config import Settings, get_settings
from app.core.errors import StartupError
from app.core.logging import configure_logging
from app.core.metrics_folder import MetricsFolder, metrics_folder
from app.services.container import check_start

log = logging.getLogger(__name__)

APPLICATION = "app.main:app"
RESTART_PAUSE_SECONDS = 1.0
"""A worker that cannot start, because the database is away, say, is tried again no sooner."""
STOP_SPARE_SECONDS = 2.0
"""So much longer than SHUTDOWN_SECONDS is waited for a worker's end: what it stores last comes after the drain."""
TICK_SECONDS_MAX = 1.0
"""The parent looks at its workers twice a second. What it missed, being stopped itself, is nobody's silence."""


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve until a signal says stop.

    Raises StartupError, or exits with a status other than 0, when the server could not start.
    """
    raise_descriptor_limit()

    def configure(settings: Settings) -> TunedConfig:
        return server_config(APPLICATION, settings, host, port, workers)

    config = configure(settings)
    sockets = bind(host, port)
    if workers > 1:
        configure_logging(settings)
        asyncio.run(_check(settings))  # here, once: the workers would say the same thing each
        _tell_address(host, sockets)
        with metrics_folder() as folder:
            os.environ |= folder.environment
            Workers(config, sockets, folder, settings.shutdown_seconds + STOP_SPARE_SECONDS, configure).run()
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


class WorkerServer(uvicorn.Server):
    """uvicorn's server, which can be asked from another thread whether it turns."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal says stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def answer(self, tell: Callable[[bool], None]) -> None:
        """Tell whether it serves; as soon as the event loop comes to it, and never from one that hangs.

        While it starts, it answers at once: importing the application keeps the loop busy, and may take a while.
        """
        if self._loop is None or not self.started:
            tell(False)
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the process is about to
            self._loop.call_soon_threadsafe(tell, True)


class Worker(Process):
    """A process that serves, as its parent sees it."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], stop_seconds: float) -> None:
        super().__init__(config, sockets)
        self.stop_seconds = stop_seconds
        """How long it may take to end."""
        self.ready = False
        """Whether it has said that it serves."""
        self.silent_seconds = 0.0
        """How long it has owed an answer."""
        self._asked = False

    # --- in the parent ---

    def listen(self, passed: float) -> bool:
        """Hear what it says, and ask it whether it serves if it owes no answer; False if it cannot be asked."""
        try:
            if self._asked:
                self.silent_seconds += passed
            while self.parent_conn.poll():
                self.ready |= bool(self.parent_conn.recv())
                self._asked, self.silent_seconds = False, 0.0
            if not self._asked:
                self.parent_conn.send(b"ping")
                self._asked = True
        except (OSError, EOFError):
            return False
        return True

    # --- in the worker ---

    @property
    def server(self) -> WorkerServer:
        """What serves in it."""
        if not isinstance(self._server, WorkerServer):
            self._server = WorkerServer(self.config)
        return self._server

    def pong(self) -> None:
        """Take a question and answer it."""
        self.child_conn.recv()
        self.server.answer(self._tell)

    def _tell(self, serves: bool) -> None:
        with contextlib.suppress(OSError):  # the parent has ended
            self.child_conn.send(serves)


class Workers(Multiprocess):
    """Starts processes that share a socket, and starts one anew that dies or hangs.

    SIGTERM and SIGINT stop all of them gracefully; SIGHUP reads the settings again and replaces them one after the
    other, each once its successor serves. Nothing here waits for a worker: what takes time goes on from tick to tick,
    beside all else.
    """

    processes: list[Worker]  # type: ignore[assignment]

    def __init__(
        self,
        config: TunedConfig,
        sockets: list[socket.socket],
        folder: MetricsFolder,
        stop_seconds: float,
        configure: Callable[[Settings], TunedConfig],
    ) -> None:
        super().__init__(config, sockets)
        self._folder = folder
        self._stop_seconds = stop_seconds
        self._configure = configure
        self._failed_at: dict[int, float] = {}
        self._leaving: dict[Worker, float] = {}
        """Workers that shall end, each with the time when it is killed."""
        self._outdated: list[Worker] = []
        """Workers that are to be replaced, the next one first."""
        self._successor: Worker | None = None
        self._successor_at = 0.0
        self._ticked_at = time.monotonic()
        self._served = False
        self._hopeless = False

    def run(self) -> None:
        """Supervise until a signal says stop. Exits with a status other than 0 when no worker could start."""
        super().run()
        if self._hopeless:
            sys.exit(STARTUP_FAILURE)

    def init_processes(self) -> None:
        """Start the first ones."""
        self.processes += [self._start() for _ in range(self.processes_num)]

    # --- from tick to tick ---

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have died or do not answer. Waits for none of them: it is called again and again."""
        now = time.monotonic()
        passed = min(now - self._ticked_at, TICK_SECONDS_MAX)
        self._ticked_at = now
        self._see_off(now)
        for place, process in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if place in self._failed_at:
                if now - self._failed_at[place] >= RESTART_PAUSE_SECONDS:
                    del self._failed_at[place]
                    self._replace(place)
                continue
            alive = process.process.is_alive()
            if alive and self._answers(process, passed):
                self._served |= process.ready
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
                self._failed_at[place] = now
            log.error("worker_died", extra={"pid": process.pid, "exit_code": process.exitcode, "hung": alive})
            if place not in self._failed_at:
                self._replace(place)
        self._go_on_replacing(now, passed)

    def _answers(self, process: Worker, passed: float) -> bool:
        return process.listen(passed) and process.silent_seconds <= self.config.timeout_worker_healthcheck

    def _see_off(self, now: float) -> None:
        """Forget who has ended, and kill who should have."""
        for process, until in list(self._leaving.items()):
            if process.process.is_alive() and now >= until:
                log.error("worker_did_not_stop", extra={"pid": process.pid})
                process.process.kill()
                process.process.join()
            if not process.process.is_alive():
                del self._leaving[process]
                self._forget(process)

    def _go_on_replacing(self, now: float, passed: float) -> None:
        """Bring a successor into service, retire the one before it; and then the next."""
        successor = self._successor
        if successor is None:
            if self._leaving:
                return  # one at a time: the machine has room for one more, not for twice as many
            while self._outdated and self._outdated[0] not in self.processes:
                del self._outdated[0]  # it died, and its successor is there
            if self._outdated:
                self._successor, self._successor_at = self._start(), now
            return
        in_time = now - self._successor_at < self.config.timeout_worker_healthcheck
        if not (successor.process.is_alive() and self._answers(successor, passed) and (successor.ready or in_time)):
            log.error("restart_given_up", extra={"pid": successor.pid})
            self._outdated.clear()
            self._successor = None
            self._kill(successor)
        elif successor.ready:
            self._successor = None
            before = self._outdated.pop(0)
            if before in self.processes:
                place = self.processes.index(before)
                self.processes[place] = successor
                self._failed_at.pop(place, None)
                self._retire(before, now)
            else:  # it died meanwhile
                self._retire(successor, now)

    def _start(self) -> Worker:
        process = Worker(self.config, self.sockets, self._stop_seconds)
        process.start()
        log.info("worker_started", extra={"pid": process.pid})
        return process

    def _replace(self, place: int) -> None:
        self.processes[place] = self._start()

    def _retire(self, process: Worker, now: float) -> None:
        process.terminate()
        self._leaving[process] = now + process.stop_seconds

    def _kill(self, process: Worker) -> None:
        process.kill()
        process.join()
        self._forget(process)

    def _forget(self, process: Worker) -> None:
        if process.pid is not None:
            self._folder.forget(process.pid)

    # --- signals ---

    def restart_all(self) -> None:
        """Replace all workers, one after the other, by what the code and the settings are now."""
        get_settings.cache_clear()
        try:
            settings = get_settings()
            settings.check_workers(self.processes_num)
        except StartupError as error:
            log.error("restart_given_up", extra={"error": str(error)})
            return
        self.config = self._configure(settings)
        self._stop_seconds = settings.shutdown_seconds + STOP_SPARE_SECONDS
        if self._successor is not None:  # of an earlier signal, and outdated before it served
            self._retire(self._successor, time.monotonic())
            self._successor = None
        self._outdated = list(self.processes)

    def handle_ttin(self) -> None:
        """One worker more."""
        self.processes_num += 1
        self.processes.append(self._start())

    def handle_ttou(self) -> None:
        """One worker less, unless it is the last."""
        if self.processes_num <= 1:
            return
        self.processes_num -= 1
        self._failed_at.pop(len(self.processes) - 1, None)
        self._retire(self.processes.pop(), time.monotonic())

    # --- the end ---

    def terminate_all(self) -> None:
        """Ask all workers to stop."""
        if self._successor is not None:
            self.processes.append(self._successor)
        super().terminate_all()

    def join_all(self) -> None:
        """Wait for the workers' graceful stops, and for no longer than they may take."""
        now = time.monotonic()
        leaving = {process: now + process.stop_seconds for process in self.processes} | self._leaving
        for process, until in leaving.items():
            process.process.join(max(0.0, until - time.monotonic()))
            if process.process.is_alive():
                log.error("worker_did_not_stop", extra={"pid": process.pid})
                process.process.kill()
                process.process.join()
