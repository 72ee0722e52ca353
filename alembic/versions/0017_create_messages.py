"""Create the table messages.

Revision 0017, after 0016. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from app.db.models import ID, MICROSECONDS, FixedBinary, ascii_binary

revision = "0017"
down_revision: str | None = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "messages",
        sa.Column("chat_id", ID, autoincrement=False, nullable=False),
        sa.Column("seq", ID, autoincrement=False, nullable=False),
        sa.Column("id", ID, nullable=False),
        sa.Column("version", ID, nullable=False),
        sa.Column("sender_id", ID, nullable=False),
        sa.Column("client_id", FixedBinary(16), nullable=False),
        sa.Column("message_type", ascii_binary(16), nullable=False),
        sa.Column("content", sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql"), nullable=False),
        sa.Column("service", sa.Text(), nullable=True),
        sa.Column("reply_to_id", ID, nullable=True),
        sa.Column("reply_to_seq", ID, nullable=True),
        sa.Column("created_at", MICROSECONDS, nullable=False),
        sa.Column("edited_at", MICROSECONDS, nullable=True),
        sa.Column("deleted_at", MICROSECONDS, nullable=True),
        sa.PrimaryKeyConstraint("chat_id", "seq", name="pk_messages"),
        sa.UniqueConstraint("id", name="uq_messages_id"),
        sa.UniqueConstraint("chat_id", "sender_id", "client_id", name="uq_messages_chat_id_sender_id_client_id"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("messages")
