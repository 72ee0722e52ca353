"""Add the column users.avatar.

Revision 0028, after 0027. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ascii_binary

revision = "0028"
down_revision: str | None = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("users", sa.Column("avatar", ascii_binary(64), nullable=True))


def downgrade() -> None:
    op.drop_column("users", "avatar")
