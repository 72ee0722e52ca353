"""`python -m bench.seed`: fills a database of its own with the people, chats and messages of a large messenger.

It never touches a database that somebody else made: everything is written into a new one (`<name>_partial`, on SQLite
a file `.partial`) that takes the name asked for only when it is whole. What is left of a run that failed is dropped,
at once or by the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import secrets
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import argon2
import pymysql
from pymysql.converters import escape_string

from app.core.config import Settings
from app.core.errors import StartupError
from app.db.database import migrate
from bench.failure import Failed
from bench.population import COLUMNS, PASSWORD, Row, Size, Used, Value, phone_of, populate
from bench.servers import MYSQL_URL_NAME, MySQL

SIZES = {"10k": 10_000, "1m": 1_000_000, "10m": 10_000_000}
PATIENCE_SECONDS = 60.0
"""A measurement on a busy machine is slow; it does not fail."""
MYSQL_CONNECTIONS = 2
MYSQL_STATEMENTS_WAITING = 8
MYSQL_ROWS_PER_STATEMENT = 2500
INDEXED_AFTERWARDS = ("messages", "chat_members", "users")
"""Building the indexes of many rows at once takes a third of the time of inserting into them row by row."""
LEAST_ARGON2 = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
"""Everybody has the same password, which is written in `population.py`: there is nothing to protect."""


class Target(Protocol):
    """A database that is being filled."""

    def write(self, table: str, rows: list[Row]) -> None:
        """Store rows, sooner or later."""

    def finish(self, used: Used, epoch: str) -> None:
        """Make it whole, and give it its name."""

    def discard(self) -> None:
        """Leave nothing behind of what is not whole."""


def epoch_of(messages: int) -> str:
    """The epoch of a database that was seeded, which says so."""
    return f"seeded-{messages}-{secrets.token_hex(6)}"


def find_seeded(where: MySQL | Path, name: str) -> int:
    """Messages of the database with this name (or the file) if it was seeded; 0 when there is none, or another's."""
    statement = "SELECT epoch FROM server_state"
    try:
        if isinstance(where, Path):
            if not where.exists():
                return 0
            with contextlib.closing(sqlite3.connect(where)) as file:
                rows = file.execute(statement).fetchall()
        else:
            connection = pymysql.connect(
                host=where.host, port=where.port, user=where.user, password=where.password, database=name
            )
            with connection:
                rows = list(_ask(connection, statement))
    except (pymysql.MySQLError, sqlite3.Error):
        return 0
    found = re.fullmatch(r"seeded-(\d+)-[0-9a-f]+", rows[0][0]) if rows else None
    return int(found[1]) if found else 0


def settings_of(mysql: MySQL, name: str) -> Settings:
    """Settings that lead to a database of a MySQL server."""
    return Settings(
        db_host=mysql.host, db_port=mysql.port, db_user=mysql.user, db_password=mysql.password, db_name=name,
        secret_key=secrets.token_urlsafe(48), db_timeout_seconds=PATIENCE_SECONDS,
    )  # fmt: skip


# --- MySQL ------------------------------------------------------------------------------------------------------


@lru_cache(4096)
def _text(value: str) -> str:
    return f"'{escape_string(value)}'"


_LITERALS: dict[type, Any] = {
    int: str,
    str: _text,
    type(None): lambda _: "NULL",
    bytes: lambda value: f"X'{value.hex()}'",
    datetime: lambda value: f"'{value.isoformat(' ')}'",
}


def literal(value: Value) -> str:
    """A value as MySQL reads it."""
    written: str = _LITERALS[type(value)](value)
    return written


def insertion(table: str, rows: Iterable[Row]) -> str:
    """A statement that inserts rows into MySQL."""
    literals = _LITERALS
    values = ",".join([f"({','.join([literals[type(value)](value) for value in row])})" for row in rows])
    return f"INSERT INTO {table} ({', '.join(COLUMNS[table])}) VALUES {values}"


