"""Tables. No behaviour, no relations on hot tables, no foreign keys on them either (a check locks the parent).

`version` columns carry the chat version of a row's last change, `account_version` columns the version of
the owner's private log; catching up reads the rows stamped after a client's version (docs/protocol.md).
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator, TypeEngine

ID = BigInteger().with_variant(Integer(), "sqlite")
"""An id on the wire: below 2**53. INTEGER on SQLite, where only that may be the rowid."""

MICROSECONDS = DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql")
"""UTC, naive in the database, six digits: without a fraction, MySQL would round."""


def ascii_binary(length: int) -> TypeEngine[str]:
    """Text compared byte for byte: ids, phones."""
    return String(length).with_variant(mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql")


class FixedBinary(TypeDecorator[bytes]):
    """Exactly `length` bytes: hashes and UUIDs."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[bytes]:
        if dialect.name == "mysql":
            return dialect.type_descriptor(mysql.BINARY(self.length))
        return dialect.type_descriptor(LargeBinary(self.length))


OPTIONS = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


class Base(DeclarativeBase):
    """Named constraints, so that a violation can be translated by its name and Alembic can drop it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    __table_args__: object = OPTIONS


class ServerState(Base):
    """One row: the `epoch` names this database; restoring a backup gives it a new one."""

    __tablename__ = "server_state"

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    epoch: Mapped[str] = mapped_column(ascii_binary(36))


class IdBlock(Base):
    """The next id of each kind that is not leased to a process yet."""

    __tablename__ = "id_blocks"

    kind: Mapped[str] = mapped_column(ascii_binary(16), primary_key=True)
    next_id: Mapped[int] = mapped_column(ID)


class User(Base):
    """A person. `account_version` numbers the changes of what only they see."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("phone"),
        UniqueConstraint("username"),
        Index("ix_users_display_name_key", "display_name_key", "id"),
        OPTIONS,
    )

    id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    phone: Mapped[str] = mapped_column(ascii_binary(16))
    username: Mapped[str] = mapped_column(
        String(32, collation="NOCASE").with_variant(
            mysql.VARCHAR(32, charset="ascii", collation="ascii_general_ci"), "mysql"
        )
    )
    display_name: Mapped[str] = mapped_column(String(64))
    display_name_key: Mapped[str] = mapped_column(String(192))
    """The casefolded display name, for prefix search; folding may triple the length."""
    avatar: Mapped[str | None] = mapped_column(ascii_binary(64))
    """Name of the picture, as `repositories/files.py` makes it."""
    bio: Mapped[str] = mapped_column(String(512), default="")
    password_hash: Mapped[str] = mapped_column(ascii_binary(255))
    profile_version: Mapped[int] = mapped_column(Integer, default=1)
    account_version: Mapped[int] = mapped_column(ID, default=0)
    created_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    last_seen_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)


class UserPair(Base):
    """All that stands between two people: their personal chat and their blocks. Locked before anything else."""

    __tablename__ = "user_pairs"
    __table_args__ = (Index("ix_user_pairs_high_id", "high_id", "low_id"), OPTIONS)

    low_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    high_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    chat_id: Mapped[int | None] = mapped_column(ID)
    low_blocks_high: Mapped[bool] = mapped_column(Boolean, default=False)
    high_blocks_low: Mapped[bool] = mapped_column(Boolean, default=False)
    low_blocked_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    """When the one with the low id blocked the other."""
    high_blocked_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    low_account_version: Mapped[int] = mapped_column(ID, default=0)
    """Account version of the low one's last change of their block."""
    high_account_version: Mapped[int] = mapped_column(ID, default=0)


class Session(Base):
    """A device that is logged in. Ended sessions stay until they expire, so that reuse can be told apart."""

    __tablename__ = "sessions"
    __table_args__ = (Index("ix_sessions_user_id", "user_id", "id"), OPTIONS)

    id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(ID)
    device_name: Mapped[str] = mapped_column(String(64), default="")
    platform: Mapped[str] = mapped_column(String(16), default="")
    ip: Mapped[str] = mapped_column(ascii_binary(45), default="")
    created_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    last_seen_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    expires_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    ended_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    end_reason: Mapped[str | None] = mapped_column(ascii_binary(16))


class RefreshToken(Base):
    """Every refresh token of a session by its hash; a used one that comes back late betrays a theft."""

    __tablename__ = "refresh_tokens"
    __table_args__ = (Index("ix_refresh_tokens_session_id", "session_id"), OPTIONS)

    token_hash: Mapped[bytes] = mapped_column(FixedBinary(32), primary_key=True)
    session_id: Mapped[int] = mapped_column(ID)
    created_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    used_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)


