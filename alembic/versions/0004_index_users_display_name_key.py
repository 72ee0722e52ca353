"""Create the index ix_users_display_name_key.

Revision 0004, after 0003. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_users_display_name_key", "users", ["display_name_key", "id"])


def downgrade() -> None:
    op.drop_index("ix_users_display_name_key", table_name="users")
