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

SENDS = scaled("PUSH_SENDS", short=300, long=3000)
DEVICES = 12
SLOWER_MS = 50.0


@pytest.fixture
async def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGoogle]:
    """Google, on this machine."""
    async with fake_google(tmp_path, monkeypatch) as google:
        yield google


async def _send(socket: SocketClient, chats: list[int]) -> tuple[list[float], dict[int, int]]:
    """Milliseconds until each ack, and the last seq of each chat."""
    took: list[float] = []
    last: dict[int, int] = {}
    for number in range(SENDS):
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
            healthy, _ = await _send(socket, chats)
            open_again = asyncio.Event()
            limited = Answer(429, failure(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED").body, {"Retry-After": "1"})
            troubles = [
                [limited, limited, Answer()],
                [failure(500, "INTERNAL", "INTERNAL"), failure(503, "UNAVAILABLE", "UNAVAILABLE"), Answer()],
                [Answer(when=open_again)],
            ]
            google.answers = {token: list(troubles[number % 3]) for number, token in enumerate(tokens)}
            before = len(google.pushed)
            troubled, last = await _send(socket, chats)
            hanging = sum(not pushed.answered for pushed in google.pushed[before:])
            google.answers = {}
            open_again.set()

            wanted = {(token, str(last[chat])) for chat, token in zip(chats, tokens, strict=True)}

            def told() -> set[tuple[str, str]]:
                return wanted & {(one.token, one.data["seq"]) for one in google.pushed if one.answered == 200}

            await google.until(lambda: told() == wanted, "a push of the last message to every device")
    refused = sum(pushed.answered not in (0, 200) for pushed in google.pushed)
    report.tell("sends in trouble", len(troubled))
    report.at_least("pushes refused", refused, 4)
    report.at_least("pushes that hung", hanging, 1)
    report.tell("p99 of a send with a healthy Google", p99(healthy), "ms")
    bound = p99(healthy) + max(SLOWER_MS, p99(healthy) / 4)  # a busy machine scatters by a quarter on its own
    report.at_most("p99 in trouble", p99(troubled), bound, "ms")
    report.exactly("devices told of the last message", len(told()), DEVICES)


async def _register(person: Person) -> str:
    token = f"device-{uuid.uuid4().hex}"
    plant(token)
    await person.do("PUT", "/push/device", {"kind": "token", "token": token})
    return token
