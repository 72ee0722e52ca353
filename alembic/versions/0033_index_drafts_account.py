"""Create the index ix_drafts_account.

Revision 0033, after 0032. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0033"
down_revision: str | None = "0032"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_drafts_account", "drafts", ["user_id", "account_version"])


def downgrade() -> None:
    op.drop_index("ix_drafts_account", table_name="drafts")
