"""Fuzzing of the socket: on every door, and nothing may come of it but errors for him who does it.

`DIALECT_FUZZ_FRAMES` sets how many frames are sent over all doors (`make fuzz` sends 100,000), `DIALECT_FUZZ_SEED`
which. A third of them are broken as WebSocket frames, the others as commands.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
import pytest

from app.core.config import Settings
from app.db.schemas import is_blank
from tests.conftest import StartServer
from tests.support import metrics
from tests.support.fuzz import NAUGHTY, Json, generated, is_refused, spoil, streams
from tests.support.people import Person, people
from tests.support.servers import ROOT, Door, Server
from tests.support.socket_client import SocketClient
from tests.support.watch import MB, memory, watched
from tests.support.wire import CLOSE, PONG, TEXT, Client

FRAMES = int(os.environ.get("DIALECT_FUZZ_FRAMES", "1200"))
SEED = int(os.environ.get("DIALECT_FUZZ_SEED", "2026"))

Entry = Literal["header", "ticket", "token"]
ENTRIES: tuple[Entry, ...] = ("header", "ticket", "token")
FORM_CODES = {"invalid_json", "invalid_frame", "unknown_type"}
LEAK = 24 * MB
"""A process may grow so far after it has seen a third of the frames: caches, the database's pages, the log's rows."""


def known_codes() -> set[str]:
    """The codes that docs/protocol.md promises."""
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \| \w+ \| .+ \| (?:yes|no) \|$", page, re.MULTILINE))


class Attacker:
    """Somebody with an account and ill will."""

    def __init__(self, server: Server, person: Person, entry: Entry) -> None:
        self.server, self.person, self.entry = server, person, entry
        self.codes: Counter[str] = Counter()
        self.closes: Counter[int] = Counter()
        self._known = known_codes()

    async def way_in(self) -> tuple[str, str]:
        """The path and the Authorization header of the next connection."""
        path = "/api/v1/messages/ws"
        token = self.person.account.access_token
        if self.entry == "header":
            return path, f"Bearer {token}"
        if self.entry == "token":
            return f"{path}?token={token}", ""
        return f"{path}?ticket={(await self.person.do('POST', '/auth/ws-ticket'))['ticket']}", ""

    async def open(self) -> SocketClient:
        """A socket for frames that are right as such."""
        path, header = await self.way_in()
        headers = {"Authorization": header} if header else {}
        url = self.server.url.replace("http", "ws", 1) + path
        return await SocketClient.connect(url, additional_headers=headers)

    def judge(self, event: Json) -> None:
        """Fail on what the documentation does not know."""
        if event["type"] == "error":
            assert event["code"] in self._known - {"internal_error"}, event
            self.codes[event["code"]] += 1

    async def send_commands(self, base: Sequence[Json], count: int, chance: random.Random) -> None:
        """Send so many, a few hundred on each socket; what is no command must get its error, and the socket lives."""
        for begin in range(0, count, 500):
            async with await self.open() as socket:
                for at in range(begin, min(begin + 500, count), 50):
                    expected: Counter[str] = Counter()
                    for _ in range(min(50, count - at)):
                        data = spoil(chance.choice(base), chance)
                        as_text = chance.random() > 0.02
                        if not as_text or is_refused(data):
                            expected["form" if as_text else "binary_frame"] += 1
                        await socket.connection.send(data, text=as_text)
                    await socket.barrier()
                    told = Counter(event["code"] for event in socket.inbox if event["type"] == "error")
                    assert sum(told[code] for code in FORM_CODES) == expected["form"], told
                    assert told["binary_frame"] == expected["binary_frame"]
                    for event in socket.inbox:
                        self.judge(event)
                    socket.inbox.clear()
                    socket.seen.clear()
                assert socket.close_code is None
            for event in socket.inbox:  # answers that took longer
                self.judge(event)

    def tear(self, path: str, header: str, data: bytes) -> None:
        """Send raw bytes on a connection of their own, then the end of the stream; what comes back must be sound."""
        port = int(self.server.url.rpartition(":")[2])
        with Client(port, path, f"Authorization: {header}\r\n" if header else "") as client:
            opcode, hello = client.frame()
            assert (opcode, json.loads(hello)["type"]) == (TEXT, "hello")
            client.send([data])
            client.end()
            try:
                while True:
                    opcode, payload = client.frame()
                    if opcode == TEXT:
                        self.judge(json.loads(payload))
                    elif opcode == CLOSE:
                        self.closes[int.from_bytes(payload[:2])] += 1
                        client.ended()
                        return
                    else:
                        assert opcode == PONG
            except (EOFError, ConnectionResetError):
                self.closes[1006] += 1


def server_log_is_clean(server: Server, door: Door) -> None:
    """No traceback of ours. uvicorn's own class may trip over nonsense, which is one reason for ours."""
    for trace in re.findall(r"Traceback \(most recent call last\).*", server.log):
        assert door == "plain", trace[:3000]
        assert "/app/" not in trace, trace[:3000]


