"""People who chat for as long as it takes: sends, edits, reads, typing, drops and resumes over sockets; uploads,
searches, logins and new chats over REST. They hold little themselves: numbers, and what was acknowledged.

The load stands still in size: groups that are made are left again, sessions end, each device holds the same chats. What
grows in the server then, but for its database, is a leak.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from tests.support.accounts import Account
from tests.support.people import Person, people
from tests.support.servers import Server

PATIENCE = 60.0
WORDS = ("all", "the", "world", "is", "a", "stage", "and", "everybody", "on", "it", "says", "more", "than", "that")

Json = dict[str, Any]


class Load:
    """All people, and what they saw."""

    def __init__(self, server: Server, users: int, seed: int) -> None:
        self.server = server
        self.users = users
        self.rng = random.Random(seed)
        self.people: list[Person] = []
        self.chats: dict[int, list[int]] = {}
        """The chats of all the time, with their members."""
        self.acked: dict[int, dict[int, bytes]] = defaultdict(dict)
        """Chat and seq to the client id that the acknowledgement was for."""
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    def fault(self, text: str) -> None:
        """Note what must not happen."""
        if len(self.faults) < 20:
            self.faults.append(text)

    async def prepare(self) -> None:
        """Register everybody: one group of all, and each with the next in a chat of two."""
        async with self.client() as client:
            self.people = await people(client, self.users)
            first, *rest = self.people
            everybody = [person.id for person in self.people]
            self.chats[await first.group(*rest, title="everybody")] = everybody
            for person, peer in zip(self.people, [*rest, first], strict=True):
                self.chats[await person.personal(peer)] = [person.id, peer.id]

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of the REST interface."""
        # The server ends idle connections after five seconds; whoever sends in that very moment gets a reset.
        limits = httpx.Limits(keepalive_expiry=1.0)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=PATIENCE, limits=limits) as client:
            yield client

    async def run(self, seconds: float) -> None:
        """Let everybody do what people do, then go; fails when any of them breaks."""
        async with asyncio.timeout(seconds + 60), asyncio.TaskGroup() as group:
            end = asyncio.get_running_loop().time() + seconds
            for person in self.people:
                device = Device(self, person.account, random.Random(self.rng.random()))
                group.create_task(device.live(end))
                group.create_task(self._visit(person, random.Random(self.rng.random()), end))

    async def _visit(self, person: Person, rng: random.Random, end: float) -> None:
        """What somebody does over REST."""
        loop = asyncio.get_running_loop()
        async with self.client() as client:
            caller = Person(client, person.account)
            while loop.time() < end:
                what = rng.choice(("upload", "search", "login", "group", "history", "chats", "resume", "send"))
                await getattr(self, f"_{what}")(caller, rng)
                self.done[what] += 1
                await asyncio.sleep(rng.uniform(0.5, 3.0))

    async def _upload(self, caller: Person, rng: random.Random) -> None:
        file = await caller.upload(rng.randbytes(rng.choice((1_000, 100_000, 1_500_000))))
        chat_id = self._a_chat_of(caller.id, rng)
        message = await caller.send_files(chat_id, "file", file)
        self.acked[chat_id][message["seq"]] = uuid.UUID(message["client_id"]).bytes
        got = await caller.fetch(file["file_id"])
        if len(got.content) != file["size"]:
            self.fault(f"of a file of {file['size']} bytes {len(got.content)} came back")

    async def _search(self, caller: Person, rng: random.Random) -> None:
        await caller.do("GET", "/users/search", q=f"person_{rng.randrange(10)}")

    async def _login(self, caller: Person, rng: random.Random) -> None:
        form = {"username": caller.account.phone, "password": caller.account.password}
        answer = await caller.client.post("/api/v1/auth/token", data=form)
        answer.raise_for_status()
        headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        (await caller.client.post("/api/v1/auth/logout", headers=headers)).raise_for_status()

    async def _group(self, caller: Person, rng: random.Random) -> None:
        others = rng.sample([person for person in self.people if person.id != caller.id], 3)
        chat_id = await caller.group(*others, title="for a moment")
        await caller.say(chat_id, "welcome")
        for other in others:
            await caller.remove(chat_id, other)
        await caller.leave(chat_id)

    async def _history(self, caller: Person, rng: random.Random) -> None:
        await caller.history(self._a_chat_of(caller.id, rng), limit=50)

    async def _chats(self, caller: Person, rng: random.Random) -> None:
        await caller.do("GET", "/chats")

    async def _resume(self, caller: Person, rng: random.Random) -> None:
        await caller.resume(account_version=0, chats={})

    async def _send(self, caller: Person, rng: random.Random) -> None:
        chat_id = self._a_chat_of(caller.id, rng)
        client_id = uuid.uuid4()
        message = await caller.say(chat_id, _text(rng), client_id=str(client_id))
        self.acked[chat_id][message["seq"]] = client_id.bytes

    def _a_chat_of(self, user_id: int, rng: random.Random) -> int:
        return rng.choice([chat_id for chat_id, members in self.chats.items() if user_id in members])

    async def check(self) -> None:
        """Compare all that was acknowledged with the histories; what is not there is a fault."""
        async with self.client() as client:
            by_id = {person.id: person for person in self.people}
            for chat_id, members in self.chats.items():
                reader = Person(client, by_id[members[0]].account)
                stored: dict[int, bytes] = {}
                after = 0
                while True:
                    page = await reader.history(chat_id, after=after, limit=100)
                    for message in page["items"]:
                        stored[message["seq"]] = uuid.UUID(message["client_id"]).bytes if message["client_id"] else b""
                    if not page["items"] or max(stored) == after:
                        break
                    after = max(stored)
                if sorted(stored) != list(range(1, len(stored) + 1)):
                    self.fault(f"chat {chat_id}: the history has holes")
                ids = [client_id for client_id in stored.values() if client_id]
                if len(set(ids)) != len(ids):
                    self.fault(f"chat {chat_id}: a message is stored twice")
                for seq, client_id in self.acked[chat_id].items():
                    if stored.get(seq) != client_id:
                        self.fault(f"chat {chat_id}: message {seq} was acknowledged and is not there")


