"""Create the table chats.

Revision 0011, after 0010. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0011"
down_revision: str | None = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "chats",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("type", ascii_binary(16), nullable=False),
        sa.Column("title", sa.String(128), nullable=False),
        sa.Column("description", sa.String(512), nullable=False),
        sa.Column("history_visible", sa.Boolean(), nullable=False),
        sa.Column("created_by", ID, nullable=False),
        sa.Column("created_at", MICROSECONDS, nullable=False),
        sa.Column("last_seq", ID, nullable=False),
        sa.Column("version", ID, nullable=False),
        sa.Column("members_version", ID, nullable=False),
        sa.Column("info_version", ID, nullable=False),
        sa.Column("member_count", sa.Integer(), nullable=False),
        sa.Column("last_activity_at", MICROSECONDS, nullable=False),
        sa.Column("changed_at", MICROSECONDS, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_chats"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("chats")
