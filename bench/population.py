"""The rows of a believable messenger of any size: who there is, who talks to whom, and everything they said.

Nothing here knows a database: `populate` hands over rows, table by table in the order of their primary keys, that keep
every rule of the chat log (docs/architecture.md), so that the real server starts on them and people go on chatting.

Most of it is drawn (from a seed: the same size gives the same rows); the few who are measured, `Size` says who, have
lives that are the same at every size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from app.db.repositories.chat_log import MessageRow
from app.services.user_service import name_key

Value = int | str | bytes | datetime | None
Row = tuple[Value, ...]
Emit = Callable[[str, list[Row]], None]
"""Takes rows of a table, more of it perhaps to come."""

PASSWORD = "Seeded-lantern-1!"
"""Everybody's."""
READER, LAGGARD = 1, 2
"""Who is measured: the one has the most chats, the other has read nothing of the largest."""
READER_DRAFTS = READER_PINNED = 10
READER_BLOCKS = 20
UNREAD_CYCLE = 10
"""Of the reader's chats each has so many unread messages, or fewer: see `unread_of_reader`."""

USER_COLUMNS = (
    "id", "phone", "username", "display_name", "display_name_key", "bio", "password_hash", "profile_version",
    "account_version", "created_at", "last_seen_at",
)  # fmt: skip
MEMBER_COLUMNS = (
    "chat_id", "user_id", "role", "joined_at", "joined_seq", "joined_version", "visible_from_seq", "left_seq",
    "read_seq", "read_at", "delivered_seq", "public_read_seq", "public_delivered_seq", "version", "account_version",
)  # fmt: skip
CHAT_COLUMNS = (
    "id", "type", "title", "description", "history_visible", "created_by", "created_at", "last_seq", "version",
    "members_version", "info_version", "member_count", "last_activity_at", "changed_at", "pushed_seq",
)  # fmt: skip
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": (*MessageRow._fields, "worker"),
    "chat_members": MEMBER_COLUMNS,
    "chats": CHAT_COLUMNS,
    "user_pairs": (
        "low_id", "high_id", "chat_id", "low_blocks_high", "high_blocks_low", "low_blocked_at", "high_blocked_at",
        "low_account_version", "high_account_version",
    ),
    "hidden_messages": ("user_id", "chat_id", "seq", "message_id", "account_version"),
    "chat_settings": (
        "user_id", "chat_id", "muted_until", "pin_order", "archived", "marked_unread", "account_version",
    ),
    "drafts": ("user_id", "chat_id", "content", "reply_to_id", "updated_at", "account_version"),
    "user_settings": ("user_id", "notify_personal", "notify_groups", "account_version"),
    "users": USER_COLUMNS,
    "sessions": (
        "id", "user_id", "device_name", "platform", "ip", "created_at", "last_seen_at", "expires_at",
    ),
    "refresh_tokens": ("token_hash", "session_id", "created_at"),
    "push_devices": ("session_id", "user_id", "kind", "token", "updated_at"),
    "workers": ("number", "name", "started_at"),
    "fanout_marks": ("chat_id", "worker", "part", "first_seq", "last_seq", "at"),
    "push_marks": ("session_id", "chat_id", "sent_seq", "tried_seq", "answer", "reason", "at"),
}  # fmt: skip

FIRST_NAMES = (
    "Anna", "Maria", "Ivan", "Olga", "Peter", "Elena", "Max", "Sofia", "Daniel", "Nina", "Oleg", "Laura", "Anton",
    "Vera", "Tom", "Irina", "Paul", "Dina", "Marat", "Alina", "Hugo", "Rosa", "Karl", "Lena", "Emil", "Zoe", "Andrej",
    "Bruno", "Clara", "Denis", "Fatima", "Gleb", "Hanna", "Igor", "Julia", "Kira", "Leo", "Mira", "Noah", "Pavel",
)  # fmt: skip
LAST_NAMES = (
    "Petrova", "Smith", "Ivanova", "Novak", "Garcia", "Kuznetsov", "Weber", "Rossi", "Lind", "Okafor", "Sato", "Kim",
    "Larsen", "Silva", "Popov", "Meyer", "Dubois", "Jansen", "Kowalski", "Haddad", "Nguyen", "Costa", "Berg", "Orlov",
)  # fmt: skip
CYRILLIC = ("Анна", "Мария", "Иван", "Ольга", "Пётр", "Елена", "Максим", "Софья", "Даниил", "Нина", "Олег", "Вера")
WORDS = """
    ok yes no see you tomorrow at the station did you get my note thanks a lot привет как дела я уже еду буду через
    десять минут the train is late again 😀 what about lunch send me the file please I will call you back later да
    нет хорошо спасибо meeting moved to Friday let us ask Anna she knows 👍 happy birthday where are the keys
""".split()  # noqa: SIM905 - a list of 70 quoted words reads worse
PLATFORMS = ("android", "ios", "web")

