"""REST bodies, and the objects that REST answers and socket events share.

What comes in is a pydantic model that refuses unknown fields. What goes out is a TypedDict: a plain dict at run
time, so the hot path serialises it as it is, with the same declaration feeding OpenAPI and AsyncAPI.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from typing_extensions import TypedDict

MAX_ID = 2**53 - 1
"""JavaScript holds no larger integer exactly (RFC 8259 section 6)."""


def _whole(value: object) -> object:
    """2.0 is an integer in JSON (and in JSON Schema); Python reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Id = Annotated[int, Field(ge=1, le=MAX_ID, examples=[42]), WHOLE]
ChatId = Annotated[Id, Field(examples=[1])]
UserId = Annotated[Id, Field(examples=[2])]
FileId = Annotated[Id, Field(examples=[7])]
SessionId = Annotated[Id, Field(examples=[7])]
Seq = Annotated[
    int,
    Field(ge=1, le=MAX_ID, description="Place of a message in its chat: 1, 2, 3, ... without gaps.", examples=[17]),
    WHOLE,
]
Counter = Annotated[int, Field(ge=0, le=MAX_ID, examples=[3]), WHOLE]
Version = Annotated[
    int, Field(ge=0, le=MAX_ID, description="Number of a change in a chat's log.", examples=[23]), WHOLE
]
AccountVersion = Annotated[
    int,
    Field(ge=0, le=MAX_ID, description="Number of a change among the things only this user sees.", examples=[5]),
    WHOLE,
]
Timestamp = Annotated[
    str,
    Field(
        json_schema_extra={"format": "date-time"},
        description="RFC 3339, UTC.",
        examples=["2026-01-31T12:00:00.000Z"],
    ),
]
AvatarUrl = Annotated[
    str | None,
    Field(
        description="The picture, 640 pixels square, in WebP; with `?size=small` behind it, 160 pixels. Another "
        "picture has another address, so this one may be cached for ever. Null without a picture.",
        examples=["/api/v1/avatars/7-0123456789abcdef0123456789abcdef"],
    ),
]
MOMENT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})$"
_MOMENT = re.compile(MOMENT, re.ASCII)


def _moment(value: object) -> datetime:
    """A time as RFC 3339 has it, to the millisecond that we show. A number, or a time of no known zone, is none."""
    if not isinstance(value, str) or not _MOMENT.fullmatch(value):
        raise ValueError("must be a time with its zone, such as 2026-01-31T12:00:00.000Z")
    try:
        moment = datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be a time of the years 1 to 9999") from None
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000, tzinfo=None)


Moment = Annotated[
    datetime,
    BeforeValidator(_moment),
    WithJsonSchema({"type": "string", "format": "date-time", "pattern": MOMENT, "maxLength": 40}),
]
"""A time from a client: naive UTC, as the database has it."""
CLIENT_ID = "7d444840-9dc0-11d1-b245-5ffdce74fad2"
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


def canonical_uuid(text: str) -> str | None:
    """A UUID as it is written everywhere (RFC 9562): with hyphens, in lower case. None for all that is none."""
    return text.lower() if _UUID.fullmatch(text) else None


def _hyphenated(value: object) -> object:
    # Python's own reader also takes braces, `urn:uuid:`, and hyphens anywhere or nowhere.
    if isinstance(value, str) and canonical_uuid(value) is None:
        raise ValueError("must be a UUID such as 7d444840-9dc0-11d1-b245-5ffdce74fad2")
    return value


ClientId = Annotated[
    UUID,
    BeforeValidator(_hyphenated),
    Field(
        strict=False,
        description="A UUID the client gives this send, with hyphens; it comes back in lower case. A retry with the "
        "same one, at any time and over any door, gets the first answer and stores nothing.",
        examples=[CLIENT_ID],
    ),
]

