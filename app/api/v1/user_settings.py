"""What the caller sets for all their chats."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.deps import CallerDep, ServicesDep, UowDep
from app.db.schemas import UserSettings, UserSettingsIn

router = APIRouter(prefix="/users/me/settings", tags=["Users"])


@router.get("", summary="My settings")
async def get_my_settings(services: ServicesDep, caller: CallerDep) -> UserSettings:
    """What the caller is notified of."""
    return await services.user_settings.get(caller.user_id)


@router.patch("", summary="Change my settings")
async def update_my_settings(
    services: ServicesDep, caller: CallerDep, uow: UowDep, body: UserSettingsIn
) -> UserSettings:
    """Change what is given; what is left out stays."""
    return await services.user_settings.change(uow, caller.user_id, body)
