"""Create the table push_marks.

Revision 0040, after 0039. 2026-11-26.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0040"
down_revision: str | None = "0039"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "push_marks",
        sa.Column("session_id", ID, autoincrement=False, nullable=False),
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("sent_seq", ID, nullable=False),
        sa.Column("tried_seq", ID, nullable=False),
        sa.Column("answer", ascii_binary(8), nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("at", MICROSECONDS, nullable=False),
        sa.PrimaryKeyConstraint("session_id", "chat_id", name="pk_push_marks"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("push_marks")