ChatType = Literal["personal", "group", "saved"]
Role = Literal["owner", "admin", "member"]
FileKind = Literal["image", "video", "audio", "file"]
MessageType = Literal["text", "image", "video", "audio", "file", "service"]
SendableType = Literal["text", "image", "video", "audio", "file"]
ServiceAction = Literal[
    "chat_created",
    "members_added",
    "member_removed",
    "member_left",
    "title_changed",
    "description_changed",
    "avatar_changed",
]
UserRelation = Literal["none", "self", "blocked"]


# What is refused in text is told to clients as a pattern, in a dialect that ECMA, Python and Rust read alike.
_CONTROLS = r"\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f"
_INVISIBLE = r"\u00ad\u061c\u180e\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
"""What makes two names look alike or turns text around. The zero-width joiner U+200D is not here: it holds
emoji together."""
_BLANK = (
    rf"\s{_CONTROLS}{_INVISIBLE}\u200d\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    r"\ufff0-\ufff8\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
)
"""What shows nothing by itself: what Unicode calls default-ignorable, letters that are drawn blank, and marks that are
put on another character. In emoji and on letters they are welcome, but something else must stand there."""
_BLANK_BEYOND = (
    "\U00013430-\U0001343f\U00013441\U00013442\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""More of it, beyond what all dialects of patterns spell alike."""
_NO_LINE = rf"{_CONTROLS}\t\n\r{_INVISIBLE}"
LINE = rf"^[^{_NO_LINE}]*$"
FILLED_LINE = rf"^[^{_NO_LINE}]*[^{_NO_LINE}{_BLANK}][^{_NO_LINE}]*$"
LINES = rf"^[^{_CONTROLS}{_INVISIBLE}]*$"
SEARCHABLE = (
    rf"^[^{_NO_LINE}\S]*(?:@[^{_NO_LINE}]{{2,}}|[^{_NO_LINE}@\s][^{_NO_LINE}]+)[^{_NO_LINE}\s][^{_NO_LINE}\S]*$"
)
"""At least three characters of a line, blanks around them and one @ before them aside."""
TEXT = r"^[^\u0000]*$"
FILLED_TEXT = rf"^[^\u0000]*[^{_BLANK}][^\u0000]*$"
_LINE, _LINES = re.compile(LINE), re.compile(LINES)
_VISIBLE = re.compile(rf"[^{_BLANK}{_BLANK_BEYOND}]")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen."""
    return _VISIBLE.search(text) is None


def _check_text(value: str) -> str:
    """Any Unicode text but NUL, which C strings and some databases end at."""
    if "\x00" in value:
        raise ValueError("must not contain the NUL character")
    return value


def _check_line(value: str) -> str:
    """One line for people to read: no controls, no bidi or zero-width tricks; composed (NFC) and trimmed."""
    if not _LINE.fullmatch(value):
        raise ValueError("must not contain control or invisible characters")
    return unicodedata.normalize("NFC", value).strip()


def _check_name(value: str) -> str:
    """A line with something to see in it."""
    value = _check_line(value)
    if is_blank(value):
        raise ValueError("must have something visible in it")
    return value


def _check_searchable(value: str) -> str:
    """What may be looked for: a part of a line."""
    _check_line(value)
    return value


def _check_lines(value: str) -> str:
    """The same with line breaks."""
    if not _LINES.fullmatch(value):
        raise ValueError("must not contain control or invisible characters")
    return unicodedata.normalize("NFC", value).replace("\r\n", "\n").strip()


Text = Annotated[str, Field(json_schema_extra={"pattern": TEXT}), AfterValidator(_check_text)]
Content = Annotated[
    str,
    Field(
        min_length=1,
        json_schema_extra={"pattern": FILLED_TEXT, "maxLength": 4096},
        description="At most 4096 characters unless the server is set otherwise; something in it must be visible.",
        examples=["Hello world!"],
    ),
    AfterValidator(_check_text),
]
Phone = Annotated[
    str,
    Field(min_length=3, max_length=32, examples=["+79991234567"], description="With its country code."),
    AfterValidator(_check_text),
]
Username = Annotated[
    str,
    Field(
        min_length=3,
        max_length=32,
        pattern=r"^[A-Za-z][A-Za-z0-9_]{2,31}$",
        examples=["john_doe"],
        description="3 to 32 of a-z, 0-9 and _, beginning with a letter; unique without regard to case.",
    ),
]
# Lengths hold twice: as written, which is what the schema tells, and as stored, since composing can lengthen a text.
DisplayName = Annotated[
    str,
    Field(min_length=1, max_length=64, json_schema_extra={"pattern": FILLED_LINE}, examples=["John Doe"]),
    AfterValidator(_check_name),
    Field(min_length=1, max_length=64),
]
Title = Annotated[
    str,
    Field(min_length=1, max_length=128, json_schema_extra={"pattern": FILLED_LINE}, examples=["Trip to Oslo"]),
    AfterValidator(_check_name),
    Field(min_length=1, max_length=128),
]
Paragraph = Annotated[
    str,
    Field(max_length=512, json_schema_extra={"pattern": LINES}, examples=["Hello!"]),
    AfterValidator(_check_lines),
    Field(max_length=512),
]
DeviceName = Annotated[
    str,
    Field(max_length=64, json_schema_extra={"pattern": LINE}, examples=["John's phone"]),
    AfterValidator(_check_line),
    Field(max_length=64),
]
Platform = Annotated[
    str,
    Field(max_length=16, json_schema_extra={"pattern": LINE}, examples=["android"]),
    AfterValidator(_check_line),
    Field(max_length=16),
]
SearchText = Annotated[
    str,
    Field(max_length=64, json_schema_extra={"pattern": SEARCHABLE}, examples=["john"]),
    AfterValidator(_check_searchable),
]
Password = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        examples=["SecurePass123!"],
        description="At least 8 characters, not a common one.",
    ),
    AfterValidator(_check_text),
]


NewPassword = Annotated[
    Password,
    # What the check of passwords says of any text; that it must not be a common one is told in words only.
    Field(json_schema_extra={"minLength": 8, "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"}),
]


class In(BaseModel):
    """Base of request bodies: exact types, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True)


