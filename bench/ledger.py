"""The ledger: what every virtual user sent, had acknowledged and received, checked against the server's history.

Shared by the functional, crash and load tests. A ledger lives in memory; given a path it also appends each record to
a JSONL file, so that separate processes can each keep one, and `Ledger.read` joins them afterwards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple, Self

import orjson


class Sent(NamedTuple):
    """A message that a user is about to send: recorded BEFORE it leaves, or a crash could hide it.

    A retry is the same record again, with the same client id.
    """

    user: int
    chat: int
    client_id: str
    text: str


class Acked(NamedTuple):
    """An answer that promised that a message is stored."""

    user: int
    client_id: str
    message_id: int
    seq: int


class Received(NamedTuple):
    """A message that reached a user.

    `session` numbers the user's connections: within one, order is checked. `live` is false for what came by catching
    up or from the history, where repeats are no fault.
    """

    user: int
    chat: int
    seq: int
    message_id: int
    client_id: str
    text: str
    session: int = 0
    live: bool = True


class Stored(NamedTuple):
    """A message of the server's final history. `service` messages take a seq, but nobody sent them."""

    chat: int
    seq: int
    message_id: int
    sender: int
    client_id: str
    text: str
    service: bool = False


Record = Sent | Acked | Received
KINDS: dict[str, type[Sent] | type[Acked] | type[Received]] = {"sent": Sent, "acked": Acked, "received": Received}


class Kind(StrEnum):
    """What can be wrong."""

    LOST = "acknowledged, but not in the history"
    ACK_DISAGREES = "acknowledged with another id or seq than the history has"
    ACK_CHANGED = "acknowledged twice with different answers"
    ACK_UNKNOWN = "an acknowledgement of something this user never sent"
    STORED_TWICE = "one client id stored more than once"
    ID_TWICE = "one message id stored more than once"
    SEQ_TWICE = "one seq of a chat stored more than once"
    HISTORY_HOLE = "a seq is missing from the history"
    INVENTED = "in the history, but nobody sent it"
    ALTERED = "the text, chat or sender is not what was sent"
    NOT_STORED = "received, but not in the history"
    OTHER_ORDER = "received under another seq or id than the history has"
    REPEATED = "received twice over one connection"
    OUT_OF_ORDER = "received after a later message, over one connection"
    GAP = "received with earlier messages missing, over one connection"
    MISSED = "never received by somebody who was there"
    WRONG_PERSON = "received by somebody who may not see it"


class Fault(NamedTuple):
    """One thing that is wrong, in words."""

    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind.name}: {self.kind.value}: {self.detail}"


@dataclass(slots=True)
class Report:
    """The outcome of a check. Every fault is counted; the first few of each kind are told in full."""

    counts: Counter[Kind] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    sent: int = 0
    acked: int = 0
    received: int = 0
    stored: int = 0

    TOLD_PER_KIND = 5

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.counts

    def add(self, kind: Kind, detail: str) -> None:
        """Report a fault."""
        self.counts[kind] += 1
        if self.counts[kind] <= self.TOLD_PER_KIND:
            self.faults.append(Fault(kind, detail))

    def __str__(self) -> str:
        head = f"{self.sent} sent, {self.acked} acked, {self.received} received, {self.stored} stored"
        if self.ok:
            return f"{head}: no fault"
        totals = ", ".join(f"{kind.name} {count}" for kind, count in sorted(self.counts.items()))
        return "\n  ".join([f"{head}: FAULTS {totals}", *map(str, self.faults)])

    def raise_if_faulty(self) -> None:
        """Fail a test.

        Raises AssertionError with the whole report when anything is wrong.
        """
        if not self.ok:
            raise AssertionError(str(self))


# --- who may see a text -----------------------------------------------------------------------------------------

_AUDIENCE = re.compile(r"\[(only|chat) ([0-9,]+)\]$")


def text_for_users(body: str, users: Iterable[int]) -> str:
    """A text that says itself who may see it."""
    return f"{body} [only {','.join(map(str, sorted(users)))}]"


def text_for_chat(body: str, chat: int) -> str:
    """The same for a chat with too many members to name: `check` needs its `members`."""
    return f"{body} [chat {chat}]"


def may_see(text: str, user: int, members: Mapping[int, Collection[int]]) -> bool:
    """Whether the text itself allows this user to see it. A text without a mark says nothing and passes."""
    found = _AUDIENCE.search(text)
    if found is None:
        return True
    if found[1] == "only":
        return user in {int(part) for part in found[2].split(",") if part}
    return user in members.get(int(found[2]), ())


# --- keeping ----------------------------------------------------------------------------------------------------


