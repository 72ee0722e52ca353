"""Create the index ix_sessions_user_id.

Revision 0008, after 0007. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision: str | None = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_sessions_user_id", "sessions", ["user_id", "id"])


def downgrade() -> None:
    op.drop_index("ix_sessions_user_id", table_name="sessions")
