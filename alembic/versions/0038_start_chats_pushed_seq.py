"""Start push at the end of every chat: what was said before is not pushed.

Revision 0038, after 0037. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision: str | None = "0037"
branch_labels = None
depends_on = None

chats = sa.table("chats", sa.column("last_seq", sa.BigInteger), sa.column("pushed_seq", sa.BigInteger))


def upgrade() -> None:
    op.execute(chats.update().values(pushed_seq=chats.c.last_seq))


def downgrade() -> None:
    pass
