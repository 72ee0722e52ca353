"""A disk of a few megabytes that can be filled: a file system in memory, mounted for one test."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MB = 1024 * 1024


class SmallDisk:
    """A folder that holds so much and no more."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def fill(self, leaving: int = 0) -> None:
        """Take all that is left, `leaving` bytes aside."""
        with self._ballast.open("ab", 0) as file:
            for piece in (MB, 64 * 1024, 4096):
                with contextlib.suppress(OSError):
                    while self.free - piece >= leaving:
                        file.write(b"\0" * piece)

    def empty(self) -> None:
        """Give it back."""
        self._ballast.unlink()

    @property
    def free(self) -> int:
        """Bytes left."""
        state = os.statvfs(self.root)
        return state.f_bavail * state.f_frsize


def missing() -> str:
    """Why there can be none here; empty when there can."""
    return "" if os.geteuid() == 0 else "mounting a small disk needs root: nobody fills one"


@contextlib.contextmanager
def small_disk(root: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mounts one at `root`, and unmounts it in the end."""
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", root], check=True)
    try:
        yield SmallDisk(root)
    finally:
        # Lazily: a server that is still closing its files must not keep it.
        subprocess.run(["umount", "--lazy", root], check=True)
