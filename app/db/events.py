"""The socket's vocabulary: commands that clients send, events that the server sends.

Commands are pydantic models, exact and closed, told apart by `type`. Events are TypedDicts: the server builds them
as plain dicts and serialises each once for all who get it. docs/protocol.md shows each with an example.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from app.db.schemas import (
    CLIENT_ID,
    EPOCH,
    AccessToken,
    AccountVersion,
    AttachmentIds,
    AvatarUrl,
    Chat,
    ChatId,
    ChatSettings,
    ClientId,
    Content,
    Counter,
    Draft,
    Id,
    In,
    Member,
    Message,
    ResumeIn,
    SendableType,
    Seq,
    SessionId,
    Timestamp,
    User,
    UserId,
    UserSettings,
    Version,
    sendable,
)

Ref = Annotated[
    str, Field(max_length=64, description="Echoed in the answer, so that the client can match them.", examples=["m1"])
]
Prev = Annotated[Version, Field(description="The version before this change.", examples=[22])]


# --- commands ---------------------------------------------------------------------------------------------------


class Command(In):
    """Base of what a client sends."""

    ref: Ref | None = None


class NewMessageCommand(Command):
    """Send a message. Answered by `ack` once it is stored for good; everybody in the chat gets `new_message`."""

    model_config = ConfigDict(json_schema_extra=sendable)

    type: Literal["new_message"]
    chat_id: ChatId
    content: Content = ""
    message_type: SendableType = "text"
    attachments: AttachmentIds = Field(default_factory=list)
    client_id: ClientId | None = None
    reply_to: Id | None = None


class EditMessageCommand(Command):
    """Change the text of one's own message."""

    type: Literal["edit_message"]
    chat_id: ChatId
    message_id: Id
    content: Content


class DeleteMessageCommand(Command):
    """Delete a message, for everybody or for oneself only."""

    type: Literal["delete_message"]
    chat_id: ChatId
    message_id: Id
    for_everyone: bool = True


class MessageReadCommand(Command):
    """Mark a message, and all before it, as read."""

    type: Literal["message_read"]
    chat_id: ChatId
    message_id: Id


class MessageDeliveredCommand(Command):
    """Mark a message, and all before it, as received by this user's device."""

    type: Literal["message_delivered"]
    chat_id: ChatId
    message_id: Id


class TypingCommand(Command):
    """Tell the others that one is typing, or has stopped. Never stored; gets no answer when all is well."""

    type: Literal["typing"]
    chat_id: ChatId
    active: bool = True


class SubscribePresenceCommand(Command):
    """Watch who is online, among the people one has a personal chat with. Replaces the earlier list."""

    type: Literal["subscribe_presence"]
    user_ids: Annotated[list[UserId], Field(max_length=1000, examples=[[2, 3]])]


class ResumeCommand(Command, ResumeIn):
    """Catch up: the server answers, per chat, `chat_changes`, `reset` or `chat_removed`, then `synced`."""

    type: Literal["resume"]


class ReauthCommand(Command):
    """Give the socket a fresh access token of the same session before the old one runs out."""

    type: Literal["reauth"]
    token: Annotated[AccessToken, Field(min_length=1, max_length=4096)]


class PingCommand(Command):
    """Ask for a `pong`, for clients that cannot send WebSocket pings."""

    type: Literal["ping"]


AnyCommand = (
    NewMessageCommand
    | EditMessageCommand
    | DeleteMessageCommand
    | MessageReadCommand
    | MessageDeliveredCommand
    | TypingCommand
    | SubscribePresenceCommand
    | ResumeCommand
    | ReauthCommand
    | PingCommand
)

COMMANDS: TypeAdapter[AnyCommand] = TypeAdapter(Annotated[AnyCommand, Field(discriminator="type")])


# --- events to one connection -----------------------------------------------------------------------------------


class HelloEvent(TypedDict):
    """First frame of every socket."""

    type: Literal["hello"]
    user_id: UserId
    session_id: SessionId
    epoch: Annotated[
        str, Field(description="Names this database. When it differs from the one known, forget all.", examples=[EPOCH])
    ]
    account_version: AccountVersion
    server_time: Timestamp
    heartbeat_seconds: Annotated[float, Field(examples=[25.0])]


