"""Engines, transactions and the schema's version. The one place that knows SQLite from MySQL connections.

SQLite allows one writer at a time, so all writes share one connection that begins IMMEDIATE; reads have their own.
MySQL gets two pools: autocommit reads, and transactions. The chat log's writer has connections of its own
(`log_connection.py`): it must not queue behind the others, and retries by itself instead of paying a ping per batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from threading import Thread
from typing import IO, Any, Literal

import aiosqlite
import asyncmy
import pymysql
from aiosqlite.core import _connection_worker_thread
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool
from sqlalchemy.util import await_only

from app.core import metrics
from app.core.config import Settings, get_settings
from app.core.errors import StartupError, Unavailable
from app.core.fair_line import FairLine
from app.db.errors import (
    DATABASE_ERRORS,
    describe,
    is_lock_conflict,
    is_outdated,
    is_transient,
    mysql_code,
    unavailable,
)
from app.db.log_connection import SQLITE_PRAGMAS, LogConnection, MySQLLogConnection, SQLiteLogConnection

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
MYSQL_SESSION = (
    "SET SESSION transaction_isolation='READ-COMMITTED', time_zone='+00:00', innodb_lock_wait_timeout=3,"
    " sql_mode='STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"
)
INSIST_SECONDS = 0.5
"""How long after a deadline its cancellation is repeated."""
SQLITE_READERS = 4
SQLITE_LOCK_SLICE_SECONDS = 0.25
"""SQLite waits for a lock in a thread that cannot be interrupted, so never for longer than this at a time."""
MYSQL_LOG_CONNECTIONS = 2
"""Transactions of the chat log's writer under way at once: the second only beside a commit that takes long."""
MYSQL_RECYCLE_SECONDS = 1800
"""A connection older than this is replaced: proxies and servers drop old ones without a word."""


def database_url(settings: Settings, *, driver: Literal["async", "sync"]) -> URL:
    """Where the data lives; `sync` is for Alembic and the tools."""
    if not settings.uses_mysql:
        return URL.create(
            "sqlite+aiosqlite" if driver == "async" else "sqlite",
            database=str(settings.sqlite_path.absolute()),
        )
    return URL.create(
        "mysql+asyncmy" if driver == "async" else "mysql+pymysql",
        username=settings.db_user or "root",
        password=settings.db_password.get_secret_value() or None,
        host=settings.db_host or "localhost",
        port=settings.db_port,
        database=settings.db_name or "dialect_db",
        query={"charset": "utf8mb4"},
    )


def database_name(settings: Settings) -> str:
    """Which database the settings lead to, for people."""
    if not settings.uses_mysql:
        return f"SQLite {settings.sqlite_path}"
    url = database_url(settings, driver="sync")
    return f"MySQL {url.host}:{url.port}/{url.database}"


class _InOneLine(logging.Filter):
    """A connection that is lost while the pool takes it back is news, not a bug: it shows no traceback.

    When a database shuts down, there is one for every transaction under way.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and (isinstance(error, asyncio.CancelledError) or is_transient(error)):
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
            record.msg, record.args = "connection_lost", ()
            record.error = describe(error)
        return True


logging.getLogger("sqlalchemy.pool.impl.AsyncAdaptedQueuePool").addFilter(_InOneLine())


@contextlib.asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout` that insists: raises TimeoutError even when its first cancellation got lost.

    The pool and the driver wait by `asyncio.wait_for`, which in Python 3.11 swallows a cancellation that meets a
    result; and when many give up at once, each frees what the next is waiting for. The wait after that has no end.
    """
    async with asyncio.timeout(seconds + INSIST_SECONDS), asyncio.timeout(seconds):
        yield


class BulkReads(FairLine):
    """The line of clients that catch up: however many they are, half of the readers stay with everybody else.

    Who stood in line when the database fell silent is not kept for a silence of their own: each place that becomes
    free would cost the next one a whole timeout, and the hundredth minutes. Both ways in raise Unavailable.
    """

    _silent_at = -math.inf

    def fell_silent(self) -> None:
        """A reader has waited for the database in vain."""
        self._silent_at = time.monotonic()

    async def _enter(self, came_at: float) -> None:
        await super()._enter(came_at)
        if self._silent_at > came_at:
            self._places.release()
            raise unavailable(TimeoutError())