class Device:
    """Somebody's phone: a socket that comes and goes."""

    def __init__(self, load: Load, account: Account, rng: random.Random) -> None:
        self.load = load
        self.account = account
        self.rng = rng
        self.chats = [chat_id for chat_id, members in load.chats.items() if account.id in members]
        self.versions: dict[int, int] = {}
        self.account_version = 0
        self.newest: dict[int, Json] = {}
        self.own: dict[int, int] = {}
        """Chat to a message of one's own."""
        self.waiting: dict[str, asyncio.Future[Json]] = {}
        self.resumed = asyncio.Event()

    async def live(self, end: float) -> None:
        """Open a socket, catch up, chat, vanish; again and again."""
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            headers = {"Authorization": f"Bearer {self.account.access_token}"}
            async with connect(
                self.load.server.ws_url, additional_headers=headers, max_size=None, compression=None
            ) as socket:
                self.resumed.clear()
                reading = asyncio.create_task(self._read(socket))
                try:
                    # A drop in the middle of this is an honest one, too.
                    with contextlib.suppress(WebSocketException):
                        await self._chat(socket, min(end, loop.time() + self.rng.uniform(5, 25)))
                    if self.rng.random() < 0.5:
                        socket.transport.abort()
                finally:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                    self.waiting.clear()
            self.load.done["drop"] += 1

    async def _chat(self, socket: ClientConnection, end: float) -> None:
        frame: Json = {
            "type": "resume",
            "account_version": self.account_version,
            "chats": {str(chat_id): version for chat_id, version in self.versions.items()},
        }
        await self._send(socket, frame)
        async with asyncio.timeout(PATIENCE):
            await self.resumed.wait()
        await self._send(socket, {"type": "subscribe_presence", "user_ids": [one.id for one in self.load.people]})
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            chat_id = self.rng.choice(self.chats)
            what = self.rng.choices(("send_message", "edit", "read_message", "typing", "ping"), (6, 1, 3, 2, 1))[0]
            await getattr(self, f"_{what}")(socket, chat_id)
            self.load.done[what] += 1
            await asyncio.sleep(self.rng.uniform(0, 0.4))

    async def _send_message(self, socket: ClientConnection, chat_id: int) -> None:
        client_id = uuid.uuid4()
        answer = await self._ask(
            socket, {"type": "new_message", "chat_id": chat_id, "content": _text(self.rng), "client_id": str(client_id)}
        )
        if answer["type"] == "ack":
            self.load.acked[chat_id][answer["seq"]] = client_id.bytes
            self.own[chat_id] = answer["message_id"]
            self.load.done["acked"] += 1
        else:
            self.load.fault(f"a send was refused: {answer['code']}")

    async def _edit(self, socket: ClientConnection, chat_id: int) -> None:
        if chat_id in self.own:
            frame = {"type": "edit_message", "chat_id": chat_id, "message_id": self.own[chat_id]}
            await self._ask(socket, {**frame, "content": _text(self.rng)})

    async def _read_message(self, socket: ClientConnection, chat_id: int) -> None:
        if message := self.newest.get(chat_id):
            await self._ask(socket, {"type": "message_read", "chat_id": chat_id, "message_id": message["id"]})

    async def _typing(self, socket: ClientConnection, chat_id: int) -> None:
        await self._send(socket, {"type": "typing", "chat_id": chat_id})

    async def _ping(self, socket: ClientConnection, _chat_id: int) -> None:
        await self._ask(socket, {"type": "ping"})

    async def _ask(self, socket: ClientConnection, frame: Json) -> Json:
        ref = uuid.uuid4().hex
        self.waiting[ref] = asyncio.get_running_loop().create_future()
        await self._send(socket, {**frame, "ref": ref})
        async with asyncio.timeout(PATIENCE):
            return await self.waiting[ref]

    async def _send(self, socket: ClientConnection, frame: Json) -> None:
        await socket.send(orjson.dumps(frame).decode())

    async def _read(self, socket: ClientConnection) -> None:
        async for text in socket:
            self._take(orjson.loads(text))

    def _take(self, event: Json) -> None:
        """Follow the versions; nobody may see a hole."""
        self.load.done["events"] += 1
        chat_id = event.get("chat_id")
        match event["type"]:
            case "ack" | "error" | "pong" if event["ref"] in self.waiting:
                self.waiting.pop(event["ref"]).set_result(event)
            case "error":
                self.load.fault(f"an error for nothing: {event['code']}")
            case "resumed":
                self.account_version = event["account_version"]
                self.resumed.set()
            case "synced" | "reset":
                self.versions[event["chat_id"]] = event["version"]
            case "chat_removed":
                self.versions.pop(event["chat_id"], None)
            case _ if "prev" in event and isinstance(chat_id, int):
                known = self.versions.get(chat_id)
                if known is not None and event["prev"] > known:
                    self.load.fault(f"chat {chat_id}: after version {known} came {event['prev']}")
                if known is not None:
                    self.versions[chat_id] = max(known, event["version"])
                if event["type"] == "new_message":
                    self.newest[chat_id] = event["message"]
                    self.load.done["messages seen"] += 1


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
