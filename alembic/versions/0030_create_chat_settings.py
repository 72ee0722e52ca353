"""Create the table chat_settings.

Revision 0030, after 0029. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS

revision = "0030"
down_revision: str | None = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "chat_settings",
        sa.Column("user_id", ID, autoincrement=False, nullable=False),
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("muted_until", MICROSECONDS, nullable=True),
        sa.Column("pin_order", ID, nullable=False),
        sa.Column("archived", sa.Boolean(), nullable=False),
        sa.Column("marked_unread", sa.Boolean(), nullable=False),
        sa.Column("account_version", ID, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "chat_id", name="pk_chat_settings"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("chat_settings")
