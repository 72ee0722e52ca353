"""`python -m app trace`: everything about a message's way, for the operator to read, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from app.core.clock import SystemClock
from app.core.config import Settings
from app.core.errors import DialectError, StartupError
from app.db.database import Database
from app.services.notification_service import push_is_configured
from app.services.trace_service import FullTrace, RecipientDetail, SessionDetail, TraceService

PARTS = {"commit": "told of its own", "sockets": "let out to sockets"}


async def trace(settings: Settings, message_id: int, *, as_json: bool) -> str:
    """What the database knows of a message's way. Raises StartupError with a sentence for the operator."""
    database = Database(settings)
    try:
        await database.start_reading()
        service = TraceService(
            settings=settings,
            clock=SystemClock(),
            database=database,
            is_online=lambda _user_id: False,  # which only the servers know
            push_is_on=push_is_configured(settings),
        )
        found = await service.full(message_id)
    except DialectError as error:
        raise StartupError(f"{error.detail} (message {message_id})") from error
    finally:
        await database.close()
    return json.dumps(found, indent=2) if as_json else "\n".join(lines_of(found))


def lines_of(found: FullTrace) -> Iterator[str]:
    """A trace for people to read."""
    yield (
        f"Message {found['message_id']}: seq {found['seq']} of chat {found['chat_id']} ({found['chat_type']}),"
        f" {found['message_type']}, from user {found['sender_id']} ({found['sender']})"
    )
    by = f" by {found['committed_by']}" if found["committed_by"] else ""
    yield f"Committed {found['committed_at']}{by}" + (f", deleted {found['deleted_at']}" if found["deleted_at"] else "")
    push = f"is at seq {found['pushed_seq']}" if found["push_is_on"] else "is off"
    yield f"The chat is at seq {found['last_seq']}, push {push}"
    yield ""
    yield "Fan-out" + ("" if found["fanout"] else ": nothing is known (any more)")
    yield from _table(
        ["worker", "did", "messages", "the last at", "this one"],
        [
            [
                run["worker"],
                PARTS.get(run["part"], run["part"]),
                f"{run['first_seq']}..{run['last_seq']}",
                run["at"],
                "yes" if run["covers"] else "no",
            ]
            for run in found["fanout"]
        ],
    )
    yield ""
    yield f"Recipients: {len(found['recipients'])}"
    yield from _table(
        ["user", "username", "state", "delivered", "read", "silent", "block", "last seen"],
        [_recipient(one, found["seq"]) for one in found["recipients"]],
    )
    yield ""
    yield "Their sessions"
    yield from _table(
        ["user", "session", "device", "state", "last used", "token", "push", "sent up to", "last answer"],
        [[str(one["user_id"]), *_session(of)] for one in found["recipients"] for of in one["sessions"]],
    )


def _recipient(one: RecipientDetail, seq: int) -> list[str]:
    state = one["state"] if one["visible"] else f"{one['state']}, cannot see it"
    blocks = [
        text
        for text, stands in (("blocks sender", one["blocks_sender"]), ("blocked", one["blocked_by_sender"]))
        if stands
    ]
    return [
        str(one["user_id"]),
        one["username"],
        state if one["left_seq"] is None else f"{state} after {one['left_seq']}",
        _mark(one["delivered_seq"], seq),
        _mark(one["read_seq"], seq),
        (f"until {one['muted_until']}" if one["muted_until"] else "yes") if one["muted"] else "no",
        ", ".join(blocks) or "no",
        one["last_seen_at"] or "-",
    ]


def _mark(mark: int, seq: int) -> str:
    return f"{'yes' if mark >= seq else 'no'} ({mark})"


def _session(of: SessionDetail) -> list[str]:
    pushed = of["pushed"]
    answer = "-"
    if pushed is not None:
        reason = f" ({pushed['reason']})" if pushed["reason"] else ""
        answer = f"{pushed['answer']}{reason} to {pushed['tried_seq']} at {pushed['at']}"
    return [
        str(of["session_id"]),
        " ".join(part for part in (of["device_name"], of["platform"]) if part) or "-",
        of["state"],
        of["last_seen_at"],
        f"{of['device']} of {of['registered_at']}" if of["device"] else "none",
        of["push"],
        str(pushed["sent_seq"]) if pushed is not None else "-",
        answer,
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        line = "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        # Devices are named by clients: their names must not move the cursor of a terminal.
        yield "".join(character if character.isprintable() else "?" for character in line)