AccessToken = Annotated[
    str, Field(examples=["eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxIn0.3Yk0bXc0c2lnbmF0dXJlLWlzLWhlcmU"])
]
RefreshToken = Annotated[str, Field(examples=["s8F1KQZ8Jm3pWvYc0nXr5tLbHd7gUeAiOq2RzTfB6kM"])]


# --- accounts ---------------------------------------------------------------------------------------------------


class RegisterIn(In):
    """A new account."""

    phone: Phone
    password: NewPassword
    username: Username
    display_name: DisplayName | None = Field(None, description="Shown to others; the username when left out.")
    device_name: DeviceName = Field("", description="Shown in the list of sessions.")
    platform: Platform = ""


class RefreshIn(In):
    """A refresh token to exchange."""

    refresh_token: Annotated[
        RefreshToken,
        Field(min_length=1, max_length=256, json_schema_extra={"pattern": TEXT}),
        AfterValidator(_check_text),
    ]


class PushDeviceIn(In):
    """Where Firebase reaches this device."""

    kind: Literal["token", "fid"] = Field(
        description="What `token` is: a registration token (`FirebaseMessaging.getToken`), or the id of a Firebase "
        "installation (`FirebaseInstallations.getId`)."
    )
    token: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[!-~]+$", examples=["bk3RNwTe3H0:CI2k_HHw"])]


class Tokens(TypedDict):
    """What a device keeps: a short-lived access token and a refresh token that works once."""

    access_token: AccessToken
    token_type: Literal["bearer"]
    expires_in: Annotated[int, Field(description="Seconds the access token lives.", examples=[3600])]
    refresh_token: RefreshToken


class Ticket(TypedDict):
    """A key to one socket."""

    ticket: Annotated[str, Field(examples=["zJf0qkC8vYx2nHh5bQm7rT1dLw9sEaGu"])]
    expires_in: Annotated[int, Field(description="Seconds.", examples=[30])]