class PushDevice(Base):
    """Where Firebase reaches a session's device. A token stands once: it belongs to who registered it last."""

    __tablename__ = "push_devices"
    __table_args__ = (UniqueConstraint("token"), Index("ix_push_devices_user_id", "user_id"), OPTIONS)

    session_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(ID)
    kind: Mapped[str] = mapped_column(ascii_binary(8))
    token: Mapped[str] = mapped_column(ascii_binary(1024))
    updated_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    """Moves with every registration; whoever deletes a dead token deletes no fresh one."""


class Worker(Base):
    """A server process, from its start on. No row is ever deleted: messages name their workers by number."""

    __tablename__ = "workers"
    __table_args__ = (OPTIONS,)

    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(ascii_binary(16))
    """As the log and the bus call it."""
    started_at: Mapped[datetime] = mapped_column(MICROSECONDS)


class FanoutMark(Base):
    """Which messages of a chat a worker has told of: the first, and up to the newest.

    Written behind what happened, a second's worth at once: what it says has happened, and a crash loses the end.
    """

    __tablename__ = "fanout_marks"
    __table_args__ = (OPTIONS,)

    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    worker: Mapped[str] = mapped_column(ascii_binary(16), primary_key=True)
    part: Mapped[str] = mapped_column(ascii_binary(8), primary_key=True)
    """`commit`: those among them that it committed (`messages.worker`), it has told the workers of. `sockets`: it let
    all of them out to its own sockets."""
    first_seq: Mapped[int] = mapped_column(ID)
    last_seq: Mapped[int] = mapped_column(ID)
    at: Mapped[datetime] = mapped_column(MICROSECONDS)
    """When it told of the newest."""


class PushMark(Base):
    """How far a session's device was pushed to in a chat, and what Firebase said last. It outlives the token."""

    __tablename__ = "push_marks"
    __table_args__ = (OPTIONS,)

    session_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    sent_seq: Mapped[int] = mapped_column(ID)
    """The newest message that Firebase took a push for; 0 for none."""
    tried_seq: Mapped[int] = mapped_column(ID)
    """The newest message that it was asked to push for, and said `answer`."""
    answer: Mapped[str] = mapped_column(ascii_binary(8))
    reason: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(MICROSECONDS)


class Chat(Base):
    """The counters of a chat's log, and what its members see of it."""

    __tablename__ = "chats"
    __table_args__ = (Index("ix_chats_changed_at", "changed_at"), OPTIONS)

    id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(ascii_binary(16))
    title: Mapped[str] = mapped_column(String(128), default="")
    description: Mapped[str] = mapped_column(String(512), default="")
    avatar: Mapped[str | None] = mapped_column(ascii_binary(64))
    history_visible: Mapped[bool] = mapped_column(Boolean, default=True)
    """Whether those who join later see what was said before."""
    created_by: Mapped[int] = mapped_column(ID)
    created_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    last_seq: Mapped[int] = mapped_column(ID, default=0)
    version: Mapped[int] = mapped_column(ID, default=0)
    members_version: Mapped[int] = mapped_column(ID, default=0)
    info_version: Mapped[int] = mapped_column(ID, default=0)
    """Version of the last change of title, description or settings."""
    member_count: Mapped[int] = mapped_column(Integer, default=0)
    last_activity_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    changed_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    """Database clock; the sweep looks for changes by it."""
    pushed_seq: Mapped[int] = mapped_column(ID, default=0, server_default=text("0"))
    """Up to here every message has been pushed, or needed no push."""


class ChatMember(Base):
    """A membership, past ones included. `read_seq` is the truth; `public_read_seq` what the log has told others."""

    __tablename__ = "chat_members"
    __table_args__ = (
        Index("ix_chat_members_user_id", "user_id", "chat_id"),
        Index("ix_chat_members_account", "user_id", "account_version"),
        Index("ix_chat_members_version", "chat_id", "version"),
        OPTIONS,
    )

    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    role: Mapped[str] = mapped_column(ascii_binary(8))
    joined_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    joined_seq: Mapped[int] = mapped_column(ID)
    joined_version: Mapped[int] = mapped_column(ID)
    """Chat version of the last joining; an older cursor must start afresh."""
    visible_from_seq: Mapped[int] = mapped_column(ID, default=1)
    left_seq: Mapped[int | None] = mapped_column(ID)
    """`last_seq` when the membership ended; NULL while it lasts."""
    read_seq: Mapped[int] = mapped_column(ID, default=0)
    read_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    """When `read_seq` last moved; in a personal chat, while nobody blocked."""
    delivered_seq: Mapped[int] = mapped_column(ID, default=0)
    public_read_seq: Mapped[int] = mapped_column(ID, default=0)
    public_delivered_seq: Mapped[int] = mapped_column(ID, default=0)
    version: Mapped[int] = mapped_column(ID, default=0)
    account_version: Mapped[int] = mapped_column(ID, default=0)


