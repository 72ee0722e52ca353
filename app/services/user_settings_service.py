"""What each person sets for all their chats: which kinds of chats they are notified of."""

from __future__ import annotations

from app.db.database import Database
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import user_settings as repository
from app.db.repositories.user_settings import UserSettingsRow
from app.db.schemas import UserSettings, UserSettingsIn
from app.services.unit_of_work import UnitOfWork


def user_settings_view(row: UserSettingsRow) -> UserSettings:
    """What somebody has set, as they see it."""
    return {
        "notify_personal": row.notify_personal,
        "notify_groups": row.notify_groups,
        "account_version": row.account_version,
    }


class UserSettingsService:
    """Reads and changes settings."""

    def __init__(self, *, database: Database) -> None:
        self._database = database

    async def get(self, user_id: int) -> UserSettings:
        """One's own settings."""
        async with self._database.reading() as session:
            return user_settings_view(await repository.find_user_settings(session, user_id))

    async def change(self, uow: UnitOfWork, user_id: int, changes: UserSettingsIn) -> UserSettings:
        """Change what is given. What changes nothing is not told."""
        await accounts_repository.lock_account(uow.session, user_id)
        row = await repository.find_user_settings(uow.session, user_id)
        new = row._replace(**changes.model_dump(exclude_none=True))
        if new == row:
            return user_settings_view(row)
        version = await uow.next_account_version(user_id)
        new = new._replace(account_version=version)
        await repository.save_user_settings(uow.session, new, new=row.account_version == 0)
        settings = user_settings_view(new)
        uow.announce_account(
            user_id, {"type": "user_settings_changed", "account_version": version, "settings": settings}
        )
        return settings
