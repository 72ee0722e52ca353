"""The writer's own connections: several statements in one round trip, on the bare driver.

A batch of the chat log is half a dozen statements, and the price of each is paid per batch, not per message: 155 µs
of CPU through SQLAlchemy's asyncio layer, 28 µs through the driver alone, and a wait for the network or for a thread.
So what is to be read goes out together, and what is to be written together with COMMIT: two round trips.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

from asyncmy.connection import Connection as Driver

Row = tuple[Any, ...]
"""Values as the driver gives them: SQLite has no type for times."""


class Statement(NamedTuple):
    """SQL, whole; with `rows` it has a `?` per value and runs once per row (SQLite only)."""

    sql: str
    rows: Sequence[Sequence[int | str | bytes | None]] | None = None


class LogConnection(ABC):
    """One connection, one transaction at a time, begun by its first statement."""

    is_mysql: ClassVar[bool]

    def __init__(self) -> None:
        self._deferred: list[Statement] = []
        self._begun = False
        self.opened_at = time.monotonic()

    def defer(self, *statements: Statement) -> None:
        """Run these, in order, before the next `fetch` or `commit` runs anything else."""
        self._deferred.extend(statements)

    async def fetch(self, *statements: Statement) -> list[list[Row]]:
        """Run statements in one round trip and return the rows of each. Raises the driver's errors."""
        return await self._flush(statements, commit=False)

    async def commit(self) -> None:
        """Run what is deferred, and commit, in one round trip. Raises the driver's errors; whether it is committed
        is then unknown."""
        if self._begun or self._deferred:
            await self._flush((), commit=True)

    async def _flush(self, statements: Sequence[Statement], *, commit: bool) -> list[list[Row]]:
        deferred, self._deferred = self._deferred, []
        begin, self._begun = not self._begun, not commit
        results = await self._run([*deferred, *statements], begin=begin, commit=commit)
        return results[len(deferred) :]

    @abstractmethod
    async def _run(self, statements: Sequence[Statement], *, begin: bool, commit: bool) -> list[list[Row]]:
        """Run statements between BEGIN and COMMIT as asked, and return the rows of each."""

    async def rollback(self) -> None:
        """Take back what was not committed; the connection goes on. Raises the driver's errors."""
        self._deferred, self._begun = [], False
        await self._run([Statement("ROLLBACK")], begin=False, commit=False)

    @abstractmethod
    def abandon(self) -> None:
        """Give up, wherever it stands: what was not committed never happened."""


class MySQLLogConnection(LogConnection):
    """All statements in one packet. Values are literals that `repositories/chat_log.py` wrote.

    The connection does not commit by itself: its first statement begins a transaction.
    """

    is_mysql = True

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self.is_open = True

    async def _run(self, statements: Sequence[Statement], *, begin: bool, commit: bool) -> list[list[Row]]:
        parts = [statement.sql for statement in statements]
        if commit:
            parts.append("COMMIT")
        results: list[list[Row]] = []
        try:
            cursor = self._driver.cursor()
            await cursor.execute(";".join(parts))
            results.append(list(await cursor.fetchall()))
            while await cursor.nextset():
                results.append(list(await cursor.fetchall()))
        except (AttributeError, RuntimeError) as error:
            # How asyncmy stumbles over a connection that was lost in the middle of an answer.
            raise ConnectionResetError(str(error)) from error
        return results

    def abandon(self) -> None:
        # Hanging up is the one way that cannot wait for a server that does not answer.
        self.is_open = False
        self._driver.close()


class SQLiteLogConnection(LogConnection):
    """All statements in one visit to a thread of its own."""

    is_mysql = False

    def __init__(self, path: str, *, lock_timeout_seconds: float) -> None:
        super().__init__()
        self._path = path
        self._lock_timeout = lock_timeout_seconds
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-log")

    async def _run(self, statements: Sequence[Statement], *, begin: bool, commit: bool) -> list[list[Row]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._work, statements, begin, commit)

    def _work(self, statements: Sequence[Statement], begin: bool, commit: bool) -> list[list[Row]]:
        connection = self._ensure()
        if begin:
            connection.execute("BEGIN IMMEDIATE")
        results: list[list[Row]] = []
        for statement in statements:
            if statement.rows is None:
                results.append(connection.execute(statement.sql).fetchall())
            else:
                connection.executemany(statement.sql, statement.rows)
                results.append([])
        if commit:
            connection.execute("COMMIT")
        return results

    async def open(self) -> None:
        """Open the file now instead of at the first batch."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._ensure)

    def _ensure(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=self._lock_timeout, isolation_level=None)
        for pragma in SQLITE_PRAGMAS:
            connection.execute(pragma)
        return connection

    def abandon(self) -> None:
        # Whatever the thread is still at ends first; the next batch waits its turn behind this.
        self._deferred, self._begun = [], False
        self._thread.submit(self._rollback)

    def _rollback(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                self._close()  # a full or broken disk; the next batch opens the file afresh

    async def close(self) -> None:
        """Close the file and end the thread, once it has done what it is at."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


SQLITE_PRAGMAS = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON")
"""How every connection to the file is set up: nothing committed is lost when the power goes."""
