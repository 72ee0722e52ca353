"""Create the table user_settings.

Revision 0034, after 0033. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID

revision = "0034"
down_revision: str | None = "0033"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "user_settings",
        sa.Column("user_id", ID, autoincrement=False, nullable=False),
        sa.Column("notify_personal", sa.Boolean(), nullable=False),
        sa.Column("notify_groups", sa.Boolean(), nullable=False),
        sa.Column("account_version", ID, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_user_settings"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("user_settings")
