"""Pictures of people and groups: decoded, cut square, kept in two sizes under a name that nobody guesses."""

from __future__ import annotations

import secrets
from datetime import timedelta

from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import file_not_found
from app.db.repositories import files as repository
from app.services.file_service import FileService, Incoming
from app.services.image_service import ImageService
from app.services.storage import Storage
from app.services.unit_of_work import UnitOfWork

ABANDONED = timedelta(hours=1)


class AvatarService:
    """Keeps pictures. The row in `files` is what gets them collected once nobody shows them any more."""

    def __init__(
        self, *, settings: Settings, clock: Clock, files: FileService, storage: Storage, images: ImageService
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._files = files
        self._storage = storage
        self._images = images

    async def receive(self, user_id: int) -> Incoming:
        """A place for a picture to stream into. Raises TooManyRequests."""
        return await self._files.receive(user_id, max_bytes=self._settings.max_avatar_bytes)

    async def add(self, user_id: int, incoming: Incoming) -> str:
        """Keep a picture for a while; its name. Raises BadInput (`invalid_image`, `image_too_large`), Unavailable."""
        digest = await incoming.finish()
        await self._images.avatar(user_id, incoming.path, incoming.target, list(repository.AVATAR_EDGES))
        secret = secrets.token_hex(16)
        key = repository.avatar_key(secret)
        file_id = await self._files.store(
            user_id,
            {f"{key}.{edge}": incoming.copy(edge) for edge in repository.AVATAR_EDGES},
            kept_for=ABANDONED,
            kind=repository.AVATAR,
            media_type="image/webp",
            name="avatar",
            size=0,  # of the account's quota
            sha256=digest,
            storage_key=key,
            created_at=self._clock.now().replace(tzinfo=None),
        )
        return f"{file_id}-{secret}"

    async def replace(self, uow: UnitOfWork, before: str | None, after: str | None) -> None:
        """In the transaction that shows `after` instead of `before`: keep the one, let go of the other."""
        if after is not None:
            await repository.keep_files(uow.session, [repository.avatar_file_id(after)])
        if before is not None:
            now = self._clock.now().replace(tzinfo=None)
            await repository.expire_files(uow.session, [repository.avatar_file_id(before)], now)

    async def load(self, name: str, *, small: bool) -> bytes:
        """A picture in WebP, 640 or 160 pixels square. Raises NotFound (`file_not_found`)."""
        edge = min(repository.AVATAR_EDGES) if small else max(repository.AVATAR_EDGES)
        key = f"{repository.avatar_key(name.partition('-')[2])}.{edge}"
        try:
            return await self._storage.load(key)
        except FileNotFoundError:
            raise file_not_found() from None
