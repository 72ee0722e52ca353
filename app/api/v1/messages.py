"""Messages: history and catching up over REST. The socket under the same prefix is in socket.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from app.api.deps import CallerDep, ServicesDep
from app.api.problems import problems
from app.db.events import CatchUpEvent
from app.db.schemas import MAX_ID, History, ResumeIn

router = APIRouter(prefix="/messages", tags=["Messages"])

SeqQuery = Annotated[int | None, Query(ge=0, le=MAX_ID)]


@router.get("/history/{chat_id:int}", summary="History of a chat", responses=problems(401, 404))
async def history(
    services: ServicesDep,
    caller: CallerDep,
    chat_id: Annotated[int, Path(ge=1, le=MAX_ID, examples=[1])],
    before: Annotated[SeqQuery, Query(description="Messages older than this seq.")] = None,
    after: Annotated[SeqQuery, Query(description="Messages newer than this seq.")] = None,
    around: Annotated[SeqQuery, Query(description="Messages on both sides of this seq.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> History:
    """A page of messages by rising `seq`: the newest, or those before or after one, between two, or around one."""
    return await services.messages.history(
        caller.user_id, chat_id, before=before, after=after, around=around, limit=limit
    )


@router.post("/resume", summary="Catch up", responses=problems(401))
async def resume(services: ServicesDep, caller: CallerDep, body: ResumeIn) -> list[CatchUpEvent]:
    """What the caller missed since the versions it gives: the events that `resume` over the socket would send.

    The last one is `resumed`; with `complete: false` there is more: apply what came and ask again.
    """
    return await services.catch_up.resume_page(caller.user_id, body)
