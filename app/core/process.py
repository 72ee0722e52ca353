"""What the operating system says of this process. Linux first; elsewhere what it can be asked for."""

from __future__ import annotations

import contextlib
import os
import sys


def resident_bytes() -> int:
    """Memory in use now; on systems without /proc the most that ever was."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        if sys.platform == "win32":
            return 0
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def open_fds() -> int:
    """Open file descriptors; 0 where nobody can say."""
    with contextlib.suppress(OSError):
        # Linux since 6.2 knows without a list of them, which takes milliseconds where there are thousands.
        if count := os.stat("/proc/self/fd").st_size:
            return count
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder)) - 1  # but the one that lists them
    return 0


def max_fds() -> int:
    """How many file descriptors it may open; 0 where nobody can say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
