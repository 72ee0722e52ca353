"""Create the table empty_chats.

Revision 0042, after 0041. 2026-11-29.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID

revision = "0042"
down_revision: str | None = "0041"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "empty_chats",
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("chat_id", name="pk_empty_chats"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("empty_chats")