class Device(TypedDict):
    """A session: one device that is logged in."""

    id: SessionId
    device_name: Annotated[str, Field(examples=["John's phone"])]
    platform: Annotated[str, Field(examples=["android"])]
    ip: Annotated[str, Field(description="Where it logged in from.", examples=["203.0.113.7"])]
    created_at: Timestamp
    last_seen_at: Timestamp
    current: Annotated[bool, Field(description="Whether this request came from it.")]


# --- people -----------------------------------------------------------------------------------------------------


class ProfileIn(In):
    """What to change of one's profile; what is left out stays."""

    username: Username | None = None
    display_name: DisplayName | None = None
    bio: Paragraph | None = None


class UserSettingsIn(In):
    """What to change of one's settings; what is left out stays."""

    notify_personal: bool | None = Field(None, description="Notify of messages of personal chats.", examples=[True])
    notify_groups: bool | None = Field(None, description="Notify of messages of groups.", examples=[False])


class UserSettings(TypedDict):
    """What somebody has set for all their chats. Of two states the greater `account_version` counts."""

    notify_personal: Annotated[bool, Field(description="Whether messages of personal chats are notified of.")]
    notify_groups: Annotated[bool, Field(description="Whether messages of groups are notified of.")]
    account_version: Annotated[AccountVersion, Field(description="Of their last change; 0 when nothing was set.")]


class User(TypedDict):
    """A person as others see them. Refetch when `profile_version` has moved."""

    id: UserId
    username: Annotated[str, Field(examples=["john_doe"])]
    display_name: Annotated[str, Field(examples=["John Doe"])]
    bio: Annotated[str, Field(examples=["Hello!"])]
    avatar_url: AvatarUrl
    profile_version: Counter


class Me(User):
    """The caller's own profile."""

    phone: Annotated[str, Field(examples=["+79991234567"])]
    account_version: AccountVersion
    created_at: Timestamp


class Registered(Me, Tokens):
    """A new account, already logged in."""


class Profile(User):
    """Somebody's profile, with what the caller may know of their presence."""

    relation: Annotated[UserRelation, Field(description="`blocked`: the caller blocked them.")]
    online: bool
    last_seen_at: Timestamp | None


Next = Annotated[str | None, Field(description="Pass as `cursor` for the next page; null at the end.", examples=[None])]


class UserPage(TypedDict):
    """A page of people; `next` continues it."""

    items: list[User]
    next: Next


class Availability(TypedDict):
    """Whether a username can be taken now. Only registering or renaming takes it."""

    username: Annotated[str, Field(examples=["john_doe"])]
    available: bool


# --- messages ---------------------------------------------------------------------------------------------------


AttachmentIds = Annotated[
    list[FileId],
    Field(
        max_length=50,
        json_schema_extra={"uniqueItems": True, "maxItems": 10},
        description="Ids of the caller's own uploaded files, at most 10 unless the server is set otherwise; more "
        "than one is an album. `image` and `video` messages take both kinds, `audio` takes audio, `file` anything.",
    ),
]


def sendable(schema: dict[str, Any]) -> None:
    """Tell in JSON Schema what goes together in a message to send: text, or files with or without a caption.

    Not by `oneOf`: generators of clients make two classes of it, and lose the fields that both share.
    """
    schema |= {
        "if": {"properties": {"message_type": {"const": "text"}}},
        "then": {"properties": {"attachments": {"maxItems": 0}}, "required": ["content"]},
        "else": {"properties": {"attachments": {"minItems": 1}}, "required": ["attachments"]},
    }
    # A client that fills in defaults would send the empty text, which is refused.
    del schema["properties"]["content"]["default"]


class MessageIn(In):
    """A message to send: text, or files with or without a caption."""

    model_config = ConfigDict(json_schema_extra=sendable)

    content: Content = ""
    message_type: SendableType = "text"
    attachments: AttachmentIds = Field(default_factory=list)
    client_id: ClientId | None = None
    reply_to: Id | None = Field(None, description="Id of the message it answers, in the same chat.")


