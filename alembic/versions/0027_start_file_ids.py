"""Start the counter of file ids.

Revision 0027, after 0026. 2026-11-23.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision: str | None = "0026"
branch_labels = None
depends_on = None

id_blocks = sa.table("id_blocks", sa.column("kind", sa.String), sa.column("next_id", sa.BigInteger))


def upgrade() -> None:
    op.bulk_insert(id_blocks, [{"kind": "file", "next_id": 1}])


def downgrade() -> None:
    op.execute(id_blocks.delete().where(id_blocks.c.kind == "file"))
