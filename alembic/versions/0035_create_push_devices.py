"""Create the table push_devices.

Revision 0035, after 0034. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0035"
down_revision: str | None = "0034"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "push_devices",
        sa.Column("session_id", ID, autoincrement=False, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("kind", ascii_binary(8), nullable=False),
        sa.Column("token", ascii_binary(1024), nullable=False),
        sa.Column("updated_at", MICROSECONDS, nullable=False),
        sa.PrimaryKeyConstraint("session_id", name="pk_push_devices"),
        sa.UniqueConstraint("token", name="uq_push_devices_token"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("push_devices")
