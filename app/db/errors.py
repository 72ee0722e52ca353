"""What went wrong in the database, whichever it is and whether SQLAlchemy or a bare driver says so."""

from __future__ import annotations

import re
import sqlite3
from typing import cast

from asyncmy import errors as mysql_errors
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app.core.errors import Unavailable

DATABASE_ERRORS = (DBAPIError, PoolTimeoutError, mysql_errors.Error, sqlite3.Error)
"""Everything that the database or its driver raises."""

LOCK_ERRORS = frozenset({1205, 1213, 3572})
"""MySQL: lock wait timeout, deadlock, NOWAIT refused. The transaction may simply be tried again."""

OUTDATED_ERRORS = frozenset({1690, 3572})
"""MySQL: a number out of range, NOWAIT refused."""

MYSQL_TRANSIENT = LOCK_ERRORS | {
    # full disks and memory
    *(1021, 1030, 1037, 1038, 1041, 1114, 1135, 1206),
    # connections: too many, refused, broken, timed out
    *(1040, 1042, 1043, 1044, 1045, 1049, 1129, 1130, 1152, 1154, 1155, 1156, 1157, 1158, 1159, 1160, 1161, 1184),
    *(1203, 1226, 1698, 4031),
    # shutting down, killed, too slow, or for reading only since a failover
    *(1053, 1077, 1079, 1080, 1290, 1317, 1792, 1836, 3024, 3100, 3101),
}
"""MySQL's errors that say nothing about the statement. Those of the client itself, 2000 to 2999, are such too."""

SQLITE_TRANSIENT = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)


def _cause(error: BaseException) -> BaseException:
    """The driver's own error."""
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def _mysql_code(error: BaseException) -> int | None:
    code = error.args[0] if error.args else None
    return code if isinstance(code, int) else None


def mysql_code(error: BaseException) -> int | None:
    """The number of an error of MySQL, whichever driver or SQLAlchemy raises it; None when it has none."""
    return _mysql_code(_cause(error))


def is_transient(error: BaseException) -> bool:
    """Whether the database, not the statement, is at fault, so that trying again may succeed."""
    if isinstance(error, (Unavailable, OSError, TimeoutError, PoolTimeoutError)):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    cause = _cause(error)
    if isinstance(cause, sqlite3.Error):
        code = cast(int | None, getattr(cause, "sqlite_errorcode", None))
        return isinstance(cause, sqlite3.OperationalError) if code is None else code & 0xFF in SQLITE_TRANSIENT
    if isinstance(cause, (mysql_errors.OperationalError, mysql_errors.InterfaceError, mysql_errors.InternalError)):
        number = _mysql_code(cause)
        # Without a number it is the driver that lost the thread: a packet cut short or out of sequence.
        return number is None or number == 0 or 2000 <= number < 3000 or number in MYSQL_TRANSIENT
    return False


def is_lock_conflict(error: BaseException) -> bool:
    """Whether somebody else held a lock for too long, or a deadlock was broken here."""
    cause = _cause(error)
    if isinstance(cause, sqlite3.Error):
        return "database is locked" in str(cause)
    return isinstance(cause, mysql_errors.Error) and _mysql_code(cause) in LOCK_ERRORS


def is_sent_before(error: BaseException) -> bool:
    """Whether a message was refused because its chat has one of this sender and `client_id` already."""
    cause = _cause(error)
    return isinstance(cause, (sqlite3.IntegrityError, mysql_errors.IntegrityError)) and _violated(cause) == (
        "uq_messages_chat_id_sender_id_client_id"
    )


def is_outdated(error: BaseException) -> bool:
    """Whether a chat was found changed or held (`repositories.chat_log.require_unchanged`)."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error) == "integer overflow"
    return isinstance(error, mysql_errors.Error) and _mysql_code(error) in OUTDATED_ERRORS


def unavailable(error: BaseException) -> Unavailable:
    """What a client is told of a database failure."""
    if is_lock_conflict(error):
        return Unavailable("busy", "Somebody else is changing the same thing; try again.", retry_after=0.5)
    return Unavailable("database_unavailable", "The database does not answer; try again.", retry_after=2)


def describe(error: BaseException) -> str:
    """An error in one line, without the statement's parameters: they are people's words."""
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0][:300]


def violated_constraint(error: IntegrityError) -> str:
    """The name of the unique constraint that an insert or update broke, whichever database says so.

    Returns an empty string for any other violation.
    """
    return _violated(error.orig)


def _violated(error: BaseException | None) -> str:
    # The text itself: MySQL's errors are shown as a tuple, with quotes in the entry changing those around it.
    message = str(error.args[-1] if error is not None and error.args else error)
    if match := re.search(r"Duplicate entry .* for key '(?:\w+\.)?(\w+)'", message, re.DOTALL):
        return match.group(1)
    if match := re.search(r"UNIQUE constraint failed: (.+)", message):
        columns = [part.strip().split(".") for part in match.group(1).split(",")]
        return "uq_" + columns[0][0] + "_" + "_".join(column for _, column in columns)
    return ""
