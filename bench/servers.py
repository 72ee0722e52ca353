"""Starting the servers under test: each one process, on one core, on a database of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import pymysql

from app.core.config import Settings
from bench import ejabberd, machine
from bench.failure import Failed

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60
MYSQL_URL_NAME = "DIALECT_TEST_MYSQL_URL"
REDIS = "redis-server"

ServerName = Literal["echo", "naive", "dialect", "workers", "plain", "nginx", "ejabberd"]
"""`workers`: two of dialect's, over Redis."""
OURS: tuple[ServerName, ...] = ("dialect", "workers")
DatabaseName = Literal["sqlite", "mysql"]


@dataclass(frozen=True, slots=True)
class MySQL:
    """Where the MySQL server is."""

    host: str
    port: int
    user: str
    password: str

    @classmethod
    def from_url(cls, url: str) -> MySQL:
        """Read mysql://user:password@host:port/.

        Raises Failed when it is something else.
        """
        parts = urlsplit(url)
        if not parts.scheme.startswith("mysql") or not parts.hostname:
            raise Failed(f"{MYSQL_URL_NAME} must look like mysql://root:password@127.0.0.1:3306/")
        return cls(parts.hostname, parts.port or 3306, unquote(parts.username or "root"), unquote(parts.password or ""))

    @property
    def arguments(self) -> dict[str, Any]:
        """How pymysql connects to it."""
        return {"host": self.host, "port": self.port, "user": self.user, "password": self.password}

    def run(self, statement: str) -> None:
        """Run one statement.

        Raises Failed when the server cannot be reached or refuses.
        """
        try:
            connection = pymysql.connect(**self.arguments, connect_timeout=5)
        except pymysql.MySQLError as error:
            raise Failed(
                f"MySQL at {self.host}:{self.port} cannot be used ({error}). Start one with `make mysql` and put the "
                f"URL it prints into {MYSQL_URL_NAME}, or leave MySQL out with --db sqlite."
            ) from error
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)


@dataclass(slots=True)
class Server:
    """A running server."""

    name: ServerName
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    clean_up: Callable[[], None]
    archive: dict[str, Any] = field(default_factory=dict)
    """How to connect to its database, where that is not for us alone to know."""

    def stop(self) -> None:
        """Stop it and drop its database."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.clean_up()

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-20:] if self.log.exists() else []
        return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


def on_core(core: int | None) -> Callable[[], None] | None:
    """What a child process does first, to stay on its core."""
    return None if core is None else lambda: os.sched_setaffinity(0, {core})


def child_environment(folder: Path) -> dict[str, str]:
    """The caller's environment without what would change the servers, and with our code on the path."""
    ours = {name.upper() for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name.upper() not in ours}
    # The servers run in a folder of their own, so that no .env of a developer gets in.
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}


def raised_limits() -> dict[str, str]:
    """Settings that switch every rate limit off."""
    off: dict[str, str] = {}
    for name, about in Settings.model_fields.items():
        if name.startswith("limit_") and not name.endswith("_burst"):
            off[name.upper()] = "" if about.annotation is str else "0"
    return off


def dialect_settings(folder: Path, port: int, database: dict[str, str], sockets_per_user: int) -> dict[str, str]:
    """The environment of the Dialect under test: its defaults, but for limits and the cost of passwords."""
    return {
        **raised_limits(),
        **database,
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "SECRET_KEY": secrets.token_urlsafe(48),
        "SQLITE_PATH": str(folder / "dialect.db"),
        "ARGON2_MEMORY_KIB": "8",
        "ARGON2_TIME_COST": "1",
        "ACCESS_TOKEN_EXPIRE_MINUTES": "1440",
        "MAX_CHATS_CREATED_PER_DAY": "0",
        "MAX_STORED_BYTES_PER_USER": "0",
        "MAX_SOCKETS_PER_USER": str(sockets_per_user),
        "MAX_SOCKETS_PER_IP": "0",
        "LOG_LEVEL": "WARNING",
    }


