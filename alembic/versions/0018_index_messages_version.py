"""Create the index ix_messages_version.

Revision 0018, after 0017. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision: str | None = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_messages_version", "messages", ["chat_id", "version"])


def downgrade() -> None:
    op.drop_index("ix_messages_version", table_name="messages")
