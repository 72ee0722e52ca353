"""Pictures of people and groups. A picture's address is its key: whoever was shown it may fetch it, without a token."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from app.api.deps import CallerDep, ServicesDep, UowDep
from app.api.multipart import UPLOAD_BODY, UPLOAD_CODES, receive_file
from app.api.problems import problems
from app.api.v1.chats import ChatId
from app.db.schemas import Chat, Me

router = APIRouter(tags=["Avatars"])

AvatarName = Annotated[
    str,
    Path(
        pattern="^[0-9]{1,16}-[0-9a-f]{32}$",
        description="The last part of an `avatar_url`.",
        examples=["7-0123456789abcdef0123456789abcdef"],
    ),
]


@router.head("/avatars/{avatar}", include_in_schema=False)
@router.get(
    "/avatars/{avatar}",
    summary="Fetch an avatar",
    response_class=Response,
    responses={
        200: {
            "description": "The picture.",
            "content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems("storage_unavailable"),
    },
)
async def fetch_avatar(
    request: Request,
    services: ServicesDep,
    avatar: AvatarName,
    size: Annotated[Literal["large", "small"], Query(description="640 or 160 pixels square.")] = "large",
) -> Response:
    """A picture, 640 pixels square, or 160 with `size=small`; for ever the same. `HEAD` answers without it.

    404 `file_not_found`.
    """
    data = await services.avatars.load(avatar, small=size == "small")
    headers = {
        "Content-Length": str(len(data)),
        "Cache-Control": "public, max-age=31536000, immutable",
        "Content-Disposition": "inline",
        "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    return Response(b"" if request.method == "HEAD" else data, headers=headers, media_type="image/webp")


@router.post(
    "/users/me/avatar",
    summary="Upload my avatar",
    responses=problems(*UPLOAD_CODES),
    openapi_extra=UPLOAD_BODY,
)
async def upload_my_avatar(request: Request, services: ServicesDep, caller: CallerDep) -> Me:
    """Another picture of oneself: JPEG, PNG, GIF or WebP, at most 10 MiB; the middle square of it is shown.

    413 `file_too_large`, 422 `invalid_upload`, `invalid_image`, `image_too_large`.
    """
    async with await services.avatars.receive(caller.user_id) as incoming:
        await receive_file(request, services.settings, incoming.write)
        name = await services.avatars.add(caller.user_id, incoming)
    async with services.unit_of_work.of(caller.user_id) as uow:
        me, before = await services.users.set_avatar(uow, caller.user_id, name)
        await services.avatars.replace(uow, before, name)
        return me


@router.delete("/users/me/avatar", summary="Delete my avatar")
async def delete_my_avatar(services: ServicesDep, caller: CallerDep, uow: UowDep) -> Me:
    """Have no picture."""
    me, before = await services.users.set_avatar(uow, caller.user_id, None)
    await services.avatars.replace(uow, before, None)
    return me


@router.post(
    "/chats/{chat_id:int}/avatar",
    summary="Upload a group's avatar",
    responses=problems("not_allowed", "not_a_group", *UPLOAD_CODES),
    openapi_extra=UPLOAD_BODY,
)
async def upload_chat_avatar(request: Request, services: ServicesDep, caller: CallerDep, chat_id: ChatId) -> Chat:
    """Another picture of a group; its admins only. As for oneself."""
    await services.chats.require_admin(caller.user_id, chat_id)
    async with await services.avatars.receive(caller.user_id) as incoming:
        await receive_file(request, services.settings, incoming.write)
        name = await services.avatars.add(caller.user_id, incoming)
    async with services.unit_of_work.of(caller.user_id) as uow:
        chat, before = await services.chats.set_avatar(uow, caller.user_id, chat_id, name)
        await services.avatars.replace(uow, before, name)
        return chat


@router.delete(
    "/chats/{chat_id:int}/avatar", summary="Delete a group's avatar", responses=problems("not_allowed", "not_a_group")
)
async def delete_chat_avatar(services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId) -> Chat:
    """Have no picture of a group; its admins only."""
    chat, before = await services.chats.set_avatar(uow, caller.user_id, chat_id, None)
    await services.avatars.replace(uow, before, None)
    return chat
