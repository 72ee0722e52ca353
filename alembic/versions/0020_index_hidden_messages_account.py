"""Create the index ix_hidden_messages_account.

Revision 0020, after 0019. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision: str | None = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_hidden_messages_account", "hidden_messages", ["user_id", "account_version"])


def downgrade() -> None:
    op.drop_index("ix_hidden_messages_account", table_name="hidden_messages")
