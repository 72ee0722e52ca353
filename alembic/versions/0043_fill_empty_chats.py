"""Name the chats that everybody has left already: their files are let go of, too.

Revision 0043, after 0042. 2026-11-29.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0043"
down_revision: str | None = "0042"
branch_labels = None
depends_on = None

chats = sa.table("chats", sa.column("id", sa.BigInteger), sa.column("member_count", sa.Integer))
empty_chats = sa.table("empty_chats", sa.column("chat_id", sa.BigInteger))


def upgrade() -> None:
    known = sa.exists().where(empty_chats.c.chat_id == chats.c.id)  # of a run that was cut short, or of a new server
    empty = sa.select(chats.c.id).where(chats.c.member_count == 0, ~known)
    op.execute(empty_chats.insert().from_select(["chat_id"], empty))


def downgrade() -> None:
    pass
