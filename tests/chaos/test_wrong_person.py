"""Nothing reaches a person who may not see it, while people join, leave, are removed, come again and block each other.

Every text (messages, edits, titles) says who may see it, and every witness reads every string that reaches them. What
texts cannot tell, a witness who was thrown out of a group hearing on, is told afterwards by the log itself: who was in
the group from which version of it to which.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from bench.ledger import may_see, text_for_users
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.support.accounts import Account, register
from tests.support.servers import Server

Event = dict[str, Any]
PEOPLE = 9
GROUPS = 4
PAIRS = 4
OPERATIONS = scaled("WRONG_PERSON_OPERATIONS", short=2000, long=20_000)
PATIENCE = 20.0


# --- the checker ------------------------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    """Every string anywhere in an answer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def messages(value: Any) -> Iterator[Event]:
    """Every message anywhere in an answer."""
    if isinstance(value, dict):
        if "seq" in value and "sender_id" in value:
            yield value
        for part in value.values():
            yield from messages(part)
    elif isinstance(value, list):
        for part in value:
            yield from messages(part)


@dataclass
class Span:
    """One stay of somebody in a chat, by the chat's versions and seqs; an open end is None."""

    first_version: int
    first_seq: int
    last_version: int | None = None
    last_seq: int | None = None

    def has_version(self, version: int) -> bool:
        """Whether a change happened during the stay."""
        return self.first_version <= version <= (self.last_version or version)

    def has_seq(self, seq: int) -> bool:
        """Whether a message was theirs to see."""
        return self.first_seq <= seq <= (self.last_seq or seq)


def spans_of(log: list[Event], *, history_visible: bool) -> dict[int, list[Span]]:
    """Who was in a group when, by the service messages of its log.

    Who joins is let in by the change just before the service message, and who leaves is let out by the one behind it.
    """
    spans: dict[int, list[Span]] = {}
    for message in log:
        service = message["service"]
        if service is None:
            continue
        version, seq = message["version"], message["seq"]
        if service["action"] in ("chat_created", "members_added"):
            people = [*service["user_ids"], *([message["sender_id"]] if service["action"] == "chat_created" else [])]
            for user in people:
                spans.setdefault(user, []).append(Span(version - 1, 1 if history_visible else seq))
        elif service["action"] in ("member_removed", "member_left"):
            for user in service["user_ids"]:
                spans[user][-1].last_version = version + 1
                spans[user][-1].last_seq = seq
    return spans


@dataclass
class Witness:
    """Everything that reached one person, and what of it should not have."""

    user: int
    violations: list[str] = field(default_factory=list)
    looked_at: int = 0
    heard: list[tuple[int, int]] = field(default_factory=list)
    """(chat, version) of each change told live or by catching up."""
    saw: set[tuple[int, int]] = field(default_factory=set)
    """(chat, seq) of each message that came, by whatever way."""
    silent: Counter[int] = field(default_factory=Counter)
    """Chats in which nobody may be heard typing at the moment."""

    def look(self, how: str, value: Any) -> None:
        """Check an answer or a frame."""
        self.looked_at += 1
        for text in strings(value):
            if not may_see(text, self.user, {}):
                self._violation(how, text)
        for message in messages(value):
            self.saw.add((message["chat_id"], message["seq"]))
        if isinstance(value, dict):
            if "prev" in value:
                self.heard.append((value["chat_id"], value["version"]))
            elif value.get("type") == "typing" and self.silent[value["chat_id"]]:
                self._violation(how, str(value))

    def compare(self, chat: int, spans: list[Span]) -> None:
        """Check what was heard and seen of a group against when this person was in it."""
        for place, version in self.heard:
            if place == chat and not any(span.has_version(version) for span in spans):
                self._violation("by the log", f"version {version} of chat {chat}; there {spans}")
        for place, seq in self.saw:
            if place == chat and not any(span.has_seq(seq) for span in spans):
                self._violation("by the log", f"seq {seq} of chat {chat}; there {spans}")

    def _violation(self, how: str, what: str) -> None:
        self.violations.append(f"user {self.user}, {how}: {what[:300]}")


