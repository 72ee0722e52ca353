"""The same send again and again, at once and by every door: one message, and one answer for all."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import defaultdict
from typing import Any

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.chaos.world import launched
from tests.support.people import Person, people
from tests.support.socket_client import SocketClient

IDS = scaled("CLIENT_IDS", short=300, long=10_000)
RETRIES = 5
AT_ONCE = 50
WINDOW = 100


@pytest.mark.chaos("A retried send is stored once")
@pytest.mark.timeout(120 + IDS // 20)
async def test_a_send_repeated_by_every_door_is_one_message_with_one_answer(
    settings: Settings, launch: Launch, rng: random.Random, report: SceneReport
) -> None:
    server = await launched(launch, settings)
    answers: dict[str, list[tuple[int, int]]] = defaultdict(list)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        sockets = [await ann.open(server) for _ in range(3)]
        hearing = await bo.open(server)
        turns = asyncio.Semaphore(WINDOW)

        async def send(client_id: str, door: Person | SocketClient) -> None:
            async with turns:
                answer: dict[str, Any]
                if isinstance(door, Person):
                    answer = await door.say(chat_id, f"once {client_id}", client_id=client_id)
                    answers[client_id].append((answer["id"], answer["seq"]))
                else:
                    answer = await door.say(chat_id, f"once {client_id}", client_id=client_id)
                    assert answer["type"] == "ack", answer
                    answers[client_id].append((answer["message_id"], answer["seq"]))
                    # Of the events of so many messages a wait would look through all, each time.
                    door.inbox[:] = [event for event in door.inbox if event["type"] != "new_message"]

        doors: list[Person | SocketClient] = [ann, *sockets]
        first = str(uuid.uuid4())
        turns = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(send(first, doors[number % len(doors)]) for number in range(AT_ONCE)))
        turns = asyncio.Semaphore(WINDOW)
        ids = [str(uuid.uuid4()) for _ in range(IDS)]
        rest = [(client_id, rng.choice(doors)) for client_id in ids for _ in range(RETRIES)]
        rng.shuffle(rest)
        await asyncio.gather(*(send(client_id, door) for client_id, door in rest))
        stored = await _all(ann, chat_id)
        await hearing.barrier()
        heard = [event["message"]["id"] for event in hearing.seen if event["type"] == "new_message"]
        for socket in (*sockets, hearing):
            await socket.close()
    report.tell("sends", AT_ONCE + len(rest))
    report.exactly("messages stored", len(stored), IDS + 1)
    report.exactly("client ids with more than one answer", sum(len(set(one)) > 1 for one in answers.values()), 0)
    report.exactly("messages heard by the other one", len(heard), IDS + 1)
    assert len(set(heard)) == len(heard)
    assert {message["client_id"]: (message["id"], message["seq"]) for message in stored} == {
        client_id: one[0] for client_id, one in answers.items()
    }


async def _all(person: Person, chat_id: int) -> list[dict[str, Any]]:
    """The whole history, page by page."""
    items: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    while page := (await person.history(chat_id, limit=100, **before))["items"]:
        items += page
        before = {"before": min(message["seq"] for message in page)}
    return items
