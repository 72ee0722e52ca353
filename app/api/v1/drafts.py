"""What the caller has begun to write in a chat."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.deps import CallerDep, ServicesDep, UowDep
from app.api.problems import problems
from app.api.v1.chats import ChatId
from app.db.schemas import Draft, DraftIn

router = APIRouter(prefix="/chats", tags=["Chats"])


@router.put("/{chat_id:int}/draft", summary="Keep a draft", responses=problems("reply_not_found", "message_too_long"))
async def save_draft(services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId, body: DraftIn) -> Draft:
    """Store a draft in place of the one before, for all of the caller's devices; a blank one deletes it.

    Sending a message does not delete it: the client that sends does. 404 `reply_not_found`, 422 `message_too_long`.
    """
    return await services.drafts.save(uow, caller.user_id, chat_id, body)


@router.delete("/{chat_id:int}/draft", summary="Delete a draft", status_code=204)
async def delete_draft(services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId) -> None:
    """Delete the draft, if there is one."""
    await services.drafts.delete(uow, caller.user_id, chat_id)
