"""Python programs without the two seconds of CPU that a server's imports take: one process has them, and forks.

What a start itself is about (`tests/test_start.py`, the chaos suite, the benchmark) runs the real command instead.
To the server a forked process looks like a worker: it has a parent of multiprocessing's, whose end ends it, too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.server_imports"])


class ForkedProcess:
    """`python -m MODULE ARGUMENTS...` in a session of its own, seen as `subprocess.Popen` shows it."""

    def __init__(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], stderr: Path | None = None
    ) -> None:
        """Without a file for `stderr`, it is written to where `stdout` is."""
        reader, writer = _context.Pipe(duplex=False)
        self._arguments = arguments
        self._process = _context.Process(target=_work, args=(arguments, cwd, dict(env), writer, stderr))
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), errors="backslashreplace")
        reader.close()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, negative for a signal's number; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit status, once it has ended. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired(self._arguments, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to it."""
        if self._process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and the server of forks knows first
                os.kill(self.pid, number)


def run(arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS...` to its end. Raises TimeoutExpired."""
    with tempfile.NamedTemporaryFile("r", errors="backslashreplace") as stderr:
        process = ForkedProcess(arguments, cwd=cwd, env=env, stderr=Path(stderr.name))
        with process.stdout as stdout:
            written = stdout.read()
        return CompletedProcess(arguments, process.wait(timeout), written, stderr.read())


def _work(arguments: Sequence[str], cwd: Path, env: dict[str, str], output: Connection, stderr: Path | None) -> None:
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno() if stderr is None else os.open(stderr, os.O_WRONLY), 2)
    output.close()
    for number, name in ((1, "stdout"), (2, "stderr")):
        setattr(sys, name, os.fdopen(number, "w", buffering=1, errors="backslashreplace", closefd=False))
    if "app.services.container" not in sys.modules:  # Python says nothing of it
        sys.stderr.write("fork_server: nothing was imported beforehand; start pytest in the project's folder\n")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    module, *rest = arguments
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
