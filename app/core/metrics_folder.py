"""The folder by which several workers show their metrics together, for whoever starts workers.

`prometheus_client` decides by the environment, and when it is imported, whether a process writes to files. So the
folder is named to the workers in their environment, and this module imports nothing of it before it must.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FOLDER_NAME: Final = "PROMETHEUS_MULTIPROC_DIR"


class MetricsFolder:
    """The files of a group of workers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def environment(self) -> dict[str, str]:
        """What to add to the environment of each worker, before it starts."""
        return {FOLDER_NAME: str(self.path)}

    def forget(self, pid: int) -> None:
        """A worker has ended: its states (open sockets, queues) no longer count. What it counted stays counted."""
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid, str(self.path))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def metrics_folder() -> Iterator[MetricsFolder]:
    """A fresh folder for the life of a group of workers. Nobody else may read it."""
    path = Path(tempfile.mkdtemp(prefix="dialect-metrics-"))
    try:
        yield MetricsFolder(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