class MessageEditIn(In):
    """The new text of a message."""

    content: Content


class Service(TypedDict):
    """What a service message reports."""

    action: ServiceAction
    user_ids: list[UserId]
    text: Annotated[str, Field(description="The new title or description.", examples=["Trip to Oslo"])]


class Attachment(TypedDict):
    """A file in a message. Fetch it at `/api/v1/files/{file_id}`, its thumbnail at `.../thumbnail`."""

    file_id: FileId
    kind: FileKind
    media_type: Annotated[str, Field(description="By its content, not by its name.", examples=["image/jpeg"])]
    name: Annotated[str, Field(description="As its sender called it.", examples=["holiday.jpg"])]
    size: Annotated[int, Field(ge=0, description="Bytes.", examples=[218_403])]
    width: Annotated[int | None, Field(description="Pixels of an image.", examples=[1600])]
    height: Annotated[int | None, Field(examples=[1200])]
    blurhash: Annotated[
        str | None,
        Field(
            description="Of an image: to show until it is loaded (blurha.sh).",
            examples=["LEHV6nWB2yk8pyo0adR*.7kCMdnj"],
        ),
    ]
    thumbnail: Annotated[bool, Field(description="Whether there is a smaller copy, in WebP.", examples=[True])]


class UploadedFile(Attachment):
    """A file that its owner may attach to messages; one that no message holds is deleted after a day."""

    created_at: Timestamp


class Message(TypedDict):
    """A message. `version` is the chat version of its last change."""

    id: Id
    chat_id: ChatId
    seq: Seq
    version: Version
    sender_id: UserId
    client_id: Annotated[
        str,
        Field(
            json_schema_extra={"format": "uuid"},
            description="Of the sender's client, or made by the server; in lower case.",
            examples=[CLIENT_ID],
        ),
    ]
    message_type: MessageType
    content: Annotated[str, Field(description="Empty when deleted or hidden.", examples=["Hello world!"])]
    service: Annotated[Service | None, Field(description="Of service messages only.", examples=[None])]
    attachments: Annotated[list[Attachment], Field(examples=[[]])]
    reply_to: Annotated[Id | None, Field(description="Id of the message it answers.", examples=[None])]
    reply_to_seq: Annotated[Seq | None, Field(examples=[None])]
    created_at: Timestamp
    edited_at: Annotated[Timestamp | None, Field(examples=[None])]
    deleted: Annotated[bool, Field(description="Deleted for everybody: only its place is left.")]
    hidden: Annotated[bool, Field(description="Deleted by the caller for themselves. Once true, it stays true.")]


class Sent(TypedDict):
    """Proof that a message is stored for good."""

    message: Message


class History(TypedDict):
    """Messages by rising `seq`, with the chat version they were read at."""

    items: list[Message]
    version: Version
    has_before: Annotated[bool, Field(description="Whether older messages exist.")]
    has_after: Annotated[bool, Field(description="Whether newer messages exist.")]


class Reader(TypedDict):
    """One who has read a message."""

    user_id: UserId
    read_at: Annotated[Timestamp | None, Field(description="When their mark last moved.")]


class Readers(TypedDict):
    """Who read a message, and whom it has reached."""

    read_by: list[Reader]
    delivered_to: list[UserId]


PushAnswer = Literal["sent", "retrying", "waiting", "refused", "given_up", "unregistered", "off", "none"]


class TracedFanout(TypedDict):
    """Who told of a message."""

    worker: Annotated[
        str, Field(description="Name of the server process that committed it.", examples=["5f1c09a7d2e4"])
    ]
    up_to_seq: Annotated[Seq, Field(description="The newest of the messages it committed that it has told of.")]
    at: Annotated[Timestamp, Field(description="When it told of that one.")]