class AckEvent(TypedDict):
    """A command is done, and stored for good where it stores anything.

    Of a `new_message` it carries the place of the message; a retry gets exactly the first one's.
    """

    type: Literal["ack"]
    ref: Annotated[str | None, Field(description="Of the command.", examples=["m1"])]
    client_id: Annotated[
        str | None, Field(json_schema_extra={"format": "uuid"}, description="In lower case.", examples=[CLIENT_ID])
    ]
    chat_id: ChatId | None
    message_id: Id | None
    seq: Seq | None
    created_at: Timestamp | None


class ErrorEvent(TypedDict):
    """A command was refused; the socket lives on. `code` is stable."""

    type: Literal["error"]
    code: Annotated[str, Field(examples=["chat_not_found"])]
    detail: Annotated[str, Field(examples=["There is no such chat."])]
    retryable: Annotated[bool, Field(description="Whether the same command may succeed later.")]
    retry_after: Annotated[float | None, Field(description="Seconds to wait first.", examples=[None])]
    ref: Annotated[str | None, Field(description="Of the command.", examples=["m1"])]
    client_id: Annotated[
        str | None,
        Field(description="Of the command: in lower case, or as it was sent when it is no UUID.", examples=[CLIENT_ID]),
    ]


class HeartbeatEvent(TypedDict):
    """Sent at intervals. `digest` is the sum over the user's chats of `((chat_id % 65521) + 1) * version`,
    modulo 2147483647; when it differs from the client's own, or the account version does, resume."""

    type: Literal["heartbeat"]
    account_version: AccountVersion
    digest: Counter
    server_time: Timestamp


class PongEvent(TypedDict):
    """Answer to `ping`."""

    type: Literal["pong"]
    ref: Annotated[str | None, Field(description="Of the command.", examples=["m1"])]


class TokenExpiringEvent(TypedDict):
    """The socket's access token runs out soon: send `reauth`, or the socket closes with 4401."""

    type: Literal["token_expiring"]
    expires_in: Annotated[int, Field(description="Seconds.", examples=[60])]


# --- events of a chat's log -------------------------------------------------------------------------------------
# Each carries `version` and `prev`: a client whose own version is below `prev` has missed something and resumes.


class NewMessageEvent(TypedDict):
    """A message was sent. Its sender has read and received all up to it."""

    type: Literal["new_message"]
    chat_id: ChatId
    version: Version
    prev: Prev
    message: Message


class MessageEditedEvent(TypedDict):
    """The text of a message changed."""

    type: Literal["message_edited"]
    chat_id: ChatId
    version: Version
    prev: Prev
    message: Message


class MessageDeletedEvent(TypedDict):
    """A message was deleted for everybody; what is left of it comes along."""

    type: Literal["message_deleted"]
    chat_id: ChatId
    version: Version
    prev: Prev
    message: Message


class MessageReadEvent(TypedDict):
    """Somebody has read everything up to `seq`."""

    type: Literal["message_read"]
    chat_id: ChatId
    version: Version
    prev: Prev
    user_id: UserId
    seq: Seq


class MessageDeliveredEvent(TypedDict):
    """Everything up to `seq` has reached a device of this member."""

    type: Literal["message_delivered"]
    chat_id: ChatId
    version: Version
    prev: Prev
    user_id: UserId
    seq: Seq


class MembersChangedEvent(TypedDict):
    """People joined, left, were removed or got another role."""

    type: Literal["members_changed"]
    chat_id: ChatId
    version: Version
    prev: Prev
    members: list[Member]
    member_count: Counter


class ChatInfo(TypedDict):
    """What a group shows of itself."""

    title: Annotated[str, Field(examples=["Trip to Oslo"])]
    description: Annotated[str, Field(examples=[""])]
    avatar_url: AvatarUrl
    history_visible: bool
    member_count: Counter


class ChatUpdatedEvent(TypedDict):
    """Title, description or settings of a group changed."""

    type: Literal["chat_updated"]
    chat_id: ChatId
    version: Version
    prev: Prev
    info: ChatInfo


class ChatChangesEvent(TypedDict):
    """All rows of a chat that changed after `prev`, up to `version`: an answer to `resume`, or live where the
    server lost the single events. Apply each row whose own `version` is newer than the one held."""

    type: Literal["chat_changes"]
    chat_id: ChatId
    version: Version
    prev: Prev
    messages: list[Message]
    members: list[Member]
    info: ChatInfo | None


# --- events of catching up --------------------------------------------------------------------------------------


