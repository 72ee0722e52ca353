"""The writer's own connection: whatever text comes, whatever goes wrong."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
from asyncmy import errors as mysql_errors
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app.core.config import Settings
from app.core.errors import Unavailable
from app.db import errors
from app.db.database import SQLITE_LOCK_SLICE_SECONDS
from app.db.log_connection import Statement
from app.db.repositories import chat_log as repository
from app.services.container import Services

NASTY = (
    "it's; COMMIT; DROP TABLE messages -- ",
    "'; SELECT 1 #",
    "\"`\\\\'%s%(a)s :name ? {t} {0}",
    "\\'; ROLLBACK; /*",
    "Привет, мир! 👩‍👩‍👧‍👦 \u202e\u0301",
    "line\nline\r\n\ttab\x1a\x7f",
    "",
)


async def test_text_comes_back_as_it_went_in_and_never_ends_a_statement(services: Services) -> None:
    """Through the literals (MySQL) or the values (SQLite) of both an insert and an update."""
    async with services.database.appending() as connection:
        for number, nasty in enumerate(NASTY, start=1):
            row = repository.MessageRow(
                7, number, number, number, 1, bytes([number] * 16), "text", nasty, nasty, None, None, None,
                services.clock.now().replace(tzinfo=None), None, None,
            )  # fmt: skip
            await repository.insert_messages(connection, [row], 7)
            turned = row._replace(content=nasty[::-1], edited_at=row.created_at)
            if number % 2:
                await repository.update_messages(connection, [turned])
    async with services.database.reading() as session:
        rows = {row.id: row for row in await repository.find_messages(session, range(1, len(NASTY) + 1))}
    for number, nasty in enumerate(NASTY, start=1):
        assert rows[number].content == (nasty[::-1] if number % 2 else nasty)
        assert rows[number].service == nasty
        assert rows[number].client_id == bytes([number] * 16)
        assert (rows[number].edited_at == rows[number].created_at) is bool(number % 2)


async def test_what_fails_in_the_middle_leaves_nothing_and_the_next_transaction_works(services: Services) -> None:
    add = "UPDATE id_blocks SET next_id = next_id + {} WHERE kind = 'chat'"
    read = Statement("SELECT next_id FROM id_blocks WHERE kind = 'chat'")

    async def stumble() -> None:
        async with services.database.appending() as connection:
            await connection.fetch(Statement(add.format(100)))
            raise ZeroDivisionError

    async with services.database.appending() as connection:
        [[(before,)]] = await connection.fetch(read)
    for broken in ("UPDATE id_blocks SET nonsense = 1", "INSERT INTO id_blocks (kind, next_id) VALUES ('chat', 1)"):
        with pytest.raises((mysql_errors.Error, sqlite3.Error)) as refused:
            async with services.database.appending() as connection:
                connection.defer(Statement(add.format(1)), Statement(broken), Statement(add.format(10)))
        assert not errors.is_transient(refused.value)
        with pytest.raises(ZeroDivisionError):
            await stumble()
    async with services.database.appending() as connection:
        connection.defer(Statement(add.format(1000)))
        [[(now,)]] = await connection.fetch(read)
    assert now == before + 1000
    async with services.database.appending() as connection:
        assert await connection.fetch(read) == [[(now,)]]


def _sqlite_error(code: int | None, text: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(text)
    if code is not None:
        error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (Unavailable("busy", "."), True),
        (mysql_errors.OperationalError(1205, "Lock wait timeout exceeded"), True),
        (mysql_errors.OperationalError(1290, "running with the --read-only option"), True),
        (mysql_errors.OperationalError(2013, "Lost connection"), True),
        (mysql_errors.InternalError("Packet sequence number wrong"), True),
        (mysql_errors.OperationalError(1366, "Incorrect string value"), False),
        (mysql_errors.OperationalError(1054, "Unknown column"), False),
        (mysql_errors.DataError(1406, "Data too long"), False),
        (mysql_errors.IntegrityError(1062, "Duplicate entry"), False),
        (OperationalError("SELECT", None, mysql_errors.OperationalError(1213, "Deadlock")), True),
        (OperationalError("SELECT", None, mysql_errors.OperationalError(1366, "Incorrect")), False),
        (_sqlite_error(sqlite3.SQLITE_BUSY, "database is locked"), True),
        (_sqlite_error(sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error"), True),
        (_sqlite_error(sqlite3.SQLITE_FULL, "database or disk is full"), True),
        (_sqlite_error(sqlite3.SQLITE_ERROR, "no such column"), False),
        (sqlite3.IntegrityError("UNIQUE constraint failed"), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_trying_again_is_for_the_failures_of_a_database_not_of_a_statement(error: Exception, transient: bool) -> None:
    assert errors.is_transient(error) is transient


async def test_the_writer_and_units_of_work_take_turns_at_sqlites_one_lock(
    services: Services, settings: Settings
) -> None:
    if settings.uses_mysql:
        pytest.skip("MySQL locks rows")
    entered, leave = asyncio.Event(), asyncio.Event()

    async def unit_of_work() -> None:
        async with services.database.writing() as session:
            await session.execute(text("UPDATE id_blocks SET next_id = next_id + 1 WHERE kind = 'chat'"))
            entered.set()
            await leave.wait()

    async def append() -> None:
        async with services.database.appending() as connection:
            await connection.fetch(Statement("SELECT 1"))

    holding = asyncio.create_task(unit_of_work())
    await entered.wait()
    waiting = asyncio.create_task(append())
    # Longer than SQLite itself would be asked to wait: who is in line does not meet its lock.
    done, _ = await asyncio.wait([waiting], timeout=SQLITE_LOCK_SLICE_SECONDS * 2)
    assert not done
    leave.set()
    await asyncio.wait_for(asyncio.gather(holding, waiting), 5)
    async with services.database.appending() as connection:
        await connection.fetch(Statement("SELECT 1"))
        waiting = asyncio.create_task(unit_of_work())
        done, _ = await asyncio.wait([waiting], timeout=SQLITE_LOCK_SLICE_SECONDS * 2)
        assert not done
    await asyncio.wait_for(waiting, 5)
