"""Create the table user_pairs.

Revision 0005, after 0004. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS

revision = "0005"
down_revision: str | None = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "user_pairs",
        sa.Column("low_id", ID, autoincrement=False, nullable=False),
        sa.Column("high_id", ID, autoincrement=False, nullable=False),
        sa.Column("chat_id", ID, nullable=True),
        sa.Column("low_blocks_high", sa.Boolean(), nullable=False),
        sa.Column("high_blocks_low", sa.Boolean(), nullable=False),
        sa.Column("low_blocked_at", MICROSECONDS, nullable=True),
        sa.Column("high_blocked_at", MICROSECONDS, nullable=True),
        sa.Column("low_account_version", ID, nullable=False),
        sa.Column("high_account_version", ID, nullable=False),
        sa.PrimaryKeyConstraint("low_id", "high_id", name="pk_user_pairs"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("user_pairs")
