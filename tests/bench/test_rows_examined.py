"""What every hot query reads does not grow with the tables: a lost index, or a bad plan, is red here.

MySQL counts the rows; the queries are those of the services (`bench/probes.py`). The same is asserted of 10 million
messages by `python -m bench --only p6`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing

import pymysql
import pytest

from bench.population import COLUMNS, Row, Size, populate
from bench.probes import PROBES, Examined, Probe, measure, verdict
from bench.seed import insertion
from tests.bench.test_seed import NOW
from tests.support.databases import ENGINES, MysqlDatabase, make_settings

SMALL = Size(
    2200, users=1000, chats=60, large_chat_messages=1200, large_chat_members=40, largest_group=60, reader_chats=20
)
LARGE = Size(
    13_000, users=5000, chats=600, large_chat_messages=8000, large_chat_members=40, largest_group=60, reader_chats=20
)

pytestmark = pytest.mark.skipif("mysql" not in ENGINES, reason="MySQL counts the rows")


def _measure(database: MysqlDatabase, size: Size) -> dict[str, Examined]:
    settings = make_settings(**database.new())
    with (
        closing(
            pymysql.connect(
                host=settings.db_host,
                port=settings.db_port,
                user=settings.db_user,
                password=settings.db_password.get_secret_value(),
                database=settings.db_name,
            )
        ) as connection,
        connection.cursor() as cursor,
    ):

        def emit(table: str, rows: list[Row]) -> None:
            if rows:
                cursor.execute(insertion(table, rows))

        populate(size, emit, now=NOW, password_hash="nobody logs in")
        connection.commit()
        cursor.execute(f"ANALYZE TABLE {', '.join(COLUMNS)}")
    return asyncio.run(measure(settings, size))


@pytest.fixture(scope="module")
def rows_examined(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, Examined], dict[str, Examined]]]:
    """Of a small and of a larger population, by the name of the probe."""
    database: MysqlDatabase = request.getfixturevalue("mysql_database")
    yield _measure(database, SMALL), _measure(database, LARGE)
    database.new()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_what_a_query_reads_is_bounded_and_does_not_grow(
    probe: Probe, rows_examined: tuple[dict[str, Examined], dict[str, Examined]]
) -> None:
    small, large = (found[probe.name] for found in rows_examined)

    assert large.statements, "nothing was asked"
    assert small.rows <= probe.most(SMALL), small
    assert not verdict(probe, SMALL, small, large), (small, large)
