"""The reference: a chat server as FastAPI tutorials write it, with nothing made slow on purpose.

One ORM session per message, a query for the membership, an insert, a commit, then `send_json` to each connection of
the chat. It speaks just enough of Dialect's REST and WebSocket protocol for the same load generator to drive it.
Started by `python -m bench` as `uvicorn bench.naive:app` with NAIVE_DATABASE_URL in the environment.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import jwt
from argon2 import PasswordHasher
from fastapi import Depends, FastAPI, HTTPException, Query, WebSocket, WebSocketDisconnect
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ValidationError
from sqlalchemy import BigInteger, DateTime, Integer, String, Text, UniqueConstraint, event, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SECRET_KEY = os.environ.get("SECRET_KEY", "only-for-benchmarks-on-this-machine!")
DATABASE_URL = os.environ.get("NAIVE_DATABASE_URL", "sqlite+aiosqlite:///naive.db")

# With the default pool of 15 the reference waits for connections rather than for the database: we give it more.
POOL: dict[str, Any] = {"pool_size": 50, "max_overflow": 0} if DATABASE_URL.startswith("mysql") else {}
engine = create_async_engine(DATABASE_URL, **POOL)
new_session = async_sessionmaker(engine, expire_on_commit=False)
hasher = PasswordHasher(
    time_cost=int(os.environ.get("ARGON2_TIME_COST", "2")),
    memory_cost=int(os.environ.get("ARGON2_MEMORY_KIB", "19456")),
    parallelism=1,
)

if engine.dialect.name == "sqlite":

    @event.listens_for(engine.sync_engine, "connect")
    def _durable(connection: Any, _: object) -> None:
        # The same promise as MySQL's default: what is committed survives a power cut.
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA busy_timeout=30000")
        cursor.close()


Key = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """Tables of the reference."""


class User(Base):
    """An account."""

    __tablename__ = "naive_users"
    id: Mapped[int] = mapped_column(Key, primary_key=True)
    phone: Mapped[str] = mapped_column(String(32), unique=True)
    username: Mapped[str] = mapped_column(String(32), unique=True)
    password_hash: Mapped[str] = mapped_column(String(255))


class Chat(Base):
    """A chat of two or more."""

    __tablename__ = "naive_chats"
    id: Mapped[int] = mapped_column(Key, primary_key=True)
    title: Mapped[str] = mapped_column(String(128), default="")


class Member(Base):
    """Who is in which chat."""

    __tablename__ = "naive_members"
    __table_args__ = (UniqueConstraint("chat_id", "user_id"),)
    id: Mapped[int] = mapped_column(Key, primary_key=True)
    chat_id: Mapped[int] = mapped_column(BigInteger)
    user_id: Mapped[int] = mapped_column(BigInteger, index=True)


class Message(Base):
    """A message."""

    __tablename__ = "naive_messages"
    id: Mapped[int] = mapped_column(Key, primary_key=True)
    chat_id: Mapped[int] = mapped_column(BigInteger, index=True)
    sender_id: Mapped[int] = mapped_column(BigInteger)
    client_id: Mapped[str] = mapped_column(String(36))
    content: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(DateTime)


class RegisterIn(BaseModel):
    """A new account."""

    phone: str
    password: str
    username: str


class PersonalChatIn(BaseModel):
    """Whom to talk to."""

    user_id: int


class GroupIn(BaseModel):
    """A new group."""

    title: str
    member_ids: list[int]


class NewMessage(BaseModel):
    """The frame that sends a message."""

    type: str
    chat_id: int
    content: str
    message_type: str = "text"
    client_id: str
    ref: str | None = None


class ConnectionManager:
    """The open sockets of each chat."""

    def __init__(self) -> None:
        self.rooms: dict[int, set[WebSocket]] = defaultdict(set)

    def connect(self, websocket: WebSocket, chats: list[int]) -> None:
        """Put a socket into its chats."""
        for chat in chats:
            self.rooms[chat].add(websocket)

    def disconnect(self, websocket: WebSocket, chats: list[int]) -> None:
        """Take it out of them."""
        for chat in chats:
            self.rooms[chat].discard(websocket)

    async def broadcast(self, chat: int, event: dict[str, Any]) -> None:
        """Send an event to everybody in a chat."""
        for websocket in list(self.rooms[chat]):
            try:
                await websocket.send_json(event)
            except (RuntimeError, WebSocketDisconnect):
                self.rooms[chat].discard(websocket)


manager = ConnectionManager()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the tables."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
bearer = HTTPBearer()


async def get_session() -> AsyncIterator[AsyncSession]:
    """A session for one request."""
    async with new_session() as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]


def make_token(user_id: int) -> str:
    """An access token."""
    expires = datetime.now(UTC) + timedelta(days=1)
    return jwt.encode({"sub": str(user_id), "exp": expires}, SECRET_KEY, algorithm="HS256")


def read_token(token: str) -> int | None:
    """The user that a token names."""
    try:
        return int(jwt.decode(token, SECRET_KEY, algorithms=["HS256"])["sub"])
    except jwt.InvalidTokenError:
        return None


async def get_caller(credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> int:
    """The caller's user id."""
    user_id = read_token(credentials.credentials)
    if user_id is None:
        raise HTTPException(401)
    return user_id


