"""What random walks, or reading the code for their sake, have found: each once more, by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import orjson
import pytest

from app.db.events import CatchUpEvent, MessageDeliveredCommand
from app.db.schemas import ResumeIn
from app.services.connection_manager import Connection
from app.services.container import Services
from app.services.transport import Frames
from tests.support.people import people


class Recorder:
    """A transport that keeps what it is given."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, frames: Frames) -> None:
        self.events += [orjson.loads(payload) for payload in frames.payloads]

    def close(self, code: int, reason: str = "") -> None:
        self.events.append({"type": "closed", "code": code})

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


def connect(services: Services, transport: Recorder) -> Connection:
    return services.connections.add(transport, 1, 1, datetime.now(UTC) + timedelta(hours=1))


async def test_history_visible_is_a_boolean_on_the_wire(client: httpx.AsyncClient) -> None:
    ann, bob = await people(client, 2)
    chat_id = await ann.group(bob)
    version = (await bob.chat(chat_id))["version"]
    await ann.do("PATCH", f"/chats/{chat_id}", {"history_visible": False})

    events = await bob.resume(account_version=1, chats={str(chat_id): version})

    [changes] = [event for event in events if event["type"] == "chat_changes"]
    assert changes["info"]["history_visible"] is False


async def test_hello_is_the_first_frame_whatever_happens_meanwhile(services: Services) -> None:
    transport = Recorder()
    connection = connect(services, transport)

    services.connections.send_to_user(1, {"type": "chat_added", "account_version": 1, "chat_id": 1})
    connection.deliver(1, 1, Frames.of({"type": "new_message"}))
    connection.catch_up(1, None)
    connection.ready = True
    connection.send_event({"type": "pong", "ref": None})

    assert transport.types == ["pong"]
    services.connections.remove(connection)


async def test_a_chat_that_is_left_while_its_reset_is_read_does_not_come_back(services: Services) -> None:
    reading = asyncio.Event()
    left = asyncio.Event()
    sent = asyncio.Event()

    async def chat_events(user_id: int, chat_id: int, since: int | None) -> AsyncIterator[CatchUpEvent]:
        reading.set()
        await left.wait()
        yield {"type": "synced", "chat_id": chat_id, "version": 7}  # stands for the reset, which comes before it
        sent.set()

    services.connections.chat_events = chat_events
    transport = Recorder()
    connection = connect(services, transport)
    connection.ready = True
    connection.catch_up(5, None)
    await reading.wait()

    services.connections.send_to_user(1, {"type": "chat_removed", "account_version": 3, "chat_id": 5})
    left.set()
    await sent.wait()
    await asyncio.sleep(0)

    assert transport.types == ["synced", "chat_removed"]
    services.connections.remove(connection)


async def test_what_a_resume_has_told_of_the_account_is_not_told_again_later(services: Services) -> None:
    reading = asyncio.Event()
    go_on = asyncio.Event()
    sent = asyncio.Event()

    async def resume_events(*_: Any) -> AsyncIterator[CatchUpEvent]:
        reading.set()
        await go_on.wait()
        yield {"type": "resumed", "ref": None, "epoch": "e", "account_version": 3, "complete": True}
        sent.set()

    services.connections.resume_events = resume_events
    transport = Recorder()
    connection = connect(services, transport)
    connection.ready = True
    connection.resume(ResumeIn(), None, lambda error: pytest.fail(error.code))
    await reading.wait()

    for version in (3, 4):
        services.connections.send_to_user(
            1, {"type": "block_changed", "account_version": version, "user_id": 2, "blocked": version == 3}
        )
    go_on.set()
    await sent.wait()
    await asyncio.sleep(0)

    assert [(event["type"], event["account_version"]) for event in transport.events] == [
        ("resumed", 3),
        ("block_changed", 4),
    ]
    services.connections.remove(connection)


@pytest.mark.settings(receipts_members_max=3)
async def test_marks_made_in_private_are_not_published_by_a_later_one(
    services: Services, client: httpx.AsyncClient
) -> None:
    ann, bob, cid, dan = await people(client, 4)
    chat_id = await ann.group(bob, cid, dan)
    messages = [await ann.say(chat_id, f"message {number}") for number in range(3)]
    last = messages[-1]["id"]  # among four members a mark is for oneself alone
    await services.messages.write(
        bob.id, MessageDeliveredCommand(type="message_delivered", chat_id=chat_id, message_id=last)
    )
    await dan.leave(chat_id)
    version = (await ann.chat(chat_id))["version"]

    await bob.read(messages[1])  # three: for all

    [changes] = [
        event
        for event in await ann.resume(account_version=1, chats={str(chat_id): version})
        if event["type"] == "chat_changes"
    ]
    [member] = changes["members"]
    assert member["read_seq"] == member["delivered_seq"] == messages[1]["seq"]


async def test_a_client_with_chats_and_no_account_version_hears_what_it_hid(client: httpx.AsyncClient) -> None:
    ann, bob = await people(client, 2)
    chat_id = await ann.personal(bob)
    message = await bob.say(chat_id, "for my eyes only")
    version = (await ann.chat(chat_id))["version"]
    await ann.delete(message, for_everyone=False)

    events = await ann.resume(account_version=0, chats={str(chat_id): version})

    assert message["id"] in [event["message_id"] for event in events if event["type"] == "message_hidden"]
