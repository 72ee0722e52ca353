"""Where the bytes of files are kept: a folder, or a bucket of S3. Keys are the server's own, never a client's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from obstore.exceptions import BaseError as S3Error
from obstore.exceptions import NotFoundError
from obstore.store import S3Store

from app.core import metrics
from app.core.config import Settings
from app.core.errors import StartupError, Unavailable

log = logging.getLogger(__name__)

CHUNK = 256 * 1024
RANGE = 512 * 1024
"""Of a bucket: one request each. A slow client keeps one in memory for as long as it likes."""
PARTS_AT_ONCE = 2
"""Of a large file on its way to a bucket, 5 MiB each: what an upload keeps in memory, however large it is."""
INCOMING = "incoming"
"""Folder of files on their way in; nobody can ask for them, and a start empties it."""

PROBE_BYTES = 4096
PROBE_KEY = "health-check"


class Storage(Protocol):
    """Keeps files by key. What `put` has returned for survives a power cut."""

    async def put(self, key: str, source: Path) -> None:
        """Take a file over; `source` is gone or may be deleted afterwards. Raises Unavailable."""

    def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes start..end-1, in pieces. Raises FileNotFoundError at the first one, and Unavailable."""

    async def load(self, key: str) -> bytes:
        """All of a small file. Raises FileNotFoundError and Unavailable."""

    async def delete(self, key: str) -> None:
        """Forget a file. What is not there is no error. Raises Unavailable, which the caller logs: it may have many."""

    async def works(self) -> bool:
        """Whether files can be stored now."""


def new_key() -> str:
    """A key that nobody guesses, spread over folders."""
    name = secrets.token_hex(16)
    return f"{name[:2]}/{name[2:4]}/{name}"


def reason_of(error: BaseException | None) -> str:
    """An error of a disk or a bucket in one line; the rest of the latter is for the library's authors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), "")


def storage_failed(action: Literal["put", "read", "delete"], key: str, error: Exception) -> Unavailable:
    """Tell the operator what could not be done, and why; what the client is told. To log deletions is the caller's."""
    metrics.storage_failures.labels(action).inc()
    if action != "delete":
        log.warning("storage_failed", extra={"action": action, "key": key, "error": reason_of(error)})
    return Unavailable("storage_unavailable", "Files cannot be stored or read now; try again later.", retry_after=30)


@contextlib.contextmanager
def _reading(key: str) -> Iterator[None]:
    try:
        yield
    except (NotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(key) from error
    except (S3Error, OSError) as error:
        raise storage_failed("read", key, error) from error


class LocalStorage:
    """A folder. A file appears under its key whole, or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def works(self) -> bool:
        return await asyncio.to_thread(self._works)

    def _works(self) -> bool:
        # Where uploads come in, on the same disk: what a kill leaves there is cleared away.
        path = self._root / INCOMING / f"check-{secrets.token_hex(8)}"
        try:
            try:
                path.write_bytes(bytes(PROBE_BYTES))
            finally:
                path.unlink(missing_ok=True)
        except OSError:
            return False
        return True

    async def put(self, key: str, source: Path) -> None:
        try:
            await asyncio.to_thread(self._put, key, source)
        except OSError as error:
            raise storage_failed("put", key, error) from error

    def _put(self, key: str, source: Path) -> None:
        target = self._root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(source, target)
        if sys.platform == "win32":
            return  # a folder cannot be opened there
        for folder in (target.parent, target.parent.parent, self._root):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the name itself must survive, too
            finally:
                os.close(descriptor)

    async def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        with _reading(key):
            file = await asyncio.to_thread((self._root / key).open, "rb", 0)
        try:
            file.seek(start)
            left = end - start
            while left > 0:
                with _reading(key):
                    data = await asyncio.to_thread(file.read, min(CHUNK, left))
                if not data:
                    raise FileNotFoundError(key)
                left -= len(data)
                yield data
        finally:
            file.close()

    async def load(self, key: str) -> bytes:
        with _reading(key):
            return await asyncio.to_thread((self._root / key).read_bytes)

    async def delete(self, key: str) -> None:
        try:
            await asyncio.to_thread((self._root / key).unlink, missing_ok=True)
        except OSError as error:
            raise storage_failed("delete", key, error) from error


class S3Storage:
    """A bucket of an S3-compatible store."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartupError when the settings name no usable bucket. Nothing is asked of it yet."""
        self._took_the_last = True
        # What is empty is left out: then the environment of AWS decides, and at last Amazon's own endpoint.
        given: dict[str, Any] = {
            "endpoint": settings.s3_endpoint_url,
            "access_key_id": settings.s3_access_key_id,
            "secret_access_key": settings.s3_secret_access_key.get_secret_value(),
        }
        try:
            self._store = S3Store(
                settings.s3_bucket,
                region=settings.s3_region,
                virtual_hosted_style_request=False,
                client_options={"allow_http": settings.s3_endpoint_url.startswith("http://"), "timeout": "30s"},
                **{name: value for name, value in given.items() if value},
            )
        except (S3Error, OSError, ValueError) as error:
            raise StartupError(
                f"The bucket {settings.s3_bucket} cannot be used ({reason_of(error)}); check the S3_* settings."
            ) from error

    async def works(self) -> bool:
        # Each request to a bucket costs money: asked only after a failure.
        if not self._took_the_last:
            try:
                await self._store.put_async(PROBE_KEY, b"")
            except (S3Error, OSError):
                return False
            self._took_the_last = True
        return True

    async def put(self, key: str, source: Path) -> None:
        try:
            await self._store.put_async(key, source, max_concurrency=PARTS_AT_ONCE)
        except (S3Error, OSError) as error:
            self._took_the_last = False
            raise storage_failed("put", key, error) from error
        self._took_the_last = True

    async def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        for position in range(start, end, RANGE):
            with _reading(key):
                data = await self._store.get_range_async(key, start=position, end=min(end, position + RANGE))
            yield bytes(data)

    async def load(self, key: str) -> bytes:
        with _reading(key):
            found = await self._store.get_async(key)
            return bytes(await found.bytes_async())

    async def delete(self, key: str) -> None:
        try:
            await self._store.delete_async(key)
        except (NotFoundError, FileNotFoundError):
            return
        except (S3Error, OSError) as error:
            raise storage_failed("delete", key, error) from error


def open_storage(settings: Settings) -> Storage:
    """The storage that the settings name."""
    return S3Storage(settings) if settings.s3_bucket else LocalStorage(settings.upload_path)


async def check_storage(settings: Settings, storage: Storage) -> str:
    """Try where files are kept: what to tell of it. Raises StartupError."""
    clear_incoming(settings.upload_path, older_than_seconds=math.inf)
    if settings.s3_bucket:
        return f"ok (the bucket {settings.s3_bucket} was not asked)"  # each request to it costs money
    if not await storage.works():
        raise StartupError(f"The folder {settings.upload_path} cannot be written.")
    return f"ok (the folder {settings.upload_path})"


def clear_incoming(root: Path, *, older_than_seconds: float) -> None:
    """Make the folder for what comes in, and delete what a crash has left there. Raises StartupError."""
    folder = root / INCOMING
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            # Gone by now: its upload has ended, here or in another process.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - older_than_seconds:
                    path.unlink()
    except OSError as error:
        raise StartupError(f"The folder {root} cannot be written ({error.strerror}).") from error
