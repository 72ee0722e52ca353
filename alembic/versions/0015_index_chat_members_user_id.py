"""Create the index ix_chat_members_user_id.

Revision 0015, after 0014. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision: str | None = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_chat_members_user_id", "chat_members", ["user_id", "chat_id"])


def downgrade() -> None:
    op.drop_index("ix_chat_members_user_id", table_name="chat_members")
