"""Create the table sessions.

Revision 0007, after 0006. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0007"
down_revision: str | None = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("device_name", sa.String(64), nullable=False),
        sa.Column("platform", sa.String(16), nullable=False),
        sa.Column("ip", ascii_binary(45), nullable=False),
        sa.Column("created_at", MICROSECONDS, nullable=False),
        sa.Column("last_seen_at", MICROSECONDS, nullable=False),
        sa.Column("expires_at", MICROSECONDS, nullable=False),
        sa.Column("ended_at", MICROSECONDS, nullable=True),
        sa.Column("end_reason", ascii_binary(16), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("sessions")
