"""Create the table files.

Revision 0022, after 0021. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.models import ID, MICROSECONDS, FixedBinary, ascii_binary

revision = "0022"
down_revision: str | None = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("owner_id", ID, nullable=False),
        sa.Column("kind", ascii_binary(8), nullable=False),
        sa.Column("media_type", ascii_binary(127), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("size", ID, nullable=False),
        sa.Column("sha256", FixedBinary(32), nullable=False),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.Column("blurhash", ascii_binary(64), nullable=True),
        sa.Column("storage_key", ascii_binary(64), nullable=False),
        sa.Column("thumbnail_size", sa.Integer(), nullable=True),
        sa.Column("created_at", MICROSECONDS, nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False),
        sa.Column("collect_at", MICROSECONDS, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("files")
