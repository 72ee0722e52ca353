"""A migrated database for every test, made quickly: SQLite by copying a file, MySQL by emptying one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pymysql

from app.core.config import Settings
from app.db.database import migrate

MYSQL_URL = os.environ.get("DIALECT_TEST_MYSQL_URL", "")
ENGINES = os.environ.get("DIALECT_TEST_ENGINES", "sqlite,mysql" if MYSQL_URL else "sqlite").split(",")
"""Both when a MySQL is at hand; naming one repeats only that half."""
SECRET_KEY = "a key that only the tests know: 0123456789abcdef"

TEST_VALUES: dict[str, Any] = {
    "secret_key": SECRET_KEY,
    "host": "127.0.0.1",
    "log_format": "json",
    "upload_path": Path(tempfile.gettempdir()) / f"dialect-test-uploads-{os.getpid()}",
    # As cheap as Argon2 goes; what it costs in earnest has tests of its own.
    "argon2_memory_kib": 8,
    "argon2_time_cost": 1,
    "username_filter_capacity": 1000,
    # Hundreds of sockets from this machine, whose processors may have much else to do.
    "max_sockets_per_ip": 0,
    "max_loop_lag_seconds": 60.0,
    # Limits are tested one by one; elsewhere they would only make tests depend on how fast they run.
    **{
        name: "" if isinstance(field.default, str) else 0
        for name, field in Settings.model_fields.items()
        if name.startswith("limit_") and not name.endswith("_burst")
    },
}


def make_settings(**values: Any) -> Settings:
    """Settings for tests, untouched by the developer's own environment."""
    return Settings(**{**TEST_VALUES, **values})


class SqliteTemplate:
    """A migrated file to copy."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "template.db"
        migrate(make_settings(sqlite_path=self._file))

    def new(self, folder: Path) -> dict[str, Any]:
        """A fresh database in `folder`: the settings that lead to it."""
        path = folder / "dialect.db"
        shutil.copyfile(self._file, path)
        return {"sqlite_path": path}


class MysqlDatabase:
    """One migrated database of this test process, emptied before each test."""

    def __init__(self, name: str) -> None:
        url = urlsplit(MYSQL_URL)
        self.values: dict[str, Any] = {
            "db_user": unquote(url.username or "root"),
            "db_password": unquote(url.password or ""),
            "db_host": url.hostname or "127.0.0.1",
            "db_port": url.port or 3306,
            "db_name": name,
        }
        self._connection = self._connect()
        self._execute(f"DROP DATABASE IF EXISTS `{name}`")
        migrate(make_settings(**self.values))
        self._execute(f"USE `{name}`")
        tables = [row[0] for row in self._execute("SHOW TABLES") if row[0] != "alembic_version"]
        # What the migrations put there comes back after each emptying.
        self._rows = {table: self._execute(f"SELECT * FROM `{table}`") for table in tables}

    def new(self) -> dict[str, Any]:
        """Empty the database: the settings that lead to it."""
        # In one transaction: DELETE and one commit take milliseconds, TRUNCATE is DDL and takes ten times that.
        self._connection.begin()
        for table, rows in self._rows.items():
            self._execute(f"DELETE FROM `{table}`")
            for row in rows:
                self._execute(f"INSERT INTO `{table}` VALUES ({', '.join(['%s'] * len(row))})", row)
        self._connection.commit()
        return self.values

    def close(self) -> None:
        """Drop it."""
        self._execute(f"DROP DATABASE IF EXISTS `{self.values['db_name']}`")
        self._connection.close()

    def _connect(self) -> pymysql.Connection[Any]:
        return pymysql.connect(
            host=self.values["db_host"],
            port=self.values["db_port"],
            user=self.values["db_user"],
            password=self.values["db_password"],
        )

    def _execute(self, statement: str, values: Any = None) -> tuple[tuple[Any, ...], ...]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values)
            return tuple(cursor.fetchall())