class ResetEvent(TypedDict):
    """Forget what is held of this chat and start from this: the chat, its newest messages, its members.

    Older messages come from the history; members beyond the first page from the list of members."""

    type: Literal["reset"]
    chat_id: ChatId
    version: Version
    chat: Chat
    messages: list[Message]
    members: list[Member]
    members_complete: bool
    users: list[User]


class SyncedEvent(TypedDict):
    """Of this chat everything up to `version` has been sent; live events go on from here."""

    type: Literal["synced"]
    chat_id: ChatId
    version: Version


class ResumedEvent(TypedDict):
    """The end of a resume."""

    type: Literal["resumed"]
    ref: Annotated[str | None, Field(description="Of the command.", examples=["m1"])]
    epoch: Annotated[str, Field(examples=[EPOCH])]
    account_version: AccountVersion
    complete: Annotated[bool, Field(description="False over REST when there is more: apply this and ask again.")]


# --- events of the account's log --------------------------------------------------------------------------------


class ChatAddedEvent(TypedDict):
    """The user is in a new chat, or in one again."""

    type: Literal["chat_added"]
    account_version: AccountVersion
    chat_id: ChatId


class ChatRemovedEvent(TypedDict):
    """The chat is no longer the user's: they left or were removed. Forget it."""

    type: Literal["chat_removed"]
    account_version: Annotated[AccountVersion | None, Field(description="Null in an answer to `resume`.")]
    chat_id: ChatId


class ReadMarkEvent(TypedDict):
    """The user's own read mark moved, where the chat's log does not tell; in a resume, also that of a chat joined
    since."""

    type: Literal["read_mark"]
    account_version: AccountVersion
    chat_id: ChatId
    seq: Seq


class MessageHiddenEvent(TypedDict):
    """The user deleted a message for themselves."""

    type: Literal["message_hidden"]
    account_version: AccountVersion
    chat_id: ChatId
    message_id: Id
    seq: Seq


class BlockChangedEvent(TypedDict):
    """The user blocked or unblocked somebody."""

    type: Literal["block_changed"]
    account_version: AccountVersion
    user_id: UserId
    blocked: bool


class ProfileChangedEvent(TypedDict):
    """The user's own profile changed: fetch it."""

    type: Literal["profile_changed"]
    account_version: AccountVersion
    profile_version: Counter


class ChatSettingsChangedEvent(TypedDict):
    """The user muted, pinned, archived or marked a chat, or undid it; what they set for it now."""

    type: Literal["chat_settings_changed"]
    account_version: AccountVersion
    chat_id: ChatId
    settings: ChatSettings


class DraftChangedEvent(TypedDict):
    """The user began, changed or deleted a draft; the draft as it is now, empty once it is deleted."""

    type: Literal["draft_changed"]
    account_version: AccountVersion
    chat_id: ChatId
    draft: Draft


class UserSettingsChangedEvent(TypedDict):
    """The user changed their settings; what they are now."""

    type: Literal["user_settings_changed"]
    account_version: AccountVersion
    settings: UserSettings


# --- ephemera: never stored, first to be dropped ----------------------------------------------------------------


class TypingEvent(TypedDict):
    """Somebody is typing, or stopped. Forget it after 6 seconds."""

    type: Literal["typing"]
    chat_id: ChatId
    user_id: UserId
    active: bool


class PresenceEvent(TypedDict):
    """Somebody watched is online or not."""

    type: Literal["presence"]
    user_id: UserId
    online: bool
    last_seen_at: Timestamp | None


ChatEvent = (
    NewMessageEvent
    | MessageEditedEvent
    | MessageDeletedEvent
    | MessageReadEvent
    | MessageDeliveredEvent
    | MembersChangedEvent
    | ChatUpdatedEvent
    | ChatChangesEvent
)
AccountEvent = (
    ChatAddedEvent
    | ChatRemovedEvent
    | ReadMarkEvent
    | MessageHiddenEvent
    | BlockChangedEvent
    | ProfileChangedEvent
    | ChatSettingsChangedEvent
    | DraftChangedEvent
    | UserSettingsChangedEvent
)
CatchUpEvent = ChatChangesEvent | ResetEvent | ChatRemovedEvent | SyncedEvent | AccountEvent | ResumedEvent
AnyEvent = (
    HelloEvent
    | AckEvent
    | ErrorEvent
    | HeartbeatEvent
    | PongEvent
    | TokenExpiringEvent
    | ChatEvent
    | ResetEvent
    | SyncedEvent
    | ResumedEvent
    | AccountEvent
    | TypingEvent
    | PresenceEvent
)
