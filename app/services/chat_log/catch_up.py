"""Catching up: what a client that knows version v of a chat needs to be as if it had never been away.

Per chat the current version V is read first, then every row stamped after the client's version, oldest change first
and without an upper bound; V, never more, is what the client is told it has. A row that changes meanwhile carries a
newer version and comes again, live. So pages may be cut anywhere between two versions, and a page's own version is
always safe to continue from.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import TooManyRequests
from app.db.database import Database
from app.db.events import CatchUpEvent, ChatChangesEvent, ChatInfo, ResetEvent
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import chat_log as repository
from app.db.repositories import chat_settings as chat_settings_repository
from app.db.repositories import chats as chats_repository
from app.db.repositories import drafts as drafts_repository
from app.db.repositories import user_settings as user_settings_repository
from app.db.repositories.chat_log import MessageRow
from app.db.repositories.chats import ChatCursor
from app.db.schemas import MAX_ID, Member, Message, ResumeIn
from app.services.chat_log.views import (
    chat_settings_view,
    chat_view,
    draft_view,
    info_view,
    member_view,
    message_view,
    people_named,
)
from app.services.coalescer import Coalescer
from app.services.connection_manager import ConnectionManager, LoadedChats, OnlineUser
from app.services.token_bucket import TokenBuckets
from app.services.user_service import users_seen_by
from app.services.user_settings_service import user_settings_view

PAGE_MESSAGES = 100
PAGE_MEMBERS = 200
PAGE_HIDDEN = 500
PAGE_BYTES = 64 * 1024
"""Of text in a page: what a slow phone reads in a few seconds."""
SHORT_AT_ONCE = 128
"""Short catch-ups that are read together."""
SHORT_OF_ONE = 16
"""Of these one client has so many read ahead."""
SHARED_PAGES = 256
SHARED_SECONDS = 10.0


class _Wanted(NamedTuple):
    """Somebody who missed what came to a chat after a version."""

    chat_id: int
    user_id: int
    since: int

    @property
    def place(self) -> tuple[int, int]:
        return self.chat_id, self.user_id


class _Missed(NamedTuple):
    """What came to a chat after a version, whoever asks; `version` was the chat's before the rest was read."""

    version: int
    messages: list[MessageRow]
    members: list[Member]
    info: ChatInfo | None
    read_at: float


async def visible_messages(
    session: AsyncSession, user_id: int, chat_id: int, rows: Sequence[MessageRow]
) -> list[Message]:
    """Messages as one member sees them: those they deleted for themselves are empty."""
    hidden = await repository.list_hidden(session, user_id, chat_id, [row.seq for row in rows])
    return [message_view(row, hidden=row.seq in hidden) for row in rows]


def within_bytes(rows: Sequence[MessageRow]) -> Sequence[MessageRow]:
    """The first of these messages, as many as PAGE_BYTES of text hold; at least one."""
    size = 0
    for index, row in enumerate(rows):
        size += len(row.content.encode())
        if index and size > PAGE_BYTES:
            return rows[:index]
    return rows


