"""What can be appended to a chat's log, what comes of it, and what is announced afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.core.errors import DialectError
from app.db.events import AccountEvent, ChatEvent
from app.db.repositories.chat_log import ChatRow
from app.db.schemas import Message, Role, SendableType, Service
from app.services.chat_log.roster import Roster


@dataclass(slots=True)
class SendMessage:
    """A message of a person."""

    chat_id: int
    user_id: int
    client_id: bytes
    content: str
    message_type: SendableType = "text"
    reply_to: int | None = None
    attachments: tuple[int, ...] = ()


@dataclass(slots=True)
class SendService:
    """A service message, written by the server in the name of a member (who may be leaving by this very change)."""

    chat_id: int
    user_id: int
    message_id: int
    service: Service


@dataclass(slots=True)
class EditMessage:
    """New text for one's own message."""

    chat_id: int
    user_id: int
    message_id: int
    content: str


@dataclass(slots=True)
class DeleteMessage:
    """Empty a message for everybody."""

    chat_id: int
    user_id: int
    message_id: int


@dataclass(slots=True)
class Mark:
    """Move a member's read or delivered mark up to a message."""

    chat_id: int
    user_id: int
    message_id: int
    kind: Literal["read", "delivered"]


@dataclass(slots=True)
class ChangeMembers:
    """Let people in or out or change their roles. The caller has checked permissions under the chat's lock."""

    chat_id: int
    join: Sequence[tuple[int, Role]] = ()
    leave: Sequence[int] = ()
    roles: Sequence[tuple[int, Role]] = ()


@dataclass(slots=True)
class ChangeInfo:
    """New title, description or settings. The caller has checked permissions."""

    chat_id: int
    title: str | None = None
    description: str | None = None
    avatar: str | None = None
    """A name; empty to have none."""
    history_visible: bool | None = None


@dataclass(slots=True)
class RosterMoved:
    """A block between the two of a personal chat changed: every worker must look again before the next message."""

    chat_id: int


Change = SendMessage | SendService | EditMessage | DeleteMessage | Mark | ChangeMembers | ChangeInfo | RosterMoved


@dataclass(slots=True)
class Done:
    """A change that is part of the log now; `message` is the one sent, edited or deleted."""

    message: Message | None = None
    earlier: bool = field(default=False, compare=False)
    """Sent before, with the same client id."""


class Deferred:
    """The chat is locked by somebody else: try again in the next batch."""


DEFERRED = Deferred()

Outcome = Done | DialectError | Deferred


@dataclass(slots=True)
class Announcement:
    """What one commit added to one chat's log: the events of the versions prev+1 .. version, in order."""

    chat_id: int
    prev: int
    version: int
    roster: Roster
    events: list[ChatEvent]
    seqs: list[int]
    """Per event, the seq of the older message it shows, or 0: who may not see that message gets no text of it."""
    joined: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    here: bool = False
    """Whether this worker committed it."""


@dataclass(slots=True)
class Remote:
    """An announcement of another worker: it says how new the roster must be, not who is in it."""

    chat_id: int
    prev: int
    version: int
    members_version: int
    events: list[ChatEvent]
    seqs: list[int]
    joined: frozenset[int]
    left: frozenset[int]

    def under(self, roster: Roster) -> Announcement:
        """As announced here, to those of this roster."""
        return Announcement(
            self.chat_id, self.prev, self.version, roster, self.events, self.seqs, self.joined, self.left
        )


@dataclass(slots=True)
class Appended:
    """The result of one append: an outcome per change, and what to announce once it is committed."""

    outcomes: list[Outcome]
    announcements: list[Announcement] = field(default_factory=list)
    account_events: list[tuple[int, AccountEvent]] = field(default_factory=list)
    rosters: list[Roster] = field(default_factory=list)
    """Rosters as this transaction leaves them; valid only if it commits."""
    moved_rosters: list[Roster] = field(default_factory=list)
    """Those of them that are not as they were before: older ones are outdated."""
    chats: list[ChatRow] = field(default_factory=list)
    """Chats as this transaction leaves them; valid only if it commits."""
