"""Create the table drafts.

Revision 0032, after 0031. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from app.db.models import ID, MICROSECONDS

revision = "0032"
down_revision: str | None = "0031"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "drafts",
        sa.Column("user_id", ID, autoincrement=False, nullable=False),
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("content", sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql"), nullable=False),
        sa.Column("reply_to_id", ID, nullable=True),
        sa.Column("updated_at", MICROSECONDS, nullable=False),
        sa.Column("account_version", ID, nullable=False),
        sa.PrimaryKeyConstraint("user_id", "chat_id", name="pk_drafts"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("drafts")
