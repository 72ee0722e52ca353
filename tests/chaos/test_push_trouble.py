"""Google limits, fails or hangs: sends do not notice, and every device is told in the end."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.chaos.world import launched
from tests.support.firebase import Answer, FakeGoogle, failure, fake_google
from tests.support.people import Person, people
from tests.support.secrets import plant
from tests.support.socket_client import SocketClient

SENDS = scaled("PUSH_SENDS", short=600, long=3000)
"""With a healthy Google, and as many with one in trouble."""
ROUNDS = 3
"""One after the other in turns, so that what else the machine does is the same for both."""
DEVICES = 12
SLOWER = 0.05
SLOWER_MS = 2.0
"""The median may be slower by so much: 5 %, or this where 5 % are less than a clock can tell."""
P99_MS = 1_000.0
"""What only one send in a hundred may take longer than, however busy the machine: few sends decide it."""


@pytest.fixture
async def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGoogle]:
    """Google, on this machine."""
    async with fake_google(tmp_path, monkeypatch) as google:
        yield google


async def _send(socket: SocketClient, chats: list[int], count: int) -> tuple[list[float], dict[int, int]]:
    """Milliseconds until each ack, and the last seq of each chat."""
    took: list[float] = []
    last: dict[int, int] = {}
    for number in range(count):
        chat_id = chats[number % len(chats)]
        begun = time.monotonic()
        ack = await socket.say(chat_id, f"message {number}")
        took.append((time.monotonic() - begun) * 1000)
        last[chat_id] = ack["seq"]
        socket.inbox.clear()
        socket.seen.clear()
    return took, last


def p99(values: list[float]) -> float:
    """All but one in a hundred are quicker."""
    return statistics.quantiles(values, n=100)[98]


@pytest.mark.chaos("Push harms nothing and is not lost")
@pytest.mark.timeout(180)
async def test_a_google_that_limits_fails_and_hangs_slows_no_send_and_loses_no_push(
    settings: Settings, google: FakeGoogle, launch: Launch, report: SceneReport
) -> None:
    settings = settings.model_copy(
        update={"firebase_credentials_path": google.credentials_path, "push_grace_seconds": 0.2}
    )
    server = await launched(launch, settings)
    async with server.client() as client:
        ann, *others = await people(client, 1 + DEVICES)
        chats = [await ann.personal(other) for other in others]
        tokens = [await _register(other) for other in others]
        async with await ann.open(server) as socket:
            limited = Answer(429, failure(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED").body, {"Retry-After": "1"})
            healthy: list[float] = []
            troubled: list[float] = []
            hanging = told = 0
            for _ in range(ROUNDS):
                await _begin_to_push(google, socket, chats, tokens)
                took, last = await _send(socket, chats, SENDS // ROUNDS)
                healthy += took
                await _told(google, chats, tokens, last)
                open_again = asyncio.Event()
                troubles = [
                    [limited, limited, Answer()],
                    [failure(500, "INTERNAL", "INTERNAL"), failure(503, "UNAVAILABLE", "UNAVAILABLE"), Answer()],
                    [Answer(when=open_again)],
                ]
                google.answers = {token: list(troubles[number % 3]) for number, token in enumerate(tokens)}
                before = len(google.pushed)
                await _begin_to_push(google, socket, chats, tokens)
                took, last = await _send(socket, chats, SENDS // ROUNDS)
                troubled += took
                hanging += sum(not pushed.answered for pushed in google.pushed[before:])
                google.answers = {}
                open_again.set()
                told = await _told(google, chats, tokens, last)
    refused = sum(pushed.answered not in (0, 200) for pushed in google.pushed)
    report.tell("sends in trouble", len(troubled))
    report.at_least("pushes refused", refused, 8 * ROUNDS)
    report.at_least("pushes that hung", hanging, ROUNDS)
    usual = statistics.median(healthy)
    report.tell("median of a send with a healthy Google", usual, "ms")
    report.at_most("median in trouble", statistics.median(troubled), usual + max(SLOWER_MS, usual * SLOWER), "ms")
    report.tell("p99 of a send with a healthy Google", p99(healthy), "ms")
    report.at_most("p99 of a send in trouble", p99(troubled), P99_MS, "ms")
    report.exactly("devices told of the last message", told, DEVICES)


async def _begin_to_push(google: FakeGoogle, socket: SocketClient, chats: list[int], tokens: list[str]) -> None:
    """Let every device be pushed to: what follows is measured while Google has its health or its trouble."""
    before = {token: len(google.to(token)) for token in tokens}
    await _send(socket, chats, len(chats))
    await google.until(
        lambda: all(len(google.to(token)) > count for token, count in before.items()), "a push to every device"
    )


async def _told(google: FakeGoogle, chats: list[int], tokens: list[str], last: dict[int, int]) -> int:
    """How many devices heard of the last message of their chat: in the end all of them."""
    wanted = {(token, str(last[chat])) for chat, token in zip(chats, tokens, strict=True)}

    def told() -> set[tuple[str, str]]:
        return wanted & {(one.token, one.data["seq"]) for one in google.pushed if one.answered == 200}

    await google.until(lambda: told() == wanted, "a push of the last message to every device")
    return len(told())


async def _register(person: Person) -> str:
    token = f"device-{uuid.uuid4().hex}"
    plant(token)
    await person.do("PUT", "/push/device", {"kind": "token", "token": token})
    return token
