"""Create the index ix_attachments_chat_id.

Revision 0041, after 0040. 2026-11-29.
"""

from __future__ import annotations

from alembic import op

revision = "0041"
down_revision: str | None = "0040"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_attachments_chat_id", "attachments", ["chat_id"])


def downgrade() -> None:
    op.drop_index("ix_attachments_chat_id", table_name="attachments")
