"""Lets each chat's versions out strictly one after the other, and heals what was lost between commit and delivery.

Commit order and announcement order differ: two transactions of one chat may finish in the other order, and a crash
or a lossy bus may swallow an announcement. A version that comes early waits; a hole that does not fill at once is
read from the database; and a sweep finds changes that nobody announced at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import Unavailable
from app.core.tasks import supervise
from app.db.database import Database
from app.db.events import ChatChangesEvent, ChatEvent
from app.db.repositories import chat_log as repository
from app.services.chat_log.changes import Announcement, Appended, Remote
from app.services.chat_log.roster import Roster, RosterCache, load_rosters
from app.services.chat_log.views import info_view, member_view, message_view
from app.services.connection_manager import Channel, ConnectionManager
from app.services.fanout_marks import FanoutMarks
from app.services.transport import Frames

log = logging.getLogger(__name__)

HOLE_SECONDS = 0.1
"""How long an early version waits for the one before it."""
SWEEP_WINDOW_SECONDS = 30
SWEEP_ROWS = 1000
HEAL_ROWS = 500
HEAL_CHARS = 64 * 1024
HEAL_PAUSE_SECONDS = 5.0
"""After this a chat that could not be healed is tried again; after twice as long each time it fails once more."""
HEAL_PAUSE_MAX_SECONDS = 300.0


@dataclass(slots=True)
class _Failure:
    """A chat that could not be healed."""

    channel: Channel
    pause: float
    until: float


class Sequencer:
    """Announces what was committed, to the connections of this process."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        rosters: RosterCache,
        connections: ConnectionManager,
        fanout: FanoutMarks,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._rosters = rosters
        self._connections = connections
        self._fanout = fanout
        self._early: dict[int, list[Announcement]] = {}
        self._behind: dict[int, int] = {}
        self._rosterless: dict[int, list[Remote]] = {}
        """Announcements of other workers that wait until their chat's roster has been read."""
        self._failures: dict[int, _Failure] = {}
        self._swept = clock.monotonic()
        self._task: asyncio.Task[None] | None = None
        self.healed = 0

    def start(self) -> None:
        """Begin sweeping."""
        self._task = supervise("sweep", self._sweep)

    async def stop(self) -> None:
        """End sweeping."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def announce(self, appended: Appended) -> None:
        """Let out what a committed transaction appended. Call it after the commit, never before."""
        for roster in appended.rosters:
            self._rosters.put(roster)
        # First that somebody came into a chat or is out of it, then what that brings.
        for user_id, event in appended.account_events:
            self._connections.send_to_user(user_id, event)
        for announcement in appended.announcements:
            announcement.here = True
            self.offer(announcement)

    def receive(self, announcement: Remote) -> None:
        """Let out what another worker committed, once the roster is known that it was committed under."""
        chat_id = announcement.chat_id
        if chat_id not in self._connections.channels and not any(map(self._connections.is_online, announcement.joined)):
            return
        waiting = self._rosterless.get(chat_id)
        if waiting is not None:
            waiting.append(announcement)
            return
        roster = self._rosters.get(chat_id)
        if roster is not None and roster.members_version >= announcement.members_version:
            self.offer(announcement.under(roster))
            return
        self._rosterless[chat_id] = [announcement]
        self._connections.spawn(self._fetch_roster(chat_id), "fetch-roster")

    async def _fetch_roster(self, chat_id: int) -> None:
        """Read who is in a chat before anything more of it is delivered: the cached roster is older than the chat."""
        generation = self._rosters.generation
        try:
            async with self._database.bulk_reads, self._database.reading() as session:
                rosters = await load_rosters(session, await repository.find_chats(session, [chat_id]))
        except Unavailable:
            rosters = []  # what waits is found by the sweep, once the database is back
        finally:
            waiting = self._rosterless.pop(chat_id, [])
        for roster in rosters:
            self._rosters.put(roster, generation=generation)
            for announcement in waiting:
                self.offer(announcement.under(roster))

    def offer(self, announcement: Announcement) -> None:
        """Release an announcement when its turn has come; keep it until then."""
        chat_id = announcement.chat_id
        channel = self._connections.channels.get(chat_id)
        if channel is None:
            # Nobody who was in the chat is online here. Somebody who just came in may be.
            for user_id in announcement.joined:
                self._connections.join(user_id, chat_id, announcement.version)
            self._note_committed(announcement)
            return
        if announcement.prev > channel.version:
            if self._failure(channel) is not None:
                self._leave_to_sweep(chat_id, announcement.version)
                return
            early = self._early.setdefault(chat_id, [])
            early.append(announcement)
            early.sort(key=lambda waiting: waiting.prev)
            if not channel.healing:
                channel.healing = True
                self._connections.spawn(self._heal_later(channel), "heal")
            return
        self._release(channel, announcement)
        self._release_early(channel)

    def _release_early(self, channel: Channel) -> None:
        early = self._early.get(channel.chat_id)
        while early and early[0].prev <= channel.version:
            self._release(channel, early.pop(0))
        if not early:
            self._early.pop(channel.chat_id, None)

    def _release(self, channel: Channel, announcement: Announcement) -> None:
        if announcement.version > channel.version:
            channel.version = announcement.version
            for user_id in announcement.left:
                self._connections.leave(user_id, announcement.chat_id)
            self._deliver(channel, announcement)
        for user_id in announcement.joined:
            self._connections.join(user_id, announcement.chat_id, channel.version)
        self._note_committed(announcement)

    def _note_committed(self, announcement: Announcement) -> None:
        if announcement.here:
            self._fanout.committed(announcement)

    def _deliver(self, channel: Channel, announcement: Announcement) -> None:
        chat_id, version, roster = announcement.chat_id, announcement.version, announcement.roster
        frames = Frames.of(*announcement.events)
        oldest = min((seq for seq in announcement.seqs if seq), default=roster.max_visible_from)
        everybody_may_see_all = oldest >= roster.max_visible_from
        audience = channel.audience(roster)
        metrics.announcements.n += 1
        metrics.deliveries.n += len(audience)
        for connection in audience:
            member = roster.members[connection.user_id]
            if everybody_may_see_all or oldest >= member.visible_from_seq:
                connection.deliver(chat_id, version, frames)
            else:
                connection.deliver(chat_id, version, Frames.of(*_without_unseen(announcement, member.visible_from_seq)))
        self._fanout.let_out(announcement)

    # --- healing ---

    async def _heal_later(self, channel: Channel) -> None:
        """Wait for the missing version a moment, then read it; keep at it while the database is away."""
        try:
            while self._connections.channels.get(channel.chat_id) is channel:
                await asyncio.sleep(HOLE_SECONDS)
                if not self._early.get(channel.chat_id):
                    break
                try:
                    if not await self._try_to_heal(channel):
                        break
                except Unavailable:
                    continue
        finally:
            channel.healing = False
            if self._connections.channels.get(channel.chat_id) is not channel:
                self._early.pop(channel.chat_id, None)  # nobody is left to hear it

    async def _try_to_heal(self, channel: Channel) -> bool:
        """Heal a chat, but for one that failed lately; whether it is healed. Raises Unavailable: any other failure is
        this chat's own, and holds up no other."""
        chat_id, now = channel.chat_id, self._clock.monotonic()
        failure = self._failure(channel)
        if failure is not None and now < failure.until:
            return False
        try:
            await self.heal(channel)
            self._release_early(channel)
        except Unavailable:
            raise
        except Exception:
            pause = HEAL_PAUSE_SECONDS if failure is None else min(failure.pause * 2, HEAL_PAUSE_MAX_SECONDS)
            self._failures[chat_id] = _Failure(channel, pause, now + pause)
            metrics.heals_failed.inc()
            log.exception("heal_failed", extra={"chat_id": chat_id, "pause": pause})
            # What waits for its turn would gather without end. It is in the database, where the sweep reads it.
            for announcement in self._early.pop(chat_id, []):
                self._leave_to_sweep(chat_id, announcement.version)
            return False
        self._failures.pop(chat_id, None)
        return True

    def _failure(self, channel: Channel) -> _Failure | None:
        failure = self._failures.get(channel.chat_id)
        return failure if failure is not None and failure.channel is channel else None

    def _leave_to_sweep(self, chat_id: int, version: int) -> None:
        self._behind[chat_id] = max(version, self._behind.get(chat_id, 0))

    async def heal(self, channel: Channel) -> None:
        """Read what was not let out from the database and let it out as one `chat_changes`."""
        chat_id = channel.chat_id
        prev = channel.version
        generation = self._rosters.generation
        async with self._database.reading() as session:
            rows = await repository.find_chats(session, [chat_id])
            if not rows:
                return
            [chat] = rows
            if chat.version <= prev:
                return
            messages = await repository.list_changed_messages(
                session, chat_id, after=prev, visible_from=1, limit=HEAL_ROWS + 1
            )
            members = await repository.list_changed_members(session, chat_id, after=prev, limit=HEAL_ROWS + 1)
            # Last: nothing said after somebody was removed may reach them.
            [roster] = await load_rosters(session, rows)
        # What changed since the version was read is announced in its turn.
        messages = [row for row in messages if row.version <= chat.version]
        members = [row for row in members if row.version <= chat.version]
        if channel.version != prev:
            return  # the announcement came while we were reading
        self._rosters.put(roster, generation=generation)
        size = sum(len(row.content) for row in messages)
        if len(messages) > HEAL_ROWS or len(members) > HEAL_ROWS or size > HEAL_CHARS:
            # Too much for one frame: each connection catches up at its own pace.
            channel.version = chat.version
            self._note_healed(chat_id, prev, chat.version)
            self._follow_members(roster, channel)
            for connection in channel.audience(roster):
                connection.catch_up(chat_id, prev)
            return
        changed_info = chat.info_version > prev or members
        event: ChatChangesEvent = {
            "type": "chat_changes",
            "chat_id": chat_id,
            "version": chat.version,
            "prev": prev,
            "messages": [message_view(row) for row in messages],
            "members": [member_view(row) for row in members],
            "info": info_view(chat, chat.member_count) if changed_info else None,
        }
        self._note_healed(chat_id, prev, chat.version)
        self._follow_members(roster, channel)
        seqs = [min((row.seq for row in messages), default=0)]
        self._release(channel, Announcement(chat_id, prev, chat.version, roster, [event], seqs))

    def _note_healed(self, chat_id: int, prev: int, version: int) -> None:
        self.healed += 1
        metrics.holes_healed.inc()
        log.warning("hole_healed", extra={"chat_id": chat_id, "prev": prev, "version": version})

    def _follow_members(self, roster: Roster, channel: Channel) -> None:
        """Nobody announced who left: unsubscribe whoever is no member by the roster just read."""
        for user_id in {connection.user_id for connection in channel.connections}:
            if user_id not in roster.members:
                self._connections.leave(user_id, channel.chat_id)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._settings.sweep_seconds)
            try:
                await self.sweep()
                metrics.sweeps.inc()
            except Unavailable:
                log.info("sweep_without_database")

    async def sweep(self) -> None:
        """Heal chats whose changes were committed but not let out since the sweep before this one."""
        if not self._connections.channels:
            return
        began = self._clock.monotonic()
        # After an outage the window reaches back to before it: what was committed then may be announced by nobody.
        window = SWEEP_WINDOW_SECONDS + began - self._swept
        candidates = dict(self._behind)
        async for chat in self._list_changed(window):
            channel = self._connections.channels.get(chat.id)
            if chat.id in candidates or (channel is not None and channel.version < chat.version):
                candidates[chat.id] = chat.version
        self._swept = began
        lost: list[Channel] = []
        for chat_id, version in candidates.items():
            channel = self._connections.channels.get(chat_id)
            if channel is None or channel.version >= version:
                self._behind.pop(chat_id, None)
            elif channel.version < self._behind.get(chat_id, 0):
                lost.append(channel)  # the last sweep saw it already; what is new may just be on its way
            else:
                self._behind[chat_id] = version
        self._failures = {
            chat_id: failure
            for chat_id, failure in self._failures.items()
            if self._connections.channels.get(chat_id) is failure.channel
        }
        # Once all that is new is noted, for this may end at any chat.
        for channel in lost:
            try:
                await self._try_to_heal(channel)
            except Unavailable:
                # To the end of the line: it may be this chat alone that takes the database too long.
                self._behind[channel.chat_id] = self._behind.pop(channel.chat_id)
                raise

    async def _list_changed(self, window: float) -> AsyncIterator[repository.ChangedChat]:
        """What changed, page by page: after an outage of an hour that may be every chat there is."""
        page: list[repository.ChangedChat] = []
        while True:
            async with self._database.reading() as session:
                page = await repository.list_changed_chats(
                    session, window, after=page[-1] if page else None, limit=SWEEP_ROWS
                )
            for chat in page:
                yield chat
            if len(page) < SWEEP_ROWS:
                return


def _without_unseen(announcement: Announcement, visible_from: int) -> list[ChatEvent]:
    """The same versions without messages from before a member's time."""
    events: list[ChatEvent] = []
    for event, seq in zip(announcement.events, announcement.seqs, strict=True):
        if not seq or seq >= visible_from:
            events.append(event)
            continue
        seen = event["messages"] if event["type"] == "chat_changes" else []
        events.append(
            {
                "type": "chat_changes",
                "chat_id": announcement.chat_id,
                "version": event["version"],
                "prev": event["prev"],
                "messages": [message for message in seen if message["seq"] >= visible_from],
                "members": event["members"] if event["type"] == "chat_changes" else [],
                "info": event["info"] if event["type"] == "chat_changes" else None,
            }
        )
    return events
