"""Who is calling: what the doors prove and the services are told."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling, by which session, and until when that is proven."""

    user_id: int
    session_id: int
    expires_at: datetime
