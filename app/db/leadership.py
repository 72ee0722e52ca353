"""One process at a time, of all that share a database: for work that must not be done twice."""

from __future__ import annotations

import time
from typing import Any

from app.db.database import Database, deadline
from app.db.errors import DATABASE_ERRORS, unavailable

VANISHED_SECONDS = 30
"""A leader whose connection died without a word keeps the lock for so long."""


class Leadership:
    """MySQL's named lock, held by a connection of its own and freed with it, however the process ends.

    SQLite serves one process: it always leads.
    """

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._name = name
        self._connection: Any = None
        self.since: float | None = None
        """When it was taken, by the monotonic clock; None while somebody else leads."""

    async def hold(self) -> bool:
        """Whether this process leads: takes the lead when it is free, and makes sure of it when it is had.

        Raises Unavailable when the database does not answer: then somebody else may lead by now.
        """
        if self._database.is_mysql:
            try:
                async with deadline(self._database.settings.db_timeout_seconds):
                    leads = await self._lock()
            except (*DATABASE_ERRORS, OSError, TimeoutError, RuntimeError, AttributeError) as error:
                # The last two are how asyncmy stumbles over a connection that was lost.
                self.release()
                raise unavailable(error) from error
        else:
            leads = True
        if not leads:
            self.since = None
        elif self.since is None:
            self.since = time.monotonic()
        return leads

    async def _lock(self) -> bool:
        if self._connection is None:
            self._connection = await self._database.connect_mysql()
            await self._ask(f"SET SESSION wait_timeout = {VANISHED_SECONDS}")
        # One's own lock is given again; asking shows that the connection is still there.
        lock = f"LEFT(CONCAT('{self._name} ', DATABASE()), 64)"
        if (await self._ask(f"SELECT IS_USED_LOCK({lock}) = CONNECTION_ID()")) == 1:
            return True
        return bool(await self._ask(f"SELECT GET_LOCK({lock}, 0)") == 1)

    async def _ask(self, sql: str) -> Any:
        cursor = self._connection.cursor()
        await cursor.execute(sql)
        row = await cursor.fetchone()
        return row[0] if row else None

    def release(self) -> None:
        """Let somebody else lead."""
        self.since = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
