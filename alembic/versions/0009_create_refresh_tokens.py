"""Create the table refresh_tokens.

Revision 0009, after 0008. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, FixedBinary

revision = "0009"
down_revision: str | None = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "refresh_tokens",
        sa.Column("token_hash", FixedBinary(32), nullable=False),
        sa.Column("session_id", ID, nullable=False),
        sa.Column("created_at", MICROSECONDS, nullable=False),
        sa.Column("used_at", MICROSECONDS, nullable=True),
        sa.PrimaryKeyConstraint("token_hash", name="pk_refresh_tokens"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("refresh_tokens")
