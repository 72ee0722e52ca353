"""Chats and their messages over REST."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Response
from fastapi.openapi.models import Example

from app.api.deps import BulkCallerDep, CallerDep, ServicesDep, UowDep, cursor_query
from app.api.problems import problems
from app.db.events import (
    DeleteMessageCommand,
    EditMessageCommand,
    MessageDeliveredCommand,
    MessageReadCommand,
    NewMessageCommand,
)
from app.db.schemas import (
    CLIENT_ID,
    MAX_ID,
    Chat,
    ChatEditIn,
    ChatPage,
    GroupIn,
    Members,
    MembersIn,
    Message,
    MessageEditIn,
    MessageIn,
    PersonalChatIn,
    Readers,
    RoleIn,
    Sent,
)
from app.services.chat_service import CHAT_CURSOR, MEMBER_CURSOR

router = APIRouter(prefix="/chats", tags=["Chats"])

ChatId = Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a chat the caller is in.", examples=[1])]
UserId = Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a person.", examples=[2])]
MessageId = Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a message in this chat.", examples=[42])]
ChatCursor = Annotated[str | None, cursor_query(*CHAT_CURSOR)]
MemberCursor = Annotated[str | None, cursor_query(*MEMBER_CURSOR)]
BLOCKED = ("peer_blocked", "peer_unavailable")
WRITER = ("overloaded", "shutting_down")
"""Why the writer of messages takes none."""
Limit = Annotated[int, Query(ge=1, le=100, description="Items of a page.")]

SEND_EXAMPLES: dict[str, Example] = {
    "text": {"summary": "Text", "value": {"content": "Hello world!"}},
    "retry": {
        "summary": "Text that can be sent again without becoming two messages",
        "value": {"content": "Hello world!", "client_id": CLIENT_ID},
    },
    "reply": {"summary": "An answer", "value": {"content": "Hello!", "reply_to": 42}},
    "album": {
        "summary": "Two uploaded pictures with a caption",
        "value": {"message_type": "image", "content": "Oslo", "attachments": [7, 8]},
    },
}


@router.get("", summary="My chats", responses=problems("overloaded"))
async def list_chats(
    services: ServicesDep,
    caller: BulkCallerDep,
    cursor: ChatCursor = None,
    limit: Limit = 50,
    pinned: Annotated[bool | None, Query(description="Only chats that are pinned, or with false, are not.")] = None,
    archived: Annotated[bool | None, Query(description="Only chats that are archived, or with false, are not.")] = None,
) -> ChatPage:
    """The caller's chats by last activity, newest first, with all that is needed to draw the list.

    Pinned chats come in their turn, too: a client shows `?pinned=true` on top, by `settings.pin_order`.
    """
    return await services.chats.list_chats(caller.user_id, cursor=cursor, limit=limit, pinned=pinned, archived=archived)


@router.post(
    "/personal",
    summary="Talk to somebody",
    status_code=201,
    responses={
        **problems(*BLOCKED, "user_not_found"),
        200: {"model": Chat, "description": "They have a chat already."},
    },
)
async def open_personal_chat(
    services: ServicesDep, caller: CallerDep, uow: UowDep, body: PersonalChatIn, response: Response
) -> Chat:
    """The personal chat with somebody, made if there is none yet: two people have one, whoever asks first."""
    chat, created = await services.chats.create_personal(uow, caller.user_id, body.user_id)
    response.status_code = 201 if created else 200
    return chat


@router.post(
    "/saved",
    summary="Saved messages",
    status_code=201,
    responses={200: {"model": Chat, "description": "It exists already."}},
)
async def open_saved_messages(services: ServicesDep, caller: CallerDep, uow: UowDep, response: Response) -> Chat:
    """The caller's chat with themselves."""
    chat, created = await services.chats.create_saved(uow, caller.user_id)
    response.status_code = 201 if created else 200
    return chat


@router.post(
    "/group",
    summary="New group",
    status_code=201,
    responses=problems(*BLOCKED, "user_not_found", "group_full"),
)
async def create_group(services: ServicesDep, caller: CallerDep, uow: UowDep, body: GroupIn) -> Chat:
    """A group with the caller as its owner."""
    return await services.chats.create_group(uow, caller.user_id, body)


@router.get("/{chat_id:int}", summary="One chat")
async def get_chat(services: ServicesDep, caller: CallerDep, chat_id: ChatId) -> Chat:
    """One of the caller's chats."""
    return await services.chats.get(caller.user_id, chat_id)


@router.patch("/{chat_id:int}", summary="Change a group", responses=problems("not_allowed", "not_a_group"))
async def edit_chat(services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId, body: ChatEditIn) -> Chat:
    """New title, description or settings. Admins only."""
    return await services.chats.edit(uow, caller.user_id, chat_id, body)


@router.get("/{chat_id:int}/members", summary="Who is in a chat", responses=problems("overloaded"))
async def list_members(
    services: ServicesDep, caller: BulkCallerDep, chat_id: ChatId, cursor: MemberCursor = None, limit: Limit = 100
) -> Members:
    """Members by user id, with their profiles."""
    return await services.chats.list_members(caller.user_id, chat_id, cursor=cursor, limit=limit)


@router.post(
    "/{chat_id:int}/members",
    summary="Add people",
    responses=problems("not_allowed", *BLOCKED, "user_not_found", "not_a_group", "group_full"),
)
async def add_members(services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId, body: MembersIn) -> Chat:
    """Let people into a group. Admins only; those already in it are passed over."""
    return await services.chats.add_members(uow, caller.user_id, chat_id, body.user_ids)