class Ledger:
    """Records of any number of users. Not shared between processes: each keeps its own file."""

    def __init__(self, path: Path | None = None) -> None:
        self.sent_rows: list[Sent] = []
        self.acked_rows: list[Acked] = []
        self.received_rows: list[Received] = []
        self.shared_rows: list[tuple[tuple[int, ...], Sequence[Received]]] = []
        self._file: IO[bytes] | None = path.open("ab") if path else None

    def sent(self, user: int, chat: int, client_id: str, text: str) -> None:
        """Record a send, before its first byte leaves."""
        row = Sent(user, chat, client_id, text)
        self.sent_rows.append(row)
        self._write("sent", row)

    def acked(self, user: int, client_id: str, message_id: int, seq: int) -> None:
        """Record an acknowledgement."""
        row = Acked(user, client_id, message_id, seq)
        self.acked_rows.append(row)
        self._write("acked", row)

    def received(
        self,
        user: int,
        chat: int,
        seq: int,
        message_id: int,
        client_id: str,
        text: str,
        *,
        session: int = 0,
        live: bool = True,
    ) -> None:
        """Record a message that arrived."""
        row = Received(user, chat, seq, message_id, client_id, text, session, live)
        self.received_rows.append(row)
        self._write("received", row)

    def received_by_all(self, users: Iterable[int], rows: Sequence[Received]) -> None:
        """Record that each of these users received exactly these messages of one chat, in this order.

        For big groups; the `user` of the rows does not count. Kept in memory only.
        """
        self.shared_rows.append((tuple(users), rows))

    def _write(self, kind: str, row: Record) -> None:
        if self._file is not None:
            self._file.write(orjson.dumps({"kind": kind, **row._asdict()}, option=orjson.OPT_APPEND_NEWLINE))
            # To the kernel, not to the disk: what is killed is the server (or this process), not the machine.
            self._file.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Ledger:
        """Join the files of several processes. A torn last line, of a writer that was killed, is left out.

        Raises ValueError when any other line cannot be read.
        """
        ledger = cls()
        for path in paths:
            lines = path.read_bytes().split(b"\n")
            # What follows the last newline is empty, or torn.
            for number, line in enumerate(lines[:-1], start=1):
                try:
                    fields = orjson.loads(line)
                    row = KINDS[fields.pop("kind")](**fields)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}, line {number}, is no ledger record: {line[:200]!r}") from error
                ledger._keep(row)
        return ledger

    def _keep(self, row: Record) -> None:
        match row:
            case Sent():
                self.sent_rows.append(row)
            case Acked():
                self.acked_rows.append(row)
            case Received():
                self.received_rows.append(row)


# --- checking ---------------------------------------------------------------------------------------------------


def check(
    ledger: Ledger,
    history: Iterable[Stored],
    *,
    members: Mapping[int, Collection[int]] | None = None,
    present: Mapping[int, Collection[int]] | None = None,
    ordered: bool = True,
    gap_free: bool = True,
    dense: bool = True,
    only_ours: bool = True,
) -> Report:
    """Compare what users experienced with the final history of their chats.

    `history` holds every message of the chats that matter, from some seq on; each client id is expected to be unique
    over all chats. `members` says who may see a chat (needed for texts marked with their chat; chats it leaves out
    are not checked for outsiders). `present` says who, per chat, must have received every message of `history` that
    somebody sent. The switches turn off what a server does not promise: `ordered` rising seqs over one connection,
    `gap_free` live messages without holes, `dense` a history without holes, `only_ours` a history without messages
    from outside this ledger.
    """
    report = Report(sent=len(ledger.sent_rows), acked=len(ledger.acked_rows))
    sent = _check_sent(ledger)
    stored = _check_history(report, history, sent, dense=dense, only_ours=only_ours)
    _check_acks(report, ledger, sent, stored)
    audience = members or {}
    have: dict[int, set[int]] = {}
    _check_received(report, ledger, stored, audience, have, ordered=ordered, gap_free=gap_free)
    _check_shared(report, ledger, stored, audience, have, ordered=ordered, gap_free=gap_free)
    for row in stored.by_id.values():
        if not row.service:
            for user in (present or {}).get(row.chat, ()):
                if row.message_id not in have.get(user, ()):
                    report.add(Kind.MISSED, f"user {user} never got {row}")
    return report


@dataclass(slots=True)
class _History:
    by_id: dict[int, Stored] = field(default_factory=dict)
    by_client: dict[str, Stored] = field(default_factory=dict)
    first_seq: dict[int, int] = field(default_factory=dict)


def _check_sent(ledger: Ledger) -> dict[str, Sent]:
    sent: dict[str, Sent] = {}
    for row in ledger.sent_rows:
        # Our own mistake, not the server's: without unique names nothing can be told apart.
        if sent.setdefault(row.client_id, row) != row:
            raise ValueError(f"client id {row.client_id} was used for two different messages: the test is wrong")
    return sent


