"""The delivery trace: why did this message not arrive? Told to its sender, and more of it to the operator.

It puts together what stands in the database anyway (when it was committed, the marks of its recipients) with marks of
fan-out (`services/fanout_marks.py`) and of push (`services/notification_service.py`). There is no row of a message and
a device anywhere: all are watermarks, true of a message because they have passed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypedDict

from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.cursors import decode_cursor, encode_cursor
from app.core.errors import message_not_found
from app.db.database import Database
from app.db.repositories import chat_log as log_repository
from app.db.repositories import chats as chats_repository
from app.db.repositories import pairs as pairs_repository
from app.db.repositories import push as push_repository
from app.db.repositories import trace as repository
from app.db.repositories import users as users_repository
from app.db.repositories.chat_log import MessageRow
from app.db.repositories.pairs import PairRow
from app.db.repositories.push import UnpushedChat
from app.db.repositories.trace import PhoneRow, RecipientRow
from app.db.schemas import MessageTrace, PushAnswer, TracedRecipient
from app.services.fanout_marks import FanoutMarks
from app.services.notification_service import BACKLOG_SECONDS

RECIPIENT_CURSOR = (int,)
PAGE = 500
"""Recipients that are read at once for the operator."""
BEST_FIRST: tuple[PushAnswer, ...] = (
    "sent", "retrying", "waiting", "refused", "given_up", "unregistered", "off", "none",
)  # fmt: skip
"""What is said of somebody with several devices: the best that came of any."""
OF_MUTED: set[PushAnswer] = {"unregistered", "off", "none"}
"""What may be said of somebody whom no push is meant for."""
ANSWERS: dict[str, PushAnswer] = {"dead": "unregistered", "refused": "refused", "given_up": "given_up"}


class FanoutDetail(TypedDict):
    """The messages that a worker has told of."""

    worker: str
    part: str
    first_seq: int
    last_seq: int
    at: str
    covers: bool


class PushDetail(TypedDict):
    """What Firebase said of a session's device."""

    sent_seq: int
    tried_seq: int
    answer: str
    reason: str
    at: str


class SessionDetail(TypedDict):
    """A session of a recipient's, and its device."""

    session_id: int
    device_name: str
    platform: str
    state: str
    last_seen_at: str
    device: str | None
    registered_at: str | None
    push: PushAnswer
    pushed: PushDetail | None


class RecipientDetail(TypedDict):
    """A recipient, with all that may have kept the message from them."""

    user_id: int
    username: str
    state: str
    joined_seq: int
    left_seq: int | None
    visible: bool
    delivered_seq: int
    read_seq: int
    read_at: str | None
    muted: bool
    muted_until: str | None
    blocks_sender: bool
    blocked_by_sender: bool
    last_seen_at: str | None
    sessions: list[SessionDetail]


class FullTrace(TypedDict):
    """Everything that is known of a message's way, but what it says."""

    message_id: int
    chat_id: int
    chat_type: str
    seq: int
    message_type: str
    sender_id: int
    sender: str
    committed_at: str
    committed_by: str | None
    deleted_at: str | None
    last_seq: int
    pushed_seq: int
    push_is_on: bool
    fanout: list[FanoutDetail]
    recipients: list[RecipientDetail]


