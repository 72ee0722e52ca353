"""Images, decoded by a process of their own each: a hostile one may kill that, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from app.core.config import Settings
from app.core.errors import BadInput, Unavailable
from app.core.fair_line import FairLine
from app.core.image_worker import REFUSED, STORAGE_FAILED, Decoded, Job
from app.db.repositories.files import THUMBNAIL_EDGE
from app.services.storage import storage_failed

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
NO_WORD_ON_THE_IMAGE = frozenset(
    {1} | {-getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM") if hasattr(signal, name)}
)
"""How a worker ends without having judged: it could not start, or the system or its operator ended it (memory that is
short on the whole machine: SIGKILL). Whatever else ends one, as a bound of its own does, is of the image's making."""
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")


def looks_like_image(head: bytes) -> bool:
    """Whether a file begins as an image does that this server decodes."""
    return head.startswith(SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


class ImageService:
    """Decodes a few images at a time, and one of each account."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._line = FairLine(settings.image_processes)

    async def photo(self, user_id: int, source: Path, target: Path) -> Decoded:
        """Encode an image afresh into `target`, with a thumbnail in `target.320`.

        Raises BadInput (`invalid_image`, `image_too_large`) and Unavailable (`overloaded`, `storage_unavailable`).
        """
        return await self._decode(user_id, self._job(source, target, [THUMBNAIL_EDGE], square=False))

    async def avatar(self, user_id: int, source: Path, target: Path, edges: list[int]) -> Decoded:
        """Make square copies of an image, `target.<edge>` each. Raises as `photo` does."""
        return await self._decode(user_id, self._job(source, target, edges, square=True))

    def _job(self, source: Path, target: Path, edges: list[int], *, square: bool) -> Job:
        return Job(
            source=str(source.absolute()),  # the worker starts in another folder
            target=str(target.absolute()),
            max_pixels=self._settings.max_image_pixels,
            max_frames=self._settings.max_image_frames,
            edges=edges,
            cpu_seconds=self._settings.image_cpu_seconds,
            memory_bytes=self._settings.image_memory_bytes,
            square=square,
        )

    async def _decode(self, user_id: int, job: Job) -> Decoded:
        # Who stands in line already makes nobody wait longer by another image.
        full = self._settings.image_processes + self._settings.image_queue
        if self._line.accounts >= full and user_id not in self._line:
            raise Unavailable("overloaded", "Too many images are waiting; try again.", retry_after=5)
        async with self._line.of(user_id):
            status, output = await self._run(json.dumps(asdict(job)).encode())
        if status == 0:
            return Decoded(**json.loads(output))
        if status == STORAGE_FAILED:
            raise storage_failed("put", Path(job.target).name, OSError(output.decode()))
        if status in NO_WORD_ON_THE_IMAGE:
            raise _failed(f"the worker ended with {status}")
        if status == REFUSED:
            refused = json.loads(output)
            if refused["code"] == "image_too_large":
                raise BadInput("image_too_large", refused["detail"], field="file")
        raise BadInput("invalid_image", "This is not an image that can be read.", field="file")

    async def _run(self, job: bytes) -> tuple[int, bytes]:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "app.core.image_worker",
                cwd=ROOT,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                # No settings, no secrets; Windows starts nothing without its root.
                env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ},
            )
        except OSError as error:  # no more processes, files or memory to be had
            raise _failed(str(error)) from error
        seconds = max(self._settings.image_seconds, 2 * self._settings.image_cpu_seconds)
        try:
            async with asyncio.timeout(seconds):
                output, _ = await process.communicate(job)
        except TimeoutError as error:
            # Of the processor's time it had less than its bound, or that would have ended it.
            raise _failed(f"the worker got too little done in {seconds:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        return process.returncode or 0, output


def _failed(problem: str) -> Unavailable:
    """An image was not decoded, for no fault of its own."""
    log.warning("image_not_decoded", extra={"error": problem})
    return Unavailable("overloaded", "Images cannot be decoded now; try again.", retry_after=5)