class CatchUpService:
    """Reads what clients missed, for sockets and for REST alike."""

    def __init__(self, *, settings: Settings, clock: Clock, database: Database, connections: ConnectionManager) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._connections = connections
        self._short_gap = min(PAGE_MESSAGES, settings.resume_max_changes)
        """Who is further behind takes the long way, or starts afresh."""
        self._short: Coalescer[_Wanted, list[CatchUpEvent]] = Coalescer(self._read_short, most=SHORT_AT_ONCE)
        self._resets = TokenBuckets(settings.limit_resets_per_minute / 60, settings.limit_resets_burst, clock)
        """Of each account: how often it may have all its chats afresh."""
        self._shared: OrderedDict[tuple[int, int], _Missed] = OrderedDict()
        """By chat and version. After a restart all members of a chat ask for the same."""
        self.epoch = ""
        """Names the database; read at start."""

    async def chat(self, user_id: int, chat_id: int, since: int | None) -> AsyncIterator[CatchUpEvent]:
        """Everything of one chat after `since`, or the chat afresh; ends with `synced` or `chat_removed`."""
        reset: ResetEvent | None = None
        async with self._database.bulk_reads.of(user_id), self._database.reading() as session:
            cursor = await chats_repository.find_cursor(session, chat_id, user_id)
            afresh = cursor is not None and self._starts_afresh(cursor, since)
            if cursor is not None and since is not None and not afresh:
                members = await repository.list_changed_members(session, chat_id, after=since, limit=PAGE_MEMBERS + 1)
                afresh = len(members) > PAGE_MEMBERS
            if cursor is not None and (since is None or afresh):
                reset = await self._reset(session, user_id, cursor)
        # Nothing is handed out while a reader is held: the peer may take its time.
        if cursor is None:
            yield {"type": "chat_removed", "account_version": None, "chat_id": chat_id}
            return
        if reset is not None:
            metrics.catch_up_resets.inc()
            yield reset
        elif since is None or afresh:
            async for event in self.chat(user_id, chat_id, None):
                yield event
            return
        else:
            async for event in self._changes(user_id, cursor, since):
                yield event
                if event["type"] == "chat_removed":
                    return
        metrics.catch_up_chats.inc()
        yield {"type": "synced", "chat_id": chat_id, "version": cursor.version}

    def _starts_afresh(self, cursor: ChatCursor, since: int | None) -> bool:
        return (
            since is None
            or since < cursor.joined_version  # left and joined again: what was missed was not theirs to see
            or since > cursor.version
            or cursor.version - since > self._settings.resume_max_changes
        )

    async def _read_short(self, wanted: Sequence[_Wanted]) -> dict[_Wanted, list[CatchUpEvent]]:
        """Like `chat`, for many at once, of those to whom one page tells everything. The others are left out."""
        events: dict[_Wanted, list[CatchUpEvent]] = {}
        missed: dict[tuple[int, int], _Missed] = {}
        places = [one.place for one in wanted]
        async with self._database.bulk_reads, self._database.reading() as session:
            cursors = await chats_repository.find_cursors(session, places)
            for one in wanted:
                cursor = cursors.get(one.place)
                if cursor is None or not max(cursor.joined_version, cursor.version - self._short_gap) <= one.since:
                    continue
                if (one.chat_id, one.since) in missed or one.since >= cursor.version:
                    continue
                page = await self._missed(session, one.chat_id, one.since, cursor.version)
                if page is not None:
                    missed[one.chat_id, one.since] = page
            hidden = await repository.list_hidden_among(
                session,
                sorted({one.user_id for one in wanted}),
                sorted({chat_id for chat_id, _ in missed}),
                sorted({row.seq for page in missed.values() for row in page.messages}),
            )
            # Asked last, when all is read: nothing said after somebody was removed may reach them.
            members = await chats_repository.find_memberships(session, places)
        for one in wanted:
            member = members.get(one.place)
            shared = missed.get((one.chat_id, one.since))
            if member is None or shared is None or member.joined_version > one.since:
                continue
            messages = [
                message_view(row, hidden=(one.user_id, one.chat_id, row.seq) in hidden)
                for row in shared.messages
                if row.seq >= member.visible_from_seq
            ]
            changes: ChatChangesEvent = {
                "type": "chat_changes",
                "chat_id": one.chat_id,
                "prev": one.since,
                "version": shared.version,
                "messages": messages,
                "members": shared.members,
                "info": shared.info,
            }
            events[one] = [changes, {"type": "synced", "chat_id": one.chat_id, "version": shared.version}]
        return events

    async def _missed(self, session: AsyncSession, chat_id: int, since: int, version: int) -> _Missed | None:
        """What came to a chat after a version; None when one page does not hold it. `version` is the chat's now."""
        now = self._clock.monotonic()
        while self._shared and next(iter(self._shared.values())).read_at < now - SHARED_SECONDS:
            self._shared.popitem(last=False)
        known = self._shared.get((chat_id, since))
        if known is not None and known.version == version:  # every change of a row moves the version
            return known
        members = await repository.list_changed_members(session, chat_id, after=since, limit=PAGE_MEMBERS + 1)
        messages = await repository.list_changed_messages(
            session, chat_id, after=since, visible_from=0, limit=PAGE_MESSAGES
        )
        if len(members) > PAGE_MEMBERS or len(messages) == PAGE_MESSAGES or len(within_bytes(messages)) < len(messages):
            return None
        [info] = await repository.find_chats(session, [chat_id])
        page = _Missed(
            version,
            messages,
            [member_view(row) for row in members],
            info_view(info, info.member_count) if info.info_version > since or members else None,
            now,
        )
        self._shared[chat_id, since] = page
        self._shared.move_to_end((chat_id, since))
        if len(self._shared) > SHARED_PAGES:
            self._shared.popitem(last=False)
        return page

    async def _reset(self, session: AsyncSession, user_id: int, cursor: ChatCursor) -> ResetEvent | None:
        """The chat from its newest page; None when the caller left it meanwhile, if only for a moment."""
        # The cursor was read first: rows read now may be newer than its version, never older.
        chat_id = cursor.chat_id
        rows = await chats_repository.list_chats(session, user_id, chat_ids=[chat_id], limit=1)
        if not rows:
            return None
        chat = chat_view(rows[0])
        chat["version"] = cursor.version
        newest = await chats_repository.list_messages(
            session,
            chat_id,
            low=rows[0].visible_from_seq,
            high=rows[0].last_seq,
            newest_first=True,
            limit=PAGE_MESSAGES,
        )
        members = await chats_repository.list_members(session, chat_id, after=0, limit=PAGE_MEMBERS)
        newest = list(within_bytes(newest[::-1]))[::-1]
        messages = await visible_messages(session, user_id, chat_id, newest)
        people = {row.user_id for row in members}.union(*map(people_named, messages))
        users = await users_seen_by(session, user_id, sorted(people))
        # Asked again, now that all is read: nothing said after somebody was removed may reach them.
        still = await chats_repository.find_cursor(session, chat_id, user_id)
        if still is None or still.joined_version != cursor.joined_version:
            return None
        return {
            "type": "reset",
            "chat_id": chat_id,
            "version": cursor.version,
            "chat": chat,
            "messages": messages,
            "members": [member_view(row) for row in members],
            "members_complete": len(members) >= chat["member_count"],
            "users": users,
        }

    async def _changes(self, user_id: int, cursor: ChatCursor, since: int) -> AsyncIterator[CatchUpEvent]:
        chat_id, target = cursor.chat_id, cursor.version
        after = since
        while after < target:
            async with self._database.bulk_reads.of(user_id), self._database.reading() as session:
                member = await chats_repository.find_membership(session, chat_id, user_id)
                visible_from = member.visible_from_seq if member else MAX_ID
                found = await repository.list_changed_messages(
                    session, chat_id, after=after, visible_from=visible_from, limit=PAGE_MESSAGES
                )
                rows = within_bytes(found)
                upto = target
                if len(rows) < len(found) or len(found) == PAGE_MESSAGES:
                    upto = min(target, rows[-1].version)
                members = await repository.list_changed_members(session, chat_id, after=after, limit=PAGE_MEMBERS * 10)
                messages = await visible_messages(session, user_id, chat_id, rows)
                [info] = await repository.find_chats(session, [chat_id])
                # Asked last, when all is read: nothing said after somebody was removed may reach them.
                member = await chats_repository.find_membership(session, chat_id, user_id)
            if member is None or member.joined_version > since:
                yield {"type": "chat_removed", "account_version": None, "chat_id": chat_id}
                return
            metrics.catch_up_pages.inc()
            yield {
                "type": "chat_changes",
                "chat_id": chat_id,
                "prev": after,
                "version": upto,
                "messages": messages,
                "members": [member_view(row) for row in members],
                "info": info_view(info, info.member_count) if info.info_version > after or members else None,
            }
            after = upto

    async def resume(self, user: OnlineUser, state: ResumeIn, ref: str | None) -> AsyncIterator[CatchUpEvent]:
        """The answer to `resume` on a socket, whose live events are held meanwhile.

        Raises TooManyRequests before it begins, and Unavailable.
        """
        metrics.resumes.labels("socket").inc()
        loaded = await self._connections.load_chats(user)
        async for event in self._resume(user.id, state, loaded, ref, tell_unchanged=True):
            yield event

    async def resume_page(self, user_id: int, state: ResumeIn) -> list[CatchUpEvent]:
        """The answer to a resume over REST: as much as fits one response, ending with `resumed`.

        Raises TooManyRequests and Unavailable.
        """
        metrics.resumes.labels("rest").inc()
        async with self._database.reading() as session:
            account_version = (await accounts_repository.account_versions(session, [user_id])).get(user_id, 0)
            cursors = (await chats_repository.list_cursors(session, [user_id])).get(user_id, [])
        loaded = LoadedChats(account_version, cursors)
        events: list[CatchUpEvent] = []
        weight = 0
        told = state.account_version
        """Everything of the account up to this version is among the events."""
        async for event in self._resume(user_id, state, loaded, None, tell_unchanged=False):
            events.append(event)
            if event["type"] in ("chat_changes", "reset"):
                weight += 1 + len(event["messages"])
            elif event["type"] == "message_hidden":
                # They come in order, after all else of the account but the profile: that must be told after the last.
                weight += 1
                told = event["account_version"] - 1
            elif event["type"] == "profile_changed":
                told = event["account_version"]
            if weight >= PAGE_MESSAGES * 5 and event["type"] != "resumed":
                events.append(
                    {
                        "type": "resumed",
                        "ref": None,
                        "epoch": self.epoch,
                        "account_version": told,
                        "complete": False,
                    }
                )
                break
        return events

    async def _resume(
        self,
        user_id: int,
        state: ResumeIn,
        loaded: LoadedChats,
        ref: str | None,
        *,
        tell_unchanged: bool,
    ) -> AsyncIterator[CatchUpEvent]:
        known = {int(chat_id): version for chat_id, version in state.chats.items()}
        account_version, cursors = loaded
        mine = {cursor.chat_id for cursor in cursors}
        same_epoch = state.epoch is None or state.epoch == self.epoch
        afresh = sum(
            self._starts_afresh(cursor, known.get(cursor.chat_id) if same_epoch else None) for cursor in cursors
        )
        if afresh and (wait := self._resets.wait(user_id, afresh / len(cursors))):
            metrics.rate_limited.labels("limit_resets_per_minute").inc()
            raise TooManyRequests("rate_limited", "Everything was asked for afresh too often.", retry_after=wait)
        if state.account_version != account_version or not same_epoch:
            after = state.account_version if same_epoch and state.account_version < account_version else 0
            # Whoever holds chats, from whatever time, must hear of every mark and hidden message in them.
            holds_chats = same_epoch and bool(known)
            async with self._database.bulk_reads.of(user_id), self._database.reading() as session:
                account_events = [
                    event async for event in self._account_events(session, user_id, after, holds_chats=holds_chats)
                ]
                profile_version = await accounts_repository.profile_version(session, user_id)
            for event in account_events:
                yield event
            if holds_chats:
                async for event in self._hidden(user_id, after):
                    yield event
            # Last: whoever holds its number has everything before it.
            yield {
                "type": "profile_changed",
                "account_version": account_version,
                "profile_version": profile_version,
            }
        for chat_id in known.keys() - mine:
            yield {"type": "chat_removed", "account_version": None, "chat_id": chat_id}
        short = [
            _Wanted(cursor.chat_id, user_id, since)
            for cursor in cursors
            if same_epoch
            and (since := known.get(cursor.chat_id)) is not None
            and cursor.joined_version <= since < cursor.version <= since + self._short_gap
        ]
        read: dict[int, list[CatchUpEvent] | None] = {}
        for cursor in cursors:
            since = known.get(cursor.chat_id) if same_epoch else None
            if since == cursor.version and since >= cursor.joined_version:
                if tell_unchanged:
                    yield {"type": "synced", "chat_id": cursor.chat_id, "version": cursor.version}
                continue
            if short and short[0].chat_id == cursor.chat_id:
                ahead, short = short[:SHORT_OF_ONE], short[SHORT_OF_ONE:]
                answers = await asyncio.gather(*(self._short.get(one) for one in ahead))
                read = {one.chat_id: events for one, events in zip(ahead, answers, strict=True)}
            events = read.pop(cursor.chat_id, None)
            if events is not None:
                metrics.catch_up_chats.inc()
                for event in events:
                    yield event
                continue
            async for event in self.chat(user_id, cursor.chat_id, since):
                if event["type"] == "reset":
                    # As it is read, not as it is asked for: who loses the socket half-way asks for the other half.
                    self._resets.spend(user_id, 1 / len(cursors))
                yield event
        yield {
            "type": "resumed",
            "ref": ref,
            "epoch": self.epoch,
            "account_version": account_version,
            "complete": True,
        }

    async def _hidden(self, user_id: int, after: int) -> AsyncIterator[CatchUpEvent]:
        """Messages the user deleted for themselves after an account version, in its order. They have no bound."""
        while True:
            async with self._database.bulk_reads.of(user_id), self._database.reading() as session:
                page = await accounts_repository.list_changed_hidden(session, user_id, after=after, limit=PAGE_HIDDEN)
            for hidden in page:
                yield {
                    "type": "message_hidden",
                    "account_version": hidden.account_version,
                    "chat_id": hidden.chat_id,
                    "message_id": hidden.message_id,
                    "seq": hidden.seq,
                }
            if len(page) < PAGE_HIDDEN:
                return
            after = page[-1].account_version

    async def _account_events(
        self, session: AsyncSession, user_id: int, after: int, *, holds_chats: bool
    ) -> AsyncIterator[CatchUpEvent]:
        """What only this user sees and that changed after an account version, hidden messages and the profile aside.
        A client without chats gets them all as `reset`, which tells the rest; it needs only what belongs to no chat."""
        for pair in await accounts_repository.list_changed_blocks(session, user_id, after=after):
            yield {
                "type": "block_changed",
                "account_version": pair.account_version,
                "user_id": pair.user_id,
                "blocked": pair.blocked,
            }
        if holds_chats:
            for mark in await accounts_repository.list_changed_marks(session, user_id, after=after):
                if mark.left:
                    yield {
                        "type": "chat_removed",
                        "account_version": mark.account_version,
                        "chat_id": mark.chat_id,
                    }
                elif mark.read_seq:
                    yield {
                        "type": "read_mark",
                        "account_version": mark.account_version,
                        "chat_id": mark.chat_id,
                        "seq": mark.read_seq,
                    }
            for settings in await chat_settings_repository.list_changed_chat_settings(session, user_id, after=after):
                yield {
                    "type": "chat_settings_changed",
                    "account_version": settings.account_version,
                    "chat_id": settings.chat_id,
                    "settings": chat_settings_view(settings),
                }
            for draft in await drafts_repository.list_changed_drafts(session, user_id, after=after):
                yield {
                    "type": "draft_changed",
                    "account_version": draft.account_version,
                    "chat_id": draft.chat_id,
                    "draft": draft_view(draft),
                }
        own = await user_settings_repository.find_user_settings(session, user_id)
        if own.account_version > after:
            yield {
                "type": "user_settings_changed",
                "account_version": own.account_version,
                "settings": user_settings_view(own),
            }