class TraceService:
    """Reads what became of a message."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        fanout: FanoutMarks | None = None,
        is_online: Callable[[int], bool],
        push_is_on: bool,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._fanout = fanout
        self._is_online = is_online
        self._push_is_on = push_is_on

    async def trace(self, user_id: int, message_id: int, *, cursor: str | None, limit: int) -> MessageTrace:
        """What became of a message of the caller's own, with a page of its recipients by user id.

        No more than the caller can find out elsewhere, and nothing that tells of a block: marks as
        `MessageService.readers` tells them, presence and push only of people the caller has a personal chat with.
        Raises NotFound for everybody else's message.
        """
        limit = min(limit, self._settings.page_size_max)
        [after] = decode_cursor(cursor, *RECIPIENT_CURSOR) if cursor is not None else [0]
        async with self._database.reading() as session:
            message, chat = await self._find_own(session, user_id, message_id)
            committed_by = await repository.find_worker(session, chat.id, message.seq)
            fanout = await repository.list_fanout(session, chat.id)
            if self._fanout is not None and (newest := self._fanout.waiting(chat.id, "commit")) is not None:
                fanout.insert(0, newest)
            rows = await repository.list_recipients(
                session, chat.id, after=after, limit=limit + 1, of=(message.seq, message.sender_id)
            )
            more = len(rows) > limit
            rows = rows[:limit]
            others = [row.user_id for row in rows]
            phones = await repository.list_phones(session, chat.id, others, alive_at=self._now())
            # The blocks last: what happened after a block must not be read with those from before.
            pairs = await pairs_repository.find_pairs(session, user_id, others)
        # Of the worker that committed it alone: whose sockets let it out would tell who was online, and where.
        told = next((row for row in fanout if row.part == "commit" and row.covers(message.seq, committed_by)), None)
        return {
            "message_id": message.id,
            "chat_id": message.chat_id,
            "seq": message.seq,
            "committed_at": timestamp(message.created_at),
            "fanned_out": told and {"worker": told.worker, "up_to_seq": told.last_seq, "at": timestamp(told.at)},
            "recipients": [
                self._recipient(message, chat, row, pairs.get(row.user_id), phones.get(row.user_id, ())) for row in rows
            ],
            "next": encode_cursor(rows[-1].user_id) if more else None,
        }

    async def _find_own(self, session: AsyncSession, user_id: int, message_id: int) -> tuple[MessageRow, UnpushedChat]:
        rows = await log_repository.find_messages(session, [message_id])
        if not rows or rows[0].sender_id != user_id:
            raise message_not_found()
        [message] = rows
        member = await chats_repository.find_membership(session, message.chat_id, user_id)
        chat = await push_repository.find_chat(session, message.chat_id)
        if member is None or chat is None or message.seq < member.visible_from_seq:
            raise message_not_found()
        return message, chat

    def _recipient(
        self,
        message: MessageRow,
        chat: UnpushedChat,
        row: RecipientRow,
        pair: PairRow | None,
        phones: Sequence[PhoneRow],
    ) -> TracedRecipient:
        # Marks never fall, and the sender sees them elsewhere: one that a block hid again would tell of it.
        read_seq, delivered_seq = (
            (row.public_read_seq, row.public_delivered_seq)
            if chat.type == "personal"
            else (row.read_seq, row.delivered_seq)
        )
        read = read_seq >= message.seq
        recipient: TracedRecipient = {
            "user_id": row.user_id,
            "delivered": delivered_seq >= message.seq,
            "read": read,
            "read_at": timestamp(row.read_at) if read and row.read_at else None,
            "connected": None,
            "push": None,
        }
        if pair is not None and pair.chat_id is not None:
            recipient["connected"] = pair.may_watch and self._is_online(row.user_id)
            recipient["push"] = self._best_answer(message, chat, pair, phones)
        return recipient

    def _best_answer(
        self, message: MessageRow, chat: UnpushedChat, pair: PairRow, phones: Sequence[PhoneRow]
    ) -> PushAnswer:
        answers = {self._answer(message, chat, phone) for phone in phones}
        # What was sent before a block keeps its answer: one that was taken back would tell of it. What is sent since
        # looks like sent to somebody who has muted the chat.
        # In a group a block keeps nobody from being pushed to, and changes nothing of what came of it.
        if chat.type == "personal" and pair.was_apart_at(message.created_at):
            answers &= OF_MUTED
        return next((answer for answer in BEST_FIRST if answer in answers), "none")

    def _answer(self, message: MessageRow, chat: UnpushedChat, phone: PhoneRow) -> PushAnswer:
        """What came of pushing a message to a session's device."""
        pushed = phone.pushed
        if pushed is not None:
            if pushed.sent_seq >= message.seq:
                return "sent"
            if pushed.tried_seq >= message.seq and pushed.answer in ANSWERS:
                return ANSWERS[pushed.answer]
            if pushed.answer == "dead" and phone.kind is None:
                return "unregistered"  # ever since
        if phone.kind is None:
            return "none"
        if not self._push_is_on:
            return "off"
        too_old = self._now() - message.created_at > timedelta(seconds=BACKLOG_SECONDS)
        if chat.pushed_seq >= message.seq or too_old:
            return "none"  # it needed none
        tried = pushed is not None and pushed.tried_seq >= message.seq
        return "retrying" if tried else "waiting"

    # --- for the operator ---

    async def full(self, message_id: int) -> FullTrace:
        """Everything about a message but what it says. Raises NotFound."""
        now = self._now()
        async with self._database.reading() as session:
            rows = await log_repository.find_messages(session, [message_id])
            chat = await push_repository.find_chat(session, rows[0].chat_id) if rows else None
            if chat is None:
                raise message_not_found()
            [message] = rows
            committed_by = await repository.find_worker(session, chat.id, message.seq)
            fanout = await repository.list_fanout(session, chat.id)
            senders = await users_repository.list_users(session, [message.sender_id])
            recipients: list[RecipientDetail] = []
            after = 0
            while members := await repository.list_recipients(session, chat.id, after=after, limit=PAGE):
                after = members[-1].user_id
                others = [member for member in members if member.user_id != message.sender_id]
                recipients += await self._details(session, message, chat, others, now)
        return {
            "message_id": message.id,
            "chat_id": chat.id,
            "chat_type": chat.type,
            "seq": message.seq,
            "message_type": message.message_type,
            "sender_id": message.sender_id,
            "sender": senders[0].username if senders else "",
            "committed_at": timestamp(message.created_at),
            "committed_by": committed_by,
            "deleted_at": timestamp(message.deleted_at) if message.deleted_at else None,
            "last_seq": chat.last_seq,
            "pushed_seq": chat.pushed_seq,
            "push_is_on": self._push_is_on,
            "fanout": [
                {
                    "worker": row.worker,
                    "part": row.part,
                    "first_seq": row.first_seq,
                    "last_seq": row.last_seq,
                    "at": timestamp(row.at),
                    "covers": row.covers(message.seq, committed_by),
                }
                for row in fanout
            ],
            "recipients": recipients,
        }

    async def _details(
        self,
        session: AsyncSession,
        message: MessageRow,
        chat: UnpushedChat,
        rows: Sequence[RecipientRow],
        now: datetime,
    ) -> list[RecipientDetail]:
        ids = [row.user_id for row in rows]
        users = {user.id: user for user in await users_repository.list_users(session, ids)}
        silent = await repository.list_silent(session, chat.id, ids, now, personal=chat.type == "personal")
        phones = await repository.list_phones(session, chat.id, ids)
        pairs = await pairs_repository.find_pairs(session, message.sender_id, ids)
        details: list[RecipientDetail] = []
        for row in rows:
            user, pair, muted_until = users.get(row.user_id), pairs.get(row.user_id), silent.get(row.user_id)
            seen = user.last_seen_at if user is not None else None
            details.append(
                {
                    "user_id": row.user_id,
                    "username": user.username if user is not None else "",
                    "state": _state(row, message.seq),
                    "joined_seq": row.joined_seq,
                    "left_seq": row.left_seq,
                    "visible": row.visible_from_seq <= message.seq,
                    "delivered_seq": row.delivered_seq,
                    "read_seq": row.read_seq,
                    "read_at": timestamp(row.read_at) if row.read_at else None,
                    "muted": row.user_id in silent,
                    "muted_until": timestamp(muted_until) if muted_until else None,
                    "blocks_sender": pair is not None and pair.blocks(row.user_id),
                    "blocked_by_sender": pair is not None and pair.blocks(message.sender_id),
                    "last_seen_at": timestamp(seen) if seen else None,
                    "sessions": [self._session(message, chat, phone, now) for phone in phones.get(row.user_id, ())],
                }
            )
        return details

    def _session(self, message: MessageRow, chat: UnpushedChat, phone: PhoneRow, now: datetime) -> SessionDetail:
        state = phone.end_reason or "ended" if phone.ended_at else "alive" if phone.expires_at > now else "expired"
        pushed = phone.pushed
        return {
            "session_id": phone.session_id,
            "device_name": phone.device_name,
            "platform": phone.platform,
            "state": state,
            "last_seen_at": timestamp(phone.last_seen_at),
            "device": phone.kind,
            "registered_at": timestamp(phone.registered_at) if phone.registered_at else None,
            "push": self._answer(message, chat, phone),
            "pushed": pushed
            and {
                "sent_seq": pushed.sent_seq,
                "tried_seq": pushed.tried_seq,
                "answer": pushed.answer,
                "reason": pushed.reason,
                "at": timestamp(pushed.at),
            },
        }

    def _now(self) -> datetime:
        return self._clock.now().astimezone(UTC).replace(tzinfo=None)


def _state(row: RecipientRow, seq: int) -> str:
    """What somebody is in the chat, as seen from a message."""
    if row.left_seq is not None:
        return "left"
    return "member" if row.joined_seq <= seq else "joined_later"
