"""Start push at the end of every chat: what was said before is not pushed.

Revision 0025, after 0024. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision: str | None = "0024"
branch_labels = None
depends_on = None

chats = sa.table("chats", sa.column("last_seq", sa.BigInteger), sa.column("pushed_seq", sa.BigInteger))


def upgrade() -> None:
    op.execute(chats.update().values(pushed_seq=chats.c.last_seq))


def downgrade() -> None:
    pass
