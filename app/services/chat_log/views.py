"""Rows of the chat log as the wire shows them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import cast

from app.core.clock import timestamp
from app.db.events import ChatInfo
from app.db.repositories.chat_log import ChatRow, FileRow, MemberRow, MessageRow
from app.db.repositories.chat_settings import ChatSettingsRow
from app.db.repositories.chats import ChatListRow
from app.db.repositories.drafts import DraftRow
from app.db.schemas import (
    Attachment,
    Chat,
    ChatSettings,
    ChatType,
    Draft,
    FileKind,
    Member,
    Message,
    MessageType,
    Role,
    Service,
)

FOR_EVER = datetime(9999, 12, 31, 23, 59, 59)  # noqa: DTZ001 - naive UTC, as the database has it
"""The end of a mute that has none; the last whole second that MySQL holds."""
NOT_MUTED = timestamp(datetime(1970, 1, 1))  # noqa: DTZ001
"""Not null, so that clients need one rule: muted while `muted_until` lies ahead."""

NAMED_MAX = 3
"""Of those whom one service message names: "Ann added Bo, Cy, Dee and 197 others"."""


def message_view(row: MessageRow, *, hidden: bool = False) -> Message:
    """A message as the wire shows it; `hidden` when the viewer deleted it for themselves."""
    message: Message = {
        "id": row.id,
        "chat_id": row.chat_id,
        "seq": row.seq,
        "version": row.version,
        "sender_id": row.sender_id,
        "client_id": uuid_text(row.client_id),
        "message_type": cast(MessageType, row.message_type),
        "content": row.content,
        "service": cast(Service, json.loads(row.service)) if row.service else None,
        "attachments": cast(list[Attachment], json.loads(row.attachments)) if row.attachments else [],
        "reply_to": row.reply_to_id,
        "reply_to_seq": row.reply_to_seq,
        "created_at": timestamp(row.created_at),
        "edited_at": timestamp(row.edited_at) if row.edited_at else None,
        "deleted": row.deleted_at is not None,
        "hidden": False,
    }
    return hidden_view(message) if hidden else message


def hidden_view(message: Message) -> Message:
    """A message as it shows to whoever deleted it for themselves."""
    return {**message, "content": "", "attachments": [], "hidden": True}


def people_named(message: Message) -> set[int]:
    """Who must be known to draw a message: its sender, and the first few of those whom a service message names."""
    return {message["sender_id"], *(message["service"]["user_ids"][:NAMED_MAX] if message["service"] else ())}


def attachment_view(row: FileRow) -> Attachment:
    """A file as a message shows it."""
    return {
        "file_id": row.id,
        "kind": cast(FileKind, row.kind),
        "media_type": row.media_type,
        "name": row.name,
        "size": row.size,
        "width": row.width,
        "height": row.height,
        "blurhash": row.blurhash,
        "thumbnail": row.thumbnail_size is not None,
    }


def avatar_url(name: str | None) -> str | None:
    """Where the picture of a person or a group is."""
    return None if name is None else f"/api/v1/avatars/{name}"


def uuid_text(raw: bytes) -> str:
    """A UUID in its usual form."""
    # uuid.UUID costs more than the rest of the message together.
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def member_view(row: MemberRow) -> Member:
    """A membership as the chat's log tells it: with public marks only."""
    return {
        "user_id": row.user_id,
        "role": cast(Role, row.role),
        "active": row.left_seq is None,
        "joined_at": timestamp(row.joined_at),
        "read_seq": row.public_read_seq,
        "delivered_seq": row.public_delivered_seq,
        "version": row.version,
    }


def info_view(row: ChatRow, member_count: int) -> ChatInfo:
    """What a group shows of itself."""
    return {
        "title": row.title,
        "description": row.description,
        "avatar_url": avatar_url(row.avatar),
        "history_visible": bool(row.history_visible),  # databases keep it as an integer
        "member_count": member_count,
    }


def chat_view(row: ChatListRow) -> Chat:
    """A chat as one member sees it in their list."""
    last = row.last_message
    return {
        "id": row.id,
        "type": cast(ChatType, row.type),
        "title": row.title,
        "description": row.description,
        "avatar_url": avatar_url(row.avatar),
        "history_visible": bool(row.history_visible),
        "version": row.version,
        "last_seq": row.last_seq,
        "member_count": row.member_count,
        "role": cast(Role, row.role),
        "created_at": timestamp(row.created_at),
        "last_activity_at": timestamp(row.last_activity_at),
        "unread_count": row.unread_count,
        "read_seq": row.read_seq,
        "peer_id": row.peer_id,
        "peer_read_seq": row.peer_read_seq or 0,
        "peer_delivered_seq": row.peer_delivered_seq or 0,
        "last_message": message_view(last, hidden=bool(row.last_message_hidden)) if last else None,
        "settings": chat_settings_view(row.settings),
        "draft": draft_view(row.draft),
    }


def chat_settings_view(row: ChatSettingsRow) -> ChatSettings:
    """What a member has set for a chat."""
    return {
        "muted_until": timestamp(row.muted_until) if row.muted_until else NOT_MUTED,
        "pinned": row.pin_order > 0,
        "pin_order": row.pin_order,
        "archived": row.archived,
        "marked_unread": row.marked_unread,
        "account_version": row.account_version,
    }


def draft_view(row: DraftRow) -> Draft:
    """What a member has begun to write in a chat."""
    return {
        "content": row.content,
        "reply_to": row.reply_to_id,
        "updated_at": timestamp(row.updated_at) if row.updated_at else None,
        "account_version": row.account_version,
    }