class TracedRecipient(TypedDict):
    """How far a message has come to somebody."""

    user_id: UserId
    delivered: Annotated[bool, Field(description="Whether a device of theirs has it.")]
    read: bool
    read_at: Annotated[Timestamp | None, Field(description="When their mark last moved; null while it is unread.")]
    connected: Annotated[
        bool | None,
        Field(description="Whether they have an open socket now. Null without a personal chat with them."),
    ]
    push: Annotated[
        PushAnswer | None,
        Field(
            description="What came of pushing to their devices, of several the best. `sent`: Firebase took it. "
            "`retrying`: Firebase is in trouble. `waiting`: not yet. `refused`: Firebase does not like it. `given_up`. "
            "`unregistered`: the app was removed. `off`: the server does not push. `none`: nothing was to be pushed. "
            "Null without a personal chat with them.",
            examples=["sent"],
        ),
    ]


class MessageTrace(TypedDict):
    """What became of a message."""

    message_id: Id
    chat_id: ChatId
    seq: Seq
    committed_at: Timestamp
    fanned_out: Annotated[
        TracedFanout | None,
        Field(description="Null for a second or so, and when it is not known (any more)."),
    ]
    recipients: Annotated[list[TracedRecipient], Field(description="By user id: members since before it was sent.")]
    next: Annotated[str | None, Field(description="Cursor of the next page of recipients.", examples=["2"])]


# --- chats ------------------------------------------------------------------------------------------------------


class PersonalChatIn(In):
    """Whom to talk to."""

    user_id: UserId


class GroupIn(In):
    """A new group; the caller becomes its owner."""

    title: Title
    description: Paragraph = ""
    member_ids: Annotated[list[UserId], Field(max_length=2000, examples=[[2, 3]])] = Field(default_factory=list)
    history_visible: bool = Field(True, description="Whether those who join later see what was said before.")


class ChatEditIn(In):
    """What to change of a group; what is left out stays."""

    title: Title | None = Field(None, examples=["Trip to Bergen"])
    description: Paragraph | None = None
    history_visible: bool | None = None


class ChatSettingsIn(In):
    """What to change of the caller's settings of a chat; what is left out stays."""

    muted_until: Moment | None = Field(
        None,
        description="Mute until then: `9999-12-31T23:59:59.000Z` for ever; any moment that has passed unmutes.",
        examples=["9999-12-31T23:59:59.000Z"],
    )
    pinned: bool | None = Field(None, description="Pinning puts the chat above those pinned before.")
    archived: bool | None = None
    marked_unread: bool | None = Field(None, description="Ends with the caller's next read mark in the chat, too.")


class DraftIn(In):
    """What the caller has begun to write."""

    content: Annotated[
        str,
        Field(
            json_schema_extra={"pattern": TEXT, "maxLength": 4096},
            description="As long as a message may be; blank deletes the draft.",
            examples=["Hello wor"],
        ),
        AfterValidator(_check_text),
    ]
    reply_to: Id | None = Field(None, description="Id of the message it answers, in the same chat.")


class MembersIn(In):
    """People to add."""

    user_ids: Annotated[list[UserId], Field(min_length=1, max_length=200, examples=[[2, 3]])]


class RoleIn(In):
    """A member's new role. `owner` hands the group over: the caller becomes an admin."""

    role: Annotated[Role, Field(examples=["admin"])]


class Member(TypedDict):
    """A membership as the chat's log tells it. Marks are seqs: everything up to them is read or delivered.

    In chats above 50 members the marks are those of own messages only; ask who read a message instead.
    """

    user_id: UserId
    role: Annotated[Role, Field(examples=["member"])]
    active: Annotated[bool, Field(description="False once they left or were removed.", examples=[True])]
    joined_at: Timestamp
    read_seq: Annotated[Counter, Field(examples=[16])]
    delivered_seq: Annotated[Counter, Field(examples=[17])]
    version: Version


class Members(TypedDict):
    """A page of members by user id."""

    items: list[Member]
    users: Annotated[list[User], Field(description="The people named in `items`.")]
    version: Version
    next: Next


