"""Reads a trace of system calls and says whether each acknowledgement waited for the disk.

kill -9 cannot show a missing fsync: what the server wrote stays in the kernel's memory and is found again. Only the
order of the calls shows what a power cut would have taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

CALLS = "write,writev,pwrite64,pwritev,sendto,sendmsg,fsync,fdatasync"
ACKS = ('\\"type\\":\\"ack\\"', "HTTP/1.1 201")
"""How an acknowledgement looks in a trace, over a socket and over REST."""

_LINE = re.compile(r"^(?P<pid>\d+)\s+(?P<rest>.*)$")
_CALL = re.compile(r"^(?P<name>\w+)\((?P<arguments>.*?)(?:\)\s+=\s+(?P<result>-?\d+).*|\s<unfinished \.\.\.>)$")
_RESUMED = re.compile(r"^<\.\.\. (?P<name>\w+) resumed>(?P<arguments>.*)\)\s+=\s+(?P<result>-?\d+)")


class Step(NamedTuple):
    """What matters in a trace, in order."""

    what: Literal["written", "synced", "acked"]
    line: int


@dataclass
class Verdict:
    """The outcome."""

    acks: int = 0
    good: int = 0
    faults: list[str] = field(default_factory=list)


def read_steps(lines: Iterable[str]) -> Iterator[Step]:
    """The steps of a trace made with `strace -f -y -s ... -e trace=CALLS`.

    A sync counts when it has returned; a write to the log counts when it begins; an acknowledgement counts when its
    first byte may leave, that is when the call begins.
    """
    begun: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        found = _LINE.match(line)
        if found is None:
            continue
        pid, rest = found["pid"], found["rest"]
        if (resumed := _RESUMED.match(rest)) is not None:
            arguments = begun.pop(pid, "") + resumed["arguments"]
            name, result = resumed["name"], resumed["result"]
            if name in ("fsync", "fdatasync") and result == "0" and _is_log(arguments):
                yield Step("synced", number)
            continue
        call = _CALL.match(rest)
        if call is None:
            continue
        name, arguments, result = call["name"], call["arguments"], call["result"]
        if result is None:
            begun[pid] = arguments
        if name in ("fsync", "fdatasync"):
            if result == "0" and _is_log(arguments):
                yield Step("synced", number)
        elif _is_log(arguments):
            yield Step("written", number)
        else:
            for _ in range(sum(arguments.count(ack) for ack in ACKS)):
                yield Step("acked", number)


def _is_log(arguments: str) -> bool:
    """Whether a call is about SQLite's write-ahead log."""
    return "-wal>" in arguments.split(",", 1)[0]


def check_trace(lines: Iterable[str]) -> Verdict:
    """Check acknowledgements of commands that came strictly one after the other.

    Since the acknowledgement before it, each must have seen the log written and, after the last such write, synced.
    """
    verdict = Verdict()
    written = synced = False
    for step in read_steps(lines):
        match step.what:
            case "written":
                written, synced = True, False
            case "synced":
                synced = True
            case "acked":
                verdict.acks += 1
                if written and synced:
                    verdict.good += 1
                else:
                    reason = "the log was not synced" if written else "nothing was written to the log"
                    verdict.faults.append(f"ack {verdict.acks}, line {step.line}: {reason}")
                written = synced = False
    return verdict
