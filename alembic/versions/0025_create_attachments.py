"""Create the table attachments.

Revision 0025, after 0024. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID

revision = "0025"
down_revision: str | None = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "attachments",
        sa.Column("file_id", ID, autoincrement=False, nullable=False),
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("seq", ID, autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("file_id", "chat_id", "seq", name="pk_attachments"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("attachments")
