"""Create the index ix_chats_changed_at.

Revision 0012, after 0011. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision: str | None = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_chats_changed_at", "chats", ["changed_at"])


def downgrade() -> None:
    op.drop_index("ix_chats_changed_at", table_name="chats")
