"""Watching what is asked of the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event

from app.db.database import Database
from app.db.log_connection import LogConnection, Row, Statement


@contextmanager
def statements(database: Database, *, background: bool = False) -> Iterator[list[str]]:
    """The statements that run meanwhile, those of the writer's own connection too.

    Not those of the tasks that store marks of fan-out and when people were last seen, unless `background`.
    """
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        task = asyncio.current_task()
        if background or task is None or task.get_name() not in ("fanout-marks", "last-seen"):
            seen.append(statement)

    flush = LogConnection._flush

    async def noting(self: LogConnection, asked: Sequence[Statement], *, commit: bool) -> list[list[Row]]:
        seen.extend(statement.sql for statement in (*self._deferred, *asked))
        return await flush(self, asked, commit=commit)

    engines = [engine.sync_engine for engine in (database.read_engine, database.write_engine)]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    LogConnection._flush = noting  # type: ignore[assignment,method-assign]
    try:
        yield seen
    finally:
        LogConnection._flush = flush  # type: ignore[method-assign]
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
