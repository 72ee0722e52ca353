"""Reads a trace of system calls and says whether anything left the server before it was on the disk.

kill -9 cannot show a missing fsync: what the server wrote stays in the kernel's memory and is found again. Only the
order of the calls shows what a power cut would have taken. Each message carries a mark of its own, which is found in
what is written to SQLite's log and in what is written to sockets.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

CALLS = "write,writev,pwrite64,pwritev,sendto,sendmsg,fsync,fdatasync"
LONGEST = 8192
"""Characters of each string that strace must show: a page of the database, or an answer, as a whole."""

_MARK = re.compile(r"mark-[0-9a-f]{32}")
_LINE = re.compile(r"^(?P<pid>\d+)\s+(?P<rest>.*)$")
_CALL = re.compile(r"^(?P<name>\w+)\((?P<arguments>.*?)(?:\)\s+=\s+(?P<result>-?\d+).*|\s<unfinished \.\.\.>)$")
_RESUMED = re.compile(r"^<\.\.\. (?P<name>\w+) resumed>(?P<arguments>.*)\)\s+=\s+(?P<result>-?\d+)")


def new_mark() -> str:
    """A mark that nothing else carries."""
    return f"mark-{uuid.uuid4().hex}"


class Step(NamedTuple):
    """What matters in a trace, in order, and the marks it carries."""

    what: Literal["written", "synced", "told"]
    line: int
    marks: frozenset[str] = frozenset()


@dataclass
class Verdict:
    """The outcome."""

    told: set[str] = field(default_factory=set)
    """Marks that left the server."""
    early: set[str] = field(default_factory=set)
    """Those of them that left before they were on the disk."""
    faults: list[str] = field(default_factory=list)


def read_steps(lines: Iterable[str]) -> Iterator[Step]:
    """The steps of a trace made with `strace -f -y -s LONGEST -e trace=CALLS`.

    A sync counts when it has returned; what is written or told counts when the call begins.
    """
    begun: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        found = _LINE.match(line)
        if found is None:
            continue
        pid, rest = found["pid"], found["rest"]
        if (resumed := _RESUMED.match(rest)) is not None:
            arguments = begun.pop(pid, "") + resumed["arguments"]
            if resumed["name"] in ("fsync", "fdatasync") and resumed["result"] == "0" and _is_log(arguments):
                yield Step("synced", number)
            continue
        call = _CALL.match(rest)
        if call is None:
            continue
        arguments, result = call["arguments"], call["result"]
        if result is None:
            begun[pid] = arguments
        if call["name"] in ("fsync", "fdatasync"):
            if result == "0" and _is_log(arguments):
                yield Step("synced", number)
        elif _is_log(arguments):
            yield Step("written", number, frozenset(_MARK.findall(arguments)))
        elif _is_socket(arguments) and (marks := frozenset(_MARK.findall(arguments))):
            yield Step("told", number, marks)


def _is_log(arguments: str) -> bool:
    """Whether a call is about SQLite's write-ahead log."""
    return "-wal>" in arguments.split(",", 1)[0]


def _is_socket(arguments: str) -> bool:
    """Whether a call is about a connection."""
    return "<socket:" in arguments.split(",", 1)[0]


def check_trace(lines: Iterable[str]) -> Verdict:
    """Whatever is told of a message, its acknowledgement first of all, is told once the message is on the disk."""
    verdict = Verdict()
    written: set[str] = set()
    durable: set[str] = set()
    for step in read_steps(lines):
        match step.what:
            case "written":
                written |= step.marks
            case "synced":
                durable |= written
                written.clear()
            case "told":
                verdict.told |= step.marks
                for mark in step.marks - durable:
                    verdict.early.add(mark)
                    reason = "was written and not synced" if mark in written else "was not even written"
                    verdict.faults.append(f"line {step.line}: {mark} left when it {reason}")
    return verdict
