"""Real servers in processes of their own, reached over real sockets."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import httpx
from pydantic import SecretStr

from app.core.config import Settings
from tests.support import fork_server
from tests.support.contract import judge
from tests.support.fork_server import ForkedProcess
from tests.support.secrets import check_log

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0
"""Seconds for what takes a moment. Only a failing test waits so long."""

Door = Literal["tuned", "plain"]
PYTHON_MODULE = [sys.executable, "-m"]
COMMANDS: dict[Door, list[str]] = {
    "tuned": [*PYTHON_MODULE, "app", "--host", "127.0.0.1", "--port", "0"],
    "plain": [*PYTHON_MODULE, "uvicorn", "app.main:app", "--host", "127.0.0.1", "--port", "0"],
}


def environment(settings: Settings | None = None, **variables: str) -> dict[str, str]:
    """The environment of a process that shall have these settings, and none of the developer's."""
    names = {name.upper() for name in Settings.model_fields}
    env = {name: value for name, value in os.environ.items() if name.upper() not in names}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in settings or ():
        if isinstance(value, SecretStr):
            env[name.upper()] = value.get_secret_value()
        elif isinstance(value, list):
            env[name.upper()] = ",".join(value)
        elif value is not None:
            env[name.upper()] = str(value)
    return env | variables


def free_port() -> int:
    """A port that stays ours while the server is down: below those that the kernel gives to clients."""
    picker = random.SystemRandom()
    while True:
        port = picker.randrange(15_000, 30_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def run(
    arguments: Sequence[str], *, cwd: Path, env: dict[str, str], forked: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. `forked`: a command of Python, from a process that has imported the server already."""
    if forked:
        assert list(arguments[:2]) == PYTHON_MODULE
        return fork_server.run(arguments[2:], cwd=cwd, env=env, timeout=PATIENCE * 2)
    return subprocess.run(arguments, cwd=cwd, env=env, text=True, capture_output=True, timeout=PATIENCE * 2)


class Server:
    """A server process and its log."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: dict[str, str],
        log_path: Path,
        forked: bool = False,
    ) -> None:
        """`forked`: a command of Python, from a process that has imported the server already."""
        self.log_path = log_path
        self.env = env
        self.url = ""
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        # A new session, so that a stop also reaches what `--reload` starts.
        self._process: subprocess.Popen[str] | ForkedProcess
        if forked:
            assert list(arguments[:2]) == PYTHON_MODULE
            self._process = ForkedProcess(arguments[2:], cwd=cwd, env=env)
        else:
            self._process = subprocess.Popen(
                arguments,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Return once it listens. Fails, with its log, when it ends before."""
        match = self.wait_for_log(r"Uvicorn running on (http://[\w.:]+)")
        self.url = match.group(1)

    def wait_for_log(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Return once a line of the log matches, one that is already there included."""
        found: list[re.Match[str]] = []

        def search() -> bool:
            found.extend(match for line in self._lines if (match := re.search(pattern, line)))
            return bool(found) or self._ended

        with self._changed:
            in_time = self._changed.wait_for(search, timeout)
        if not found:
            reason = "the server ended" if in_time else f"{timeout} s passed"
            raise AssertionError(f"{reason} without {pattern!r} in its log:\n{self.log}")
        return found[0]

    @property
    def ws_url(self) -> str:
        """The brief's door for sockets."""
        return self.url.replace("http", "ws", 1) + "/api/v1/messages/ws"

    @property
    def log(self) -> str:
        """All it has said."""
        return "".join(self._lines)

    @property
    def pid(self) -> int:
        """The process, for tests that look at it from outside."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def client(self) -> httpx.AsyncClient:
        """A client of its REST interface. Answers that are not documented fail the test."""
        return httpx.AsyncClient(base_url=self.url, timeout=PATIENCE, event_hooks={"response": [judge]})

    def signal(self, number: int) -> None:
        """Send a signal to the server."""
        self._process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; the exit code."""
        code = self._process.wait(timeout)
        self._reader.join(timeout)
        return code

    def stop(self) -> int:
        """Ask it to stop, as an operator does; the exit code."""
        if self.exit_code is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self.exit_code is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # a forked one leads no group yet, or has just ended
                self._process.send_signal(signal.SIGKILL)
        self.wait()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream, self.log_path.open("w", encoding="utf-8") as copy:
            for line in stream:
                copy.write(line)
                copy.flush()
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@contextlib.contextmanager
def killed_at_the_end() -> Iterator[list[Server]]:
    """A list of servers to add to; in the end they are killed and their logs are looked through."""
    started: list[Server] = []
    yield started
    for server in started:
        server.kill()
    for server in started:
        check_log(server.log, server.log_path.name)
