"""Create the index ix_chat_settings_account.

Revision 0031, after 0030. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0031"
down_revision: str | None = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_chat_settings_account", "chat_settings", ["user_id", "account_version"])


def downgrade() -> None:
    op.drop_index("ix_chat_settings_account", table_name="chat_settings")
