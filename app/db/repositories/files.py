"""SQL of uploaded files and of who may fetch them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, cast

from sqlalchemy import Table, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db.models import Attachment, Chat, ChatMember, EmptyChat, File, User

FILE = cast(Table, File.__table__)
ATTACHMENT = cast(Table, Attachment.__table__)
MEMBER = cast(Table, ChatMember.__table__)
USER = cast(Table, User.__table__)
CHAT = cast(Table, Chat.__table__)
EMPTY_CHAT = cast(Table, EmptyChat.__table__)


class StoredFile(NamedTuple):
    """Where a file's bytes are, and what they are."""

    id: int
    owner_id: int
    kind: str
    media_type: str
    name: str
    size: int
    sha256: bytes
    storage_key: str
    thumbnail_size: int | None


AVATAR = "avatar"
"""Kind of the row behind a picture of a person or a group. No message holds such, and nobody fetches it as a file."""
AVATAR_EDGES = (640, 160)
THUMBNAIL_EDGE = 320


def avatar_key(secret: str) -> str:
    """Where a picture is kept; behind it comes `.<edge>`."""
    return f"avatars/{secret[:2]}/{secret}"


def avatar_file_id(name: str) -> int:
    """The row behind a picture, by the name that people and chats have of it: `<file_id>-<secret>`."""
    return int(name.partition("-")[0])


def stored_keys(file: StoredFile) -> list[str]:
    """All that the storage keeps of a file."""
    if file.kind == AVATAR:
        return [f"{file.storage_key}.{edge}" for edge in AVATAR_EDGES]
    small = [] if file.thumbnail_size is None else [f"{file.storage_key}.{THUMBNAIL_EDGE}"]
    return [*small, file.storage_key]


COLUMNS = [FILE.c[name] for name in StoredFile._fields]


async def insert_file(session: AsyncSession, **values: object) -> None:
    """Store a file's row, not ready yet."""
    await session.execute(insert(FILE).values(**values, ready=False))


async def lock_stored_bytes(session: AsyncSession, owner_id: int) -> int:
    """How many bytes a person's files have in all. Locks the person: two uploads cannot share the last room."""
    await session.execute(select(USER.c.id).where(USER.c.id == owner_id).with_for_update())
    total = await session.execute(select(func.coalesce(func.sum(FILE.c.size), 0)).where(FILE.c.owner_id == owner_id))
    return int(total.scalar_one())


async def mark_ready(session: AsyncSession, file_id: int) -> None:
    """The storage has the bytes: the file may be used."""
    await session.execute(update(FILE).where(FILE.c.id == file_id).values(ready=True))


async def find_visible(session: AsyncSession, file_id: int, user_id: int) -> StoredFile | None:
    """A file that is the caller's own, or in a message that they may see; None otherwise."""
    seen = exists().where(
        ATTACHMENT.c.file_id == FILE.c.id,
        MEMBER.c.chat_id == ATTACHMENT.c.chat_id,
        MEMBER.c.user_id == user_id,
        MEMBER.c.left_seq.is_(None),
        MEMBER.c.visible_from_seq <= ATTACHMENT.c.seq,
    )
    result = await session.execute(
        select(*COLUMNS).where(
            and_(
                FILE.c.id == file_id,
                FILE.c.ready.is_(True),
                FILE.c.kind != AVATAR,
                or_(FILE.c.owner_id == user_id, seen),
            )
        )
    )
    row = result.one_or_none()
    return StoredFile(*row) if row else None


async def lock_own(session: AsyncSession, file_id: int, owner_id: int) -> bool:
    """Lock a file that the owner can use; False when there is no such."""
    result = await session.execute(
        select(FILE.c.id)
        .where(FILE.c.id == file_id, FILE.c.owner_id == owner_id, FILE.c.ready.is_(True), FILE.c.kind != AVATAR)
        .with_for_update()
    )
    return result.one_or_none() is not None


async def lock_empty_chat(session: AsyncSession) -> int | None:
    """Lock a chat that everybody has left and whose files have not all been let go of; None when there is none."""
    result = await session.execute(
        select(EMPTY_CHAT.c.chat_id).order_by(EMPTY_CHAT.c.chat_id).limit(1).with_for_update(skip_locked=True)
    )
    return result.scalar_one_or_none()


async def list_attachments(session: AsyncSession, chat_id: int, limit: int) -> list[tuple[int, int, int]]:
    """(file_id, chat_id, seq) of files in the messages of a chat, `limit` at most."""
    columns = (ATTACHMENT.c.file_id, ATTACHMENT.c.chat_id, ATTACHMENT.c.seq)
    result = await session.execute(select(*columns).where(ATTACHMENT.c.chat_id == chat_id).limit(limit))
    return [(row[0], row[1], row[2]) for row in result]


async def forget_empty_chat(session: AsyncSession, chat_id: int, now: datetime) -> None:
    """No message of this chat holds a file any more; its picture may be collected, too."""
    avatar = (await session.execute(select(CHAT.c.avatar).where(CHAT.c.id == chat_id))).scalar_one_or_none()
    if avatar is not None:
        await expire_files(session, [avatar_file_id(avatar)], now)
    await session.execute(delete(EMPTY_CHAT).where(EMPTY_CHAT.c.chat_id == chat_id))


async def lock_collectable(session: AsyncSession, now: datetime, limit: int) -> list[StoredFile]:
    """Lock files whose time has come, the oldest first; those that somebody is attaching are left out."""
    result = await session.execute(
        select(*COLUMNS)
        .where(FILE.c.collect_at <= now)
        .order_by(FILE.c.collect_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [StoredFile(*row) for row in result]


async def list_attached(session: AsyncSession, file_ids: Sequence[int]) -> set[int]:
    """Those of the files that a message holds."""
    result = await session.execute(select(ATTACHMENT.c.file_id).where(ATTACHMENT.c.file_id.in_(file_ids)).distinct())
    return set(result.scalars())


async def keep_files(session: AsyncSession, file_ids: Sequence[int]) -> None:
    """A message holds these: they are not to be collected."""
    await session.execute(update(FILE).where(FILE.c.id.in_(file_ids)).values(collect_at=None))


async def expire_files(session: AsyncSession, file_ids: Sequence[int], at: datetime) -> None:
    """Nothing holds these any more: they may be collected."""
    await session.execute(update(FILE).where(FILE.c.id.in_(file_ids)).values(collect_at=at))


async def hide_files(session: AsyncSession, file_ids: Sequence[int], *, again_at: datetime) -> None:
    """Nobody can use these any more, and they count for nobody; their bytes are deleted at `again_at`, or before."""
    await session.execute(update(FILE).where(FILE.c.id.in_(file_ids)).values(ready=False, size=0, collect_at=again_at))


async def delete_files(session: AsyncSession, file_ids: Sequence[int]) -> None:
    """Forget files whose bytes are gone."""
    await session.execute(delete(FILE).where(FILE.c.id.in_(file_ids)))
