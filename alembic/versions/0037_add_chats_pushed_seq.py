"""Add the column pushed_seq to chats.

Revision 0037, after 0036. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID

revision = "0037"
down_revision: str | None = "0036"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("chats", sa.Column("pushed_seq", ID, server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.drop_column("chats", "pushed_seq")
