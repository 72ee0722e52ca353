"""Create the index ix_files_collect_at.

Revision 0024, after 0023. 2026-11-23.
"""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision: str | None = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_files_collect_at", "files", ["collect_at"])


def downgrade() -> None:
    op.drop_index("ix_files_collect_at", table_name="files")
