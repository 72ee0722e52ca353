"""The people and chats of a benchmark, made over the server's REST API, and their history read back from it."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import orjson

from bench.ledger import Stored

PAGE = 100
"""Messages in one page of history: as many as the server allows."""
AT_ONCE = 8


class SetupFailed(Exception):
    """The server did not do what the benchmark needs, in a sentence."""


@dataclass(frozen=True, slots=True)
class Person:
    """An account."""

    id: int
    token: str


@dataclass(frozen=True, slots=True)
class Room:
    """A chat; `members` are indexes of people."""

    chat: int
    members: list[int]


@dataclass(frozen=True, slots=True)
class World:
    """All that a scenario needs to know."""

    people: list[Person]
    pairs: list[Room]
    groups: dict[int, Room]

    def save(self, path: Path) -> None:
        """Write it for the processes to come."""
        path.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_NON_STR_KEYS))

    @classmethod
    def load(cls, path: Path) -> World:
        """Read it."""
        data = orjson.loads(path.read_bytes())
        return cls(
            people=[Person(**item) for item in data["people"]],
            pairs=[Room(**item) for item in data["pairs"]],
            groups={int(size): Room(**item) for size, item in data["groups"].items()},
        )


class Api:
    """A REST client of the server under test."""

    def __init__(self, port: int, at_once: int = AT_ONCE) -> None:
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}/api/v1",
            timeout=60,
            trust_env=False,
            limits=httpx.Limits(max_connections=at_once * 2),
        )

    async def call(self, method: str, path: str, token: str | None = None, **options: Any) -> Any:
        """One request, answered by JSON or by nothing.

        Raises SetupFailed when the server refuses.
        """
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = await self.http.request(method, path, headers=headers, **options)
        except httpx.HTTPError as error:
            raise SetupFailed(f"{method} {path}: {type(error).__name__} {error}") from error
        if answer.is_error:
            raise SetupFailed(f"{method} {path} answered {answer.status_code}: {answer.text[:300]}")
        return orjson.loads(answer.content) if answer.content else None

    async def register(self, number: int) -> Person:
        """Make an account."""
        body = {
            "phone": f"+7999{number:07d}",
            "password": secrets.token_urlsafe(12),
            "username": f"bench_{number:06d}",
        }
        made = await self.call("POST", "/auth/register", json=body)
        return Person(made["id"], made["access_token"])

    async def newest_seq(self, room: Room, people: list[Person]) -> int:
        """The seq of a chat's last message; 0 when there is none."""
        page = await self._history(room, people, {"limit": 1})
        return _place(page["items"][-1]) if page["items"] else 0

    async def history(self, room: Room, people: list[Person], after: int) -> list[Stored]:
        """Everything stored in a chat after a seq."""
        stored: list[Stored] = []
        more = True
        while more:
            page = await self._history(room, people, {"after": after, "limit": PAGE})
            stored.extend(
                Stored(
                    room.chat,
                    _place(item),
                    item["id"],
                    item["sender_id"],
                    item["client_id"],
                    item["content"],
                    item["message_type"] == "service",
                )
                for item in page["items"]
            )
            more = page["has_after"] and bool(page["items"])
            after = stored[-1].seq if stored else after
        return stored

    async def _history(self, room: Room, people: list[Person], query: dict[str, int]) -> Any:
        reader = people[room.members[0]]
        return await self.call("GET", f"/messages/history/{room.chat}", reader.token, params=query)


def _place(message: dict[str, Any]) -> int:
    # The reference numbers messages by id alone.
    return int(message.get("seq") or message["id"])


T = TypeVar("T")
R = TypeVar("R")


async def in_turns(work: Callable[[T], Awaitable[R]], items: Iterable[T], at_once: int = AT_ONCE) -> list[R]:
    """Do it for each item, a few at a time; results in the order of the items."""
    gate = asyncio.Semaphore(at_once)

    async def one(item: T) -> R:
        async with gate:
            return await work(item)

    return await asyncio.gather(*map(one, items))


async def build(port: int, people: int, pairs: int, groups: list[int]) -> World:
    """Make everything.

    Raises SetupFailed when the server refuses.
    """
    api = Api(port)
    started = time.monotonic()
    try:
        everybody = await in_turns(api.register, range(1, people + 1))

        async def pair(number: int) -> Room:
            members = [2 * number, 2 * number + 1]
            first, second = (everybody[member] for member in members)
            made = await api.call("POST", "/chats/personal", first.token, json={"user_id": second.id})
            return Room(made["id"], members)

        async def group(size: int) -> Room:
            owner, *others = everybody[:size]
            body = {"title": f"Benchmark of {size}", "member_ids": [person.id for person in others]}
            made = await api.call("POST", "/chats/group", owner.token, json=body)
            return Room(made["id"], list(range(size)))

        world = World(
            everybody,
            await in_turns(pair, range(pairs)),
            dict(zip(groups, await in_turns(group, groups, 1), strict=True)),
        )
    finally:
        await api.http.aclose()
    print(f"made {people} accounts and their chats in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return world