WORKER = 1
"""Number of the worker that committed all of it."""
WORKER_NAME = "seeded"
PUBLIC_MARKS_MAX = 50
"""Members of a chat whose log tells their marks; the default of `receipts_members_max`."""
CHUNK = 5000
"""Messages handed over at once."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    messages: int
    users: int
    chats: int
    large_chat_messages: int
    """Of the largest chat."""
    large_chat_members: int = 200
    largest_group: int = 2000
    reader_chats: int = 500
    reader_chat_messages: int = 12
    """At least so many in each of the reader's."""

    @classmethod
    def of(cls, messages: int) -> Size:
        """The benchmark's: for 10 million messages, a million people and 200,000 chats, the largest of a million."""
        return cls(messages, max(2500, messages // 10), max(800, messages // 50), max(1200, messages // 10))

    @property
    def large_chat(self) -> int:
        """Id of the chat with the most messages, the reader and the laggard among its members."""
        return self.chats // 2

    @property
    def largest_chat_by_members(self) -> int:
        """Id of the group with the most members, the reader among them."""
        return self.large_chat + 1

    def chats_of_reader(self) -> list[int]:
        """Ids, all over the table: the two large ones, then the others by id. Their place says what they are like."""
        step = self.chats // self.reader_chats
        large = [self.large_chat, self.largest_chat_by_members]
        others = [chat_id for chat_id in range(step, self.chats + 1, step) if chat_id not in large]
        return (large + others)[: self.reader_chats]


def unread_of_reader(index: int) -> int:
    """How many messages are unread in the reader's n-th chat."""
    return (index + 3) % UNREAD_CYCLE


@dataclass(frozen=True, slots=True)
class Used:
    """The highest id of each kind."""

    user: int
    session: int
    chat: int
    message: int


def phone_of(user_id: int) -> str:
    """The phone that somebody logs in with."""
    return f"+7900{user_id:07d}"


def username_of(user_id: int) -> str:
    """Somebody's username: their name and number."""
    first, last = _name(user_id)
    return f"{first}_{last}_{user_id}".lower()


def _name(user_id: int) -> tuple[str, str]:
    # Squared: some names are far more common than others, as in life.
    drawn = user_id * 2654435761 % 2**32
    first, last = drawn / 2**32, drawn % 2**16 / 2**16
    return FIRST_NAMES[int(first**2 * len(FIRST_NAMES))], LAST_NAMES[int(last**2 * len(LAST_NAMES))]


def display_name_of(user_id: int) -> str:
    """Somebody's name; of every fourth in Cyrillic."""
    first, last = _name(user_id)
    return f"{CYRILLIC[FIRST_NAMES.index(first) % len(CYRILLIC)]} {last}" if user_id % 4 == 0 else f"{first} {last}"


def populate(size: Size, emit: Emit, *, now: datetime, password_hash: str) -> Used:
    """Hand over every row of a messenger of this size, whose newest message is a day old at `now` (naive UTC)."""
    return _Population(size, emit, now, password_hash).run()


class _Population:
    def __init__(self, size: Size, emit: Emit, now: datetime, password_hash: str) -> None:
        self.size = size
        self.emit = emit
        self.now = now
        self.password_hash = password_hash
        self.random = random.Random(size.messages)
        self.account_versions: Counter[int] = Counter()
        self.pinned: Counter[int] = Counter()
        self.reader_chats = {chat_id: index for index, chat_id in enumerate(size.chats_of_reader())}
        self.pairs: dict[tuple[int, int], Row] = {}
        self.hidden: list[Row] = []
        self.settings: list[Row] = []
        self.drafts: list[Row] = []
        self.chat_rows: list[Row] = []
        self.member_rows: list[Row] = []
        self.push_marks: list[Row] = []
        self.messages = 0
        self.texts = self._texts()

    def run(self) -> Used:
        self.emit("workers", [(WORKER, WORKER_NAME, self.now - timedelta(days=800))])
        for chat_id, messages in enumerate(self._message_counts(), start=1):
            _Conversation(self, chat_id, messages).hold()
            if len(self.member_rows) >= CHUNK:
                self._hand_over_chats()
        self._hand_over_chats()
        self._blocks_of_reader()
        self.emit("user_pairs", sorted(self.pairs.values(), key=lambda row: row[:2]))
        for table, rows in (
            ("hidden_messages", self.hidden),
            ("chat_settings", self.settings),
            ("drafts", self.drafts),
        ):
            self.emit(table, sorted(rows, key=lambda row: row[:3]))
        self._user_settings()
        self.emit("push_marks", sorted(self.push_marks, key=lambda row: row[:2]))
        for table, found in (("users", self._users()), *self._sessions()):
            for part in _chunks(found):
                self.emit(table, part)
        return Used(self.size.users, self.size.users, self.size.chats, self.messages)

    def stamp(self, user_id: int) -> int:
        """The next version of what only they see."""
        self.account_versions[user_id] += 1
        return self.account_versions[user_id]

    def _hand_over_chats(self) -> None:
        self.emit("chats", self.chat_rows)
        self.emit("chat_members", self.member_rows)
        self._note_marks()
        self.chat_rows, self.member_rows = [], []

    def _note_marks(self) -> None:
        """What the delivery trace knows of the chats at hand: one worker told of all that was said, and in every tenth
        chat the phones (every second person has one) were pushed to up to their owner's mark."""
        told: list[Row] = []
        large = (self.size.large_chat, self.size.largest_chat_by_members)
        activity = CHAT_COLUMNS.index("last_activity_at")
        for row in self.chat_rows:
            last_seq = row[CHAT_COLUMNS.index("last_seq")]
            told += [(row[0], WORKER_NAME, part, 1, last_seq, row[activity]) for part in ("commit", "sockets")]
        self.emit("fanout_marks", told)
        for row in self.member_rows:
            chat_id, user_id, read_seq = (
                row[MEMBER_COLUMNS.index(name)] for name in ("chat_id", "user_id", "read_seq")
            )
            if int(str(user_id)) % 2 and (chat_id in large or int(str(chat_id)) % 10 == 0):
                self.push_marks.append((user_id, chat_id, read_seq, read_seq, "sent", "", self.now - timedelta(days=1)))

    def _texts(self) -> list[str]:
        lengths = (int(self.random.lognormvariate(1.9, 0.8)) + 1 for _ in range(512))
        return [" ".join(self.random.choices(WORDS, k=min(length, 200))) for length in lengths]

    def _message_counts(self) -> list[int]:
        """Messages of each chat: few have many, most have few; together as many as asked for."""
        size = self.size
        least = [
            size.reader_chat_messages if chat_id in self.reader_chats else 2 for chat_id in range(1, size.chats + 1)
        ]
        least[size.large_chat - 1] = 0
        room = size.messages - size.large_chat_messages - sum(least)
        if room < 0:
            raise ValueError(f"{size.chats:,} chats have no room in {size.messages:,} messages")
        weights = [self.random.lognormvariate(0, 1.5) for _ in least]
        weights[size.large_chat - 1] = 0.0
        total = sum(weights)
        counts = [few + int(room * weight / total) for few, weight in zip(least, weights, strict=True)]
        counts[size.large_chat - 1] = size.large_chat_messages
        counts[size.largest_chat_by_members - 1] += size.messages - sum(counts)
        return counts

    # --- what is no chat ---

    def _blocks_of_reader(self) -> None:
        strangers = (other for other in range(self.size.users, 0, -1) if (READER, other) not in self.pairs)
        for other in itertools.islice(strangers, READER_BLOCKS):
            self.pairs[READER, other] = (
                READER, other, None, 1, 0, self.now - timedelta(days=3), None, self.stamp(READER), 0
            )  # fmt: skip

    def _user_settings(self) -> None:
        rows: list[Row] = [(user_id, 1, 0, self.stamp(user_id)) for user_id in range(1, self.size.users + 1, 100)]
        self.emit("user_settings", rows)

    def _users(self) -> Iterator[Row]:
        begun = self.now - timedelta(days=800)
        step = timedelta(days=60) / self.size.users
        for user_id in range(1, self.size.users + 1):
            name = display_name_of(user_id)
            yield (
                user_id, phone_of(user_id), username_of(user_id), name, name_key(name), "" if user_id % 3 else "Hello!",
                self.password_hash, 1, self.account_versions[user_id], begun + user_id * step,
                self.now - timedelta(hours=user_id % 1000),
            )  # fmt: skip

    def _sessions(self) -> list[tuple[str, Iterator[Row]]]:
        """A session each, as registering leaves it, and a phone for every second."""
        users = range(1, self.size.users + 1)
        begun, end = self.now - timedelta(days=2), self.now + timedelta(days=28)
        return [
            (
                "sessions",
                ((user, user, "Phone", PLATFORMS[user % 3], "192.0.2.1", begun, begun, end) for user in users),
            ),
            ("refresh_tokens", iter(sorted((hashlib.sha256(b"%d" % user).digest(), user, begun) for user in users))),
            (
                "push_devices",
                ((user, user, "fcm", hashlib.sha256(b"%d" % user).hexdigest() * 2, begun) for user in users[::2]),
            ),
        ]


class _Conversation:
    """One chat, from its making to its last mark."""

    def __init__(self, world: _Population, chat_id: int, messages: int) -> None:
        self.world = world
        self.random = world.random
        self.id = chat_id
        self.size = messages
        self.index_of_reader = world.reader_chats.get(chat_id)
        self.is_large = chat_id in (world.size.large_chat, world.size.largest_chat_by_members)
        self.version = self.seq = self.members_version = 0
        self.history_visible = True
        self.members: dict[int, list[Value]] = {}
        self.active: list[int] = []
        self.last_sent: dict[int, int] = {}
        self.rows: list[Row] = []
        draw = self.random.random()
        self.type = "group" if self.is_large or draw < 0.2 else "saved" if draw > 0.95 else "personal"
        last = world.now - timedelta(days=1 + self.random.random() ** 3 * 600)
        if self.index_of_reader is not None:
            self.type = "group" if self.is_large or self.index_of_reader % 3 == 0 else "personal"
            last = world.now - timedelta(days=1, hours=self.index_of_reader * 7 % world.size.reader_chats)
        self.begun = last - timedelta(days=1 + self.random.random() * 100)
        self.step = (last - self.begun) / messages
        self.last_activity = self.begun

    def hold(self) -> None:
        """All of it."""
        blocked = False
        if self.type == "group":
            self._gather()
        else:
            blocked = self._pair_up()
        quiet = UNREAD_CYCLE if self.index_of_reader is not None else 0
        """Of the last messages, which nobody edits, deletes or hides, and the reader does not send."""
        half = (self.size - quiet) // 2
        if self.type == "group" and not self.is_large and half > 5:
            self._talk(half)
            self._come_and_go()
        self._talk(self.size - quiet - self.seq)
        if quiet:
            self._talk(self.size - self.seq, quiet=True)
        self._read(marks_are_public=len(self.active) <= PUBLIC_MARKS_MAX and not blocked)
        self._furnish()
        self._hand_over()

    # --- who is in it ---

    def _gather(self) -> None:
        size = self.world.size
        wanted = min(size.largest_group, int(self.random.paretovariate(1.1) * 3))
        people: set[int] = set()
        if self.id == size.large_chat:
            wanted = size.large_chat_members
            people.add(LAGGARD)
        elif self.id == size.largest_chat_by_members:
            wanted = size.largest_group
        if self.index_of_reader is not None:
            people.add(READER)
        wanted = min(wanted, size.users // 2)
        while len(people) < max(2, wanted):
            people.add(self._somebody())
        owner = max(people)
        self.history_visible = self.is_large or self.random.random() < 0.7
        self._change_members({user_id: "owner" if user_id == owner else "member" for user_id in sorted(people)})
        self._service(owner, "chat_created", sorted(people - {owner}), "Группа" if self.id % 3 == 0 else "Group")
        for user_id in self.active:
            if user_id != owner and self.random.random() < 0.03:
                self.members[user_id][2] = "admin"

    def _somebody(self) -> int:
        # Squared: a few know everybody. Not the measured ones.
        return LAGGARD + 1 + int(self.random.random() ** 2 * (self.world.size.users - LAGGARD))

    def _pair_up(self) -> bool:
        world = self.world
        first = READER if self.index_of_reader is not None else self._somebody()
        second = first if self.type == "saved" else self._somebody()
        key = (min(first, second), max(first, second))
        while key in world.pairs or (key[0] == key[1]) != (self.type == "saved"):
            first = READER if self.index_of_reader is not None else self._somebody()
            second = first if self.type == "saved" else self._somebody()
            key = (min(first, second), max(first, second))
        self._change_members(dict.fromkeys(key, "owner" if self.type == "saved" else "member"))
        blocks = self.type == "personal" and self.index_of_reader is None and self.random.random() < 0.01
        if blocks:
            self.members_version += 1
        world.pairs[key] = (
            *key, self.id, int(blocks), 0, world.now - timedelta(days=2) if blocks else None, None,
            world.stamp(key[0]) if blocks else 0, 0,
        )  # fmt: skip
        return blocks

    def _change_members(self, joining: dict[int, str]) -> None:
        self.version += 1
        self.members_version += 1
        for user_id, role in joining.items():
            self.members[user_id] = [
                self.id, user_id, role, self._moment(), self.seq + 1, self.version,
                1 if self.history_visible else self.seq + 1, None, self.seq, None, self.seq, self.seq, self.seq,
                self.version, self.world.stamp(user_id),
            ]  # fmt: skip
            self.active.append(user_id)

    def _come_and_go(self) -> None:
        """Somebody joins, somebody leaves."""
        owner = next(user_id for user_id, row in self.members.items() if row[2] == "owner")
        new = self._somebody()
        if new not in self.members and self.random.random() < 0.3:
            self._change_members({new: "member"})
            self._service(owner, "members_added", [new])
        leaver = self.active[0] if self.active[0] not in (READER, owner) else self.active[-1]
        if leaver not in (READER, owner) and len(self.active) > 3 and self.random.random() < 0.3:
            self._service(leaver, "member_left", [leaver])
            self.version += 1
            self.members_version += 1
            row = self.members[leaver]
            row[7], row[13], row[14] = self.seq, self.version, self.world.stamp(leaver)
            row[8] = row[10] = row[11] = row[12] = self.seq  # their last message moved their marks
            row[9] = self.last_activity
            self.active.remove(leaver)
            self.last_sent.pop(leaver, None)

    # --- what is said ---

    def _moment(self) -> datetime:
        return self.begun + self.seq * self.step

    def _service(self, user_id: int, action: str, user_ids: list[int], text: str = "") -> None:
        self.version += 1
        self.seq += 1
        self.world.messages += 1
        self.last_activity = self._moment()
        service = json.dumps({"action": action, "user_ids": user_ids, "text": text}, ensure_ascii=False)
        number = self.world.messages
        self.rows.append(
            (
                self.id, self.seq, number, self.version, user_id, number.to_bytes(16, "big"), "service", "", service,
                None, None, None, self.last_activity, None, None, WORKER,
            )
        )  # fmt: skip
        self.last_sent[user_id] = self.seq

    def _talk(self, count: int, *, quiet: bool = False) -> None:
        world, chat_id, draw, bits = self.world, self.id, self.random.random, self.random.getrandbits
        senders = [user_id for user_id in self.active if user_id != LAGGARD and not (quiet and user_id == READER)]
        rows, texts, last_sent, begun, step = self.rows, world.texts, self.last_sent, self.begun, self.step
        seq, version, number, people = self.seq, self.version, world.messages, len(senders)
        a_minute, row = timedelta(minutes=1), self.rows.append
        for _ in range(count):
            seq += 1
            version += 1
            number += 1
            sender = senders[int(draw() ** 2 * people)]
            last_sent[sender] = seq
            moment = begun + seq * step
            fate, content = draw(), texts[bits(9)]
            edited = deleted = answered = answered_seq = None
            if fate < 0.15:
                if fate < 0.1:
                    if seq > 1:
                        answered, answered_seq = number - 1, seq - 1
                elif quiet:
                    pass
                elif fate < 0.13:
                    version += 1
                    edited = moment + a_minute
                elif fate < 0.14:
                    version += 1
                    deleted, content = moment + a_minute, ""
                elif fate < 0.142:
                    owner = self.active[int(draw() * len(self.active))]
                    if owner not in (READER, LAGGARD):
                        world.hidden.append((owner, chat_id, seq, number, world.stamp(owner)))
            row(
                (
                    chat_id, seq, number, version, sender, bits(128).to_bytes(16, "big"), "text", content, None,
                    answered, answered_seq, None, moment, edited, deleted, WORKER,
                )
            )  # fmt: skip
            if len(rows) >= CHUNK:
                world.emit("messages", rows)
                self.rows = rows = []
                row = rows.append
        self.seq, self.version, world.messages = seq, version, number
        self.last_activity = begun + seq * step

    # --- what is left behind ---

    def _read(self, *, marks_are_public: bool) -> None:
        for index, user_id in enumerate(self.active):
            row = self.members[user_id]
            joined = row[8]
            assert isinstance(joined, int)
            sent = self.last_sent.get(user_id, 0)
            row[8] = row[10] = row[11] = row[12] = max(joined, sent)
            if sent:
                row[9] = self.last_activity
            if user_id == LAGGARD:
                continue
            if self.index_of_reader is not None and user_id == READER:
                read = self.seq - unread_of_reader(self.index_of_reader)
            else:
                read = self.seq if index % 10 < 7 else int(self.seq * self.random.random())
            if read <= max(joined, sent):
                continue
            row[8], row[9], row[10] = read, self.last_activity, read
            if marks_are_public:
                self.version += 1
                row[11], row[12], row[13] = read, read, self.version
            elif len(self.active) > PUBLIC_MARKS_MAX:
                row[14] = self.world.stamp(user_id)

    def _furnish(self) -> None:
        """Settings and drafts."""
        world, draw = self.world, self.random.random
        for user_id in self.active:
            if user_id == READER:
                index = self.index_of_reader or 0
                pinned, archived, muted = index < READER_PINNED, index % 10 == 5, index % 5 == 3
                drafted = index % (world.size.reader_chats // READER_DRAFTS) == 0
            else:
                pinned = draw() < 0.01 and world.pinned[user_id] < READER_PINNED
                archived, muted, drafted = draw() < 0.01, draw() < 0.03, draw() < 0.01
            if pinned or archived or muted:
                version = world.stamp(user_id)
                world.pinned[user_id] += pinned
                until = world.now + timedelta(days=300) if muted else None
                world.settings.append((user_id, self.id, until, version if pinned else 0, int(archived), 0, version))
            if drafted:
                text = world.texts[self.id % len(world.texts)]
                world.drafts.append((user_id, self.id, text, None, self.last_activity, world.stamp(user_id)))

    def _hand_over(self) -> None:
        world = self.world
        title = f"{world.texts[self.id % 512][:100]} {self.id}" if self.type == "group" else ""
        world.emit("messages", self.rows)
        world.member_rows.extend(tuple(self.members[user_id]) for user_id in sorted(self.members))
        world.chat_rows.append(
            (
                self.id, self.type, title, "", int(self.history_visible), next(iter(self.members)), self.begun,
                self.seq, self.version, self.members_version, 0, len(self.active), self.last_activity,
                self.last_activity, self.seq,
            )
        )  # fmt: skip


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if len(part) >= CHUNK:
            yield part
            part = []
    yield part
