"""Add the column worker to messages.

Last and without a default: neither database touches the rows that are there, however many they are.

Revision 0045, after 0044. 2026-11-29.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0045"
down_revision: str | None = "0044"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("messages", sa.Column("worker", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("messages", "worker")
