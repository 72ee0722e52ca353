"""Wires the parts together: built once per process by `create_app`, started and stopped by its lifespan."""

from __future__ import annotations

from dataclasses import dataclass

from app.core.clock import Clock
from app.core.config import Settings
from app.core.ids import IdAllocator
from app.db.database import Database
from app.services.chat_log.append import Appender
from app.services.chat_log.roster import RosterCache
from app.services.unit_of_work import UnitOfWorkFactory


@dataclass
class Services:
    """Everything the edge may call."""

    settings: Settings
    clock: Clock
    database: Database
    ids: IdAllocator
    rosters: RosterCache
    appender: Appender
    unit_of_work: UnitOfWorkFactory
