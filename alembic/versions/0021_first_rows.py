"""Name this database and start the id counters.

Revision 0021, after 0020. 2026-11-23.
"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision: str | None = "0020"
branch_labels = None
depends_on = None

server_state = sa.table("server_state", sa.column("id", sa.SmallInteger), sa.column("epoch", sa.String))
id_blocks = sa.table("id_blocks", sa.column("kind", sa.String), sa.column("next_id", sa.BigInteger))


def upgrade() -> None:
    op.bulk_insert(server_state, [{"id": 1, "epoch": str(uuid.uuid4())}])
    op.bulk_insert(id_blocks, [{"kind": kind, "next_id": 1} for kind in ("user", "session", "chat", "message")])


def downgrade() -> None:
    op.execute(id_blocks.delete())
    op.execute(server_state.delete())