class ChatSettings(TypedDict):
    """What one member has set for a chat, for themselves alone. Of two states the greater `account_version` counts."""

    muted_until: Annotated[
        Timestamp,
        Field(
            description="Muted while this lies ahead. `9999-12-31T23:59:59.000Z`: for ever; "
            "`1970-01-01T00:00:00.000Z`: not muted.",
            examples=["1970-01-01T00:00:00.000Z"],
        ),
    ]
    pinned: bool
    pin_order: Annotated[
        int, Field(ge=0, le=MAX_ID, description="Pinned chats stand by it, highest first; else 0.", examples=[0])
    ]
    archived: bool
    marked_unread: Annotated[bool, Field(description="Shown as unread although all is read.")]
    account_version: Annotated[AccountVersion, Field(description="Of their last change; 0 when nothing was set.")]


class Draft(TypedDict):
    """What a member has begun to write in a chat. Of two states the greater `account_version` counts."""

    content: Annotated[str, Field(description="Empty: there is no draft.", examples=["Hello wor"])]
    reply_to: Annotated[Id | None, Field(description="Id of the message it answers.", examples=[None])]
    updated_at: Timestamp | None
    account_version: Annotated[AccountVersion, Field(description="Of its last change; 0 when there was none.")]


class Chat(TypedDict):
    """A chat with all that is needed to draw its row in a list."""

    id: ChatId
    type: ChatType
    title: Annotated[str, Field(description="Of a group. A personal chat is named after its peer.", examples=[""])]
    description: Annotated[str, Field(examples=[""])]
    avatar_url: Annotated[AvatarUrl, Field(examples=[None])]
    history_visible: Annotated[bool, Field(examples=[True])]
    version: Version
    last_seq: Annotated[Counter, Field(examples=[17])]
    member_count: Annotated[Counter, Field(examples=[2])]
    role: Annotated[Role, Field(examples=["member"])]
    created_at: Timestamp
    last_activity_at: Timestamp
    unread_count: Annotated[
        int,
        Field(
            ge=0, le=1000, description="Messages of others not read yet; 1000 stands for more than 999.", examples=[1]
        ),
    ]
    read_seq: Annotated[int, Field(ge=0, description="The caller's own read mark.", examples=[16])]
    peer_id: Annotated[UserId | None, Field(description="The other person of a personal chat.")]
    peer_read_seq: Annotated[
        int, Field(ge=0, description="Up to where the peer of a personal chat has read.", examples=[17])
    ]
    peer_delivered_seq: Annotated[
        int, Field(ge=0, description="Up to where the peer's devices have received.", examples=[17])
    ]
    last_message: Message | None
    settings: Annotated[ChatSettings, Field(description="The caller's own.")]
    draft: Annotated[Draft, Field(description="The caller's own.")]


class ChatPage(TypedDict):
    """Chats by last activity, newest first."""

    items: list[Chat]
    users: Annotated[list[User], Field(description="Peers, and senders of last messages.")]
    next: Next


# --- catching up ------------------------------------------------------------------------------------------------


EPOCH = "0287ba44-01bf-47e1-963b-fb1cb5c8cced"


class ResumeIn(In):
    """Where a client stands: the `epoch` it knows, its account version and the version of each of its chats."""

    epoch: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="From `hello` or `resumed`.", examples=[EPOCH]
    )
    account_version: AccountVersion = 0
    chats: Annotated[
        # Below 9 * 10^15, and so within MAX_ID: a greater one would come back in an answer that its schema forbids.
        dict[Annotated[str, Field(pattern=r"^([1-9][0-9]{0,14}|[1-8][0-9]{15})$")], Version],
        Field(
            max_length=10_000,
            json_schema_extra={"additionalProperties": False},
            description="Chat id to the version the client has applied.",
            examples=[{"1": 17, "3": 9}],
        ),
    ] = Field(default_factory=dict)
