"""Messages: history and catching up over REST. The socket under the same prefix is in socket.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from app.api.deps import BulkCallerDep, CallerDep, ServicesDep, cursor_query
from app.api.multipart import UPLOAD_BODY, UPLOAD_CODES, receive_file
from app.api.problems import problems
from app.db.events import CatchUpEvent
from app.db.schemas import MAX_ID, History, MessageTrace, ResumeIn, UploadedFile
from app.services.trace_service import RECIPIENT_CURSOR

router = APIRouter(prefix="/messages", tags=["Messages"])

SeqQuery = Annotated[int | None, Query(ge=0, le=MAX_ID)]


@router.get("/history/{chat_id:int}", summary="History of a chat", responses=problems("overloaded"))
async def get_history(
    services: ServicesDep,
    caller: BulkCallerDep,
    chat_id: Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a chat the caller is in.", examples=[1])],
    before: Annotated[SeqQuery, Query(description="Messages older than this seq.")] = None,
    after: Annotated[SeqQuery, Query(description="Messages newer than this seq.")] = None,
    around: Annotated[SeqQuery, Query(description="Messages on both sides of this seq.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Messages of a page, at most.")] = 50,
) -> History:
    """A page of messages by rising `seq`: the newest, or those before or after one, between two, or around one."""
    return await services.messages.history(
        caller.user_id, chat_id, before=before, after=after, around=around, limit=limit
    )


@router.post(
    "/upload",
    summary="Upload a file",
    status_code=201,
    responses=problems("quota_exceeded", *UPLOAD_CODES),
    openapi_extra=UPLOAD_BODY,
)
async def upload_file(request: Request, services: ServicesDep, caller: CallerDep) -> UploadedFile:
    """Upload one file, then send a message with its `file_id` in `attachments`.

    Its content decides what it is. Images (JPEG, PNG, GIF, WebP) are encoded afresh, upright and without metadata, and
    get a thumbnail. 403 `quota_exceeded`, 413 `file_too_large`, 422 `invalid_upload`, `file_empty`, `invalid_image`,
    `image_too_large`.
    """
    async with await services.files.receive(caller.user_id) as incoming:
        part = await receive_file(request, services.settings, incoming.write)
        return await services.files.add(caller.user_id, incoming, part.name, part.content_type)


@router.post("/resume", summary="Catch up", responses=problems("overloaded"))
async def catch_up(services: ServicesDep, caller: BulkCallerDep, body: ResumeIn) -> list[CatchUpEvent]:
    """What the caller missed since the versions it gives: the events that `resume` over the socket would send.

    The last one is `resumed`; with `complete: false` there is more: apply what came and ask again.
    """
    return await services.catch_up.resume_page(caller.user_id, body)


@router.get("/{message_id:int}/trace", summary="Why did it not arrive?", responses=problems("overloaded"))
async def get_message_trace(
    services: ServicesDep,
    caller: BulkCallerDep,
    message_id: Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a message of the caller's.", examples=[42])],
    cursor: Annotated[str | None, cursor_query(*RECIPIENT_CURSOR)] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Recipients of a page, at most.")] = 50,
) -> MessageTrace:
    """How far one's own message has come: when it was committed, who told of it, and how each recipient stands to it.

    Nothing that is hidden from the sender elsewhere. Somebody else's message answers like one that does not exist:
    404 `message_not_found`.
    """
    return await services.trace.trace(caller.user_id, message_id, cursor=cursor, limit=limit)