class Message(Base):
    """A message by its place in its chat. Deleting one empties it; its row, ids and `client_id` stay."""

    __tablename__ = "messages"
    __table_args__ = (
        UniqueConstraint("id"),
        UniqueConstraint("chat_id", "sender_id", "client_id"),
        Index("ix_messages_version", "chat_id", "version"),
        OPTIONS,
    )

    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    id: Mapped[int] = mapped_column(ID)
    version: Mapped[int] = mapped_column(ID)
    sender_id: Mapped[int] = mapped_column(ID)
    client_id: Mapped[bytes] = mapped_column(FixedBinary(16))
    message_type: Mapped[str] = mapped_column(ascii_binary(16))
    content: Mapped[str] = mapped_column(Text().with_variant(mysql.MEDIUMTEXT(), "mysql"), default="")
    service: Mapped[str | None] = mapped_column(Text)
    """JSON of a service message: what happened, and to whom."""
    reply_to_id: Mapped[int | None] = mapped_column(ID)
    reply_to_seq: Mapped[int | None] = mapped_column(ID)
    attachments: Mapped[str | None] = mapped_column(Text)
    """JSON of the files it holds, as the wire shows them: what a file is never changes."""
    created_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    edited_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    deleted_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    worker: Mapped[int | None] = mapped_column(Integer)
    """Number of the worker that committed it; NULL of one that had none."""


class HiddenMessage(Base):
    """A message deleted for one member only."""

    __tablename__ = "hidden_messages"
    __table_args__ = (Index("ix_hidden_messages_account", "user_id", "account_version"), OPTIONS)

    user_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    message_id: Mapped[int] = mapped_column(ID)
    account_version: Mapped[int] = mapped_column(ID)


class File(Base):
    """An uploaded file. Its bytes are in the storage, under `storage_key`."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_owner", "owner_id", "size"),
        Index("ix_files_collect_at", "collect_at"),
        OPTIONS,
    )

    id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    owner_id: Mapped[int] = mapped_column(ID)
    kind: Mapped[str] = mapped_column(ascii_binary(8))
    media_type: Mapped[str] = mapped_column(ascii_binary(127))
    name: Mapped[str] = mapped_column(String(255))
    """As its owner calls it. Never a path of ours."""
    size: Mapped[int] = mapped_column(ID)
    sha256: Mapped[bytes] = mapped_column(FixedBinary(32))
    width: Mapped[int | None] = mapped_column(Integer)
    height: Mapped[int | None] = mapped_column(Integer)
    blurhash: Mapped[str | None] = mapped_column(ascii_binary(64))
    storage_key: Mapped[str] = mapped_column(ascii_binary(64))
    thumbnail_size: Mapped[int | None] = mapped_column(Integer)
    """Of `storage_key` + `.320`, if there is one."""
    created_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    ready: Mapped[bool] = mapped_column(Boolean, default=False)
    """False until the storage has the bytes."""
    collect_at: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    """When to delete it unless a message holds it by then; NULL while one does."""


class Attachment(Base):
    """A file in a message: who may see the message may fetch the file."""

    __tablename__ = "attachments"
    __table_args__ = (Index("ix_attachments_chat_id", "chat_id"), OPTIONS)

    file_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)


class EmptyChat(Base):
    """A chat that everybody has left, until its messages have let go of their files. Nobody can come back to it."""

    __tablename__ = "empty_chats"
    __table_args__ = (OPTIONS,)

    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)


class ChatSettings(Base):
    """What one member has set for a chat, for themselves alone. No row stands for nothing set; leaving deletes it."""

    __tablename__ = "chat_settings"
    __table_args__ = (Index("ix_chat_settings_account", "user_id", "account_version"), OPTIONS)

    user_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    muted_until: Mapped[datetime | None] = mapped_column(MICROSECONDS)
    pin_order: Mapped[int] = mapped_column(ID, default=0)
    """The account version at which it was pinned; 0 when it is not."""
    archived: Mapped[bool] = mapped_column(Boolean, default=False)
    marked_unread: Mapped[bool] = mapped_column(Boolean, default=False)
    account_version: Mapped[int] = mapped_column(ID)


class Draft(Base):
    """What somebody has begun to write in a chat; empty once it was deleted. Leaving the chat deletes the row."""

    __tablename__ = "drafts"
    __table_args__ = (Index("ix_drafts_account", "user_id", "account_version"), OPTIONS)

    user_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    chat_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    content: Mapped[str] = mapped_column(Text().with_variant(mysql.MEDIUMTEXT(), "mysql"))
    reply_to_id: Mapped[int | None] = mapped_column(ID)
    updated_at: Mapped[datetime] = mapped_column(MICROSECONDS)
    account_version: Mapped[int] = mapped_column(ID)


class UserSettings(Base):
    """What somebody has set for all their chats. No row stands for nothing set."""

    __tablename__ = "user_settings"

    user_id: Mapped[int] = mapped_column(ID, primary_key=True, autoincrement=False)
    notify_personal: Mapped[bool] = mapped_column(Boolean, default=True)
    notify_groups: Mapped[bool] = mapped_column(Boolean, default=True)
    account_version: Mapped[int] = mapped_column(ID)