# --- the checker's own tests ------------------------------------------------------------------------------------


def _message(seq: int, content: str = "", service: Event | None = None, version: int | None = None) -> Event:
    return {
        "chat_id": 7,
        "seq": seq,
        "version": version or seq,
        "sender_id": 1,
        "content": content,
        "service": service,
    }


LOG = [
    _message(1, service={"action": "chat_created", "user_ids": [2], "text": ""}, version=2),
    _message(2, "hello [only 1,2]", version=3),
    _message(3, service={"action": "member_removed", "user_ids": [2], "text": ""}, version=4),
    _message(4, "alone [only 1]", version=6),
    _message(5, service={"action": "members_added", "user_ids": [2], "text": ""}, version=8),
]


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ({"type": "new_message", "message": _message(2, "hello [only 1,2]")}, True),
        ({"type": "new_message", "message": _message(2, "hello [only 1,3]")}, False),
        ([{"items": [{"last_message": _message(2, "alone [only 1]")}]}], False),
        ({"type": "chat_updated", "info": {"title": "a title [only 1,22]"}}, False),
        ({"type": "typing", "chat_id": 8, "user_id": 1, "active": True}, True),
        ({"type": "typing", "chat_id": 7, "user_id": 1, "active": True}, False),
    ],
)
def test_a_text_that_reaches_the_wrong_person_is_found_wherever_it_stands(value: Any, allowed: bool) -> None:
    witness = Witness(2)
    witness.silent[7] = 1
    witness.look("socket", value)
    assert (witness.violations == []) is allowed


@pytest.mark.parametrize(
    ("heard", "saw", "history_visible", "allowed"),
    [
        ([1, 3, 5, 7, 8, 20], [1, 2, 3, 5, 9], False, True),
        ([6], [], False, False),  # while they were out
        ([], [4], False, False),  # what was said meanwhile, in a group that hides it from who comes later
        ([], [4], True, True),
    ],
)
def test_the_log_tells_who_heard_on_after_a_removal(
    heard: list[int], saw: list[int], history_visible: bool, allowed: bool
) -> None:
    witness = Witness(2, heard=[(7, version) for version in heard], saw={(7, seq) for seq in saw})
    witness.compare(7, spans_of(LOG, history_visible=history_visible)[2])
    assert (witness.violations == []) is allowed


# --- people -----------------------------------------------------------------------------------------------------


