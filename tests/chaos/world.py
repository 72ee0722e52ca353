"""Two people on a server in trouble: everything is asked of it, and every answer is timed."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import websockets

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.support.accounts import Account, register
from tests.support.servers import Server, free_port
from tests.support.socket_client import SocketClient

Event = dict[str, Any]
ANSWER_SECONDS: float = sum(Settings.model_fields[name].default for name in ("db_timeout_seconds", "bulk_wait_seconds"))
"""Within so long everything is answered, whatever the database does: a silence, and a turn before it."""
RECOVERY_SECONDS = 5.0
"""And so long after the database is back, everything works."""
SLACK = 0.5
"""What this process itself may take to notice an answer on a busy machine."""

# Paths that are served without the database.
NO_DATABASE = {"/", "/health/live", "/openapi.json", "/docs", "/redoc"}


@dataclass
class World:
    """Two people, their chat, a group, and a message in each."""

    server: Server
    ann: Account
    bob: Account
    chat_id: int
    group_id: int
    message_id: int
    sockets: list[SocketClient] = field(default_factory=list)


@contextlib.asynccontextmanager
async def populated(server: Server) -> AsyncIterator[World]:
    """People and chats on a server, and a socket for each of them."""
    async with server.client() as client:
        ann, bob = await register(client), await register(client)
        chat = (await client.post("/api/v1/chats/personal", json={"user_id": bob.id}, headers=ann.headers)).json()
        body = {"title": "Both", "member_ids": [bob.id]}
        group = (await client.post("/api/v1/chats/group", json=body, headers=ann.headers)).json()
        path = f"/api/v1/chats/{chat['id']}/messages"
        sent = (await client.post(path, json={"content": "before the trouble"}, headers=ann.headers)).json()
    world = World(server, ann, bob, chat["id"], group["id"], sent["message"]["id"])
    async with contextlib.AsyncExitStack() as stack:
        for account in (ann, bob):
            socket = await SocketClient.open(server.ws_url, account.access_token)
            world.sockets.append(await stack.enter_async_context(socket))
        yield world


async def launched(launch: Launch, settings: Settings) -> Server:
    """A server that is ready."""
    server = launch(settings, free_port())
    await asyncio.to_thread(server.wait_until_ready)
    return server


# --- asking for everything --------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came of a request, and how soon."""

    what: str
    seconds: float
    status: int
    code: str
    retry_after: str = ""

    @property
    def late(self) -> bool:
        return self.seconds > ANSWER_SECONDS + SLACK


async def timed(what: str, asking: Callable[[], Awaitable[tuple[int, str, str]]]) -> Answer:
    begun = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_SECONDS * 3):
            status, code, retry_after = await asking()
    except TimeoutError:
        status, code, retry_after = 0, "never answered", ""
    return Answer(what, time.monotonic() - begun, status, code, retry_after)


def every_request(world: World, openapi: Event) -> list[tuple[str, str, Event | None]]:
    """Each route of the API with a body that would do; a route this does not know yet gets an empty one."""
    values = {
        "chat_id": world.chat_id,
        "message_id": world.message_id,
        "user_id": world.bob.id,
        "session_id": 1,
        "identifier": world.bob.username,
    }
    bodies: dict[str, Event] = {
        "/chats/personal": {"user_id": world.bob.id},
        "/chats/group": {"title": "New"},
        "/chats/{chat_id}/messages": {"content": "in trouble"},
        "/chats/{chat_id}/messages/{message_id}": {"content": "edited"},
        "/chats/{chat_id}/members": {"user_ids": [world.bob.id]},
        "/chats/{chat_id}/members/{user_id}/role": {"role": "admin"},
        "/chats/{chat_id}": {"title": "Renamed"},
        "/users/me": {"bio": "trouble"},
        "/messages/resume": {},
        "/auth/register": {"phone": "+79990000000", "password": "Orchid-lantern-77!", "username": "trouble_77"},
        "/auth/refresh": {"refresh_token": "x" * 43},
        "/push/device": {"kind": "token", "token": "trouble"},
    }
    requests: list[tuple[str, str, Event | None]] = []
    for template, methods in openapi["paths"].items():
        short = template.removeprefix("/api/v1")
        path = re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], 1)), template)
        for method in methods:
            if (
                method not in ("get", "post", "put", "patch", "delete")
                or short.endswith("/ws")
                or short == "/auth/logout"
            ):
                continue
            if template in NO_DATABASE:
                continue
            query = ""
            if short == "/users/search":
                query = "?q=person"
            elif short == "/users/username-available":
                query = f"?username={world.bob.username}"
            requests.append(
                (method, path + query, bodies.get(short, {}) if method in ("post", "put", "patch") else None)
            )
    return requests


async def ask_for_everything(world: World, openapi: Event) -> list[Answer]:
    async with httpx.AsyncClient(
        base_url=world.server.url, timeout=ANSWER_SECONDS * 4, limits=httpx.Limits(max_connections=200)
    ) as client:

        def request(method: str, path: str, body: Event | None) -> Callable[[], Awaitable[tuple[int, str, str]]]:
            async def ask() -> tuple[int, str, str]:
                answer = await client.request(method, path, json=body, headers=world.ann.headers)
                is_problem = answer.headers.get("content-type", "") == "application/problem+json"
                code = answer.json()["code"] if is_problem else ""
                return answer.status_code, code, answer.headers.get("retry-after", "")

            return ask

        def send(number: int) -> Callable[[], Awaitable[tuple[int, str, str]]]:
            async def say() -> tuple[int, str, str]:
                socket = world.sockets[number % 2]
                answer = await socket.say(world.chat_id, f"over the socket {number}")
                if answer["type"] == "ack":
                    return 200, "ack", ""
                assert answer["retryable"], answer
                return 503, answer["code"], str(answer["retry_after"] or "")

            return say

        async def connect() -> tuple[int, str, str]:
            try:
                client = await SocketClient.open(world.server.ws_url, world.bob.access_token)
            except AssertionError as error:
                return (503, "1012", "at once") if "closed with 1012" in str(error) else (500, str(error), "")
            except websockets.InvalidStatus as error:
                return error.response.status_code, "", error.response.headers.get("retry-after", "")
            await client.close()
            return 200, "hello", ""

        asking = [
            timed(f"{method} {path}", request(method, path, body))
            for method, path, body in every_request(world, openapi)
        ]
        asking += [timed(f"send {number}", send(number)) for number in range(20)]
        asking.append(timed("a new socket", connect))
        return list(await asyncio.gather(*asking))


async def say_until_stored(world: World, client_id: str, sender: int = 0) -> Event:
    """Repeat a send until it is acknowledged, as a client does; every answer must come in time."""
    while True:
        begun = time.monotonic()
        answer = await world.sockets[sender].say(world.chat_id, "again and again", client_id=client_id)
        assert time.monotonic() - begun <= ANSWER_SECONDS + SLACK, answer
        if answer["type"] == "ack":
            return answer
        assert answer["code"] in ("database_unavailable", "busy"), answer
        assert answer["retryable"] is True
        assert answer["client_id"] == client_id


async def recovery(world: World) -> float:
    """Seconds until a read and a send work again."""
    begun = time.monotonic()
    async with asyncio.timeout(RECOVERY_SECONDS * 4), world.server.client() as client:
        await say_until_stored(world, str(uuid.uuid4()))
        while (await client.get("/api/v1/chats", headers=world.ann.headers)).status_code != 200:
            pass
        while (await client.get("/health/ready")).status_code != 200:
            pass
    return time.monotonic() - begun
