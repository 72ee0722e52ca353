"""Files: bytes for those who may see them, in ranges; an owner gives theirs up. Uploading is in messages.py, as the
brief has it."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Path, Request
from starlette.responses import Response, StreamingResponse

from app.api.deps import CallerDep, ServicesDep, UowDep
from app.api.problems import problem, problems
from app.core.errors import file_not_found
from app.db.schemas import MAX_ID
from app.services.file_service import Content

log = logging.getLogger(__name__)

router = APIRouter(prefix="/files", tags=["Files"])

FileId = Annotated[int, Path(ge=1, le=MAX_ID, description="`file_id` of an attachment.", examples=[7])]
RANGE = re.compile(r"bytes=(?:(\d{1,15})-(\d{0,15})|-(\d{1,15}))")
ETAG = re.compile(r'(W/)?("[^"]*")')

WEBP = "image/webp"


def _responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}
    return {
        200: {"description": "The whole file.", "content": content},
        206: {"description": "The range asked for.", "content": content},
        304: {"description": "What the client has is the same."},
        **problems("precondition_failed", "range_not_satisfiable", "storage_unavailable"),
    }


@dataclass(slots=True)
class Conditions:
    """What a client has already, and which part of the rest it wants (RFC 9110 sections 13 and 14)."""

    range: str | None
    if_range: str | None
    if_match: str | None
    if_none_match: str | None


async def get_conditions(
    range_header: Annotated[
        str | None, Header(alias="Range", description="One range: `bytes=0-1023`, `bytes=-500`.")
    ] = None,
    if_range: Annotated[
        str | None,
        Header(alias="If-Range", description="The range only if the file still has this `ETag`; else all of it."),
    ] = None,
    if_match: Annotated[
        str | None, Header(alias="If-Match", description="412 unless the file still has one of these `ETag`s.")
    ] = None,
    if_none_match: Annotated[
        str | None, Header(alias="If-None-Match", description="304 if the file still has one of these `ETag`s.")
    ] = None,
) -> Conditions:
    """The headers of a conditional request."""
    return Conditions(range_header, if_range, if_match, if_none_match)


ConditionsDep = Annotated[Conditions, Depends(get_conditions)]


@router.head("/{file_id:int}", include_in_schema=False)
@router.get(
    "/{file_id:int}",
    summary="Fetch a file",
    response_class=Response,
    responses=_responses("application/octet-stream", "image/jpeg", "image/png", "image/gif", WEBP),
)
async def fetch_file(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    file_id: FileId,
    conditions: ConditionsDep,
) -> Response:
    """The bytes of a file: for its owner, and for the members of a chat where a message holds it.

    Images can be shown; everything else comes as `application/octet-stream` for saving. `HEAD` answers the same
    without the bytes. Keep what you have and ask with `If-None-Match`: 304 while you may see it. 404 `file_not_found`.
    """
    content = await services.files.find(caller.user_id, file_id)
    return await _respond(request, services, content, conditions)


@router.head("/{file_id:int}/thumbnail", include_in_schema=False)
@router.get(
    "/{file_id:int}/thumbnail",
    summary="Fetch a thumbnail",
    response_class=Response,
    responses=_responses(WEBP),
)
async def fetch_thumbnail(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    file_id: FileId,
    conditions: ConditionsDep,
) -> Response:
    """A smaller copy of an image, in WebP, 320 pixels along its longer edge. 404 `file_not_found`."""
    content = await services.files.find(caller.user_id, file_id, thumbnail=True)
    return await _respond(request, services, content, conditions)


@router.delete(
    "/{file_id:int}",
    summary="Delete a file",
    status_code=204,
    responses=problems("file_in_use"),
)
async def delete_file(services: ServicesDep, caller: CallerDep, uow: UowDep, file_id: FileId) -> None:
    """Give up a file of one's own that no message holds, or none any more: its room is free at once.

    404 `file_not_found`, also for the file of somebody else. 409 `file_in_use` while a message holds it, in whatever
    chat: deleting that message for everybody takes the file out of it.
    """
    await services.files.delete(uow, caller.user_id, file_id)


async def _respond(request: Request, services: ServicesDep, content: Content, conditions: Conditions) -> Response:
    is_head = request.method == "HEAD"
    headers = {
        "ETag": content.etag,
        "Accept-Ranges": "bytes",
        # Asked for again each time: who may see it changes, people share browsers, and a server that was restored
        # from a backup gives ids a second time.
        "Cache-Control": "private, no-cache",
        "Vary": "Authorization",
        "Content-Disposition": disposition(content.file.name, inline=content.inline),
        "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }
    # In the order of RFC 9110 section 13.2.2.
    if conditions.if_match is not None and not _names(conditions.if_match, content.etag, weakly=False):
        return problem(412, "precondition_failed", "The file has none of these ETags.")
    if conditions.if_none_match is not None and _names(conditions.if_none_match, content.etag, weakly=True):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, content.size, 200
    asked, if_range = conditions.range, conditions.if_range
    # Only a GET has ranges (section 14.2).
    if asked is not None and not is_head and (if_range is None or if_range.strip() == content.etag):
        found = byte_range(asked, content.size)
        if found is not None:
            start, end = found
            if start >= end:
                return problem(
                    416,
                    "range_not_satisfiable",
                    "The range begins behind the end of the file.",
                    headers={"Content-Range": f"bytes */{content.size}"},
                )
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size}"
    headers["Content-Length"] = str(end - start)
    pieces = services.files.read(content, start, start + 1 if is_head else end)
    try:
        first = await anext(pieces, b"")
        if is_head:
            await anext(pieces, b"")  # and so it is closed
    except FileNotFoundError:
        log.error("file_bytes_missing", extra={"file_id": content.file.id})
        raise file_not_found() from None
    if is_head:
        return Response(status_code=status, headers=headers, media_type=content.media_type)
    return StreamingResponse(_chain(first, pieces), status, headers, media_type=content.media_type)


def _names(header: str, etag: str, *, weakly: bool) -> bool:
    """Whether a list of ETags has this one in it; a weak one is the same as a strong one only `weakly`."""
    return header.strip() == "*" or any(tag == etag and (weakly or not weak) for weak, tag in ETAG.findall(header))


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def byte_range(asked: str, size: int) -> tuple[int, int] | None:
    """What one range asks for, as start and end; an empty one when nothing of it exists; None when it is not a range
    that this server knows, which is then as if it had not been asked for (RFC 9110 section 14.2)."""
    match = RANGE.fullmatch(asked.strip())
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        return max(0, size - int(suffix)), size if int(suffix) else 0
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def disposition(name: str, *, inline: bool) -> str:
    """Content-Disposition with the name in full (RFC 6266, RFC 8187)."""
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "_", name)
    return f"{'inline' if inline else 'attachment'}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
