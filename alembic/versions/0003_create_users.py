"""Create the table users.

Revision 0003, after 0002. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from app.db.models import ID, MICROSECONDS, ascii_binary

revision = "0003"
down_revision: str | None = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", ID, autoincrement=False, nullable=False),
        sa.Column("phone", ascii_binary(16), nullable=False),
        sa.Column(
            "username",
            sa.String(32, collation="NOCASE").with_variant(
                mysql.VARCHAR(32, charset="ascii", collation="ascii_general_ci"), "mysql"
            ),
            nullable=False,
        ),
        sa.Column("display_name", sa.String(64), nullable=False),
        sa.Column("display_name_key", sa.String(192), nullable=False),
        sa.Column("bio", sa.String(512), nullable=False),
        sa.Column("password_hash", ascii_binary(255), nullable=False),
        sa.Column("profile_version", sa.Integer(), nullable=False),
        sa.Column("account_version", ID, nullable=False),
        sa.Column("created_at", MICROSECONDS, nullable=False),
        sa.Column("last_seen_at", MICROSECONDS, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("phone", name="uq_users_phone"),
        sa.UniqueConstraint("username", name="uq_users_username"),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("users")
