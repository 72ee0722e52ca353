"""Create the table workers.

Revision 0044, after 0043. 2026-11-29.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import MICROSECONDS, ascii_binary

revision = "0044"
down_revision: str | None = "0043"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("name", ascii_binary(16), nullable=False),
        sa.Column("started_at", MICROSECONDS, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_workers"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("workers")