@pytest.mark.timeout(max(300, FRAMES // 10))
@pytest.mark.parametrize("door", ["tuned", pytest.param("plain", marks=pytest.mark.logs_errors)])
async def test_fuzzed_frames_harm_nobody_else(
    settings: Settings, start_server: StartServer, door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(settings, door)
    frames = FRAMES // 2  # the other half comes through the other door
    chance = random.Random(SEED)
    async with server.client() as client:
        ann, bo, cy, dan = await people(client, 4)
        chat_id = await ann.personal(bo)
        message = await ann.say(chat_id, "to be fuzzed")
        aims = {
            "chat_id": [chat_id, 999_999],
            "chats": [chat_id],
            "message_id": [message["id"]],
            "reply_to": [message["id"]],
            "user_ids": [bo.id, cy.id],
            "token": [ann.account.access_token],
        }
        base = generated(aims, max(60, frames // 20))
        attackers = [Attacker(server, ann, entry) for entry in ENTRIES]
        async with watched(server, cy, dan) as watch:
            for _ in range(100):
                await watch.say()
            calm, watch.seconds = watch.p99, []
            async with watch.talking(least=20) as talk:
                tasks = await asyncio_tasks(client)
                sent = begun = 0
                for third, attacker in enumerate(attackers):
                    sent += await attack(attacker, base, frames // 3, chance, talk)
                    if third == 0:
                        begun = memory(server.pid, "VmRSS")
                grown = memory(server.pid, "VmRSS") - begun
            assert server.exit_code is None
            await until(lambda: asyncio_tasks(client), tasks)
        assert (await client.get("/health/ready")).status_code == 200
        # What people can still do: everything.
        assert (await bo.say(chat_id, "still there"))["content"] == "still there"
    server_log_is_clean(server, door)
    codes = sum((attacker.codes for attacker in attackers), Counter[str]())
    closes = sum((attacker.closes for attacker in attackers), Counter[int]())
    with capsys.disabled():
        sys.stdout.write(
            f"\nFuzz on {door}, {'MySQL' if settings.uses_mysql else 'SQLite'}: {sent} frames; p99 of others "
            f"{watch.p99 * 1000:.0f} ms (calm {calm * 1000:.0f} ms); memory {grown / MB:+.1f} MB; "
            f"errors {dict(codes.most_common(6))}; closes {dict(closes.most_common())}\n"
        )
    assert codes.keys() >= FORM_CODES
    assert 1002 in closes
    if frames > 1000:
        assert codes.keys() >= {"binary_frame", "chat_not_found", "invalid_token", "message_not_found"}
        assert closes.keys() >= {1007, 1009}
    assert closes.keys() <= {0, 1000, 1002, 1006, 1007, 1009, *PEERS_OWN}
    assert grown < LEAK


PEERS_OWN = {1001, 1003, *range(1007, 1015), *range(3000, 5000)}
"""Codes of close frames that the fuzz sent itself, and got back."""


async def attack(
    attacker: Attacker, base: Sequence[Json], count: int, chance: random.Random, talk: asyncio.Task[None]
) -> int:
    """Send so many frames through one door, a third of them torn; ends at once when the others' talk fails."""
    torn = count // 3
    sent = count - torn
    await attacker.send_commands(base, sent, chance)
    messages = [json.dumps(command).encode("utf-8", "replace")[:2000] for command in base[:1000]]
    for number, data in streams(messages, torn, chance):
        path, header = await attacker.way_in()
        await asyncio.to_thread(attacker.tear, path, header, data)
        sent += number
        if talk.done():
            await talk
    return sent


async def asyncio_tasks(client: httpx.AsyncClient) -> int:
    """Tasks of the server's loop, by its own metrics."""
    return int(metrics.value((await client.get("/metrics")).text, "dialect_asyncio_tasks"))


async def until(measure: Callable[[], Any], most: int) -> None:
    """Return once the measured is no more than that."""
    end = time.monotonic() + 15
    while (now := await measure()) > most:
        assert time.monotonic() < end, f"{now} instead of {most}"
        await asyncio.sleep(0.05)


# --- text that must come back as it went in ---------------------------------------------------------------------


async def test_naughty_strings_come_back_byte_for_byte(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        async with await ann.open(server) as socket, await bo.open(server) as other:
            for text in NAUGHTY:
                if is_blank(text):
                    assert (await socket.say(chat_id, text))["code"] == "message_empty", text
                    text = f"{text}."
                assert (await socket.say(chat_id, text))["type"] == "ack", text
                event = await other.wait(type="new_message")
                assert event["message"]["content"] == text
                edited = f"{text} {text}"
                await socket.send(
                    type="edit_message", chat_id=chat_id, message_id=event["message"]["id"], content=edited, ref="e"
                )
                assert (await socket.wait(ref="e"))["type"] == "ack", edited
                changed = await other.wait(type="message_edited")
                assert changed["message"]["content"] == edited
                [newest] = (await bo.history(chat_id, limit=1))["items"]
                assert newest["content"] == edited
