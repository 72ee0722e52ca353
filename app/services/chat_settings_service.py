"""What each member sets for a chat, for themselves alone: mute, pin, archive, mark unread.

A change is numbered and told by the account version. The user's lock is enough: joining and leaving number themselves
under it, too, so nobody keeps settings of a chat they have left.
"""

from __future__ import annotations

from datetime import datetime

from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import Conflict, chat_not_found
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import chat_settings as repository
from app.db.repositories import chats as chats_repository
from app.db.schemas import ChatSettings, ChatSettingsIn
from app.services.chat_log.views import FOR_EVER, chat_settings_view
from app.services.unit_of_work import UnitOfWork


class ChatSettingsService:
    """Changes what a member has set for a chat; the list of chats shows it."""

    def __init__(self, *, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    async def change(self, uow: UnitOfWork, user_id: int, chat_id: int, changes: ChatSettingsIn) -> ChatSettings:
        """Change what is given. What changes nothing is not told.

        Raises NotFound for a chat the user is not in, Conflict (`too_many_pinned`) when it is one pin too many.
        """
        session = uow.session
        await accounts_repository.lock_account(session, user_id)
        if await chats_repository.find_membership(session, chat_id, user_id) is None:
            raise chat_not_found()
        row = await repository.find_chat_settings(session, user_id, chat_id)
        values = changes.model_dump(include={"archived", "marked_unread"}, exclude_none=True)
        new = row._replace(muted_until=self._muted_until(row.muted_until, changes.muted_until), **values)
        pins = changes.pinned is not None and changes.pinned != bool(row.pin_order)
        if new == row and not pins:
            return chat_settings_view(row)
        if (
            pins
            and changes.pinned
            and await repository.count_pinned(session, user_id) >= self._settings.max_pinned_chats
        ):
            raise Conflict("too_many_pinned", f"At most {self._settings.max_pinned_chats} chats can be pinned.")
        version = await uow.next_account_version(user_id)
        if pins:
            # Account versions rise: whatever is pinned later stands higher, and no two stand alike.
            new = new._replace(pin_order=version if changes.pinned else 0)
        new = new._replace(account_version=version)
        await repository.save_chat_settings(session, new, new=row.account_version == 0)
        settings = chat_settings_view(new)
        uow.announce_account(
            user_id,
            {"type": "chat_settings_changed", "account_version": version, "chat_id": chat_id, "settings": settings},
        )
        return settings

    def _muted_until(self, held: datetime | None, given: datetime | None) -> datetime | None:
        if given is None:
            return held
        now = self._clock.now().replace(tzinfo=None)
        if given <= now:
            # A mute that ran out by itself is unmuted already: saying so once more changes nothing.
            return held if held is not None and held <= now else None
        return min(given, FOR_EVER)
