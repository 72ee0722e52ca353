"""Create the index ix_chat_members_version.

Revision 0016, after 0015. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision: str | None = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_chat_members_version", "chat_members", ["chat_id", "version"])


def downgrade() -> None:
    op.drop_index("ix_chat_members_version", table_name="chat_members")