def start(
    name: ServerName,
    database: DatabaseName,
    folder: Path,
    core: int | None,
    mysql: MySQL | None,
    *,
    sockets_per_user: int = 10,
    settings: Mapping[str, str] | None = None,
) -> Server:
    """Start a server and wait until it answers.

    Raises Failed with the end of its log when it does not.
    """
    folder = folder / f"{name}-{database}"
    folder.mkdir(parents=True)
    (folder / "uploads").mkdir()
    port = free_port()
    log = folder / "server.log"
    environment = child_environment(folder)
    schema = f"bench_{name}_{os.getpid()}_{secrets.token_hex(3)}"
    after = contextlib.ExitStack()
    after.callback(shutil.rmtree, folder, ignore_errors=True)
    if database == "mysql" and name not in ("echo", "plain"):
        assert mysql is not None
        mysql.run(f"CREATE DATABASE {schema} CHARACTER SET utf8mb4")
        after.callback(mysql.run, f"DROP DATABASE IF EXISTS {schema}")

    uvicorn = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), "--loop", "uvloop"]
    uvicorn += ["--no-access-log", "--log-level", "warning"]
    archive: dict[str, Any] = {}
    command: list[str]
    prepare: list[str] | None = None
    if name == "echo":
        command = [*uvicorn, "bench.echo:app"]
    elif name == "plain":
        command = [*uvicorn, "bench.plain:app"]
    elif name == "ejabberd":
        assert mysql is not None
        archive = {**mysql.arguments, "database": schema}
        command, more = ejabberd.command(folder, port, archive)
        environment |= more
    elif name == "naive":
        command = [*uvicorn, "bench.naive:app"]
        environment |= {
            "ARGON2_MEMORY_KIB": "8",
            "ARGON2_TIME_COST": "1",
            "NAIVE_DATABASE_URL": (
                f"sqlite+aiosqlite:///{folder / 'naive.db'}"
                if mysql is None or database == "sqlite"
                else f"mysql+asyncmy://{quote(mysql.user)}:{quote(mysql.password)}@{mysql.host}:{mysql.port}/{schema}"
            ),
        }
    else:
        names: dict[str, str] = {}
        if mysql is not None and database == "mysql":
            names = {"DB_HOST": mysql.host, "DB_PORT": str(mysql.port), "DB_USER": mysql.user}
            names |= {"DB_PASSWORD": mysql.password, "DB_NAME": schema}
        environment |= dialect_settings(folder, port, names, sockets_per_user) | dict(settings or {})
        if name == "workers":
            environment |= {"WORKERS": "2", "REDIS_URL": after.enter_context(redis_server(folder))}
            core = None  # they share the cores with all the rest
        prepare = [sys.executable, "-m", "app", "migrate"]
        command = [sys.executable, "-m", "app"]

    if prepare is not None:
        with log.open("ab") as output:
            done = subprocess.run(prepare, cwd=folder, env=environment, stdout=output, stderr=output, check=False)
        if done.returncode:
            words = log.read_text(errors="replace")[-2000:]
            after.close()
            raise Failed(f"`python -m app migrate` failed on {database}:\n{words}")
    return _launch(Launch(name, command, folder, environment, port, core, after.close, archive))


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A Redis that keeps nothing; its address.

    Raises Failed where none is installed.
    """
    if shutil.which(REDIS) is None:
        raise Failed(f"{REDIS} was not found; on Debian: apt-get install {REDIS}. Or measure with --workers 1.")
    port = free_port()
    command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


@dataclass(slots=True)
class Launch:
    """A server about to be started."""

    name: ServerName
    command: list[str]
    folder: Path
    environment: dict[str, str]
    port: int
    core: int | None
    clean_up: Callable[[], None]
    archive: dict[str, Any] = field(default_factory=dict)


def start_on(database: dict[str, str], folder: Path, core: int | None) -> Server:
    """Start Dialect on a database that is there and stays, and wait until it answers; `database` are its settings.

    Raises Failed with the end of its log when it does not.
    """
    folder = Path(tempfile.mkdtemp(prefix="dialect-", dir=folder))
    port = free_port()
    environment = child_environment(folder) | dialect_settings(folder, port, {}, 10) | database
    command = [sys.executable, "-m", "app"]
    return _launch(Launch("dialect", command, folder, environment, port, core, lambda: shutil.rmtree(folder)))


def _launch(launch: Launch) -> Server:
    log = launch.folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            launch.command,
            cwd=launch.folder,
            env=launch.environment,
            stdout=output,
            stderr=output,
            preexec_fn=on_core(launch.core),
        )
    server = Server(launch.name, launch.port, process, log, launch.clean_up, launch.archive)
    try:
        wait_until_ready(server, "/" if launch.name in ("echo", "plain") else "/health/ready")
    except BaseException:
        server.stop()
        raise
    return server


def wait_until_ready(server: Server, path: str) -> None:
    """Wait until a path answers.

    Raises Failed with the end of the server's log when it does not.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.process.poll() is not None:
            raise Failed(f"{server.name} ended at once (status {server.process.returncode}):\n{server.last_words()}")
        try:
            if server.name == "ejabberd":
                socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
                return
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise Failed(
                    f"{server.name} was not ready within {START_SECONDS} s ({error}):\n{server.last_words()}"
                ) from error
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class DatabaseCore:
    """mysqld, held on a core while we measure."""

    pid: int | None = None
    before: set[int] | None = None
    note: str = ""

    @classmethod
    def hold(cls, mysql: MySQL, core: int | None) -> DatabaseCore:
        """Pin it if it runs on this machine and we may."""
        pid = machine.find_listener(mysql.port, "mysqld") if mysql.host in ("127.0.0.1", "localhost", "::1") else None
        if pid is None:
            return cls(note="mysqld was not found among the processes of this machine: it runs on any core")
        if core is None:
            return cls(pid, note="one core only: mysqld shares it")
        before = os.sched_getaffinity(pid)
        if not machine.pin(pid, {core}):
            return cls(pid, note=f"mysqld (pid {pid}) may not be pinned by this user: it runs on any core")
        return cls(pid, before, f"mysqld pinned to core {core} while measuring")

    def release(self) -> None:
        """Let it run where it did before."""
        if self.pid is not None and self.before is not None:
            machine.pin(self.pid, self.before)
