"""A real Redis in a process of its own, for tests that kill it, freeze it and start it again."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from tests.support.servers import PATIENCE
from tests.support.tools import require_tools


class RedisServer:
    """One `redis-server` on a port of its own; it keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        # A newcomer who runs all tests need not have it.
        require_tools(["redis-server"], "redis-server", everywhere=False)
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and return once it answers."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            ["redis-server", *arguments], cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        give_up_at = time.monotonic() + PATIENCE
        while True:
            try:
                with Redis(port=self.port) as client:
                    client.ping()
                return
            except RedisError:
                assert self._process.poll() is None, "redis-server ended"
                assert time.monotonic() < give_up_at, "redis-server does not answer"
                time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal to it."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    def require_password(self, password: str) -> None:
        """Let in only who says this from now on."""
        with Redis(port=self.port) as client:
            client.config_set("requirepass", password)

    def flush(self) -> None:
        """Make it forget everything."""
        with Redis(port=self.port) as client:
            client.flushall()
