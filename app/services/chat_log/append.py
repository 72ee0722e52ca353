"""The one way to write to chats: lock, number, stamp, insert.

`append` runs inside a transaction it neither opens nor commits. Under the chats' locks it looks up earlier sends
before it checks membership, so that a retry always gets its first answer, and checks membership by rosters that are
exact, so that nobody who was removed or blocked slips a message in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import assert_never, cast

from app.core.clock import Clock, timestamp
from app.core.errors import (
    BadInput,
    Conflict,
    DialectError,
    Forbidden,
    NotFound,
    chat_not_found,
    file_not_found,
    message_not_found,
    peer_unavailable,
)
from app.db.events import AccountEvent, ChatEvent
from app.db.repositories import chat_log as repository
from app.db.repositories.chat_log import ChatRow, ChatUpdate, FileRow, MarkUpdate, MemberRow, MessageRow
from app.db.schemas import Attachment, Message, MessageType, SendableType, Service
from app.services.chat_log.changes import (
    DEFERRED,
    Announcement,
    Appended,
    Change,
    ChangeInfo,
    ChangeMembers,
    DeleteMessage,
    Done,
    EditMessage,
    Mark,
    Outcome,
    RosterMoved,
    SendMessage,
    SendService,
)
from app.services.chat_log.known_chats import KnownChats
from app.services.chat_log.roster import Roster, RosterCache, RosterMember, load_rosters
from app.services.chat_log.views import (
    attachment_view,
    chat_settings_view,
    info_view,
    member_view,
    message_view,
    uuid_text,
)

ATTACHABLE: dict[SendableType, tuple[str, ...]] = {
    "text": (),
    "image": ("image", "video"),
    "video": ("image", "video"),  # an album mixes the two
    "audio": ("audio",),
    "file": ("image", "video", "audio", "file"),
}


class Appender:
    """Appends changes; shared by the writer and by units of work."""

    def __init__(
        self, rosters: RosterCache, clock: Clock, *, receipts_members_max: int, worker: Callable[[], int | None]
    ) -> None:
        """`worker`: the number of this process, once it has one."""
        self.worker = worker
        self.rosters = rosters
        self.known = KnownChats()
        self.clock = clock
        self.receipts_members_max = receipts_members_max

    async def append(
        self,
        executor: repository.Executor,
        changes: Sequence[Change],
        message_ids: Sequence[int] = (),
        *,
        skip_locked: bool = False,
        look_up: bool = True,
        recall: bool = False,
    ) -> Appended:
        """Append changes to their chats and say what came of each.

        `message_ids` holds an id for every SendMessage among them. With `skip_locked`, changes of chats that
        somebody else holds come back deferred; otherwise the lock is waited for. Without `look_up`, earlier sends
        are looked up only of what would be refused, and the database refuses all changes together when one of them
        was sent before (`db.errors.is_sent_before`): the caller rolls back, and appends them with `look_up`.
        With `recall`, nothing is asked where `known` says enough, and the database refuses all changes together when a
        chat has moved on or is held (`db.errors.is_outdated`): the caller rolls back, and appends them without it.
        """
        if recall and not look_up:
            batch = _Batch(self, executor, changes, message_ids, look_up=False)
            if (appended := await batch.run_from_memory()) is not None:
                return appended
        batch = _Batch(self, executor, changes, message_ids, look_up=look_up)
        return await batch.run(skip_locked=skip_locked)


class _Draft:
    """A chat under its lock, and what this batch does to it."""

    __slots__ = ("events", "info_version_before", "joined", "left", "new", "roster", "row", "seqs", "updated")

    def __init__(self, row: ChatRow, roster: Roster) -> None:
        self.row = row
        self.roster = roster
        self.info_version_before = row.info_version
        self.updated = ChatUpdate(
            row, row.last_seq, row.version, row.members_version, row.info_version, row.member_count, None
        )
        self.new: list[MessageRow] = []
        self.events: list[ChatEvent] = []
        self.seqs: list[int] = []
        self.joined: set[int] = set()
        self.left: set[int] = set()

    def next_version(self) -> int:
        self.updated.version += 1
        return self.updated.version

    def add_event(self, event: ChatEvent, seq: int = 0) -> None:
        self.events.append(event)
        self.seqs.append(seq)

    @property
    def changed(self) -> bool:
        return self.updated.version != self.row.version or self.updated.members_version != self.row.members_version


class _Batch:
    def __init__(
        self,
        appender: Appender,
        executor: repository.Executor,
        changes: Sequence[Change],
        message_ids: Sequence[int],
        *,
        look_up: bool,
    ) -> None:
        self.appender = appender
        self.executor = executor
        self.changes = changes
        self.message_ids = iter(message_ids)
        self.look_up = look_up
        self.now = appender.clock.now().replace(tzinfo=None)
        self.now_text = timestamp(self.now)
        self.locked: set[int] = set()
        self.drafts: dict[int, _Draft] = {}
        self.earlier: dict[tuple[int, int, bytes], Done] = {}
        self.targets: dict[int, MessageRow] = {}
        self.members: dict[tuple[int, int], MemberRow] = {}
        self.rewritten: dict[int, MessageRow] = {}
        self.marks: dict[tuple[int, int], MarkUpdate] = {}
        self.private_marks: list[tuple[int, int]] = []
        self.marked_unread: set[tuple[int, int]] = set()
        self.read_after_all: list[tuple[int, int]] = []
        """Who was marked as unread, and is read now."""
        self.saved_members: dict[tuple[int, int], MemberRow] = {}
        self.existing_members: set[tuple[int, int]] = set()
        self.files: dict[int, FileRow] = {}
        self.attached: list[tuple[int, int, int]] = []
        self.detached: list[tuple[int, int, int]] = []
        self.account_steps: dict[int, int] = {}
        self.account_events: list[tuple[int, AccountEvent]] = []

    async def run_from_memory(self) -> Appended | None:
        """Append without a look at the database, if that can be: only the writing finds out whether the chats still
        are as they were. Otherwise nothing has been written, and it returns None."""
        if not self._recall():
            return None
        outcomes = self._apply_all()
        if any(isinstance(outcome, DialectError) for outcome in outcomes):
            return None  # no refusal without a look at what was sent before
        await repository.require_unchanged(self.executor, [draft.row for draft in self.drafts.values()])
        await self._write()
        return self._appended(outcomes)

    def _recall(self) -> bool:
        appender = self.appender
        for change in self.changes:
            if not isinstance(change, SendMessage) or change.attachments or change.reply_to is not None:
                return False
            row, roster = appender.known.get(change.chat_id), appender.rosters.get(change.chat_id)
            if row is None or roster is None or roster.members_version != row.members_version:
                return False
            if row.id not in self.drafts:
                self.drafts[row.id] = _Draft(row, roster)
        return True

    async def run(self, *, skip_locked: bool) -> Appended:
        await self._read(skip_locked=skip_locked)
        outcomes = self._apply_all()
        if not self.look_up:
            await self._look_up_refused(outcomes)
        await self._write()
        return self._appended(outcomes)

    def _apply_all(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for change in self.changes:
            draft = self.drafts.get(change.chat_id)
            if draft is None:
                outcomes.append(DEFERRED if change.chat_id in self.locked else chat_not_found())
                continue
            try:
                outcomes.append(self._apply(draft, change))
            except DialectError as error:
                outcomes.append(error)
        return outcomes

    def _appended(self, outcomes: list[Outcome]) -> Appended:
        drafts = [draft for draft in self.drafts.values() if draft.changed]
        return Appended(
            outcomes,
            [
                Announcement(
                    draft.row.id,
                    draft.row.version,
                    draft.updated.version,
                    draft.roster,
                    draft.events,
                    draft.seqs,
                    frozenset(draft.joined),
                    frozenset(draft.left),
                )
                for draft in drafts
                if draft.updated.version != draft.row.version
            ],
            self.account_events,
            [draft.roster for draft in self.drafts.values()],
            [draft.roster for draft in drafts if draft.updated.members_version != draft.row.members_version],
            [draft.updated.after(draft.row) for draft in self.drafts.values()],
        )

    # --- reading, all under the locks ---

    async def _read(self, *, skip_locked: bool) -> None:
        executor = self.executor
        chat_ids = sorted({change.chat_id for change in self.changes})
        client_ids: list[tuple[int, int, bytes]] = []
        targets: set[int] = set()
        file_ids: set[int] = set()
        member_keys: set[tuple[int, int]] = set()
        reader_keys: set[tuple[int, int]] = set()
        for change in self.changes:
            match change:
                case SendMessage():
                    if self.look_up:
                        client_ids.append((change.chat_id, change.user_id, change.client_id))
                    file_ids.update(change.attachments)
                    if change.reply_to is not None:
                        targets.add(change.reply_to)
                case EditMessage() | DeleteMessage():
                    targets.add(change.message_id)
                case Mark():
                    targets.add(change.message_id)
                    member_keys.add((change.chat_id, change.user_id))
                    if change.kind == "read":
                        reader_keys.add((change.chat_id, change.user_id))
                case ChangeMembers():
                    people = [user_id for user_id, _ in (*change.join, *change.roles)]
                    member_keys.update((change.chat_id, user_id) for user_id in (*people, *change.leave))
                case SendService() | ChangeInfo() | RosterMoved():
                    pass
                case _:
                    assert_never(change)
        found = await repository.lock_and_find(
            executor,
            chat_ids,
            client_ids=client_ids,
            message_ids=sorted(targets),
            member_keys=sorted(member_keys),
            file_ids=sorted(file_ids),
            reader_keys=sorted(reader_keys),
            skip_locked=skip_locked,
        )
        if skip_locked and len(found.chats) < len(chat_ids):
            missing = set(chat_ids) - {row.id for row in found.chats}
            self.locked = {row.id for row in await repository.find_chats(executor, sorted(missing))}
        self._remember(found.earlier)
        self.targets = {row.id: row for row in found.messages}
        self.members = {(row.chat_id, row.user_id): row for row in found.members}
        self.existing_members = set(self.members)
        self.files = {row.id: row for row in found.files}
        self.marked_unread = found.marked_unread

        moved = {change.chat_id for change in self.changes if isinstance(change, RosterMoved)}
        rosters = {row.id: self.appender.rosters.get(row.id) for row in found.chats}
        stale = [
            row
            for row in found.chats
            if (known := rosters[row.id]) is None
            or known.members_version != row.members_version
            or row.id in moved  # the caller has just changed the pair's row, in this transaction
        ]
        for roster in await load_rosters(executor, stale):
            rosters[roster.chat_id] = roster
        for row in found.chats:
            roster_now = rosters[row.id]
            if roster_now is not None:
                self.drafts[row.id] = _Draft(row, roster_now)

    def _remember(self, sent: Sequence[MessageRow]) -> None:
        for row in sent:
            self.earlier[row.chat_id, row.sender_id, row.client_id] = Done(message_view(row), earlier=True)

    async def _look_up_refused(self, outcomes: list[Outcome]) -> None:
        """Give retries their first answers, whatever has become of their senders since."""
        refused = {
            number: (change.chat_id, change.user_id, change.client_id)
            for number, (change, outcome) in enumerate(zip(self.changes, outcomes, strict=True))
            if isinstance(change, SendMessage) and isinstance(outcome, DialectError) and change.chat_id in self.drafts
        }
        if refused:
            self._remember(await repository.find_sent(self.executor, sorted(set(refused.values()))))
        for number, key in refused.items():
            outcomes[number] = self.earlier.get(key, outcomes[number])

    # --- deciding, in memory ---

    def _apply(self, draft: _Draft, change: Change) -> Outcome:
        match change:
            case SendMessage():
                return self._send(draft, change)
            case SendService():
                return self._send_service(draft, change)
            case EditMessage():
                return self._edit(draft, change)
            case DeleteMessage():
                return self._delete(draft, change)
            case Mark():
                return self._mark(draft, change)
            case ChangeMembers():
                return self._change_members(draft, change)
            case ChangeInfo():
                return self._change_info(draft, change)
            case RosterMoved():
                draft.updated.members_version += 1
                self._renew_roster(draft, dict(draft.roster.members))
                return Done()
            case _:
                assert_never(change)

    def _require_member(self, draft: _Draft, user_id: int) -> RosterMember:
        member = draft.roster.members.get(user_id)
        if member is None:
            raise chat_not_found()
        return member

    def _require_reachable(self, draft: _Draft, user_id: int) -> None:
        """In a personal chat with a block nothing passes, whoever set it."""
        if draft.roster.blockers:
            if user_id in draft.roster.blockers:
                raise Forbidden("peer_blocked", "You have blocked this person; unblock them first.")
            raise peer_unavailable()
        if draft.roster.type == "personal" and len(draft.roster.members) < 2:
            raise peer_unavailable()

    def _require_target(self, draft: _Draft, member: RosterMember, message_id: int) -> MessageRow:
        row = self.rewritten.get(message_id) or self.targets.get(message_id)
        if row is None or row.chat_id != draft.row.id or row.seq < member.visible_from_seq:
            raise message_not_found()
        return row

    def _send(self, draft: _Draft, change: SendMessage) -> Outcome:
        key = (change.chat_id, change.user_id, change.client_id)
        message_id = next(self.message_ids)
        if (first := self.earlier.get(key)) is not None:
            return first
        member = self._require_member(draft, change.user_id)
        self._require_reachable(draft, change.user_id)
        reply_to_seq = None
        if change.reply_to is not None:
            try:
                reply_to_seq = self._require_target(draft, member, change.reply_to).seq
            except DialectError:
                raise NotFound("reply_not_found", "The message it answers is not in this chat.") from None
        attachments = [self._attachment(change, file_id) for file_id in change.attachments]
        done = self._insert(
            draft,
            message_id,
            change.user_id,
            change.client_id,
            change.message_type,
            change.content,
            None,
            change.reply_to,
            reply_to_seq,
            attachments,
        )
        self.attached.extend((file_id, draft.row.id, draft.updated.last_seq) for file_id in change.attachments)
        self.earlier[key] = done
        return done

    def _attachment(self, change: SendMessage, file_id: int) -> Attachment:
        row = self.files.get(file_id)
        if row is None or not row.ready or row.owner_id != change.user_id:
            raise file_not_found()
        if row.kind not in ATTACHABLE[change.message_type]:
            raise BadInput(
                "attachment_mismatch",
                f"A message of type {change.message_type} cannot hold a file of kind {row.kind}.",
                field="attachments",
            )
        return attachment_view(row)

    def _send_service(self, draft: _Draft, change: SendService) -> Outcome:
        # Ids are unique, so the id itself names the send.
        client_id = change.message_id.to_bytes(16, "big")
        service = json.dumps(change.service, ensure_ascii=False)
        return self._insert(draft, change.message_id, change.user_id, client_id, "service", "", service, None, None, [])

    def _insert(
        self,
        draft: _Draft,
        message_id: int,
        user_id: int,
        client_id: bytes,
        message_type: MessageType,
        content: str,
        service: str | None,
        reply_to: int | None,
        reply_to_seq: int | None,
        attachments: list[Attachment],
    ) -> Done:
        updated = draft.updated
        prev = updated.version
        version = draft.next_version()
        updated.last_seq += 1
        seq = updated.last_seq
        updated.last_activity_at = self.now
        draft.new.append(
            MessageRow(
                draft.row.id,
                seq,
                message_id,
                version,
                user_id,
                client_id,
                message_type,
                content,
                service,
                reply_to,
                reply_to_seq,
                json.dumps(attachments, ensure_ascii=False) if attachments else None,
                self.now,
                None,
                None,
            )
        )
        # Sending moves all of one's own marks: whoever answers has read. Clients conclude it from the message, so
        # the member's row needs no version of its own.
        if user_id in draft.roster.members:
            mark = self._mark_update(draft.row.id, user_id)
            mark.read_seq = mark.delivered_seq = mark.public_read_seq = mark.public_delivered_seq = seq
            mark.read_at = self.now
        message: Message = {
            "id": message_id,
            "chat_id": draft.row.id,
            "seq": seq,
            "version": version,
            "sender_id": user_id,
            "client_id": uuid_text(client_id),
            "message_type": message_type,
            "content": content,
            "service": cast(Service, json.loads(service)) if service else None,
            "attachments": attachments,
            "reply_to": reply_to,
            "reply_to_seq": reply_to_seq,
            "created_at": self.now_text,
            "edited_at": None,
            "deleted": False,
            "hidden": False,
        }
        draft.add_event(
            {
                "type": "new_message",
                "chat_id": draft.row.id,
                "version": version,
                "prev": prev,
                "message": message,
            }
        )
        return Done(message)

    def _edit(self, draft: _Draft, change: EditMessage) -> Outcome:
        member = self._require_member(draft, change.user_id)
        row = self._require_target(draft, member, change.message_id)
        if row.sender_id != change.user_id:
            raise Forbidden("not_your_message", "Only its sender may edit a message.")
        if row.message_type == "service":
            raise Forbidden("not_editable", "Service messages cannot be edited.")
        if row.deleted_at is not None:
            raise Conflict("message_deleted", "The message has been deleted.")
        self._require_reachable(draft, change.user_id)
        if row.content == change.content:
            return Done(message_view(row))
        prev = draft.updated.version
        row = row._replace(content=change.content, edited_at=self.now, version=draft.next_version())
        return self._rewrite(draft, row, "message_edited", prev)

    def _delete(self, draft: _Draft, change: DeleteMessage) -> Outcome:
        member = self._require_member(draft, change.user_id)
        row = self._require_target(draft, member, change.message_id)
        if row.sender_id != change.user_id and not (draft.roster.type == "group" and member.role != "member"):
            raise Forbidden("not_your_message", "Only its sender or an admin may delete a message for everybody.")
        if row.message_type == "service":
            raise Forbidden("not_deletable", "Service messages cannot be deleted for everybody.")
        if row.deleted_at is not None:
            return Done(message_view(row))
        prev = draft.updated.version
        if row.attachments:
            held = cast(list[Attachment], json.loads(row.attachments))
            self.detached.extend((one["file_id"], row.chat_id, row.seq) for one in held)
        row = row._replace(
            content="", service=None, attachments=None, deleted_at=self.now, version=draft.next_version()
        )
        return self._rewrite(draft, row, "message_deleted", prev)

    def _rewrite(self, draft: _Draft, row: MessageRow, event: str, prev: int) -> Done:
        self.rewritten[row.id] = row
        message = message_view(row)
        if event == "message_edited":
            draft.add_event(
                {
                    "type": "message_edited",
                    "chat_id": row.chat_id,
                    "version": row.version,
                    "prev": prev,
                    "message": message,
                },
                row.seq,
            )
        else:
            draft.add_event(
                {
                    "type": "message_deleted",
                    "chat_id": row.chat_id,
                    "version": row.version,
                    "prev": prev,
                    "message": message,
                },
                row.seq,
            )
        return Done(message)

    def _mark(self, draft: _Draft, change: Mark) -> Outcome:
        member = self._require_member(draft, change.user_id)
        seq = self._require_target(draft, member, change.message_id).seq
        key = (change.chat_id, change.user_id)
        if change.kind == "read" and key in self.marked_unread:  # whether or not there is more to read
            self.marked_unread.discard(key)
            self.read_after_all.append(key)
            self.account_steps[change.user_id] = self.account_steps.get(change.user_id, 0) + 1
        stored = self.members[key]
        mark = self.marks.get(key)
        read = max(stored.read_seq, mark.read_seq if mark else 0)
        delivered = max(stored.delivered_seq, mark.delivered_seq if mark else 0)
        if seq <= (read if change.kind == "read" else delivered):
            return Done()
        mark = self._mark_update(*key)
        mark.delivered_seq = max(delivered, seq)  # what was read has been delivered
        if change.kind == "read":
            mark.read_seq = seq
            if not draft.roster.blockers:  # the time of a mark that a block keeps private would tell of both
                mark.read_at = self.now
        if self._receipts_are_public(draft.roster):
            prev = draft.updated.version
            mark.version = draft.next_version()
            # No more than the event tells: what was received while marks were private stays so.
            mark.public_delivered_seq = max(mark.public_delivered_seq, seq)
            if change.kind == "read":
                mark.public_read_seq = seq
                draft.add_event(
                    {
                        "type": "message_read",
                        "chat_id": change.chat_id,
                        "version": mark.version,
                        "prev": prev,
                        "user_id": change.user_id,
                        "seq": seq,
                    }
                )
            else:
                draft.add_event(
                    {
                        "type": "message_delivered",
                        "chat_id": change.chat_id,
                        "version": mark.version,
                        "prev": prev,
                        "user_id": change.user_id,
                        "seq": seq,
                    }
                )
        elif change.kind == "read" and key not in self.private_marks:
            self.private_marks.append(key)
            self.account_steps[change.user_id] = self.account_steps.get(change.user_id, 0) + 1
        return Done()

    def _receipts_are_public(self, roster: Roster) -> bool:
        return len(roster.members) <= self.appender.receipts_members_max and not roster.blockers

    def _mark_update(self, chat_id: int, user_id: int) -> MarkUpdate:
        key = (chat_id, user_id)
        mark = self.marks.get(key)
        if mark is None:
            mark = self.marks[key] = MarkUpdate(chat_id, user_id)
        return mark

    def _change_members(self, draft: _Draft, change: ChangeMembers) -> Outcome:
        updated = draft.updated
        prev = updated.version
        version = draft.next_version()
        updated.members_version += 1
        active = dict(draft.roster.members)
        rows: list[MemberRow] = []
        for user_id, role in change.join:
            row = MemberRow(
                chat_id=draft.row.id,
                user_id=user_id,
                role=role,
                joined_at=self.now,
                joined_seq=updated.last_seq + 1,
                joined_version=version,
                visible_from_seq=1 if draft.row.history_visible else updated.last_seq + 1,
                left_seq=None,
                read_seq=updated.last_seq,
                delivered_seq=updated.last_seq,
                public_read_seq=updated.last_seq,
                public_delivered_seq=updated.last_seq,
                version=version,
                account_version=0,
            )
            rows.append(row)
            active[user_id] = RosterMember(role, row.visible_from_seq)
            draft.joined.add(user_id)
            draft.left.discard(user_id)
        for user_id in change.leave:
            rows.append(self._member(draft.row.id, user_id)._replace(left_seq=updated.last_seq, version=version))
            del active[user_id]
            draft.left.add(user_id)
            draft.joined.discard(user_id)
        for user_id, role in change.roles:
            rows.append(self._member(draft.row.id, user_id)._replace(role=role, version=version))
            active[user_id] = active[user_id]._replace(role=role)
        for row in rows:
            self.saved_members[row.chat_id, row.user_id] = row
        for user_id in (*(user_id for user_id, _ in change.join), *change.leave):
            self.account_steps[user_id] = self.account_steps.get(user_id, 0) + 1
        updated.member_count = len(active)
        self._renew_roster(draft, active)
        draft.add_event(
            {
                "type": "members_changed",
                "chat_id": draft.row.id,
                "version": version,
                "prev": prev,
                "members": [member_view(row) for row in rows],
                "member_count": len(active),
            }
        )
        return Done()

    def _member(self, chat_id: int, user_id: int) -> MemberRow:
        key = (chat_id, user_id)
        return self.saved_members.get(key) or self.members[key]

    def _renew_roster(self, draft: _Draft, members: dict[int, RosterMember]) -> None:
        draft.roster = Roster(
            draft.row.id, draft.roster.type, draft.updated.members_version, members, draft.roster.blockers
        )

    def _change_info(self, draft: _Draft, change: ChangeInfo) -> Outcome:
        row = draft.row
        title = row.title if change.title is None else change.title
        description = row.description if change.description is None else change.description
        avatar = row.avatar if change.avatar is None else change.avatar or None
        visible = row.history_visible if change.history_visible is None else change.history_visible
        if (title, description, avatar, visible) == (row.title, row.description, row.avatar, row.history_visible):
            return Done()
        prev = draft.updated.version
        draft.updated.info_version = draft.next_version()
        draft.row = row._replace(title=title, description=description, avatar=avatar, history_visible=visible)
        draft.add_event(
            {
                "type": "chat_updated",
                "chat_id": row.id,
                "version": draft.updated.version,
                "prev": prev,
                "info": info_view(draft.row, draft.updated.member_count),
            }
        )
        return Done()

    # --- writing ---

    async def _write(self) -> None:
        executor = self.executor
        changed = [draft for draft in self.drafts.values() if draft.changed]
        if new := [row for draft in changed for row in draft.new]:
            await repository.insert_messages(executor, new, self.appender.worker())
        if self.attached:
            await repository.attach_files(executor, self.attached)
        if self.detached:
            await repository.detach_files(executor, self.detached, self.now)
        if self.rewritten:
            await repository.update_messages(executor, list(self.rewritten.values()))
        if changed:
            await repository.update_chats(executor, [draft.updated for draft in changed])
        if empty := [draft.row.id for draft in changed if draft.left and not draft.updated.member_count]:
            await repository.note_empty_chats(executor, empty)
        for draft in changed:
            if draft.updated.info_version != draft.info_version_before:
                await repository.update_chat_info(
                    executor,
                    draft.row.id,
                    title=draft.row.title,
                    description=draft.row.description,
                    avatar=draft.row.avatar,
                    history_visible=draft.row.history_visible,
                )
        await self._stamp_accounts()
        await repository.forget_private(executor, [(draft.row.id, user) for draft in changed for user in draft.left])
        if self.saved_members:
            await repository.save_members(executor, list(self.saved_members.values()), frozenset(self.existing_members))
        if self.marks:
            await repository.update_marks(executor, list(self.marks.values()))

    async def _stamp_accounts(self) -> None:
        """Number what only its owner sees: who joined, who left, whose own mark moved unseen, who read after all."""
        if not self.account_steps:
            return
        last = await repository.bump_account_versions(self.executor, self.account_steps)

        def stamp(user_id: int) -> int:
            last[user_id] += 1
            return last[user_id]

        for key in self.private_marks:
            chat_id, user_id = key
            mark = self.marks[key]
            mark.account_version = stamp(user_id)
            self.account_events.append(
                (
                    user_id,
                    {
                        "type": "read_mark",
                        "account_version": mark.account_version,
                        "chat_id": chat_id,
                        "seq": mark.read_seq,
                    },
                )
            )
        if self.read_after_all:
            await self._end_marked_unread(stamp)
        for draft in self.drafts.values():
            for user_id in (*draft.joined, *draft.left):
                key = (draft.row.id, user_id)
                version = stamp(user_id)
                self.saved_members[key] = self.saved_members[key]._replace(account_version=version)
                event: AccountEvent
                if user_id in draft.joined:
                    event = {"type": "chat_added", "account_version": version, "chat_id": draft.row.id}
                else:
                    event = {"type": "chat_removed", "account_version": version, "chat_id": draft.row.id}
                self.account_events.append((user_id, event))

    async def _end_marked_unread(self, stamp: Callable[[int], int]) -> None:
        # Read again, now that numbering has locked the users: the event shows the other settings, too.
        rows = [
            row._replace(marked_unread=False, account_version=stamp(row.user_id))
            for row in await repository.list_chat_settings(self.executor, self.read_after_all)
        ]
        await repository.save_marked_unread(self.executor, rows)
        for row in rows:
            event: AccountEvent = {
                "type": "chat_settings_changed",
                "account_version": row.account_version,
                "chat_id": row.chat_id,
                "settings": chat_settings_view(row),
            }
            self.account_events.append((row.user_id, event))
