"""Create the table fanout_marks.

Revision 0039, after 0038. 2026-11-26.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0039"
down_revision: str | None = "0038"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "fanout_marks",
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("worker", ascii_binary(16), nullable=False),
        sa.Column("part", ascii_binary(8), nullable=False),
        sa.Column("first_seq", ID, nullable=False),
        sa.Column("last_seq", ID, nullable=False),
        sa.Column("at", MICROSECONDS, nullable=False),
        sa.PrimaryKeyConstraint("chat_id", "worker", "part", name="pk_fanout_marks"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("fanout_marks")