class Database:
    """The server's connections. `start` before use, `close` after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_mysql = settings.uses_mysql
        self._lock_file: Any = None
        self._closed = False
        self.writes_work = True
        """False since a write that the database refused for its own reasons: a full disk, reads only, no answer."""
        self._sqlite_write = asyncio.Lock()
        """SQLite allows one writer: here they queue in order, at the file they would have to try again and again."""
        self._mysql_logs: list[MySQLLogConnection] = []
        """The writer's connections that are idle."""
        self.readers = settings.db_pool_size if self.is_mysql else SQLITE_READERS
        """Reads that can run at once."""
        self.bulk_reads = BulkReads(self.readers // 2, of_account=settings.catch_up_reads_per_user)
        self._mysql_connect = {"connect_timeout": settings.db_timeout_seconds, "init_command": MYSQL_SESSION}
        url = database_url(settings, driver="async")
        if self.is_mysql:
            connect = {**self._mysql_connect, "async_creator_fn": _connect_mysql}
            pool = {
                "pool_timeout": settings.db_timeout_seconds,
                "max_overflow": 0,
                "pool_recycle": MYSQL_RECYCLE_SECONDS,
            }
            self.read_engine = create_async_engine(
                url,
                connect_args=connect,
                pool_size=settings.db_pool_size,
                pool_pre_ping=True,
                isolation_level="AUTOCOMMIT",
                skip_autocommit_rollback=True,
                **pool,
            )
            self.write_engine = create_async_engine(
                url, connect_args=connect, pool_size=settings.db_pool_size, pool_pre_ping=True, **pool
            )
        else:
            timeout = settings.db_timeout_seconds

            def open_engine(size: int, lock_timeout: float) -> AsyncEngine:
                connect = {"timeout": lock_timeout, "async_creator_fn": _SQLiteConnection}
                return create_async_engine(
                    url, pool_size=size, max_overflow=0, pool_timeout=timeout, connect_args=connect
                )

            self.read_engine = open_engine(SQLITE_READERS, timeout)
            self.write_engine = open_engine(1, SQLITE_LOCK_SLICE_SECONDS)
            self._sqlite_log = SQLiteLogConnection(
                str(settings.sqlite_path.absolute()), lock_timeout_seconds=SQLITE_LOCK_SLICE_SECONDS
            )
            _prepare_sqlite(self.read_engine, begin="BEGIN", read_only=True, patience=timeout)
            # Before the other listener, which would meet the file's lock instead of waiting in line.
            _queue_for(self._sqlite_write, self.write_engine)
            _prepare_sqlite(self.write_engine, begin="BEGIN IMMEDIATE", read_only=False, patience=timeout)
        for engine in (self.read_engine, self.write_engine):
            event.listen(engine.sync_engine, "checkin", self._close_latecomer)

    async def start(self) -> None:
        """Take the database into use.

        Raises StartupError when it cannot be reached, is not migrated, does not keep what it commits, or (SQLite)
        is in use by another server.
        """
        if not self.is_mysql:
            self._lock_file = _lock_sqlite(self.settings.sqlite_path)
        try:
            async with self.read_engine.connect() as connection:
                await connection.run_sync(_check_migrated)
                if self.is_mysql:
                    await connection.run_sync(_check_mysql)
                else:
                    await connection.run_sync(_check_sqlite)
            # The rest of what every message needs, too, while there are file descriptors: a flood of connections may
            # take all that are left, and those who are connected go on.
            async with self.write_engine.connect():
                pass
            if self.is_mysql:
                self._mysql_logs = [await self._open_mysql_log() for _ in range(MYSQL_LOG_CONNECTIONS)]
            else:
                await self._sqlite_log.open()
        except (OSError, TimeoutError, *DATABASE_ERRORS) as error:
            raise StartupError(unreachable(self.settings, error)) from error

    async def start_reading(self) -> None:
        """Take the database into use for reads alone, beside the servers that have it; `writing` must not be used.

        Raises StartupError when it cannot be reached or is not migrated.
        """
        path = self.settings.sqlite_path
        if not self.is_mysql and not path.exists():  # SQLite would make it
            raise StartupError(f"There is no database {path}; run: python -m app migrate")
        try:
            async with self.read_engine.connect() as connection:
                await connection.run_sync(_check_migrated)
        except (OSError, TimeoutError, *DATABASE_ERRORS) as error:
            raise StartupError(unreachable(self.settings, error)) from error

    async def close(self) -> None:
        """Close every connection: those in use, as soon as they are given back."""
        self._closed = True
        await self.read_engine.dispose()
        await self.write_engine.dispose()
        while self._mysql_logs:
            self._mysql_logs.pop().abandon()
        if not self.is_mysql:
            await self._sqlite_log.close()
        if self._lock_file is not None:
            self._lock_file.close()

    def _close_latecomer(self, _connection: object, record: ConnectionPoolEntry) -> None:
        # Whoever outlives `close` (a question that others had asked, a cancelled request) gives its connection back
        # to a pool that nobody looks after any more: it would be dropped there, open.
        if self._closed:
            record.invalidate()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session for reads only. On MySQL every statement sees what is committed when it runs; on SQLite all of
        them see what was committed when the first one ran.

        Raises Unavailable when the database does not answer in time.
        """
        async with self._guarded(self.read_engine) as session:
            yield session

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises Unavailable when the database does not answer in time; whether it committed is then unknown.
        """
        async with self._guarded(self.write_engine) as session, session.begin():
            yield session

    @contextlib.asynccontextmanager
    async def appending(self) -> AsyncIterator[LogConnection]:
        """One transaction of the chat log's writer: committed when the block ends, rolled back when it raises.

        Raises what the driver raises, and TimeoutError when the database does not answer in time; whether it
        committed is then unknown.
        """
        try:
            async with deadline(self.settings.db_timeout_seconds):
                if self.is_mysql:
                    mysql = await self._take_mysql_log()
                    try:
                        async with self._committing(mysql):
                            yield mysql
                    finally:
                        if self._closed:
                            mysql.abandon()
                        elif mysql.is_open:
                            self._mysql_logs.append(mysql)
                else:
                    async with self._sqlite_write, self._committing(self._sqlite_log):
                        yield self._sqlite_log
        except Exception as error:
            if is_transient(error):
                self._note_failed_write(error)
            raise
        self.writes_work = True

    def _note_failed_write(self, error: Exception) -> None:
        # Neither a lock nor a queue for connections says anything about the next write.
        if not is_lock_conflict(error) and not isinstance(error, (Unavailable, PoolTimeoutError)):
            self.writes_work = False

    @contextlib.asynccontextmanager
    async def _committing(self, connection: LogConnection) -> AsyncIterator[None]:
        try:
            yield
            await connection.commit()
        except BaseException as error:
            if is_outdated(error):
                await self._roll_back(connection)
            else:
                connection.abandon()
            raise

    async def _roll_back(self, connection: LogConnection) -> None:
        try:
            await connection.rollback()
        except BaseException:
            connection.abandon()
            raise

    async def _take_mysql_log(self) -> MySQLLogConnection:
        while self._mysql_logs:
            known = self._mysql_logs.pop()
            if known.opened_at + MYSQL_RECYCLE_SECONDS > time.monotonic():
                return known
            known.abandon()
        return await self._open_mysql_log()

    async def _open_mysql_log(self) -> MySQLLogConnection:
        return MySQLLogConnection(await self.connect_mysql(autocommit=False))

    async def connect_mysql(self, *, autocommit: bool = True) -> Any:
        """A connection of the bare driver, outside the pools, that commits each statement or begins with the first.

        Raises the driver's errors.
        """
        url = database_url(self.settings, driver="async")
        return await _connect_mysql(
            host=url.host,
            port=url.port,
            user=url.username,
            password=url.password or "",
            db=url.database,
            charset="utf8mb4",
            autocommit=autocommit,
            **self._mysql_connect,
        )

    @contextlib.asynccontextmanager
    async def _guarded(self, engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
        try:
            async with (
                deadline(self.settings.db_timeout_seconds),
                AsyncSession(engine, expire_on_commit=False, autoflush=False) as session,
            ):
                yield session
        except (DBAPIError, PoolTimeoutError, TimeoutError, OSError) as error:
            if isinstance(error, DBAPIError) and not is_transient(error):
                raise
            if isinstance(error, TimeoutError):
                self.bulk_reads.fell_silent()
            metrics.database_unavailable.inc()
            if engine is self.write_engine:
                self._note_failed_write(error)
            log.warning("database_unavailable", extra={"error": describe(error)})
            raise unavailable(error) from error

    async def ping(self) -> bool:
        """Whether the database answers."""
        try:
            async with self.reading() as session:
                await session.execute(text("SELECT 1"))
        except Unavailable:
            return False
        return True


def _lock_sqlite(path: Path) -> IO[str]:
    """The lock of an SQLite file: held until it is closed, and freed by the kernel, even after kill -9.

    Makes the file where it is missing. Raises StartupError when somebody else holds it.
    """
    try:
        file = open(f"{path}.lock", "w")  # noqa: SIM115 - outlives this function
    except OSError as error:
        raise StartupError(f"{path} cannot be written ({error.strerror}).") from error
    try:
        _lock_now(file)
        _make_private(path)
    except BlockingIOError as error:
        file.close()
        raise StartupError(
            f"Another server is using {path}. SQLite serves one process: stop the other one, "
            "or set the DB_* names to use MySQL for several workers."
        ) from error
    except OSError as error:
        file.close()
        raise StartupError(f"{path} cannot be locked ({error.strerror}).") from error
    return file


def _make_private(path: Path) -> None:
    """Make a database that is not there yet readable by its owner only; what SQLite puts beside it gets its mode.

    Raises OSError. The mode of one that exists is its owner's choice.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _lock_now(file: IO[str]) -> None:
    """Lock a whole file or raise BlockingIOError."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def _connect_mysql(**arguments: Any) -> Any:
    """A connection of the driver. Raises ConnectionError where asyncmy gives a reset a name of its own."""
    try:
        return await asyncmy.connect(**arguments)
    except RuntimeError as error:
        # "Transport does not expose socket instance": the server hung up before the driver could look at it.
        raise ConnectionResetError(str(error)) from error


class _SQLiteConnection(aiosqlite.Connection):
    """A connection that can be stopped while it is being closed, and whose loop may end meanwhile.

    SQLAlchemy stops one when what waits for its closing is cancelled. aiosqlite's `close` then stops it once more, and
    waits for a thread that ended at the first stop: the process would not exit.
    """

    def __init__(self, path: str, **arguments: Any) -> None:
        super().__init__(lambda: sqlite3.connect(path, **arguments), iter_chunk_size=64)
        self._thread = Thread(target=_serve_sqlite, args=(self._tx,), daemon=True)
        self._stopped = False
        self._end: asyncio.Future[Any] | None = None

    def stop(self) -> asyncio.Future[Any] | None:
        if not self._stopped:
            self._stopped = True
            self._end = super().stop()
        return self._end


def _serve_sqlite(requests: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for the last answer
        _connection_worker_thread(requests)


def _prepare_sqlite(engine: AsyncEngine, *, begin: str, read_only: bool, patience: float) -> None:
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where `begin` below says, not where the driver guesses
        cursor = connection.cursor()
        for pragma in SQLITE_PRAGMAS:
            cursor.execute(pragma)
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        cursor.close()

    def on_begin(connection: Connection) -> None:
        give_up_at = time.monotonic() + patience
        while time.monotonic() < give_up_at:
            cursor = connection.connection.cursor()
            try:
                cursor.execute(begin)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    break
            finally:
                cursor.close()
        connection.exec_driver_sql(begin)  # as SQLAlchemy's own, so that its error is

    event.listen(engine.sync_engine, "connect", on_connect)
    event.listen(engine.sync_engine, "begin", on_begin)


def _queue_for(lock: asyncio.Lock, engine: AsyncEngine) -> None:
    """Let each transaction of an engine hold a lock from its first statement until its connection is given back."""

    def on_begin(connection: Connection) -> None:
        await_only(lock.acquire())
        connection.info["holds_lock"] = True

    def on_checkin(_connection: object, record: ConnectionPoolEntry) -> None:
        if record.info.pop("holds_lock", False):
            lock.release()

    event.listen(engine.sync_engine, "begin", on_begin)
    event.listen(engine.sync_engine, "checkin", on_checkin)


def _check_migrated(connection: Connection) -> None:
    if _revisions(connection) == _newest_revisions():
        return
    state = "has another version than this server" if _revisions(connection) else "is empty"
    raise StartupError(f"The database {state}; run: python -m app migrate")


def _revisions(connection: Connection) -> set[str]:
    """What the database was migrated to; nothing when it is empty. Raises StartupError when we do not know it."""
    current = set(MigrationContext.configure(connection).get_current_heads())
    script = ScriptDirectory.from_config(alembic_config())
    if current != set(script.get_heads()):  # else all of them need not be loaded
        unknown = current - {revision.revision for revision in script.walk_revisions()}
        if unknown:
            raise StartupError(
                f"The database belongs to a newer Dialect (revision {', '.join(sorted(unknown))}): "
                "install that version, or restore the backup."
            )
    return current


def _newest_revisions() -> set[str]:
    return set(ScriptDirectory.from_config(alembic_config()).get_heads())


def _check_mysql(connection: Connection) -> None:
    flush, binlog, has_binlog = connection.execute(
        text("SELECT @@innodb_flush_log_at_trx_commit, @@sync_binlog, @@log_bin")
    ).one()
    if int(flush) != 1:
        raise StartupError(
            f"MySQL has innodb_flush_log_at_trx_commit={flush}: a power cut would lose acknowledged messages. "
            "Set it to 1."
        )
    if int(has_binlog) and int(binlog) != 1:
        log.warning("mysql_sync_binlog_is_not_1", extra={"sync_binlog": binlog})


def _check_sqlite(connection: Connection) -> None:
    synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
    journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    if synchronous < 2 or journal != "wal":
        raise StartupError("SQLite cannot use WAL with full synchronisation here; is the file on a network disk?")


def unreachable(settings: Settings, error: BaseException) -> str:
    """One sentence about a database that cannot be used."""
    if settings.uses_mysql:
        url = database_url(settings, driver="sync")
        where = f"MySQL at {url.host}:{url.port}"
        match mysql_code(error):
            case 1049:
                return f"{where} has no database {url.database} yet; run: python -m app migrate"
            case 1045 | 1698:
                return f"{where} refuses this DB_USER or DB_PASSWORD (the user is {url.username})."
            case 1044:
                return (
                    f"{where} does not let the user {url.username} use or create the database {url.database}: "
                    "create it, and GRANT that user its rights (docs/operations.md, MySQL)."
                )
            case _:
                return f"{where} cannot be used ({describe(error)}); check the DB_* settings and that it is running."
    return f"The SQLite file {settings.sqlite_path} cannot be used ({describe(error)})."


# --- the schema, written by Alembic only ------------------------------------------------------------------------


def alembic_config() -> AlembicConfig:
    """Alembic's configuration, wherever the process was started."""
    config = AlembicConfig(str(ROOT / "alembic.ini"))
    config.set_main_option("script_location", str(ROOT / "alembic"))
    return config


def migration_engine(settings: Settings) -> Engine:
    """Connections for the revisions, none of them kept.

    As the server's own they read what is committed: at MySQL's default a revision that fills a table from another
    would lock every row of that for the servers that are still at work.
    """
    url = database_url(settings, driver="sync")
    if settings.uses_mysql:
        return create_engine(url, poolclass=NullPool, isolation_level="READ COMMITTED")
    return create_engine(url, poolclass=NullPool)


def create_all_tables() -> None:
    """Create the database where it is missing and bring its schema up to date (`alembic upgrade head`).

    The brief's quick start calls this. Exits with one sentence when the database cannot be used.
    """
    try:
        migrate(get_settings())
    except StartupError as error:
        raise SystemExit(str(error)) from error


def migrate(settings: Settings, revision: str = "head") -> None:
    """Bring the schema to `revision`.

    Raises StartupError when the database cannot be used, or when it is SQLite, there is something to change, and a
    server is using it.
    """
    url = database_url(settings, driver="sync")
    try:
        if settings.uses_mysql:
            _create_mysql_database(settings, url)
        else:
            _make_private(settings.sqlite_path)
        engine = migration_engine(settings)
        try:
            with contextlib.ExitStack() as held, engine.connect() as connection:
                if settings.uses_mysql:
                    # Two machines that start together must not both create the tables.
                    connection.exec_driver_sql("SELECT GET_LOCK(LEFT(CONCAT('migrate ', DATABASE()), 64), 60)")
                elif revision != "head" or _revisions(connection) != _newest_revisions():
                    held.enter_context(_lock_sqlite(settings.sqlite_path))
                _revisions(connection)  # those that a newer version made are none of ours
                connection.commit()  # or Alembic would leave the transactions to us
                config = alembic_config()
                config.attributes["connection"] = connection
                if revision == "base" or revision.startswith("-"):
                    command.downgrade(config, revision)
                else:
                    command.upgrade(config, revision)
                connection.commit()
        finally:
            engine.dispose()
    except (OSError, DBAPIError, pymysql.Error, sqlite3.Error) as error:
        raise StartupError(unreachable(settings, error)) from error


def _create_mysql_database(settings: Settings, url: URL) -> None:
    connection = pymysql.connect(
        host=url.host,
        port=url.port or 3306,
        user=url.username,
        password=str(url.password or ""),
        connect_timeout=int(settings.db_timeout_seconds) + 1,
    )
    try:
        with connection.cursor() as cursor:
            name = (url.database or "").replace("`", "``")
            # `IF NOT EXISTS` alone would need the CREATE privilege that a careful host does not give.
            cursor.execute("SELECT 1 FROM information_schema.schemata WHERE schema_name = %s", (url.database,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
    finally:
        connection.close()
