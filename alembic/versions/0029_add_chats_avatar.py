"""Add the column chats.avatar.

Revision 0029, after 0028. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ascii_binary

revision = "0029"
down_revision: str | None = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("chats", sa.Column("avatar", ascii_binary(64), nullable=True))


def downgrade() -> None:
    op.drop_column("chats", "avatar")
