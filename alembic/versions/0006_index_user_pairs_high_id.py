"""Create the index ix_user_pairs_high_id.

Revision 0006, after 0005. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision: str | None = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_user_pairs_high_id", "user_pairs", ["high_id", "low_id"])


def downgrade() -> None:
    op.drop_index("ix_user_pairs_high_id", table_name="user_pairs")
