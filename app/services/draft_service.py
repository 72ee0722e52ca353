"""Drafts: what each member has begun to write in a chat, on all their devices.

Sending does not delete one: it may have been written on another device meanwhile. The client that sends does it.
"""

from __future__ import annotations

from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import NotFound, chat_not_found
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import chat_log as log_repository
from app.db.repositories import chats as chats_repository
from app.db.repositories import drafts as repository
from app.db.schemas import Draft, DraftIn, is_blank
from app.services.chat_log.views import draft_view
from app.services.message_service import check_length
from app.services.unit_of_work import UnitOfWork


class DraftService:
    """Stores and deletes drafts; the list of chats shows them."""

    def __init__(self, *, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    async def save(self, uow: UnitOfWork, user_id: int, chat_id: int, body: DraftIn) -> Draft:
        """Store a draft in place of the one before; a blank one deletes it. What changes nothing is not told.

        Raises BadInput when it is too long for a message, NotFound for a chat the user is not in, or a `reply_to` that
        they cannot see there.
        """
        check_length(body.content, self._settings.max_message_chars)
        if is_blank(body.content):
            return await self._save(uow, user_id, chat_id, "", None)
        return await self._save(uow, user_id, chat_id, body.content, body.reply_to)

    async def delete(self, uow: UnitOfWork, user_id: int, chat_id: int) -> None:
        """Delete a draft, if there is one. Raises NotFound for a chat the user is not in."""
        await self._save(uow, user_id, chat_id, "", None)

    async def _save(self, uow: UnitOfWork, user_id: int, chat_id: int, content: str, reply_to: int | None) -> Draft:
        session = uow.session
        # As with settings of a chat: nobody joins or leaves one under the user's lock.
        await accounts_repository.lock_account(session, user_id)
        member = await chats_repository.find_membership(session, chat_id, user_id)
        if member is None:
            raise chat_not_found()
        if reply_to is not None:
            found = await log_repository.find_messages(session, [reply_to])
            if not found or found[0].chat_id != chat_id or found[0].seq < member.visible_from_seq:
                raise NotFound("reply_not_found", "The message it answers is not in this chat.")
        row = await repository.find_draft(session, user_id, chat_id)
        if (row.content, row.reply_to_id) == (content, reply_to):
            return draft_view(row)
        version = await uow.next_account_version(user_id)
        now = self._clock.now().replace(tzinfo=None)
        new = row._replace(content=content, reply_to_id=reply_to, updated_at=now, account_version=version)
        await repository.save_draft(session, new, new=row.account_version == 0)
        draft = draft_view(new)
        uow.announce_account(
            user_id, {"type": "draft_changed", "account_version": version, "chat_id": chat_id, "draft": draft}
        )
        return draft
