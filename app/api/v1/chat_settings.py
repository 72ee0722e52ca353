"""What the caller sets for a chat, for themselves alone."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body

from app.api.deps import CallerDep, ServicesDep, UowDep
from app.api.problems import problems
from app.api.v1.chats import ChatId
from app.db.schemas import ChatSettings, ChatSettingsIn

router = APIRouter(prefix="/chats", tags=["Chats"])

EXAMPLES = {
    "for_ever": {"summary": "Mute for ever", "value": {"muted_until": "9999-12-31T23:59:59.000Z"}},
    "unmute": {"summary": "Unmute", "value": {"muted_until": "1970-01-01T00:00:00.000Z"}},
    "pin": {"summary": "Pin", "value": {"pinned": True}},
    "archive": {"summary": "Archive and mark as unread", "value": {"archived": True, "marked_unread": True}},
}


@router.patch(
    "/{chat_id:int}/settings", summary="Mute, pin, archive, mark unread", responses=problems("too_many_pinned")
)
async def update_chat_settings(
    services: ServicesDep,
    caller: CallerDep,
    uow: UowDep,
    chat_id: ChatId,
    body: Annotated[ChatSettingsIn, Body(openapi_examples=EXAMPLES)],
) -> ChatSettings:
    """Change what is given; what is left out stays. Nobody but the caller sees it. 409 `too_many_pinned`."""
    return await services.chat_settings.change(uow, caller.user_id, chat_id, body)
