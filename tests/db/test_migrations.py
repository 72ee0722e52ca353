"""The schema's history: it makes exactly the tables of the models, on both databases, and can be undone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.pool import NullPool

from app.core.config import Settings
from app.db.database import alembic_config, create_all_tables, database_url, migrate, migration_engine
from app.db.models import Base
from tests.support.databases import MysqlDatabase


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """A plain connection to the test's database."""
    engine = create_engine(database_url(settings, driver="sync"), poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def settings(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Settings]:
    """These tests tear tables down: the next test must find them again."""
    yield settings
    if settings.uses_mysql:
        migrate(settings)


def tables(engine: Engine) -> dict[str, str]:
    """How the database itself describes its tables and indexes, `alembic_version` aside."""
    with engine.connect() as connection:
        return describe(connection)


def describe(connection: Connection) -> dict[str, str]:
    """The same, on a connection at hand."""
    if connection.dialect.name == "sqlite":
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        return {name: _sorted_parts(sql) for name, sql in rows if name != "alembic_version"}
    names = [name for name in inspect(connection).get_table_names() if name != "alembic_version"]
    created = {name: connection.execute(text(f"SHOW CREATE TABLE `{name}`")).one()[1] for name in names}
    # Keys come in the order of their making, which means nothing; nor does how many rows there have been.
    created = {name: re.sub(r" AUTO_INCREMENT=\d+", "", sql) for name, sql in created.items()}
    return {name: "\n".join(sorted(line.strip(" ,") for line in sql.splitlines())) for name, sql in created.items()}


def _sorted_parts(sql: str) -> str:
    """A statement with its parts sorted: a column that was added later stands behind the constraints."""
    head, _, body = re.sub(r"\s+", " ", sql).partition("(")
    parts = re.split(r",(?![^()]*\))", body.rpartition(")")[0])
    return "\n".join([head.strip(), *sorted(part.strip() for part in parts)])


def first_rows(engine: Engine) -> tuple[str, list[tuple[str, int]]]:
    with engine.connect() as connection:
        epoch = connection.execute(text("SELECT epoch FROM server_state WHERE id = 1")).scalar_one()
        blocks = connection.execute(text("SELECT kind, next_id FROM id_blocks ORDER BY kind")).all()
    return epoch, [(kind, next_id) for kind, next_id in blocks]


def test_the_migrations_make_the_tables_of_the_models_to_the_letter(settings: Settings, engine: Engine) -> None:
    migrated = tables(engine)
    migrate(settings, "base")
    assert tables(engine) == {}
    Base.metadata.create_all(engine)
    try:
        assert migrated == tables(engine)
    finally:
        Base.metadata.drop_all(engine)


def test_alembic_finds_no_drift(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_up_down_and_up_again_ends_where_it_began(settings: Settings, engine: Engine) -> None:
    before, (epoch, blocks) = tables(engine), first_rows(engine)
    migrate(settings, "base")
    assert tables(engine) == {}
    migrate(settings)
    assert tables(engine) == before
    again, blocks_again = first_rows(engine)
    assert blocks_again == blocks == [("chat", 1), ("file", 1), ("message", 1), ("session", 1), ("user", 1)]
    assert again != epoch  # another database than before, and its clients must notice


def test_every_single_revision_can_be_undone(engine: Engine) -> None:
    config = alembic_config()
    count = len(list(ScriptDirectory.from_config(config).walk_revisions()))
    stages = []
    with engine.connect() as connection:  # one for all steps: a new one for each would take most of the time
        config.attributes["connection"] = connection
        for _ in range(count):
            stages.append(describe(connection))
            connection.commit()
            command.downgrade(config, "-1")
        assert describe(connection) == {}
        for stage in reversed(stages):
            connection.commit()
            command.upgrade(config, "+1")
            assert describe(connection) == stage


def test_migrating_twice_changes_nothing(settings: Settings, engine: Engine) -> None:
    before = tables(engine), first_rows(engine)
    migrate(settings)
    assert (tables(engine), first_rows(engine)) == before


def test_a_revision_holds_one_statement_of_ddl_or_only_data(settings: Settings) -> None:
    """MySQL commits after each: a revision cut short between two could be neither repeated nor undone."""
    statements: list[str] = []

    def remember(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        words = statement.split()
        if words[0] in ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE", "DELETE"):
            statements.append("version" if "alembic_version" in statement else "ddl" if words[0] in DDL else "data")

    migrate(settings, "base")
    event.listen(Engine, "before_cursor_execute", remember)
    try:
        migrate(settings)
    finally:
        event.remove(Engine, "before_cursor_execute", remember)
    revisions = [part.split() for part in " ".join(statements).split("version") if part.strip()]
    assert len(revisions) == len(list(ScriptDirectory.from_config(alembic_config()).walk_revisions()))
    assert all(part == ["ddl"] or set(part) == {"data"} for part in revisions), revisions


DDL = ("CREATE", "ALTER", "DROP")


def test_mysql_columns_have_the_types_that_the_queries_rely_on(mysql_columns: dict[str, str]) -> None:
    assert mysql_columns["messages.content"] == "mediumtext utf8mb4_bin"
    assert mysql_columns["messages.created_at"] == "datetime(6)"
    assert mysql_columns["messages.client_id"] == "binary(16)"
    assert mysql_columns["refresh_tokens.token_hash"] == "binary(32)"
    assert mysql_columns["users.username"] == "varchar(32) ascii_general_ci"
    assert mysql_columns["users.phone"] == "varchar(16) ascii_bin"
    assert mysql_columns["users.display_name"] == "varchar(64) utf8mb4_bin"
    assert mysql_columns["users.id"] == "bigint"


@pytest.fixture
def mysql_columns(settings: Settings, engine: Engine) -> dict[str, str]:
    """Type and collation of every column, by `table.column`."""
    if not settings.uses_mysql:
        pytest.skip("MySQL only")
    with engine.connect() as connection:
        return _columns(connection)


def _columns(connection: Connection) -> dict[str, str]:
    rows = connection.execute(
        text(
            "SELECT table_name, column_name, column_type, collation_name FROM information_schema.columns"
            " WHERE table_schema = DATABASE()"
        )
    )
    return {f"{table}.{column}": f"{kind} {collation or ''}".strip() for table, column, kind, collation in rows}


def test_push_starts_at_the_end_of_chats_that_are_there_already(settings: Settings, engine: Engine) -> None:
    migrate(settings, "base")
    migrate(settings, "0023")
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO chats (id, type, title, description, history_visible, created_by, created_at, last_seq,"
                " version, members_version, info_version, member_count, last_activity_at, changed_at)"
                " VALUES (1, 'group', '', '', 1, 1, '2026-01-01 00:00:00', 77, 80, 1, 1, 1, '2026-01-01 00:00:00',"
                " '2026-01-01 00:00:00')"
            )
        )
    migrate(settings)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT pushed_seq FROM chats")).scalar_one() == 77
        connection.execute(text("DELETE FROM chats"))


def test_chats_that_everybody_had_left_before_let_go_of_their_files_too(settings: Settings, engine: Engine) -> None:
    migrate(settings, "base")
    migrate(settings, "0042")
    with engine.begin() as connection:
        for chat_id, members in ((1, 2), (2, 0), (3, 0), (4, 1)):
            connection.execute(
                text(
                    "INSERT INTO chats (id, type, title, description, history_visible, created_by, created_at,"
                    " last_seq, version, members_version, info_version, member_count, last_activity_at, changed_at)"
                    f" VALUES ({chat_id}, 'group', '', '', 1, 1, '2026-01-01 00:00:00', 7, 8, 1, 1, {members},"
                    " '2026-01-01 00:00:00', '2026-01-01 00:00:00')"
                )
            )
        connection.execute(text("INSERT INTO empty_chats (chat_id) VALUES (3)"))
    migrate(settings)
    with engine.begin() as connection:
        named = connection.execute(text("SELECT chat_id FROM empty_chats ORDER BY chat_id")).scalars().all()
        assert named == [2, 3]
        connection.execute(text("DELETE FROM chats"))
        connection.execute(text("DELETE FROM empty_chats"))


def test_messages_that_are_there_get_no_worker_and_are_not_written_anew(settings: Settings, engine: Engine) -> None:
    migrate(settings, "base")
    migrate(settings, "0044")
    table_id = text(
        "SELECT table_id FROM information_schema.innodb_tables WHERE name = CONCAT(DATABASE(), '/messages')"
    )

    def tables_made() -> int:
        """MySQL numbers its tables: one that is copied has another number."""
        with engine.connect() as connection:
            return connection.execute(table_id).scalar_one() if settings.uses_mysql else 0

    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO messages (chat_id, seq, id, version, sender_id, client_id, message_type, content,"
                " created_at) VALUES (1, 1, 1, 1, 1, '0123456789abcdef', 'text', 'hello', '2026-01-01 00:00:00')"
            )
        )
    before = tables_made()
    migrate(settings)
    assert tables_made() == before
    with engine.begin() as connection:
        assert connection.execute(text("SELECT content, worker FROM messages")).all() == [("hello", None)]
        connection.execute(text("DELETE FROM messages"))


def test_a_revision_that_reads_a_table_locks_none_of_its_rows(settings: Settings, engine: Engine) -> None:
    del engine
    if not settings.uses_mysql:
        pytest.skip("SQLite locks the file")
    reviser = migration_engine(settings)
    try:
        with reviser.connect() as connection:
            assert connection.execute(text("SELECT @@transaction_isolation")).scalar_one() == "READ-COMMITTED"
    finally:
        reviser.dispose()


def test_usernames_compare_without_case_and_phones_exactly(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO users (id, phone, username, display_name, display_name_key, bio, password_hash,"
                " profile_version, account_version, created_at)"
                " VALUES (1, '+79990000001', 'Ann', 'Ann', 'ann', '', 'x', 1, 0, '2026-01-01 00:00:00')"
            )
        )
        count = text("SELECT COUNT(*) FROM users WHERE username = 'aNN'")
        assert connection.execute(count).scalar_one() == 1
        connection.rollback()


def test_create_all_tables_makes_a_missing_mysql_database(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    if not settings.uses_mysql:
        pytest.skip("MySQL only")
    fresh = settings.model_copy(update={"db_name": f"{settings.db_name}_fresh"})
    monkeypatch.setattr("app.db.database.get_settings", lambda: fresh)
    engine = create_engine(database_url(fresh, driver="sync"), poolclass=NullPool)
    try:
        create_all_tables()
        create_all_tables()
        assert "messages" in tables(engine)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT @@collation_database")).scalar_one() == "utf8mb4_bin"
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE `{fresh.db_name}`"))
        engine.dispose()


def test_an_emptied_test_database_is_as_good_as_new(request: pytest.FixtureRequest, settings: Settings) -> None:
    """The suite relies on it: what one test leaves behind must not reach the next."""
    if not settings.uses_mysql:
        pytest.skip("SQLite gets a new file")
    database: MysqlDatabase = request.getfixturevalue("mysql_database")
    engine = create_engine(database_url(settings, driver="sync"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("UPDATE id_blocks SET next_id = 77"))
        connection.execute(text("INSERT INTO hidden_messages VALUES (1, 2, 3, 4, 5)"))
    database.new()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM hidden_messages")).scalar_one() == 0
    assert first_rows(engine)[1] == [("chat", 1), ("file", 1), ("message", 1), ("session", 1), ("user", 1)]
    engine.dispose()