Caller = Annotated[int, Depends(get_caller)]


@app.get("/health/ready")
async def ready() -> dict[str, str]:
    """Whether the server is up."""
    return {"status": "ok"}


@app.post("/api/v1/auth/register", status_code=201)
async def register(body: RegisterIn, session: Session) -> dict[str, Any]:
    """Make an account."""
    user = User(phone=body.phone, username=body.username, password_hash=hasher.hash(body.password))
    session.add(user)
    await session.commit()
    return {"id": user.id, "access_token": make_token(user.id), "token_type": "bearer"}


async def _make_chat(session: AsyncSession, title: str, members: set[int]) -> dict[str, Any]:
    chat = Chat(title=title)
    session.add(chat)
    await session.flush()
    session.add_all(Member(chat_id=chat.id, user_id=user_id) for user_id in members)
    await session.commit()
    return {"id": chat.id}


@app.post("/api/v1/chats/personal", status_code=201)
async def make_personal(body: PersonalChatIn, caller: Caller, session: Session) -> dict[str, Any]:
    """Make a chat of two."""
    return await _make_chat(session, "", {caller, body.user_id})


@app.post("/api/v1/chats/group", status_code=201)
async def make_group(body: GroupIn, caller: Caller, session: Session) -> dict[str, Any]:
    """Make a group."""
    return await _make_chat(session, body.title, {caller, *body.member_ids})


@app.get("/api/v1/messages/history/{chat_id}")
async def history(
    chat_id: int,
    caller: Caller,
    session: Session,
    after: Annotated[int | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> dict[str, Any]:
    """Messages of a chat: the newest, or those that follow one."""
    if await _find_member(session, chat_id, caller) is None:
        raise HTTPException(404)
    query = select(Message).where(Message.chat_id == chat_id).limit(limit)
    if after is None:
        rows = list(await session.scalars(query.order_by(Message.id.desc())))[::-1]
    else:
        rows = list(await session.scalars(query.where(Message.id > after).order_by(Message.id)))
    return {"items": [_view(row) for row in rows], "has_after": after is not None and len(rows) == limit}


async def _find_member(session: AsyncSession, chat_id: int, user_id: int) -> Member | None:
    member: Member | None = await session.scalar(
        select(Member).where(Member.chat_id == chat_id, Member.user_id == user_id)
    )
    return member


def _view(message: Message) -> dict[str, Any]:
    return {
        "id": message.id,
        "chat_id": message.chat_id,
        "sender_id": message.sender_id,
        "client_id": message.client_id,
        "message_type": "text",
        "content": message.content,
        "created_at": message.created_at.isoformat(),
    }


@app.websocket("/api/v1/messages/ws")
async def chat_socket(websocket: WebSocket, token: str) -> None:
    """One client's connection."""
    user_id = read_token(token)
    if user_id is None:
        await websocket.close(4401)
        return
    async with new_session() as session:
        chats = list(await session.scalars(select(Member.chat_id).where(Member.user_id == user_id)))
    await websocket.accept()
    manager.connect(websocket, chats)
    try:
        await websocket.send_json({"type": "hello", "user_id": user_id})
        while True:
            await handle_message(websocket, user_id, await websocket.receive_text())
    except WebSocketDisconnect:
        pass
    finally:
        manager.disconnect(websocket, chats)


async def handle_message(websocket: WebSocket, user_id: int, text: str) -> None:
    """Store one message, acknowledge it and send it to everybody in the chat."""
    try:
        frame = NewMessage.model_validate_json(text)
    except ValidationError:
        await websocket.send_json({"type": "error", "code": "bad_input"})
        return
    async with new_session() as session:
        if await _find_member(session, frame.chat_id, user_id) is None:
            await websocket.send_json({"type": "error", "code": "chat_not_found", "client_id": frame.client_id})
            return
        message = Message(
            chat_id=frame.chat_id,
            sender_id=user_id,
            client_id=frame.client_id,
            content=frame.content,
            created_at=datetime.now(UTC).replace(tzinfo=None),
        )
        session.add(message)
        await session.commit()
    await websocket.send_json({"type": "ack", "client_id": frame.client_id, "message_id": message.id})
    await manager.broadcast(frame.chat_id, {"type": "new_message", "chat_id": frame.chat_id, "message": _view(message)})
