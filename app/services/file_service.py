"""Files: taking them in as they stream, telling what they are, handing them out to those who may see them.

An upload is written to a file of its own in `incoming`, looked at there, recorded in the database as not ready, handed
to the storage, and then marked ready. A crash at any point leaves nothing that anybody can see; what it leaves on the
disk is collected, as is every file that no message holds after a day. Messages of a chat that everybody has left
hold nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePath
from typing import BinaryIO, Self, cast

from app.core import metrics
from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.errors import (
    BadInput,
    Conflict,
    DialectError,
    Forbidden,
    StartupError,
    TooManyRequests,
    Unavailable,
    file_not_found,
    file_too_large,
)
from app.core.ids import IdAllocator
from app.core.tasks import supervise
from app.db.database import Database
from app.db.repositories import chat_log
from app.db.repositories import files as repository
from app.db.repositories.files import StoredFile
from app.db.schemas import FileKind, UploadedFile
from app.services.file_types import HEAD_BYTES, OCTETS, detect
from app.services.image_service import ImageService, looks_like_image
from app.services.rate_limiter import RateLimiter
from app.services.storage import INCOMING, Storage, clear_incoming, new_key, reason_of, storage_failed
from app.services.unit_of_work import UnitOfWork

log = logging.getLogger(__name__)

FLUSH_BYTES = 512 * 1024
FLUSH_PIECES = 512
"""A body in tiny pieces must not weigh many times its size."""
NAME_BYTES_MAX = 255
COLLECT_SECONDS = 60.0
COLLECT_PAGE = 100
"""Files in one transaction of the collector, whatever there is to collect: others write meanwhile."""
COLLECT_AGAIN = timedelta(minutes=10)
"""When a file is tried again that the storage did not delete: behind all that are due by then."""
STOP_SECONDS = 1.0
ABANDONED_SECONDS = 6 * 3600
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".svg", ".bmp", ".tif", ".tiff", ".ico"})
THUMBNAIL_TYPE = "image/webp"


class Incoming:
    """A file as it comes in: bounded, hashed, never whole in memory. Deleted when the block ends."""

    def __init__(self, folder: Path, max_bytes: int, under_way: Counter[int], user_id: int) -> None:
        self.path = folder / secrets.token_hex(16)
        self.size = 0
        self.head = b""
        self._max_bytes = max_bytes
        self._pieces: list[bytes | memoryview] = []
        self._waiting = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._under_way = under_way
        self._user_id = user_id

    async def __aenter__(self) -> Self:
        # Before anything is waited for: of many that begin at once each must see the others.
        self._under_way[self._user_id] += 1
        try:
            self._file = await asyncio.to_thread(self.path.open, "xb", 0)
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise storage_failed("put", f"{INCOMING}/{self.path.name}", error) from error
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()
        await asyncio.to_thread(self._close)

    def _leave(self) -> None:
        self._under_way[self._user_id] -= 1
        if not self._under_way[self._user_id]:
            del self._under_way[self._user_id]

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        for path in self.path.parent.glob(f"{self.path.name}*"):
            path.unlink(missing_ok=True)

    @property
    def target(self) -> Path:
        """Where an image goes that is encoded afresh."""
        return self.path.with_suffix(".new")

    def copy(self, edge: int) -> Path:
        """And its smaller copy."""
        return Path(f"{self.target}.{edge}")

    async def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes, which may not change afterwards: they are written as they are, and copied nowhere.

        Raises TooLarge (`file_too_large`) and Unavailable (`storage_unavailable`).
        """
        self.size += len(data)
        metrics.upload_bytes.n += len(data)
        if self.size > self._max_bytes:
            raise file_too_large(self._max_bytes)
        if len(self.head) < HEAD_BYTES:
            self.head += bytes(data[: HEAD_BYTES - len(self.head)])
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting >= FLUSH_BYTES or len(self._pieces) >= FLUSH_PIECES:
            await self._flush()

    async def finish(self) -> bytes:
        """Write what is left and return the SHA-256 of it all."""
        await self._flush()
        return self._hash.digest()

    async def _flush(self) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        try:
            await asyncio.to_thread(self._append, pieces)
        except OSError as error:
            raise storage_failed("put", f"{INCOMING}/{self.path.name}", error) from error

    def _append(self, pieces: list[bytes | memoryview]) -> None:
        if self._file is None:
            raise RuntimeError("this file is not open")
        for piece in pieces:
            self._hash.update(piece)
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]


@dataclass(slots=True)
class Content:
    """A file that may be handed out."""

    file: StoredFile
    key: str
    size: int
    media_type: str
    inline: bool
    etag: str


