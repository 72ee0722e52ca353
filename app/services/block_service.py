"""Blocks: between two people, nothing personal passes any more, whoever of the two set it.

In common groups both stay and hear each other. The one who is blocked is not told; what they send is refused as
it is to somebody gone.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from functools import partial

from app.core.clock import Clock
from app.core.config import Settings
from app.core.cursors import decode_cursor, encode_cursor
from app.core.errors import Conflict, user_not_found
from app.db.database import Database
from app.db.repositories import pairs as pair_repository
from app.db.repositories import users as user_repository
from app.db.schemas import UserPage
from app.services.chat_log.changes import RosterMoved
from app.services.unit_of_work import UnitOfWork
from app.services.user_service import user_view

BLOCKED_CURSOR = (int,)
"""User id."""


class BlockService:
    """Blocks, unblocks and lists the blocked."""

    def __init__(self, *, settings: Settings, clock: Clock, database: Database) -> None:
        self.settings = settings
        self.clock = clock
        self.database = database
        self.on_blocked: list[Callable[[int, int], None]] = []
        """Called with (who blocked, whom) once a block is committed."""

    async def block(self, uow: UnitOfWork, user_id: int, other_id: int) -> None:
        """Block somebody; blocking twice is blocking once. Raises Conflict for oneself and NotFound."""
        if user_id == other_id:
            raise Conflict("cannot_block_self", "You cannot block yourself.")
        await self._set(uow, user_id, other_id, blocked=True)

    async def unblock(self, uow: UnitOfWork, user_id: int, other_id: int) -> None:
        """Unblock somebody, blocked or not. Raises NotFound."""
        await self._set(uow, user_id, other_id, blocked=False)

    async def _set(self, uow: UnitOfWork, user_id: int, other_id: int, *, blocked: bool) -> None:
        # Somebody who blocks the caller is found here: one may always block back.
        if await user_repository.find_user(uow.session, other_id) is None:
            raise user_not_found()
        if user_id == other_id:
            return
        pair = await pair_repository.lock_pair(uow.session, user_id, other_id)
        if pair.blocks(user_id) == blocked:
            return
        now = self.clock.now().astimezone(UTC).replace(tzinfo=None)
        await pair_repository.set_block(uow.session, user_id, other_id, now if blocked else None)
        if pair.chat_id is not None:
            # After the pair is written: the chat's roster is read again, and carries the block from here on.
            await uow.append(RosterMoved(pair.chat_id))
        if blocked:
            for listener in self.on_blocked:
                uow.after_commit(partial(listener, user_id, other_id))
        version = await uow.next_account_version(user_id)
        await pair_repository.stamp_block(uow.session, user_id, other_id, version)
        uow.announce_account(
            user_id,
            {"type": "block_changed", "account_version": version, "user_id": other_id, "blocked": blocked},
        )

    async def list_blocked(self, user_id: int, cursor: str | None, limit: int) -> UserPage:
        """Those a person blocks, by id. Raises BadInput for a cursor that is not ours."""
        limit = min(limit, self.settings.page_size_max)
        [after_id] = decode_cursor(cursor, *BLOCKED_CURSOR) if cursor is not None else [0]
        async with self.database.reading() as session:
            ids = await pair_repository.list_blocked(session, user_id, after_id, limit + 1)
            page = ids[:limit]
            rows = {row.id: row for row in await user_repository.list_users(session, page)}
        return {
            # As their profile shows them to whoever blocks them: without what they say of themselves.
            "items": [user_view(rows[other_id]._replace(bio="", avatar=None)) for other_id in page if other_id in rows],
            "next": encode_cursor(page[-1]) if len(ids) > limit else None,
        }
