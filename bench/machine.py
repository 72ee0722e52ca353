"""Reading and steering processes of this machine: cores, CPU time, memory. Linux; elsewhere it does less."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cores() -> tuple[int, int] | None:
    """The core for the server and the one for everything else, or None when this machine has only one."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else None


def pin(pid: int, wanted: set[int]) -> bool:
    """Keep a process with all its threads on these cores; False when it may not be."""
    done = False
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), wanted)
            done = True
    return done


def cpu_seconds(pid: int | None) -> float:
    """CPU time used by a process and its children so far; 0 when it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS + sum(map(cpu_seconds, _children(pid)))


def rss_kib(pid: int) -> int:
    """Resident memory of a process and its children: pages that they share count for each.

    Raises OSError when it is gone.
    """
    total = _status_kib(pid, "VmRSS")
    for child in _children(pid):
        with contextlib.suppress(OSError):  # one that has just ended
            total += rss_kib(child)
    return total


def _children(pid: int | None) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children


def peak_rss_kib(pid: int) -> int:
    """The most memory that was resident since the process began, or since its peak was reset.

    Raises OSError when it is gone.
    """
    return _status_kib(pid, "VmHWM")


def _status_kib(pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def find_listener(port: int, name: str) -> int | None:
    """The process called `name` that listens on a TCP port of this machine, if we may look."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == name:
                for descriptor in (process / "fd").iterdir():
                    if os.readlink(descriptor) in inodes:
                        return int(process.name)
    return None


def allow_many_files(wanted: int) -> int:
    """Raise our limit of open files as far as allowed towards `wanted`, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted and hard > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def describe() -> str:
    """The machine in one line."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}, Python {platform.python_version()}"
