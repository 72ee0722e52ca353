"""Create the table chat_members.

Revision 0013, after 0012. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0013"
down_revision: str | None = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "chat_members",
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("user_id", ID, autoincrement=False, nullable=False),
        sa.Column("role", ascii_binary(8), nullable=False),
        sa.Column("joined_at", MICROSECONDS, nullable=False),
        sa.Column("joined_seq", ID, nullable=False),
        sa.Column("joined_version", ID, nullable=False),
        sa.Column("visible_from_seq", ID, nullable=False),
        sa.Column("left_seq", ID, nullable=True),
        sa.Column("read_seq", ID, nullable=False),
        sa.Column("read_at", MICROSECONDS, nullable=True),
        sa.Column("delivered_seq", ID, nullable=False),
        sa.Column("public_read_seq", ID, nullable=False),
        sa.Column("public_delivered_seq", ID, nullable=False),
        sa.Column("version", ID, nullable=False),
        sa.Column("account_version", ID, nullable=False),
        sa.PrimaryKeyConstraint("chat_id", "user_id", name="pk_chat_members"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("chat_members")
