"""Create the index ix_push_devices_user_id.

Revision 0036, after 0035. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0036"
down_revision: str | None = "0035"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_push_devices_user_id", "push_devices", ["user_id"])


def downgrade() -> None:
    op.drop_index("ix_push_devices_user_id", table_name="push_devices")