class FileService:
    """What people do with files."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        ids: IdAllocator,
        limiter: RateLimiter,
        storage: Storage,
        images: ImageService,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._ids = ids
        self._limiter = limiter
        self._storage = storage
        self._images = images
        self._under_way: Counter[int] = Counter()
        self._collector: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin collecting. Raises StartupError when the folder cannot be written."""
        clear_incoming(self._settings.upload_path, older_than_seconds=ABANDONED_SECONDS)
        self._collector = supervise("collect-files", self._collect_for_ever, until=self._stopping.is_set)

    async def stop(self) -> None:
        """End collecting; what it is at is finished, if that does not take long."""
        if self._collector is not None:
            self._stopping.set()
            await asyncio.wait([self._collector], timeout=STOP_SECONDS)
            self._collector.cancel()
            await asyncio.gather(self._collector, return_exceptions=True)
            self._collector = None

    # --- coming in ---

    async def receive(self, user_id: int, *, max_bytes: int | None = None) -> Incoming:
        """A place for a file to stream into, of at most `max_bytes`. Raises TooManyRequests."""
        await self._limiter.hit("limit_uploads_per_user", user_id)
        if self._under_way[user_id] >= self._settings.max_uploads_at_once:
            raise TooManyRequests("rate_limited", "Too many uploads at once; wait until one has ended.", retry_after=1)
        limit = max_bytes or self._settings.max_upload_bytes
        return Incoming(self._settings.upload_path / INCOMING, limit, self._under_way, user_id)

    async def add(self, user_id: int, incoming: Incoming, name: str, claimed_type: str) -> UploadedFile:
        """Keep what came in. Images are encoded afresh; what claims to be one and is not is refused.

        Raises BadInput (`file_empty`, `invalid_image`, `image_too_large`), Forbidden (`quota_exceeded`) and
        Unavailable.
        """
        digest = await incoming.finish()
        if not incoming.size:
            raise BadInput("file_empty", "The file is empty.", field="file")
        name = clean_name(name)
        now = self._clock.now().replace(tzinfo=None)
        path, size = incoming.path, incoming.size
        width = height = blurhash = thumbnail_size = None
        if looks_like_image(incoming.head):
            decoded = await self._images.photo(user_id, incoming.path, incoming.target)
            path, media_type = incoming.target, decoded.media_type
            kind: FileKind = "image"
            width, height, blurhash = decoded.width, decoded.height, decoded.blurhash
            size, digest, thumbnail_size = await asyncio.to_thread(
                _measure, path, incoming.copy(repository.THUMBNAIL_EDGE)
            )
        elif claimed_type.lower().startswith("image/") or PurePath(name).suffix.lower() in IMAGE_SUFFIXES:
            raise BadInput(
                "invalid_image", "This is not an image of a known kind (JPEG, PNG, GIF, WebP).", field="file"
            )
        else:
            media_type, kind = await asyncio.to_thread(_detect, path)
        key = new_key()
        parts = {key: path}
        if thumbnail_size is not None:
            parts[_thumbnail_key(key)] = incoming.copy(repository.THUMBNAIL_EDGE)
        file_id = await self.store(
            user_id,
            parts,
            kept_for=timedelta(hours=self._settings.unattached_file_hours),
            kind=kind,
            media_type=media_type,
            name=name,
            size=size,
            sha256=digest,
            width=width,
            height=height,
            blurhash=blurhash,
            storage_key=key,
            thumbnail_size=thumbnail_size,
            created_at=now,
        )
        async with self._database.writing() as session:
            await repository.mark_ready(session, file_id)
        return {
            "file_id": file_id,
            "kind": kind,
            "media_type": media_type,
            "name": name,
            "size": size,
            "width": width,
            "height": height,
            "blurhash": blurhash,
            "thumbnail": thumbnail_size is not None,
            "created_at": timestamp(now),
        }

    async def store(
        self,
        user_id: int,
        parts: Mapping[str, Path],
        *,
        kept_for: timedelta,
        kind: str,
        size: int,
        created_at: datetime,
        **columns: object,
    ) -> int:
        """Record a file, not ready, and hand its parts to the storage under their keys; its id.

        It is collected after `kept_for` unless somebody keeps it by then, and at once when the storage fails. Raises
        Forbidden (`quota_exceeded`) and Unavailable.
        """
        [file_id] = await self._ids.reserve("file")
        async with self._database.writing() as session:
            if limit := self._settings.max_stored_bytes_per_user:
                used = await repository.lock_stored_bytes(session, user_id)
                if used + size > limit:
                    raise Forbidden("quota_exceeded", f"All your files together may have {limit} bytes.")
            await repository.insert_file(
                session,
                id=file_id,
                owner_id=user_id,
                kind=kind,
                size=size,
                created_at=created_at,
                collect_at=created_at + kept_for,
                **columns,
            )
        try:
            for key, path in parts.items():
                await self._storage.put(key, path)
        except Unavailable:
            async with self._database.writing() as session:
                await repository.expire_files(session, [file_id], created_at)
            raise
        metrics.uploads.labels(kind).inc()
        return file_id

    # --- going out ---

    async def find(self, user_id: int, file_id: int, *, thumbnail: bool = False) -> Content:
        """A file for its owner and for those who see a message with it. Raises NotFound (`file_not_found`)."""
        async with self._database.reading() as session:
            file = await repository.find_visible(session, file_id, user_id)
        if file is None or (thumbnail and file.thumbnail_size is None):
            raise file_not_found()
        digest = file.sha256.hex()
        if thumbnail:
            size = cast(int, file.thumbnail_size)
            return Content(file, _thumbnail_key(file.storage_key), size, THUMBNAIL_TYPE, True, f'"{digest}-small"')
        # Only what was encoded here is shown by browsers; the rest is for saving, whatever it claims to be.
        inline = file.kind == "image"
        return Content(file, file.storage_key, file.size, file.media_type if inline else OCTETS, inline, f'"{digest}"')

    def read(self, content: Content, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes start..end-1 of a file."""
        return self._storage.read(content.key, start, end)

    # --- going for good ---

    async def delete(self, uow: UnitOfWork, user_id: int, file_id: int) -> None:
        """Give up a file of one's own that no message holds: it counts no more, and the collector takes its bytes.

        Raises NotFound (`file_not_found`), also for what is not the caller's, and Conflict (`file_in_use`).
        """
        now = self._clock.now().replace(tzinfo=None)
        if not await repository.lock_own(uow.session, file_id, user_id):
            raise file_not_found()
        # Asked under the lock: who attaches a file locks it first.
        if await repository.list_attached(uow.session, [file_id]):
            raise Conflict("file_in_use", "A message holds this file; delete the message instead.")
        await repository.hide_files(uow.session, [file_id], again_at=now)

    # --- collecting ---

    async def _collect_for_ever(self) -> None:
        while not self._stopping.is_set():
            try:
                while await self.collect() and not self._stopping.is_set():
                    pass
                await asyncio.to_thread(
                    clear_incoming, self._settings.upload_path, older_than_seconds=ABANDONED_SECONDS
                )
            except (DialectError, StartupError) as error:  # the database or the disk: neither is for ever
                log.warning("collecting_files_failed", extra={"error": str(error)})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), COLLECT_SECONDS)

    async def collect(self) -> bool:
        """Delete files that no message holds and whose time has come; True when there may be more."""
        now = self._clock.now().replace(tzinfo=None)
        async with self._database.writing() as session:
            due = await repository.lock_collectable(session, now, COLLECT_PAGE)
            # Asked under the lock: who attaches a file locks it first.
            attached = await repository.list_attached(session, [file.id for file in due])
            if attached:
                await repository.keep_files(session, sorted(attached))
            gone = [file for file in due if file.id not in attached]
            if gone:
                await repository.hide_files(session, [file.id for file in gone], again_at=now + COLLECT_AGAIN)
        if gone:
            await self._delete(gone)
        # After what is due: a chat that cannot be emptied holds up no file.
        more = await self._let_go(now)
        return more or len(due) == COLLECT_PAGE

    async def _let_go(self, now: datetime) -> bool:
        """Take a page of files out of the messages of a chat that everybody has left; True when there may be more."""
        async with self._database.writing() as session:
            chat_id = await repository.lock_empty_chat(session)
            if chat_id is None:
                return False
            if held := await repository.list_attachments(session, chat_id, COLLECT_PAGE):
                await chat_log.detach_files(session, held, now)
            else:
                await repository.forget_empty_chat(session, chat_id, now)
        return True

    async def _delete(self, files: Sequence[StoredFile]) -> None:
        """Delete the bytes of hidden files, and forget those whose bytes went; the others come again."""
        deleted: list[int] = []
        kept: list[tuple[int, Unavailable]] = []
        for file in files:
            try:
                for key in repository.stored_keys(file):
                    await self._storage.delete(key)
            except Unavailable as error:
                kept.append((file.id, error))
            else:
                deleted.append(file.id)
        if deleted:
            async with self._database.writing() as session:
                await repository.delete_files(session, deleted)
            log.info("files_collected", extra={"files": len(deleted)})
        if kept:
            file_id, failure = kept[0]
            reason = reason_of(failure.__cause__)
            log.warning("files_not_deleted", extra={"files": len(kept), "file_id": file_id, "error": reason})


def clean_name(name: str) -> str:
    """A name for people: the last part of a path, with no controls in it, and short."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    last = "".join(letter for letter in last if letter.isprintable()).strip(" .")
    raw = last.encode("utf-8", "ignore")
    if len(raw) > NAME_BYTES_MAX:
        suffix = PurePath(last).suffix.encode("utf-8", "ignore")
        suffix = suffix if len(suffix) <= 16 else b""
        raw = raw[: NAME_BYTES_MAX - len(suffix)] + suffix
    return raw.decode("utf-8", "ignore") or "file"


def _thumbnail_key(key: str) -> str:
    return f"{key}.{repository.THUMBNAIL_EDGE}"


@contextlib.contextmanager
def _reading_back() -> Iterator[None]:
    """What has come in is read again. Raises Unavailable (`storage_unavailable`)."""
    try:
        yield
    except OSError as error:
        raise storage_failed("read", INCOMING, error) from error


def _detect(path: Path) -> tuple[str, FileKind]:
    with _reading_back(), path.open("rb", 0) as file:
        return detect(file)


def _measure(path: Path, thumbnail: Path) -> tuple[int, bytes, int]:
    with _reading_back(), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return os.path.getsize(path), digest, os.path.getsize(thumbnail)
