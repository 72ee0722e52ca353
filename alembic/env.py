"""Runs the revisions: on the connection it is handed (`database.migrate`), or on one of its own."""

from __future__ import annotations

from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection

from app.core.config import get_settings
from app.db.database import database_url, migration_engine
from app.db.models import Base

config = context.config


def run(connection: Connection) -> None:
    """Run the revisions, each with its version stamp in a transaction of its own: MySQL commits DDL anyway,
    and so an interrupted run goes on where it stopped."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def print_sql() -> None:
    """`alembic upgrade head --sql`: the statements for an administrator who runs them by hand."""
    context.configure(
        url=database_url(get_settings(), driver="sync").render_as_string(hide_password=False),
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    given = config.attributes.get("connection")
    if given is not None:
        run(given)
        return
    # Only the alembic command gets here; inside the server, logging is the server's business.
    if config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    if context.is_offline_mode():
        print_sql()
        return
    engine = migration_engine(get_settings())
    with engine.connect() as connection:
        run(connection)
    engine.dispose()


main()