class MySQLTarget:
    """A database of a MySQL server. Statements are sent by threads, in the order of the primary keys."""

    def __init__(self, mysql: MySQL, name: str) -> None:
        self._mysql = mysql
        self.name = name
        self.partial = f"{name}_partial"
        self._connections: list[pymysql.Connection[Any]] = []
        self._waiting: queue.Queue[tuple[str, list[Row]] | None] = queue.Queue(MYSQL_STATEMENTS_WAITING)
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._indexes: dict[str, list[str]] = {}
        with self._connect(None) as connection:
            found = _ask(connection, "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", name)
            if found:
                raise Failed(
                    f"There is a database {name} already, with {_accounts(connection, name)} accounts: it is not "
                    "touched. Choose another name, or drop it yourself."
                )
            _ask(connection, f"DROP DATABASE IF EXISTS `{self.partial}`")
        try:
            migrate(settings_of(mysql, self.partial))
            self._drop_indexes()
            for _ in range(MYSQL_CONNECTIONS):
                self._connections.append(self._connect(self.partial))
        except BaseException:
            self.discard()
            raise
        for connection in self._connections:
            thread = threading.Thread(target=self._send, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _connect(self, database: str | None) -> pymysql.Connection[Any]:
        connection = pymysql.connect(
            host=self._mysql.host,
            port=self._mysql.port,
            user=self._mysql.user,
            password=self._mysql.password,
            database=database,
            charset="utf8mb4",
            autocommit=True,
        )
        _ask(connection, "SET SESSION time_zone = '+00:00', unique_checks = 0, foreign_key_checks = 0")
        with contextlib.suppress(pymysql.MySQLError):  # a privilege; without it, it only takes longer
            _ask(connection, "SET SESSION sql_log_bin = 0")
        return connection

    def write(self, table: str, rows: list[Row]) -> None:
        for start in range(0, len(rows), MYSQL_ROWS_PER_STATEMENT):
            self._put((table, rows[start : start + MYSQL_ROWS_PER_STATEMENT]))

    def _put(self, item: tuple[str, list[Row]] | None) -> None:
        while self._failure is None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(item, timeout=0.5)
                return
        raise self._failure

    def _send(self, connection: pymysql.Connection[Any]) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                table, rows = item
                with connection.cursor() as cursor:
                    cursor.execute(insertion(table, rows))
        except BaseException as error:
            self._failure = error

    def _drop_indexes(self) -> None:
        with self._connect(self.partial) as connection:
            for table in INDEXED_AFTERWARDS:
                rows = _ask(
                    connection,
                    "SELECT index_name, non_unique, GROUP_CONCAT(column_name ORDER BY seq_in_index)"
                    " FROM information_schema.statistics"
                    " WHERE table_schema = DATABASE() AND table_name = %s AND index_name <> 'PRIMARY' GROUP BY 1, 2",
                    table,
                )
                self._indexes[table] = [
                    f"ADD {'' if many else 'UNIQUE '}INDEX {name} ({columns})" for name, many, columns in rows
                ]
                _ask(connection, f"ALTER TABLE {table} {', '.join(f'DROP INDEX {name}' for name, *_ in rows)}")

    def finish(self, used: Used, epoch: str) -> None:
        for _ in self._threads:
            self._put(None)
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        with self._connect(self.partial) as connection:
            _ask(connection, "SET SESSION innodb_ddl_buffer_size = 268435456, innodb_ddl_threads = 2")
            for table, indexes in self._indexes.items():
                say(f"building the indexes of {table}")
                _ask(connection, f"ALTER TABLE {table} {', '.join(indexes)}")
            for kind, highest in used_ids(used):
                _ask(connection, "UPDATE id_blocks SET next_id = %s WHERE kind = %s", highest + 1, kind)
            _ask(connection, "UPDATE server_state SET epoch = %s", epoch)
            tables = [row[0] for row in _ask(connection, "SHOW TABLES")]
            say("gathering the statistics of every table")
            _ask(connection, f"ANALYZE TABLE {', '.join(tables)}")
            _ask(connection, f"CREATE DATABASE IF NOT EXISTS `{self.name}` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
            moves = ", ".join(f"{table} TO `{self.name}`.{table}" for table in tables)
            _ask(connection, f"RENAME TABLE {moves}")
        self.discard()

    def discard(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(pymysql.MySQLError, OSError):
                connection.close()
        self._connections = []
        with self._connect(None) as connection:
            _ask(connection, f"DROP DATABASE IF EXISTS `{self.partial}`")


def _ask(connection: pymysql.Connection[Any], statement: str, *values: Value) -> tuple[tuple[Any, ...], ...]:
    with connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return tuple(cursor.fetchall())


def _accounts(connection: pymysql.Connection[Any], name: str) -> str:
    try:
        return f"{_ask(connection, f'SELECT COUNT(*) FROM `{name}`.users')[0][0]:,}"
    except pymysql.MySQLError:
        return "no table of"


def used_ids(used: Used) -> list[tuple[str, int]]:
    """(kind, highest id)."""
    return [("user", used.user), ("session", used.session), ("chat", used.chat), ("message", used.message)]


# --- SQLite -----------------------------------------------------------------------------------------------------


class SQLiteTarget:
    """A file. Nothing is durable until it is whole."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise Failed(f"There is a file {path} already: it is not touched. Choose another, or delete it yourself.")
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._connection: sqlite3.Connection | None = None
        self.discard()
        try:
            migrate(Settings(sqlite_path=self.partial, secret_key=secrets.token_urlsafe(48)))
            self._connection = sqlite3.connect(self.partial, isolation_level=None)
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-262144"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.execute("BEGIN")
        except BaseException:
            self.discard()
            raise

    def write(self, table: str, rows: list[Row]) -> None:
        assert self._connection is not None
        names = COLUMNS[table]
        marks = ", ".join("?" * len(names))
        values = [[_sqlite_value(value) for value in row] for row in rows]
        self._connection.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", values)

    def finish(self, used: Used, epoch: str) -> None:
        assert self._connection is not None
        for kind, highest in used_ids(used):
            self._connection.execute("UPDATE id_blocks SET next_id = ? WHERE kind = ?", (highest + 1, kind))
        self._connection.execute("UPDATE server_state SET epoch = ?", (epoch,))
        self._connection.execute("COMMIT")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.close()
        self._connection = None
        self.partial.rename(self.path)
        self.discard()

    def discard(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for suffix in ("", "-journal", "-wal", "-shm", ".lock"):
            self.partial.with_name(self.partial.name + suffix).unlink(missing_ok=True)


def _sqlite_value(value: Value) -> Value:
    return value.isoformat(" ", "microseconds") if isinstance(value, datetime) else value


# --- seeding ----------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.messages = self.rows = 0
        self._begun = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._begun

    def add(self, rows: int, messages: int) -> None:
        """So many more have been handed over."""
        self.rows += rows
        self.messages += messages
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (0.2 if self._terminal else 15)
            self._show(now)

    def _show(self, now: float) -> None:
        share, seconds = self.messages / self.total, now - self._begun
        left = seconds / share * (1 - share) if share else 0
        bar = "#" * int(share * 30)
        line = f"[{bar:30}] {share:4.0%} {self.messages:,} messages, {self.rows / max(seconds, 0.001):,.0f} rows/s"
        line += f", {left // 60:.0f}:{left % 60:02.0f} left"
        print(f"\r{line:100}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        """All have been handed over."""
        self._show(time.monotonic())
        if self._terminal:
            print(file=sys.stderr)


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _whole_or_nothing(target: Target) -> Iterator[Target]:
    try:
        yield target
    except BaseException:
        say("dropping what was written")
        target.discard()
        raise


def seed(target: Target, size: Size) -> None:
    """Fill a new database. Raises what the database raises; then nothing of it is left."""
    progress = Progress(size.messages)

    def emit(table: str, rows: list[Row]) -> None:
        target.write(table, rows)
        progress.add(len(rows), len(rows) if table == "messages" else 0)

    begun = time.monotonic()
    with _whole_or_nothing(target):
        now = datetime.now(UTC).replace(tzinfo=None)
        used = populate(size, emit, now=now, password_hash=LEAST_ARGON2.hash(PASSWORD))
        progress.end()
        target.finish(used, epoch_of(size.messages))
    say(f"{progress.rows:,} rows in {time.monotonic() - begun:,.0f} s")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.seed",
        description="Fill a new database with the people, chats and messages of a large messenger.",
    )
    parser.add_argument("--messages", default="10k", help="10k, 1M, 10M or a number (default 10k)")
    parser.add_argument("--name", help="name of the new MySQL database (default bench_scale_<messages>)")
    parser.add_argument("--sqlite", type=Path, help="make this SQLite file instead")
    options = parser.parse_args(arguments)
    options.messages = options.messages.lower()
    count = SIZES.get(options.messages, options.messages.replace(",", "").replace("_", ""))
    if not str(count).isdecimal() or int(count) < SIZES["10k"]:
        parser.error("--messages takes 10k, 1M, 10M or a number of at least 10,000")
    options.count = int(count)
    options.name = options.name or f"bench_scale_{options.messages}"
    return options


def main() -> int:
    """Do what the command line asks for."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    size = Size.of(options.count)
    try:
        if options.sqlite:
            seed(SQLiteTarget(options.sqlite), size)
        else:
            url = os.environ.get(MYSQL_URL_NAME)
            if not url:
                raise Failed(f"{MYSQL_URL_NAME} is not set: start a MySQL with `make mysql` and put the URL there.")
            seed(MySQLTarget(MySQL.from_url(url), options.name), size)
    except (Failed, StartupError, pymysql.MySQLError, sqlite3.Error, OSError) as failure:
        print(f"Not seeded: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    where = options.sqlite or options.name
    print(f"{where}: {size.users:,} people, {size.chats:,} chats, {size.messages:,} messages.")
    print(f"Log in as {phone_of(1)} to {phone_of(size.users)}, password {PASSWORD}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