def _check_history(
    report: Report, history: Iterable[Stored], sent: Mapping[str, Sent], *, dense: bool, only_ours: bool
) -> _History:
    known = _History()
    seqs: dict[int, list[int]] = {}
    for row in history:
        report.stored += 1
        if known.by_id.setdefault(row.message_id, row) is not row:
            report.add(Kind.ID_TWICE, f"{known.by_id[row.message_id]} and {row}")
        seqs.setdefault(row.chat, []).append(row.seq)
        if row.service:
            continue
        if known.by_client.setdefault(row.client_id, row) is not row:
            report.add(Kind.STORED_TWICE, f"{known.by_client[row.client_id]} and {row}")
        origin = sent.get(row.client_id)
        if origin is None:
            if only_ours:
                report.add(Kind.INVENTED, str(row))
        elif (origin.user, origin.chat, origin.text) != (row.sender, row.chat, row.text):
            report.add(Kind.ALTERED, f"sent {origin}, stored {row}")
    for chat, numbers in seqs.items():
        numbers.sort()
        known.first_seq[chat] = numbers[0]
        for before, after in pairwise(numbers):
            if before == after:
                report.add(Kind.SEQ_TWICE, f"seq {after} of chat {chat}")
            elif dense and after != before + 1:
                report.add(Kind.HISTORY_HOLE, f"chat {chat} has seq {before}, then {after}")
    return known


def _check_acks(report: Report, ledger: Ledger, sent: Mapping[str, Sent], stored: _History) -> None:
    answers: dict[str, Acked] = {}
    for row in ledger.acked_rows:
        origin = sent.get(row.client_id)
        if origin is None or origin.user != row.user:
            report.add(Kind.ACK_UNKNOWN, str(row))
            continue
        first = answers.setdefault(row.client_id, row)
        if (first.message_id, first.seq) != (row.message_id, row.seq):
            report.add(Kind.ACK_CHANGED, f"{first}, later {row}")
    for client_id, row in answers.items():
        kept = stored.by_client.get(client_id)
        if kept is None:
            report.add(Kind.LOST, f"{row} of chat {sent[client_id].chat}")
        elif (kept.message_id, kept.seq) != (row.message_id, row.seq):
            report.add(Kind.ACK_DISAGREES, f"acked {row}, stored {kept}")


def _check_one(report: Report, row: Received, stored: _History) -> None:
    kept = stored.by_id.get(row.message_id)
    if kept is None:
        # The history may begin later than the connection did.
        if row.seq >= stored.first_seq.get(row.chat, 0):
            report.add(Kind.NOT_STORED, str(row))
    elif (kept.chat, kept.seq) != (row.chat, row.seq):
        report.add(Kind.OTHER_ORDER, f"received {row}, stored {kept}")
    elif (kept.client_id, kept.text) != (row.client_id, row.text):
        report.add(Kind.ALTERED, f"received {row}, stored {kept}")


def _check_person(report: Report, user: int, row: Received, audience: Mapping[int, Collection[int]]) -> None:
    if (row.chat in audience and user not in audience[row.chat]) or not may_see(row.text, user, audience):
        report.add(Kind.WRONG_PERSON, f"user {user} got {row}")


def _check_received(
    report: Report,
    ledger: Ledger,
    stored: _History,
    audience: Mapping[int, Collection[int]],
    have: dict[int, set[int]],
    *,
    ordered: bool,
    gap_free: bool,
) -> None:
    top: dict[tuple[int, int, int], int] = {}
    live: dict[tuple[int, int], set[int]] = {}
    for row in ledger.received_rows:
        report.received += 1
        have.setdefault(row.user, set()).add(row.message_id)
        _check_one(report, row, stored)
        _check_person(report, row.user, row, audience)
        place = (row.user, row.session, row.chat)
        highest = top.get(place)
        if row.live:
            seen = live.setdefault(place[:2], set())
            if row.message_id in seen:
                report.add(Kind.REPEATED, str(row))
            elif highest is not None:
                _check_step(report, row.user, row, highest, ordered=ordered, gap_free=gap_free)
            seen.add(row.message_id)
        # What a catch-up brought counts as seen: live messages go on after it.
        top[place] = row.seq if highest is None else max(highest, row.seq)


def _check_step(report: Report, user: int, row: Received, highest: int, *, ordered: bool, gap_free: bool) -> None:
    if ordered and row.seq <= highest:
        report.add(Kind.OUT_OF_ORDER, f"user {user} had seq {highest} before {row}")
    elif gap_free and row.seq > highest + 1:
        report.add(Kind.GAP, f"user {user} had seq {highest}, then {row}")


def _check_shared(
    report: Report,
    ledger: Ledger,
    stored: _History,
    audience: Mapping[int, Collection[int]],
    have: dict[int, set[int]],
    *,
    ordered: bool,
    gap_free: bool,
) -> None:
    for users, rows in ledger.shared_rows:
        report.received += len(rows) * len(users)
        ids = {row.message_id for row in rows}
        for user in users:
            have[user] = have[user] | ids if user in have else ids
        if len(ids) != len(rows):
            report.add(Kind.REPEATED, f"{len(rows) - len(ids)} messages of chat {rows[0].chat} to each of {len(users)}")
        highest: int | None = None
        marks: set[str] = set()
        for row in rows:
            _check_one(report, row, stored)
            if highest is not None:
                _check_step(report, users[0] if users else 0, row, highest, ordered=ordered, gap_free=gap_free)
            highest = row.seq if highest is None else max(highest, row.seq)
            # One look per user and audience is enough: all users got all rows.
            mark = f"{row.chat} {row.text.rpartition('[')[2]}"
            if mark not in marks:
                marks.add(mark)
                for user in users:
                    _check_person(report, user, row, audience)
