"""Create the index ix_chat_members_account.

Revision 0014, after 0013. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision: str | None = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_chat_members_account", "chat_members", ["user_id", "account_version"])


def downgrade() -> None:
    op.drop_index("ix_chat_members_account", table_name="chat_members")
