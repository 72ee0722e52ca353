"""Locks that somebody else holds: what a slow transaction of another process looks like."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

import pymysql

from app.core.config import Settings


@contextlib.contextmanager
def held(settings: Settings, rows: str) -> Iterator[None]:
    """Hold the lock of `rows` (a table and a condition) on MySQL, and of the whole file on SQLite."""
    if settings.uses_mysql:
        mysql = pymysql.connect(
            host=settings.db_host,
            port=settings.db_port,
            user=settings.db_user,
            password=settings.db_password.get_secret_value(),
            database=settings.db_name,
        )
        try:
            with mysql.cursor() as cursor:
                cursor.execute(f"SELECT 1 FROM {rows} FOR UPDATE")
            yield
        finally:
            mysql.close()
    else:
        sqlite = sqlite3.connect(settings.sqlite_path, isolation_level=None)
        try:
            sqlite.execute("BEGIN IMMEDIATE")
            yield
        finally:
            sqlite.close()