@router.delete(
    "/{chat_id:int}/members/{user_id:int}",
    summary="Remove somebody",
    status_code=204,
    responses=problems("not_allowed", "not_a_group", "owner_must_transfer"),
)
async def remove_member(
    services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId, user_id: UserId
) -> None:
    """Take somebody of a lower role out of a group; oneself to leave it."""
    await services.chats.remove_member(uow, caller.user_id, chat_id, user_id)


@router.put(
    "/{chat_id:int}/members/{user_id:int}/role",
    summary="Change a role",
    responses=problems("not_allowed", "not_a_group", "owner_must_transfer"),
)
async def set_member_role(
    services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId, user_id: UserId, body: RoleIn
) -> Chat:
    """Promote, demote, or hand the group over with `owner`. The owner only."""
    return await services.chats.set_role(uow, caller.user_id, chat_id, user_id, body.role)


@router.post(
    "/{chat_id:int}/leave",
    summary="Leave a group",
    status_code=204,
    responses=problems("not_a_group", "owner_must_transfer"),
)
async def leave_chat(services: ServicesDep, caller: CallerDep, uow: UowDep, chat_id: ChatId) -> None:
    """Leave a group. Its owner hands it over first."""
    await services.chats.leave(uow, caller.user_id, chat_id)


@router.post(
    "/{chat_id:int}/messages",
    summary="Send a message",
    status_code=201,
    responses=problems(
        *BLOCKED,
        "reply_not_found",
        "file_not_found",
        "message_too_long",
        "message_empty",
        "attachment_mismatch",
        "too_many_attachments",
        *WRITER,
    ),
)
async def send_message(
    services: ServicesDep,
    caller: CallerDep,
    chat_id: ChatId,
    body: Annotated[MessageIn, Body(openapi_examples=SEND_EXAMPLES)],
) -> Sent:
    """Store a message for good and tell everybody in the chat: the same as `new_message` over the socket.

    With a `client_id`, a retry gets the first answer, whenever it comes and over whichever door.
    """
    command = NewMessageCommand(type="new_message", chat_id=chat_id, **body.model_dump(exclude_unset=True))
    return {"message": await services.messages.send(caller.user_id, command)}


@router.get("/{chat_id:int}/messages/{message_id:int}", summary="One message")
async def get_message(services: ServicesDep, caller: CallerDep, chat_id: ChatId, message_id: MessageId) -> Message:
    """One message of a chat, for instance the one that another answers."""
    return await services.messages.get(caller.user_id, chat_id, message_id)


@router.patch(
    "/{chat_id:int}/messages/{message_id:int}",
    summary="Edit a message",
    responses=problems(
        "not_your_message", "not_editable", *BLOCKED, "message_deleted", "message_too_long", "message_empty", *WRITER
    ),
)
async def edit_message(
    services: ServicesDep, caller: CallerDep, chat_id: ChatId, message_id: MessageId, body: MessageEditIn
) -> Message:
    """New text for one's own message."""
    return await services.messages.send(
        caller.user_id,
        EditMessageCommand(type="edit_message", chat_id=chat_id, message_id=message_id, content=body.content),
    )


@router.delete(
    "/{chat_id:int}/messages/{message_id:int}",
    summary="Delete a message",
    status_code=204,
    responses=problems("not_your_message", "not_deletable", *WRITER),
)
async def delete_message(
    services: ServicesDep,
    caller: CallerDep,
    chat_id: ChatId,
    message_id: MessageId,
    for_everyone: Annotated[bool, Query(description="False deletes it for the caller only.")] = True,
) -> None:
    """Delete a message for everybody (its sender, or an admin of the group) or for oneself only."""
    await services.messages.delete(
        caller.user_id,
        DeleteMessageCommand(type="delete_message", chat_id=chat_id, message_id=message_id, for_everyone=for_everyone),
    )


@router.post(
    "/{chat_id:int}/messages/{message_id:int}/read",
    summary="Mark as read",
    status_code=204,
    responses=problems(*WRITER),
)
async def mark_message_read(services: ServicesDep, caller: CallerDep, chat_id: ChatId, message_id: MessageId) -> None:
    """Mark a message, and all before it, as read."""
    await services.messages.mark(
        caller, MessageReadCommand(type="message_read", chat_id=chat_id, message_id=message_id)
    )


@router.post(
    "/{chat_id:int}/messages/{message_id:int}/delivered",
    summary="Mark as delivered",
    status_code=204,
    responses=problems(*WRITER),
)
async def mark_message_delivered(
    services: ServicesDep, caller: CallerDep, chat_id: ChatId, message_id: MessageId
) -> None:
    """Mark a message, and all before it, as having reached one of the caller's devices: after a push, for instance."""
    await services.messages.mark(
        caller, MessageDeliveredCommand(type="message_delivered", chat_id=chat_id, message_id=message_id)
    )


@router.get(
    "/{chat_id:int}/messages/{message_id:int}/readers", summary="Who has read it", responses=problems("overloaded")
)
async def list_message_readers(
    services: ServicesDep, caller: BulkCallerDep, chat_id: ChatId, message_id: MessageId
) -> Readers:
    """Who has read a message, and whom it has reached."""
    return await services.messages.readers(caller.user_id, chat_id, message_id)
