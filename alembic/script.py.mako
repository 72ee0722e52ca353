"""${message}.

Revision ${up_revision}, after ${down_revision or "nothing"}. ${create_date.strftime("%Y-%m-%d")}.
"""

# MySQL commits after every DDL statement, so a revision holds ONE of them, or only data: then a revision that was cut
# short has either happened or not. Name it by the next number: alembic revision --rev-id 00NN -m "Create the ..."

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision: str | None = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
