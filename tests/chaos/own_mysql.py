"""A MySQL server that may be killed, frozen and reconfigured: nobody else uses it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pymysql

from tests.support.servers import ROOT, free_port

SCRIPT = ROOT / "scripts/mysql.sh"
FOLDER = Path(os.environ.get("DIALECT_CHAOS_MYSQL_DIR") or "/var/tmp/dialect-chaos-mysql")  # noqa: S108 - kept
SHARED = Path(os.environ.get("DIALECT_MYSQL_DIR") or "/var/tmp/dialect-mysql") / "rootfs"  # noqa: S108
"""Where the MySQL of the other tests was unpacked, if it was."""
USER, PASSWORD = "dialect", "an ordinary user without an extra connection"
PATIENCE = 60.0


class OwnMysql:
    """The server's process, and what an administrator does to it."""

    def __init__(self) -> None:
        self._env = {**os.environ, "DIALECT_MYSQL_DIR": str(FOLDER)}
        if (SHARED / "usr/sbin/mysqld").exists():
            self._env["DIALECT_MYSQL_ROOTFS"] = str(SHARED)
        running = self._script("url", check=False)
        url = urlsplit(running.stdout.strip())
        self.port = url.port if running.returncode == 0 and url.port else free_port()
        self._env["DIALECT_MYSQL_PORT"] = str(self.port)
        self._password = ""

    def start(self) -> None:
        """Start it, after a kill as well, and return once it answers."""
        url = urlsplit(self._script("start").stdout.strip())
        self._password = unquote(url.password or "")

    def stop(self) -> None:
        """Shut it down properly."""
        self._script("stop")

    def kill(self) -> None:
        """End it as a power cut does, and return once it is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        give_up_at = time.monotonic() + PATIENCE
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < give_up_at, f"mysqld, process {pid}, does not end"
            time.sleep(0.01)

    def freeze(self) -> None:
        """Let it stand still; connections open and stay silent."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        """The process."""
        [path] = [path for path in (FOLDER / "server/mysqld.pid", FOLDER / "rootfs/server/mysqld.pid") if path.exists()]
        return int(path.read_text())

    def connect(self, **options: Any) -> pymysql.Connection[Any]:
        """A connection of its administrator."""
        return pymysql.connect(host="127.0.0.1", port=self.port, user="root", password=self._password, **options)

    def execute(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements as its administrator; the rows of the last one."""
        rows: list[tuple[Any, ...]] = []
        with self.connect(autocommit=True) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
                rows = list(cursor.fetchall())
        return rows

    def new(self, name: str) -> dict[str, Any]:
        """An empty database of an ordinary user: the settings that lead to it."""
        self.execute(
            f"DROP DATABASE IF EXISTS {name}",
            f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
            f"CREATE USER IF NOT EXISTS {USER} IDENTIFIED BY '{PASSWORD}'",
            f"GRANT ALL ON {name}.* TO {USER}",
        )
        return {
            "db_user": USER,
            "db_password": PASSWORD,
            "db_host": "127.0.0.1",
            "db_port": self.port,
            "db_name": name,
        }

    def _script(self, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([SCRIPT, command], env=self._env, text=True, capture_output=True, timeout=PATIENCE * 3)
        assert not check or done.returncode == 0, done.stderr
        return done


def missing() -> str:
    """Why there can be none here; empty when there can."""
    if shutil.which("mysqld"):
        return ""
    if (SHARED / "usr/sbin/mysqld").exists() or shutil.which("debootstrap"):
        return "" if os.geteuid() == 0 else "a second MySQL in a chroot needs root: nobody kills and freezes one"
    return "there is no mysqld and no debootstrap: nobody kills and freezes a MySQL"


@contextmanager
def own_mysql() -> Iterator[OwnMysql]:
    """Runs one, for one test run at a time. It stops in the end; its files stay, so that the next start is quick."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "chaos.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mysql = OwnMysql()
        mysql.start()
        try:
            yield mysql
        finally:
            mysql.thaw()
            mysql.stop()