class Person:
    """An account with a socket that drops now and then, and a witness of all it brings."""

    def __init__(self, server: Server, client: httpx.AsyncClient, account: Account) -> None:
        self.id = account.id
        self.account = account
        self.witness = Witness(account.id)
        self.versions: dict[str, int] = {}
        """What a client would resume from; never forgotten, so that it also asks for chats that are lost to it."""
        self._server = server
        self._client = client
        self._connection: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._answers: dict[str, asyncio.Future[Event]] = {}
        self._moving = asyncio.Lock()

    async def come(self, *, resume: bool = True) -> None:
        """Connect, and catch up from whatever was known last."""
        headers = self.account.headers
        self._connection = await connect(
            self._server.ws_url, additional_headers=headers, max_size=None, compression=None
        )
        self._reader = asyncio.create_task(self._read(self._connection))
        if resume:
            await self._ask(type="resume", chats=self.versions)

    async def go(self) -> None:
        """Drop the connection without a word."""
        if self._connection is not None and self._reader is not None:
            self._connection.transport.abort()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def come_again(self) -> None:
        """Drop and connect again."""
        async with self._moving:
            await self.go()
            await self.come()

    async def tell(self, **frame: Any) -> Event:
        """Send a command; its `ack` or `error`."""
        async with self._moving:
            return await self._ask(**frame)

    async def type(self, chat_id: int) -> None:
        """Be seen typing, and return once the server has dealt with it."""
        async with self._moving:
            assert self._connection is not None
            await self._connection.send(orjson.dumps({"type": "typing", "chat_id": chat_id}).decode())
        for _ in range(2):
            await self.barrier()

    async def barrier(self) -> None:
        """Return once what the server sent before has been looked at."""
        await self.tell(type="ping")

    async def get(self, path: str) -> httpx.Response:
        """Ask over REST."""
        answer = await self._client.get("/api/v1" + path, headers=self.account.headers)
        self.witness.look(path, answer.json())
        return answer

    async def post(self, path: str, body: Event, method: str = "POST") -> httpx.Response:
        """Do something over REST."""
        answer = await self._client.request(method, "/api/v1" + path, json=body, headers=self.account.headers)
        if answer.content:
            self.witness.look(path, answer.json())
        assert answer.status_code < 500, answer.text
        return answer

    async def _ask(self, **frame: Any) -> Event:
        assert self._connection is not None
        ref = uuid.uuid4().hex
        self._answers[ref] = asyncio.get_running_loop().create_future()
        await self._connection.send(orjson.dumps({**frame, "ref": ref}).decode())
        async with asyncio.timeout(PATIENCE):
            return await self._answers[ref]

    async def _read(self, connection: ClientConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for frame in connection:
                event = orjson.loads(frame)
                self.witness.look("socket", event)
                if "chat_id" in event and event.get("version"):
                    self.versions[str(event["chat_id"])] = event["version"]
                if event.get("ref") is not None and (answer := self._answers.pop(event["ref"], None)) is not None:
                    answer.set_result(event)


Operation = Callable[[], Awaitable[None]]


class Scene:
    """One chat, its people, and the operations on it, one after the other."""

    def __init__(self, rng: random.Random, counts: Counter[str]) -> None:
        self.rng = rng
        self.counts = counts
        self.chat_id = 0

    def operations(self) -> dict[str, tuple[int, Operation]]:
        """Name, weight and what to do."""
        raise NotImplementedError

    async def play(self, count: int) -> None:
        """Do random things."""
        operations = self.operations()
        names = list(operations)
        weights = [operations[name][0] for name in names]
        for _ in range(count):
            [name] = self.rng.choices(names, weights)
            self.counts[name] += 1
            await operations[name][1]()

    async def send(self, person: Person, text: str) -> Event:
        """Send a message over either door."""
        client_id = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        if self.rng.random() < 0.7:
            return await person.tell(type="new_message", chat_id=self.chat_id, content=text, client_id=client_id)
        path = f"/chats/{self.chat_id}/messages"
        answer = await person.post(path, {"content": text, "client_id": client_id})
        body: Event = answer.json()
        if answer.status_code != 201:
            return {"type": "error", "code": body["code"]}
        return {"type": "ack", "message_id": body["message"]["id"], "seq": body["message"]["seq"]}


class Group(Scene):
    """A group of some of the pool, whose owner never leaves; everybody else comes and goes."""

    def __init__(
        self, rng: random.Random, counts: Counter[str], everybody: list[Person], *, history_visible: bool
    ) -> None:
        super().__init__(rng, counts)
        self.history_visible = history_visible
        self.everybody = everybody
        self.pool = rng.sample(everybody, PEOPLE - 2)
        """Those who may ever be in it. The rest are strangers for good."""
        self.owner = self.pool[0]
        self.visible_from = {person.id: 1 for person in self.pool[:4]}
        """Who is in it now, and from which seq on they see."""
        self.sent: list[tuple[Person, int, int]] = []
        self.last_seq = 1

    async def create(self) -> None:
        """Make it."""
        body = {
            "title": self.text("title"),
            "member_ids": list(self.visible_from),
            "history_visible": self.history_visible,
        }
        answer = await self.owner.post("/chats/group", body)
        self.chat_id = answer.json()["id"]

    def text(self, body: str, seq: int | None = None) -> str:
        """A text for those who are in the group, or who see its message `seq`."""
        if self.history_visible:
            people = [person.id for person in self.pool]
        else:
            people = [user for user, first in self.visible_from.items() if seq is None or seq >= first]
        return text_for_users(body, people)

    def member(self) -> Person:
        return self.rng.choice([person for person in self.pool if person.id in self.visible_from])

    def outsider(self) -> Person:
        return self.rng.choice([person for person in self.everybody if person.id not in self.visible_from])

    def operations(self) -> dict[str, tuple[int, Operation]]:
        return {
            "say": (30, self.say),
            "edit": (10, self.edit),
            "delete": (3, self.delete),
            "read": (5, self.read),
            "typing": (3, self.typing),
            "rename": (4, self.rename),
            "add": (12, self.add),
            "remove": (6, self.remove),
            "leave": (4, self.leave),
            "remove while all talk": (4, self.remove_while_all_talk),
            "look around": (10, self.look_around),
            "drop and resume": (8, self.drop),
            "try from outside": (10, self.try_from_outside),
        }

    async def say(self) -> None:
        person = self.member()
        ack = await self.send(person, self.text("said"))
        assert ack["type"] == "ack", ack
        self.last_seq = ack["seq"]
        self.sent.append((person, ack["message_id"], ack["seq"]))

    def _own(self) -> tuple[Person, int, int] | None:
        mine = [(p, i, seq) for p, i, seq in self.sent if self.visible_from.get(p.id, seq + 1) <= seq]
        return self.rng.choice(mine) if mine else None

    async def edit(self) -> None:
        if (own := self._own()) is not None:
            person, message_id, seq = own
            answer = await person.tell(
                type="edit_message",
                chat_id=self.chat_id,
                message_id=message_id,
                content=self.text(f"edited {self.rng.random()}", seq),
            )
            assert answer["type"] == "ack", answer

    async def delete(self) -> None:
        if (own := self._own()) is not None:
            self.sent.remove(own)
            person, message_id, _ = own
            path = f"/chats/{self.chat_id}/messages/{message_id}"
            assert (await person.post(path, {}, "DELETE")).status_code == 204

    async def read(self) -> None:
        if (own := self._own()) is not None:
            reader = self.member()
            if self.visible_from[reader.id] <= own[2]:
                answer = await reader.tell(type="message_read", chat_id=self.chat_id, message_id=own[1])
                assert answer["type"] == "ack", answer

    async def typing(self) -> None:
        outside = self.outsider()
        outside.witness.silent[self.chat_id] += 1
        await self.member().type(self.chat_id)
        await outside.barrier()
        outside.witness.silent[self.chat_id] -= 1

    async def rename(self) -> None:
        answer = await self.owner.post(f"/chats/{self.chat_id}", {"title": self.text("title")}, "PATCH")
        assert answer.status_code == 200, answer.text

    async def _retitle_first(self) -> None:
        # A title is seen by whoever comes later: before anybody new comes it says nothing of the old ones.
        answer = await self.owner.post(f"/chats/{self.chat_id}", {"title": "Open"}, "PATCH")
        assert answer.status_code == 200, answer.text

    async def add(self) -> None:
        new = [person for person in self.pool if person.id not in self.visible_from]
        if new:
            person = self.rng.choice(new)
            await self._retitle_first()
            answer = await self.owner.post(f"/chats/{self.chat_id}/members", {"user_ids": [person.id]})
            if answer.status_code == 403:  # one of the two blocks the other, as a pair below
                assert answer.json()["code"] in ("peer_blocked", "peer_unavailable")
                return
            assert answer.status_code == 200, answer.text
            self.last_seq = answer.json()["last_seq"]
            self.visible_from[person.id] = 1 if self.history_visible else self.last_seq

    def _removable(self) -> Person | None:
        people = [person for person in self.pool[1:] if person.id in self.visible_from]
        return self.rng.choice(people) if people else None

    async def remove(self) -> None:
        if (person := self._removable()) is not None:
            answer = await self.owner.post(f"/chats/{self.chat_id}/members/{person.id}", {}, "DELETE")
            assert answer.status_code == 204, answer.text
            del self.visible_from[person.id]

    async def leave(self) -> None:
        if (person := self._removable()) is not None:
            answer = await person.post(f"/chats/{self.chat_id}/leave", {})
            assert answer.status_code == 204, answer.text
            del self.visible_from[person.id]

    async def remove_while_all_talk(self) -> None:
        person = self._removable()
        if person is None:
            return
        text = self.text("in the turmoil")  # whether they are still there only the log can tell
        talkers = [self.member() for _ in range(4)]
        async with asyncio.TaskGroup() as turmoil:
            early = [turmoil.create_task(self.send(talker, text)) for talker in talkers[:2]]
            turmoil.create_task(self.owner.post(f"/chats/{self.chat_id}/members/{person.id}", {}, "DELETE"))
            late = [turmoil.create_task(self.send(talker, text)) for talker in talkers[2:]]
        del self.visible_from[person.id]
        for talker, sending in zip(talkers, (*early, *late), strict=True):
            answer = sending.result()
            assert answer["type"] == "ack" or (talker is person and answer["code"] == "chat_not_found"), answer

    async def look_around(self) -> None:
        person = self.member()
        page = (await person.get(f"/messages/history/{self.chat_id}?limit=30")).json()
        assert all(message["seq"] >= self.visible_from[person.id] for message in page["items"])
        page = (await person.get(f"/messages/history/{self.chat_id}?after=0&limit=10")).json()
        assert all(message["seq"] >= self.visible_from[person.id] for message in page["items"])
        await person.get("/chats")
        await person.get(f"/chats/{self.chat_id}/members")
        body = {"chats": {key: self.rng.randrange(value + 1) for key, value in person.versions.items()}}
        await person.post("/messages/resume", body)

    async def drop(self) -> None:
        await self.rng.choice(self.everybody).come_again()

    async def try_from_outside(self) -> None:
        person = self.outsider()
        message_id = self.sent[-1][1] if self.sent else 1
        chat = f"/chats/{self.chat_id}"
        for path in (chat, f"{chat}/members", f"/messages/history/{self.chat_id}", f"{chat}/messages/{message_id}"):
            answer = await person.get(path)
            assert (answer.status_code, answer.json()["code"]) == (404, "chat_not_found"), path
        for frame in (
            {"type": "new_message", "content": text_for_users("from outside", [])},
            {"type": "edit_message", "message_id": message_id, "content": text_for_users("from outside", [])},
            {"type": "delete_message", "message_id": message_id},
            {"type": "message_read", "message_id": message_id},
            {"type": "typing"},
        ):
            refused = await person.tell(**frame, chat_id=self.chat_id)
            assert (refused["type"], refused["code"]) == ("error", "chat_not_found"), frame
        answer = await person.post("/messages/resume", {"chats": {str(self.chat_id): 1}})
        told = [event for event in answer.json() if event.get("chat_id") == self.chat_id]
        assert {event["type"] for event in told} == {"chat_removed"}
        assert all(item["id"] != self.chat_id for item in (await person.get("/chats")).json()["items"])

    async def check(self) -> None:
        """Compare what everybody saw with the log."""
        log: list[Event] = []
        while True:
            after = log[-1]["seq"] if log else 0
            page = (await self.owner.get(f"/messages/history/{self.chat_id}?after={after}&limit=100")).json()
            log += page["items"]
            if not page["has_after"]:
                break
        spans = spans_of(log, history_visible=self.history_visible)
        for person in self.everybody:
            person.witness.compare(self.chat_id, spans.get(person.id, []))


class Pair(Scene):
    """Two people who talk, and block each other now and then."""

    def __init__(self, rng: random.Random, counts: Counter[str], people: list[Person]) -> None:
        super().__init__(rng, counts)
        self.people = people
        self.blocks: set[int] = set()

    async def create(self) -> None:
        """Make their chat."""
        answer = await self.people[0].post("/chats/personal", {"user_id": self.people[1].id})
        self.chat_id = answer.json()["id"]

    def operations(self) -> dict[str, tuple[int, Operation]]:
        return {
            "write": (10, self.write),
            "block": (4, self.block),
            "unblock": (4, self.unblock),
            "typing to one": (3, self.typing),
            "block while writing": (2, self.block_while_writing),
            "resume a pair": (3, self.drop),
        }

    def one(self) -> tuple[Person, Person]:
        first, second = self.rng.sample(self.people, 2)
        return first, second

    async def write(self) -> None:
        writer, reader = self.one()
        text = text_for_users("written", [writer.id] if self.blocks else [writer.id, reader.id])
        answer = await self.send(writer, text)
        if self.blocks:
            assert answer["type"] == "error", answer
            assert answer["code"] == ("peer_blocked" if writer.id in self.blocks else "peer_unavailable")
        else:
            assert answer["type"] == "ack", answer

    async def block(self) -> None:
        first, second = self.one()
        assert (await first.post(f"/users/block/{second.id}", {})).status_code == 204
        self.blocks.add(first.id)

    async def unblock(self) -> None:
        first, second = self.one()
        assert (await first.post(f"/users/block/{second.id}", {}, "DELETE")).status_code == 204
        self.blocks.discard(first.id)

    async def typing(self) -> None:
        writer, reader = self.one()
        if self.blocks:
            reader.witness.silent[self.chat_id] += 1
        await writer.type(self.chat_id)
        await reader.barrier()
        if self.blocks:
            reader.witness.silent[self.chat_id] -= 1

    async def block_while_writing(self) -> None:
        writer, reader = self.one()
        text = text_for_users("in the turmoil", [writer.id, reader.id])
        blocking = reader.post(f"/users/block/{writer.id}", {})
        await asyncio.gather(self.send(writer, text), blocking, self.send(writer, text))
        self.blocks.add(reader.id)

    async def drop(self) -> None:
        await self.one()[0].come_again()


@pytest.mark.chaos("Nothing reaches the wrong person")
@pytest.mark.timeout(180 + OPERATIONS // 20)
async def test_nothing_reaches_the_wrong_person_while_people_come_go_and_block(
    server: Server, rng: random.Random, report: SceneReport
) -> None:
    counts: Counter[str] = Counter()
    async with server.client() as client, contextlib.AsyncExitStack() as stack:
        people = [Person(server, client, await register(client)) for _ in range(PEOPLE)]
        for person in people:
            stack.push_async_callback(person.go)
            await person.come(resume=False)
        groups = [Group(rng, counts, people, history_visible=number % 2 == 0) for number in range(GROUPS)]
        pairs = [Pair(rng, counts, people[2 * number : 2 * number + 2]) for number in range(PAIRS)]
        scenes: list[Group | Pair] = [*groups, *pairs]
        for scene in scenes:
            await scene.create()
        async with asyncio.TaskGroup() as playing:
            for scene in scenes:
                playing.create_task(scene.play(OPERATIONS // len(scenes)))
        for person in people:
            await person.come_again()
            await person.barrier()
        for group in groups:
            await group.check()
    looked_at = sum(person.witness.looked_at for person in people)
    print(f"{counts.total()} operations, {looked_at} frames and answers looked at: {dict(counts)}")  # noqa: T201
    report.tell("operations", counts.total())
    report.tell("frames and answers looked at", looked_at)
    violations = [violation for person in people for violation in person.witness.violations]
    print(*violations, sep="\n")  # noqa: T201 - pytest shows it when the test fails
    report.exactly("that reached somebody who may not see them", len(violations), 0)
    # A run that saw little would prove little.
    assert looked_at > OPERATIONS * 3
    assert sum(len(person.witness.saw) for person in people) > OPERATIONS // 4
