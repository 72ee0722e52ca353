"""The socket: its doors, its frames, who hears what, and how a client that was away catches up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from app.api.v1.socket import SocketReceiver
from app.core.config import Settings
from app.db.database import Database
from app.db.models import Message
from app.services.chat_log.changes import SendMessage
from app.services.container import Services
from app.services.transport import Frames
from tests.conftest import StartServer
from tests.services.test_sequencer import come_online
from tests.support.clock import ManualClock
from tests.support.databases import ENGINES
from tests.support.locks import held
from tests.support.metrics import value
from tests.support.people import Json, contents, people
from tests.support.replica import Replica, fetch
from tests.support.secrets import plant
from tests.support.servers import Door, Server
from tests.support.socket_client import SocketClient

# As the brief writes them.
SEND = """{
  "type": "new_message",
  "chat_id": 1,
  "content": "Hello world!",
  "message_type": "text"
}"""
MARK_AS_READ = """{
  "type": "message_read",
  "message_id": 42,
  "chat_id": 1
}"""

# The doors differ in how bytes travel, not in what is stored: one database is enough for the plain one.
both_doors = pytest.mark.parametrize(
    ("settings", "door"),
    [(engine, door) for engine in ENGINES for door in ("tuned", "plain") if "sqlite" in engine or door == "tuned"],
    indirect=["settings"],
)


@asynccontextmanager
async def socket_at(url: str, **options: Any) -> AsyncIterator[SocketClient]:
    """A socket opened by any door."""
    client = SocketClient(await connect(url, max_size=None, **options))
    await client.wait(type="hello")
    async with client:
        yield client


async def refusal(url: str, **options: Any) -> tuple[int, str, httpx.Headers]:
    """A handshake that is refused before it is accepted: (status, code, headers)."""
    with pytest.raises(InvalidStatus) as caught:
        await connect(url, **options)
    response = caught.value.response
    assert response.headers["content-type"] == "application/problem+json"
    problem = json.loads(response.body or b"")
    assert problem["status"] == response.status_code
    return response.status_code, problem["code"], httpx.Headers(list(response.headers.raw_items()))


def live(socket: SocketClient, chat_id: int) -> list[Json]:
    """The events of a chat's log that came, in order."""
    return [event for event in socket.seen if event.get("chat_id") == chat_id and "prev" in event]


def kinds(socket: SocketClient) -> list[str]:
    """What came, the answers to barriers left out."""
    return [event["type"] for event in socket.seen if event["type"] != "pong"]


# --- the doors --------------------------------------------------------------------------------------------------


@both_doors
@pytest.mark.settings(allowed_origins=["https://app.example", "http://localhost:3000"])
async def test_three_doors_open_and_everything_else_is_refused_before_the_handshake(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    url = server.ws_url
    async with server.client() as client:
        [ann] = await people(client, 1)
        token = ann.account.access_token
        bearer = {"Authorization": f"Bearer {token}"}

        # Three doors.
        ticket: Json = await ann.do("POST", "/auth/ws-ticket")
        plant(ticket["ticket"])
        for address, options in (
            (url, {"additional_headers": bearer}),
            (url, {"additional_headers": {"Authorization": f"bearer  {token}"}}),
            (f"{url}?token={token}", {}),
            (f"{url}?ticket={ticket['ticket']}", {}),
        ):
            async with socket_at(address, **options) as socket:
                [hello] = socket.seen
                assert (hello["type"], hello["user_id"]) == ("hello", ann.id)
                assert hello["session_id"] > 0
                assert str(uuid.UUID(hello["epoch"])) == hello["epoch"]
                assert hello["account_version"] == 0
                assert hello["heartbeat_seconds"] == settings.socket_heartbeat_seconds
        assert ticket["expires_in"] == settings.socket_ticket_seconds

        # No door.
        for address, headers in (
            (url, {}),
            (f"{url}?token=", {}),
            (f"{url}?token={token}x", {}),
            (f"{url}?ticket={ticket['ticket']}", {}),  # it has been used
            (f"{url}?ticket=", {}),
            (f"{url}?ticket={token}", {}),
            (url, {"Authorization": "Bearer nonsense"}),
            (url, {"Authorization": "Basic dXNlcjpwYXNz"}),
            (f"{url}?token={token}", {"Authorization": "Bearer nonsense"}),  # the header decides
        ):
            status, code, answered = await refusal(address, additional_headers=headers)
            assert (status, code) == (401, "invalid_token"), (address, headers)
            assert answered["www-authenticate"].startswith("Bearer")

        # A page of another site gets nowhere, whatever token it got hold of.
        host = server.url.removeprefix("http://")
        for origin in ("https://app.example", "http://localhost:3000", f"http://{host}", f"https://{host}"):
            async with socket_at(url, additional_headers=bearer, origin=Origin(origin)):
                pass
        for origin in (
            "null",
            "https://evil.example",
            "http://app.example",
            "https://app.example:8443",
            "https://app.example.evil.example",
            "https://evil-app.example",
            "https://APP.example/",
            "https://app.example, https://evil.example",
            f"http://{host}.evil.example",
            f"http://evil.example/{host}",
            f"http://evil.example#{host}",
            f"http://{host}@evil.example",
            f"http://evil@{host}",
            f"http://x{host}",
            "http://127.0.0.1",
            "file://",
            "http://[",
            "http://[::1",
            "//",
            "*",
        ):
            refused = await refusal(url, additional_headers=bearer, origin=Origin(origin))
            assert refused[:2] == (403, "origin_not_allowed"), origin
        # The origin is looked at first: it is no oracle for tokens.
        assert (await refusal(url, origin=Origin("null")))[0] == 403

        # Without the upgrade it is an ordinary request, and is told what to do.
        answer = await client.get("/api/v1/messages/ws", params={"token": token})
        assert (answer.status_code, answer.json()["code"]) == (426, "upgrade_required")
        assert answer.headers["upgrade"] == "websocket"
        assert answer.headers["content-type"] == "application/problem+json"


# --- frames -----------------------------------------------------------------------------------------------------


@both_doors
async def test_the_frames_of_the_brief_work_to_the_letter(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        assert await ann.personal(bo) == 1
        async with (
            await ann.open(server) as phone,
            await ann.open(server) as laptop,
            await bo.open(server) as other,
        ):
            await phone.connection.send(SEND)
            ack = await phone.wait(type="ack")
            heard = [await socket.wait(type="new_message") for socket in (phone, laptop, other)]
            assert heard[0] == heard[1] == heard[2]
            message = heard[0]["message"]
            assert heard[0] == {"type": "new_message", "chat_id": 1, "version": 2, "prev": 1, "message": message}
            assert (message["content"], message["sender_id"], message["seq"]) == ("Hello world!", ann.id, 1)
            assert ack == {
                "type": "ack",
                "ref": None,
                "client_id": message["client_id"],
                "chat_id": 1,
                "message_id": message["id"],
                "seq": 1,
                "created_at": message["created_at"],
            }
            await asyncio.gather(*(phone.say(1, str(number)) for number in range(41)))
            while (await other.wait(type="new_message"))["message"]["id"] != 42:
                pass
            await other.connection.send(MARK_AS_READ)
            assert (await other.wait(type="ack"))["chat_id"] == 1
            for socket in (phone, laptop, other):
                read = await socket.wait(type="message_read")
                assert read == {
                    "type": "message_read",
                    "chat_id": 1,
                    "version": 44,
                    "prev": 43,
                    "user_id": bo.id,
                    "seq": 42,
                }
            assert (await bo.chat(1))["unread_count"] == 0

            # Every other command, its answer, and what others hear.
            client_id = str(uuid.uuid4())
            ack = await phone.say(1, "with a name", client_id=client_id, reply_to=42)
            assert (ack["client_id"], ack["seq"]) == (client_id, 43)
            event = await other.wait(type="new_message", version=45)
            assert (event["message"]["client_id"], event["message"]["reply_to"]) == (client_id, 42)
            target = {"chat_id": 1, "message_id": ack["message_id"]}
            for ref, command, type, told in (
                ("e", "edit_message", "message_edited", phone),
                ("d", "message_delivered", "message_delivered", other),
                ("x", "delete_message", "message_deleted", phone),
            ):
                extra = {"content": "edited"} if command == "edit_message" else {}
                await told.send(type=command, ref=ref, **target, **extra)
                assert (await told.wait(type="ack", ref=ref))["chat_id"] == 1
                events = [await socket.wait(type=type) for socket in (phone, laptop, other)]
                assert events[0] == events[1] == events[2]
            await phone.send(type="ping", ref="p")
            assert await phone.wait(type="pong", ref="p") == {"type": "pong", "ref": "p"}
            for socket in (phone, laptop, other):
                await socket.barrier()
                versions = [(event["prev"], event["version"]) for event in live(socket, 1)]
                assert versions == [(version - 1, version) for version in range(2, 49)]


@both_doors
async def test_a_bad_frame_is_answered_and_harms_nobody(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        secret = "words that must not be repeated"
        frames: list[tuple[str | Json, str]] = [
            ("", "invalid_json"),
            ("{", "invalid_json"),
            ("nonsense", "invalid_json"),
            ('{"type":"ping"} x', "invalid_json"),
            ("[" * 30_000, "invalid_json"),
            ('{"a":' * 5_000 + "1" + "}" * 5_000, "invalid_json"),
            ("[]", "invalid_frame"),
            ("null", "invalid_frame"),
            ('"ping"', "invalid_frame"),
            ({}, "unknown_type"),
            ({"type": "nonsense"}, "unknown_type"),
            ({"type": "hello"}, "unknown_type"),
            ({"type": None}, "unknown_type"),
            ({"type": ["ping"]}, "unknown_type"),
            ({"type": "ping", "unknown": secret}, "invalid_frame"),  # what the field is called, its sender is told
            ({"type": "ping", "ref": "r" * 65}, "invalid_frame"),
            ({"type": "ping", "ref": 1}, "invalid_frame"),
            ({"type": "new_message", "content": "x"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": str(chat_id), "content": "x"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": chat_id + 0.5, "content": "x"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": True, "content": "x"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": 0, "content": "x"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": 2**53, "content": "x"}, "invalid_frame"),
            (f'{{"type":"new_message","chat_id":{"9" * 4000},"content":"x"}}', "invalid_frame"),
            ('{"type":"new_message","chat_id":NaN,"content":"x"}', "invalid_frame"),
            ({"type": "new_message", "chat_id": chat_id, "content": "x", "message_type": "service"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": chat_id, "content": "x", "client_id": "1"}, "invalid_frame"),
            ({"type": "new_message", "chat_id": chat_id, "content": "x", "sender_id": bo.id}, "invalid_frame"),
            ({"type": "subscribe_presence", "user_ids": [1] * 1001}, "invalid_frame"),
            ({"type": "resume", "chats": {secret: 1}}, "invalid_frame"),
            ({"type": "resume", "chats": {"1": -1}}, "invalid_frame"),
            ({"type": "resume", "chats": {"01": 1}}, "invalid_frame"),
            ({"type": "new_message", "chat_id": 999_999, "content": "x"}, "chat_not_found"),
            ({"type": "edit_message", "chat_id": chat_id, "message_id": 999_999, "content": "x"}, "message_not_found"),
            ({"type": "delete_message", "chat_id": 999_999, "message_id": 1}, "chat_not_found"),
            ({"type": "message_read", "chat_id": chat_id, "message_id": 999_999}, "message_not_found"),
            ({"type": "typing", "chat_id": 999_999}, "chat_not_found"),
            ({"type": "reauth", "token": "nonsense"}, "invalid_token"),
            ({"type": "subscribe_presence", "user_ids": list(range(1, 130))}, "too_many_subscriptions"),
        ]
        async with await ann.open(server) as socket, await bo.open(server) as other:
            for number, (frame, code) in enumerate(frames):
                ref = f"r{number}"
                if isinstance(frame, dict):
                    frame = {"ref": ref, **frame}
                    await socket.send(**frame)
                else:
                    await socket.connection.send(frame)
                error = await socket.wait(type="error")
                assert error["code"] == code, (str(frame)[:200], error)
                assert set(error) == {"type", "code", "detail", "retryable", "retry_after", "ref", "client_id"}
                assert error["retryable"] is False
                if isinstance(frame, dict):
                    expected = frame["ref"] if frame["ref"] == ref else None
                    assert error["ref"] == expected
                    assert error["client_id"] == frame.get("client_id")
                assert secret not in str(error)
                assert len(error["detail"]) < 200
            await socket.connection.send(b"\x00\xff")
            assert (await socket.wait(type="error"))["code"] == "binary_frame"
            await socket.send(type="resume", ref="first")
            await socket.send(type="resume", ref="second")
            await socket.wait(type="resumed", ref="first")
            second = await socket.wait(lambda event: event["type"] in ("error", "resumed"), ref="second")
            assert second.get("code", "resume_in_progress") == "resume_in_progress"  # unless the first was quicker
            assert (await socket.say(chat_id, "alive"))["seq"] == 1
            assert (await other.wait(type="new_message"))["message"]["content"] == "alive"
            assert kinds(other) == ["hello", "new_message"]
            # A frame one byte too long ends the socket that sent it, and no other.
            await socket.connection.send("x" * (settings.socket_max_frame_bytes + 1))
            assert await socket.wait_closed() == 1009
            await other.barrier()


class Wire:
    """A transport without a network: what it is told to do."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.called = asyncio.Event()

    def send(self, frames: Frames) -> None:
        """Take what a client would be sent."""

    def close(self, code: int, reason: str = "") -> None:
        self._note(code)

    def pause_reading(self) -> None:
        self._note("pause")

    def resume_reading(self) -> None:
        self._note("resume")

    def _note(self, call: int | str) -> None:
        self.calls.append(call)
        self.called.set()

    async def wait_for_call(self) -> Any:
        """What comes next."""
        async with asyncio.timeout(10):
            await self.called.wait()
        self.called.clear()
        return self.calls[-1]


@pytest.mark.settings(
    socket_max_early_frames=2,
    socket_max_pending=3,
    socket_max_refused_frames=4,
    limit_frames_per_second=0.001,
    limit_frames_burst=5,
)
async def test_the_limits_of_one_sockets_frames_are_settings(client: httpx.AsyncClient, services: Services) -> None:
    [ann] = await people(client, 1)
    chat_id = await ann.group()
    frame = json.dumps({"type": "new_message", "chat_id": chat_id, "content": "x"}).encode()

    caller = await services.auth.authenticate(ann.account.access_token)

    def open_socket() -> tuple[SocketReceiver, Wire]:
        wire = Wire()
        return SocketReceiver(services, caller, wire, services.admission.enter("")), wire

    # Before it is greeted, which no frame here waits for.
    early, wire = open_socket()
    for _ in range(2):
        early.on_text(frame)
    assert wire.calls == []
    early.on_text(frame)
    assert wire.calls == [4429]
    early.on_closed(4429)
    # Those under way, and those above the limit of frames.
    receiver, wire = open_socket()
    while not receiver._ready:
        await services.database.ping()
    for _ in range(3):
        assert wire.calls == []
        receiver.on_text(frame)
    assert await wire.wait_for_call() == "pause"
    assert await wire.wait_for_call() == "resume"
    for _ in range(2 + 4):
        receiver.on_text(b'{"type": "ping"}')
    assert wire.calls == ["pause", "resume"]
    receiver.on_text(b'{"type": "ping"}')
    assert wire.calls[2:] == [4429]
    receiver.on_closed(4429)


@pytest.mark.settings(limit_frames_per_second=5, limit_frames_burst=20)
async def test_too_many_frames_and_too_many_sockets(server: Server) -> None:
    async with server.client() as client, AsyncExitStack() as stack:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        other = await stack.enter_async_context(await bo.open(server))
        sockets = [await stack.enter_async_context(await ann.open(server)) for _ in range(10)]
        await sockets[0].barrier()
        newest = await stack.enter_async_context(await ann.open(server))
        assert await sockets[0].wait_closed() == 4409
        for socket in (*sockets[1:], newest):
            assert socket.close_code is None
        assert (await newest.say(chat_id, "to all"))["type"] == "ack"
        for socket in (*sockets[1:], newest, other):
            await socket.wait(type="new_message")

        # What is above the limit is refused one by one, with its name, and told when to try again.
        client_id = str(uuid.uuid4())
        for number in range(40):
            await sockets[1].send(type="ping", ref=str(number), client_id=client_id)
        answers = [await sockets[1].wait(ref=str(number)) for number in range(40)]
        codes = [answer["code"] for answer in answers]
        refused = [answer for answer in answers if answer["code"] == "rate_limited"]
        assert codes[:20] == ["invalid_frame"] * 20
        assert len(refused) >= 5
        for error in refused:
            assert (error["retryable"], error["client_id"]) == (True, client_id)
            assert 0 < error["retry_after"] <= 0.2
        # Its other sockets and other people have limits of their own.
        await newest.barrier()
        await other.barrier()
        # Who does not listen at all is closed.
        for _ in range(1500):
            await sockets[2].send(type="ping")
        assert await sockets[2].wait_closed() == 4429


# --- typing and presence ----------------------------------------------------------------------------------------


async def test_typing_reaches_the_others_of_a_chat_and_nobody_else(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo, cy, eve = await people(client, 4)
        group, personal = await ann.group(bo, cy), await ann.personal(bo)
        async with (
            await ann.open(shared_server) as phone,
            await ann.open(shared_server) as laptop,
            await bo.open(shared_server) as his,
            await cy.open(shared_server) as hers,
            await eve.open(shared_server) as stranger,
        ):
            await phone.send(type="typing", chat_id=group)
            await phone.send(type="typing", chat_id=group, active=False)
            for socket in (his, hers):
                for active in (True, False):
                    event = await socket.wait(type="typing")
                    assert event == {"type": "typing", "chat_id": group, "user_id": ann.id, "active": active}
            await phone.send(type="typing", chat_id=personal)
            assert (await his.wait(type="typing"))["chat_id"] == personal
            for chat_id in (group, personal):
                await stranger.send(type="typing", chat_id=chat_id, ref="r")
                assert (await stranger.wait(type="error", ref="r"))["code"] == "chat_not_found"
            # Across a block nothing passes in the personal chat, whoever set it, and nobody is told so.
            await bo.block(ann)
            for socket in (phone, his):
                await socket.send(type="typing", chat_id=personal)
            await phone.send(type="typing", chat_id=group)
            assert (await his.wait(type="typing"))["chat_id"] == group  # in common groups they hear each other
            await ann.remove(group, cy)
            await phone.send(type="typing", chat_id=group)
            await his.wait(type="typing", chat_id=group)
            for socket in (phone, laptop, his, hers, stranger):
                await socket.barrier()
            assert kinds(laptop).count("typing") == kinds(phone).count("typing") == 0
            assert kinds(his).count("typing") == 5
            assert kinds(hers).count("typing") == 3
            assert kinds(stranger) == ["hello", "error", "error"]
            assert "error" not in kinds(phone) + kinds(his)


@pytest.mark.settings(limit_typing_repeat_seconds=3600)
async def test_typing_is_told_once_and_each_change_of_it_at_once(server: Server) -> None:
    async with server.client() as client:
        ann, bo, eve = await people(client, 3)
        group, other = await ann.group(bo), await ann.group(bo)
        async with (
            await ann.open(server) as phone,
            await ann.open(server) as laptop,
            await bo.open(server) as his,
            await eve.open(server) as stranger,
        ):
            for active in (True, False, True):
                for socket in (phone, laptop, phone):
                    await socket.send(type="typing", chat_id=group, active=active)
                    await socket.barrier()
            await phone.say(group, "typed")  # which ends it: what follows is no repetition
            for _ in range(2):
                await laptop.send(type="typing", chat_id=group)
            await phone.send(type="typing", chat_id=other)
            for _ in range(2):  # nobody heard it: to be refused once does not make the second one a repetition
                await stranger.send(type="typing", chat_id=group, ref="r")
                assert (await stranger.wait(type="error", ref="r"))["code"] == "chat_not_found"
            await his.wait(type="typing", chat_id=other)
            for socket in (phone, laptop, his):
                await socket.barrier()
            told = [event for event in his.seen if event["type"] in ("typing", "new_message")]
            assert [event.get("active") for event in told if event["chat_id"] == group] == [
                *(True, False, True),
                None,  # the message
                True,
            ]
        shown = (await client.get("/metrics")).text
        assert value(shown, "dialect_typing_repeats_total") == 3 * 2 + 1


@pytest.mark.settings(limit_typing_repeat_seconds=3600, limit_typing_per_second=0.01, limit_typing_burst=4)
async def test_who_tells_of_their_typing_without_end_is_refused_on_all_their_sockets(server: Server) -> None:
    async with server.client() as client:
        ann, bo, cy = await people(client, 3)
        group = await ann.group(bo, cy)
        async with await ann.open(server) as phone, await ann.open(server) as laptop, await bo.open(server) as his:
            for socket in (phone, laptop):
                for active in (True, False):
                    await socket.send(type="typing", chat_id=group, active=active)
                    await his.wait(type="typing", active=active)
            await laptop.send(type="typing", chat_id=group, active=False)  # a repetition costs nothing
            await laptop.send(type="typing", chat_id=group, ref="r")
            refused = await laptop.wait(type="error")
            assert (refused["code"], refused["ref"], refused["retryable"]) == ("rate_limited", "r", True)
            assert 0 < refused["retry_after"] <= 100
            # Of somebody else nothing is refused.
            await his.send(type="typing", chat_id=group)
            await phone.wait(type="typing", user_id=bo.id)
            await his.barrier()
            assert kinds(his).count("typing") == 4
        shown = (await client.get("/metrics")).text
        assert value(shown, "dialect_rate_limited_total", limit="limit_typing_per_second") == 1


@pytest.mark.settings(limit_typing_repeat_seconds=2)
async def test_who_types_on_is_told_again_after_a_moment(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    monkeypatch.setattr(services.typing, "_clock", clock)
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    inbox = await come_online(services, bo)
    for seconds in (0.0, 1.9, 0.1, 1.9, 0.1):
        clock.advance(seconds)
        await services.typing.type(ann.id, chat_id, active=True)
    assert [event["type"] for event in inbox.events] == ["typing"] * 3
    clock.advance(10)
    await services.typing.type(bo.id, chat_id, active=True)
    assert list(services.typing._told) == [(bo.id, chat_id)]  # nothing is kept that decides nothing


@pytest.mark.settings(limit_presence_per_second=0.01, limit_presence_burst=2)
async def test_lists_of_people_to_watch_are_limited_by_account_over_all_its_sockets(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        await ann.personal(bo)
        async with await ann.open(server) as phone, await ann.open(server) as laptop, await bo.open(server) as his:
            for socket in (phone, laptop):
                await socket.send(type="subscribe_presence", user_ids=[bo.id], ref="within")
                assert (await socket.wait(ref="within"))["type"] == "ack"
            await phone.send(type="subscribe_presence", user_ids=[], ref="beyond")
            refused = await phone.wait(ref="beyond")
            assert (refused["type"], refused["code"], refused["retryable"]) == ("error", "rate_limited", True)
            assert 0 < refused["retry_after"] <= 100
            await his.send(type="subscribe_presence", user_ids=[ann.id], ref="another account")
            assert (await his.wait(ref="another account"))["type"] == "ack"
            # What was refused has changed nothing: the list before it holds.
            phone.inbox.clear()
            await his.close()
            assert (await phone.wait(type="presence"))["online"] is False
        shown = (await client.get("/metrics")).text
        assert value(shown, "dialect_rate_limited_total", limit="limit_presence_per_second") == 1


async def test_presence_is_told_to_those_with_a_personal_chat_who_asked(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo, cy = await people(client, 3)
        await ann.personal(bo)
        await ann.group(bo, cy)
        async with await ann.open(shared_server) as watcher, await cy.open(shared_server) as stranger:
            for socket in (watcher, stranger):
                await socket.send(type="subscribe_presence", user_ids=[ann.id, bo.id, cy.id, 999_999], ref="s")
                await socket.wait(type="ack", ref="s")
            assert [event for event in watcher.seen if event["type"] == "presence"] == [
                {"type": "presence", "user_id": bo.id, "online": False, "last_seen_at": None}
            ]
            watcher.inbox.clear()
            async with await bo.open(shared_server) as phone:
                online = {"type": "presence", "user_id": bo.id, "online": True, "last_seen_at": None}
                assert await watcher.wait(type="presence") == online
                async with await bo.open(shared_server):
                    pass
                await phone.barrier()
            gone = await watcher.wait(type="presence")
            assert (gone["online"], gone["last_seen_at"] is not None) == (False, True)
            await watcher.barrier()
            assert [event["online"] for event in watcher.seen if event["type"] == "presence"] == [False, True, False]
            # A new list replaces the one before, and says how they are now.
            await watcher.send(type="subscribe_presence", user_ids=[])
            await watcher.wait(type="ack")
            async with await bo.open(shared_server):
                await watcher.barrier()
                assert "presence" not in [event["type"] for event in watcher.inbox]
                await watcher.send(type="subscribe_presence", user_ids=[bo.id])
                assert (await watcher.wait(type="presence"))["online"] is True
                # A block ends it, in both directions and without a word.
                await bo.block(ann)
            async with await bo.open(shared_server) as phone:
                await phone.send(type="subscribe_presence", user_ids=[ann.id])
                await phone.wait(type="ack")
                await watcher.send(type="subscribe_presence", user_ids=[bo.id], ref="again")
                await watcher.wait(type="ack", ref="again")
                await bo.unblock(ann)
                await watcher.send(type="subscribe_presence", user_ids=[bo.id])
                assert (await watcher.wait(type="presence"))["online"] is True
            assert (await watcher.wait(type="presence"))["online"] is False
            await stranger.barrier()
            shown = [event["online"] for event in watcher.seen if event["type"] == "presence"]
            assert shown == [False, True, False, True, True, False]
            assert kinds(phone) == ["hello", "ack", "block_changed"]
            assert kinds(stranger) == ["hello", "ack"]


# --- heartbeats and sessions ------------------------------------------------------------------------------------


@pytest.mark.settings(socket_heartbeat_seconds=1)
async def test_heartbeats_tell_who_missed_something(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        await ann.personal(bo)
        for _ in range(3):
            await ann.say(await ann.group(bo), "hello")
        async with await bo.open(server) as socket:
            replica = Replica(bo.id)
            await socket.send(**replica.resume_frame())
            await socket.wait(type="resumed")
            beat = await socket.wait(type="heartbeat")
            while socket.seen:
                replica.apply(socket.seen.pop(0))
            assert (beat["digest"], beat["account_version"]) == (replica.digest(), replica.account_version)
            assert len(replica.chats) == 4
            # Things only Bo sees move the account version; chats joined and written move the digest.
            await bo.block(ann)
            await ann.remove(max(replica.chats), bo)
            await ann.say(max(replica.chats) - 1, "more")
            await socket.wait(type="new_message")
            socket.inbox.clear()
            now = await socket.wait(type="heartbeat")
            while socket.seen:
                replica.apply(socket.seen.pop(0))
            assert len(replica.chats) == 3
            assert (now["digest"], now["account_version"]) == (replica.digest(), replica.account_version)
            assert now["digest"] != beat["digest"]
            assert now["account_version"] == beat["account_version"] + 2
            assert now["server_time"] > beat["server_time"]


@pytest.mark.settings(access_token_expire_minutes=5 / 60)
async def test_a_token_that_runs_out_ends_its_socket_unless_it_is_renewed(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        async with await ann.open(server) as lazy, await ann.open(server) as diligent:
            warning = await diligent.wait(type="token_expiring")
            assert 0 <= warning["expires_in"] <= 5
            # The token of somebody else, or of another session, is not taken.
            form = {"username": ann.account.phone, "password": ann.account.password}
            login = await client.post("/api/v1/auth/token", data=form)
            for token in (bo.account.access_token, login.json()["access_token"]):
                plant(token)
                await diligent.send(type="reauth", token=token, ref="wrong")
                assert (await diligent.wait(type="error", ref="wrong"))["code"] == "wrong_session"
            refreshed = await client.post("/api/v1/auth/refresh", json={"refresh_token": ann.account.refresh_token})
            plant(*(refreshed.json()[name] for name in ("access_token", "refresh_token")))
            await diligent.send(type="reauth", token=refreshed.json()["access_token"], ref="right")
            await diligent.wait(type="ack", ref="right")
            assert await lazy.wait_closed() == 4401
            if diligent.close_code is None:  # it has as long again, minus what this took
                await diligent.barrier()
            await diligent.wait(type="token_expiring")
            assert await diligent.wait_closed() == 4401
            assert (await refusal(server.ws_url, additional_headers=ann.account.headers))[0] == 401


async def test_a_session_that_ends_takes_its_sockets_along_and_no_others(shared_server: Server) -> None:
    async with shared_server.client() as client:
        [ann] = await people(client, 1)
        form = {"username": ann.account.phone, "password": ann.account.password}
        login = (await client.post("/api/v1/auth/token", data=form)).json()
        plant(login["access_token"], login["refresh_token"])
        headers = {"Authorization": f"Bearer {login['access_token']}"}
        async with (
            await ann.open(shared_server) as first,
            await ann.open(shared_server) as second,
            socket_at(shared_server.ws_url, additional_headers=headers) as other,
        ):
            await ann.do("POST", "/auth/logout")
            assert await first.wait_closed() == await second.wait_closed() == 4401
            await other.barrier()

            # Handshakes under way at that moment do not slip through.
            async def open_one() -> int | None:
                try:
                    connection = await connect(shared_server.ws_url, additional_headers=headers)
                except InvalidStatus as refused:
                    return refused.response.status_code
                async with SocketClient(connection) as socket:
                    return await socket.wait_closed()

            handshakes = [asyncio.create_task(open_one()) for _ in range(8)]
            await client.post("/api/v1/auth/logout", headers=headers)
            assert set(await asyncio.gather(*handshakes)) <= {401, 4401}
            assert await other.wait_closed() == 4401


# --- joining, leaving, catching up ------------------------------------------------------------------------------


async def test_joining_brings_a_chat_afresh_and_leaving_ends_it_at_once(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        group = await ann.group(title="Cooks")
        old = await ann.say(group, "old")
        async with (
            await ann.open(shared_server) as writer,
            await bo.open(shared_server) as phone,
            await bo.open(shared_server) as laptop,
        ):
            await ann.add(group, bo)
            added = [await socket.wait(type="chat_added") for socket in (phone, laptop)]
            first = (await ann.chat(group))["last_seq"] + 1
            assert added[0] == added[1] == {"type": "chat_added", "account_version": 1, "chat_id": group}
            for socket in (phone, laptop):
                await socket.wait(type="reset", chat_id=group)
                await socket.wait(type="synced", chat_id=group)
            await ann.say(group, "new")
            for socket in (phone, laptop):
                event = await socket.wait(type="new_message")
                assert event["message"]["content"] == "new"
                assert kinds(socket) == ["hello", "chat_added", "reset", "synced", "new_message"]
                reset, synced = socket.seen[2], socket.seen[3]
                assert event["prev"] == synced["version"] == reset["version"]
                assert (reset["chat"]["title"], reset["chat"]["role"]) == ("Cooks", "member")
                assert contents(reset) == ["old"]
                assert old in reset["messages"]
                assert {member["user_id"] for member in reset["members"]} == {ann.id, bo.id}
                assert {user["id"] for user in reset["users"]} == {ann.id, bo.id}
                assert reset["members_complete"] is True

            # Removed in the middle of a stream: what was said before, all of it, and nothing after.
            async def stream() -> None:
                for number in range(150):
                    await writer.say(group, f"{number} of the stream")

            streaming = asyncio.create_task(stream())
            for socket in (phone, laptop):
                await socket.wait(lambda event: event["message"]["content"].startswith("20 "), type="new_message")
            await ann.remove(group, bo)
            await streaming
            history = (await ann.history(group, limit=100))["items"]
            while history[0]["seq"] > 1:
                history = (await ann.history(group, before=history[0]["seq"], limit=100))["items"] + history
            [removal] = [one for one in history if one["service"] and one["service"]["action"] == "member_removed"]
            for socket in (phone, laptop):
                await socket.wait(type="chat_removed", chat_id=group)
                await socket.barrier()
                heard = [event["message"]["seq"] for event in live(socket, group) if event["type"] == "new_message"]
                assert heard == list(range(first, removal["seq"]))
                of_chat = [event["type"] for event in socket.seen if event.get("chat_id") == group]
                assert of_chat[-1] == "chat_removed"
                assert "members_changed" not in of_chat
            assert removal["seq"] < history[-1]["seq"]
            assert (await phone.say(group, "still here?"))["code"] == "chat_not_found"

            # Back again: afresh, whatever one had.
            await ann.add(group, bo)
            reset = await phone.wait(type="reset", chat_id=group)
            await phone.wait(type="synced", chat_id=group, version=reset["version"])
            # The socket of somebody who leaves goes quiet as well; the others hear of it.
            await bo.leave(group)
            await phone.wait(type="chat_removed", chat_id=group)
            left = await writer.wait(lambda event: not event["members"][0]["active"], type="members_changed")
            assert left["members"][0]["user_id"] == bo.id
            await ann.say(group, "after")
            for socket in (phone, laptop):
                await socket.barrier()
                assert [event["type"] for event in socket.seen if event.get("chat_id") == group][-1] == "chat_removed"


@pytest.mark.settings(resume_max_changes=20)
async def test_resume_brings_each_chat_what_it_needs_over_socket_and_rest(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        names = ["equal", "behind", "far", "ahead", "unknown", "rejoined", "removed"]
        chats = {name: await ann.group(bo, title=name) for name in names}
        known = {name: (await bo.chat(chat_id))["version"] for name, chat_id in chats.items()}
        known["ahead"] += 5
        account_version = (await bo.do("GET", "/users/me"))["account_version"]
        edited = await ann.say(chats["behind"], "to be edited")
        known["behind"] += 1
        await ann.edit(edited, "edited")
        await ann.say(chats["behind"], "missed")
        for number in range(21):
            await ann.say(chats["far"], str(number))
        for name in ("rejoined", "removed"):
            await ann.remove(chats[name], bo)
        await ann.add(chats["rejoined"], bo)
        hidden = await ann.say(chats["equal"], "hidden")
        known["equal"] += 1
        await bo.delete(hidden, for_everyone=False)
        await bo.block(ann)
        state: Json = {"account_version": account_version}
        state["chats"] = {str(chats[name]): known[name] for name in names if name != "unknown"} | {"999999": 7}

        def by_chat(events: list[Json]) -> dict[int, list[str]]:
            found: dict[int, list[str]] = {}
            for event in events:
                if event["type"] in ("chat_changes", "reset", "synced"):
                    found.setdefault(event["chat_id"], []).append(event["type"])
                elif event["type"] == "chat_removed" and event["account_version"] is None:
                    found.setdefault(event["chat_id"], []).append("chat_removed")
            return found

        afresh = ["reset", "synced"]
        expected = {
            chats["equal"]: ["synced"],
            chats["behind"]: ["chat_changes", "synced"],
            chats["far"]: afresh,
            chats["ahead"]: afresh,
            chats["unknown"]: afresh,
            chats["rejoined"]: afresh,
            chats["removed"]: ["chat_removed"],
            999_999: ["chat_removed"],
        }
        async with await bo.open(server) as socket:
            epoch = socket.seen[0]["epoch"]

            async def resume(**changed: Any) -> list[Json]:
                socket.seen.clear()
                await socket.send(type="resume", ref="r", **{**state, "epoch": epoch, **changed})
                await socket.wait(type="resumed", ref="r")
                return list(socket.seen)

            events = await resume()
            assert by_chat(events) == expected
            over_rest = await bo.resume(**state, epoch=epoch)
            assert by_chat(over_rest) == {key: value for key, value in expected.items() if value != ["synced"]}
            told = [event for event in events if event["type"] != "synced" or event["chat_id"] != chats["equal"]]

            def sorted_events(some: list[Json]) -> list[str]:
                return sorted(json.dumps({**event, "ref": None}, sort_keys=True) for event in some)

            assert sorted_events(told) == sorted_events(over_rest)
            [changes] = [event for event in events if event["type"] == "chat_changes"]
            assert (changes["prev"], changes["version"]) == (known["behind"], known["behind"] + 2)
            assert [message["content"] for message in changes["messages"]] == ["edited", "missed"]
            private = {event["type"]: event for event in events if event.get("account_version")}
            assert private["message_hidden"]["message_id"] == hidden["id"]
            assert (private["block_changed"]["user_id"], private["block_changed"]["blocked"]) == (ann.id, True)
            assert private["chat_removed"]["chat_id"] == chats["removed"]
            assert events[-1] == {
                "type": "resumed",
                "ref": "r",
                "epoch": epoch,
                "account_version": (await bo.do("GET", "/users/me"))["account_version"],
                "complete": True,
            }
            # Another database: nothing of what the client holds is worth anything.
            resets = dict.fromkeys((chats[name] for name in names if name != "removed"), afresh)
            gone = {chats["removed"]: ["chat_removed"], 999_999: ["chat_removed"]}
            for other_epoch in ("another", ""):
                assert by_chat(await resume(epoch=other_epoch)) == {**resets, **gone}
                assert by_chat(await bo.resume(**state, epoch=other_epoch)) == {**resets, **gone}
            assert by_chat(await resume(epoch=None)) == expected  # it does not know: taken at its word
            assert by_chat(await resume(chats={})) == resets
            # Live events go on after it.
            await ann.say(chats["far"], "live")
            await socket.wait(lambda event: event["message"]["content"] == "live", type="new_message")


async def test_a_resume_over_rest_that_is_too_long_for_one_answer_goes_on(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(6)]
    changes = [
        SendMessage(chat_id, ann.id, uuid.uuid4().bytes, str(number)) for chat_id in chats for number in range(99)
    ]
    await asyncio.gather(*(services.writer.write(change) for change in changes))
    replica = Replica(bo.id)
    answers: list[list[Json]] = []
    while not answers or not answers[-1][-1]["complete"]:
        state = replica.resume_frame()
        del state["type"]
        answers.append(await bo.resume(**state))
        for event in answers[-1]:
            replica.apply(event)
    assert len(answers) == 2
    await replica.complete(client, bo.account.headers)
    assert replica.view() == (await fetch(client, bo.account.headers, bo.id)).view()


@both_doors
async def test_live_events_never_overtake_catching_up_while_others_write(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client, AsyncExitStack() as stack:
        ann, bo, cy = await people(client, 3)
        group, personal = await ann.group(bo, cy), await ann.personal(cy)
        writers = [await stack.enter_async_context(await person.open(server)) for person in (ann, bo)]
        done = asyncio.Event()

        async def write(socket: SocketClient, chat_ids: list[int]) -> None:
            number = 0
            while not done.is_set():
                number += 1
                acks = await asyncio.gather(*(socket.say(chat_id, "x" * 200) for chat_id in chat_ids for _ in range(5)))
                message = {"chat_id": acks[0]["chat_id"], "message_id": acks[0]["message_id"]}
                await socket.send(type="edit_message", content=f"edited {number}", ref="e", **message)
                await socket.wait(lambda event: event["type"] in ("ack", "error"), ref="e")

        writing = [
            asyncio.create_task(write(writers[0], [group, personal])),
            asyncio.create_task(write(writers[1], [group])),
        ]
        replica = Replica(cy.id)
        for _ in range(12):
            async with await cy.open(server) as socket:
                await socket.send(**replica.resume_frame())
                await socket.wait(type="resumed")
                for _ in range(3):
                    await socket.wait(type="new_message")
                _check_stream(socket)
                for event in socket.seen:
                    replica.apply(event)
                    if event["type"] == "synced":  # what came live before it was a hole of course
                        replica.holes.discard(event["chat_id"])
                assert not replica.holes
        # Devices that come at the same moment: each is greeted before it is told anything.
        opened = await asyncio.gather(*(cy.open(server) for _ in range(6)))
        for socket in opened:
            await socket.wait(type="new_message")
            assert socket.seen[0]["type"] == "hello"
            await socket.close()
        done.set()
        await asyncio.gather(*writing)
        async with await cy.open(server) as socket:
            await socket.send(**replica.resume_frame())
            await socket.wait(type="resumed")
            for event in socket.seen:
                replica.apply(event)
        await replica.complete(client, cy.account.headers)
        assert len(replica.chats[group].messages) > 100
        assert replica.view() == (await fetch(client, cy.account.headers, cy.id)).view()


def _check_stream(socket: SocketClient) -> None:
    """Catching up, then `synced`, then live events, each continuing the one before; no message new twice."""
    at: dict[int, int] = {}
    new: set[int] = set()
    for event in socket.seen:
        chat_id = event.get("chat_id")
        if event["type"] in ("reset", "chat_changes"):
            assert chat_id not in at or event["prev"] == at[chat_id]
        elif event["type"] == "synced":
            at[event["chat_id"]] = event["version"]
        elif "prev" in event and chat_id in at:
            assert event["prev"] == at[chat_id], (event, at)
            at[chat_id] = event["version"]
            if event["type"] == "new_message":
                assert event["message"]["id"] not in new
                new.add(event["message"]["id"])


# --- stopping ---------------------------------------------------------------------------------------------------


@both_doors
async def test_a_stop_acknowledges_what_it_stores_and_asks_everybody_to_come_back(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client, AsyncExitStack() as stack:
        crowd = await people(client, 3)
        group = await crowd[0].group(*crowd[1:])
        flooding, *others = [await stack.enter_async_context(await person.open(server)) for person in crowd]

        async def send(socket: SocketClient) -> str:
            client_id = str(uuid.uuid4())
            await socket.send(type="new_message", chat_id=group, client_id=client_id, content="x")
            return client_id

        async def flood() -> None:
            """Through our own transport more at once than the server lets be under way, and more until it ends."""
            with contextlib.suppress(ConnectionClosed, AssertionError):
                while True:
                    for _ in range(150 if door == "tuned" else 20):
                        await send(flooding)
                    await flooding.barrier()
                    flooding.inbox.clear()

        task = asyncio.create_task(flood())
        await others[0].wait(lambda event: event["message"]["seq"] > 100, type="new_message")
        with held(settings, f"chats WHERE id = {group}"):
            taken = {await send(socket) for socket in others for _ in range(50)}
            for socket in others:
                await socket.barrier()
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            await asyncio.to_thread(server.wait_for_log, '"stopping"')
        codes = [await socket.wait_closed() for socket in (flooding, *others)]
        assert await asyncio.to_thread(server.wait) in (0, -signal.SIGTERM)  # uvicorn ends by the signal it was sent
        assert time.monotonic() - started < 10
        assert codes == [1012] * 3
        await task
        events = [event for socket in (flooding, *others) for event in socket.seen]
    assert {event["code"] for event in events if event["type"] == "error"} <= {"shutting_down"}
    acked = {event["client_id"] for event in events if event["type"] == "ack"}
    assert taken <= acked
    database = Database(settings)
    await database.start()
    async with database.reading() as session:
        query = select(Message.client_id).where(Message.chat_id == group, Message.message_type == "text")
        stored = {str(uuid.UUID(bytes=bytes(row))) for row in (await session.execute(query)).scalars()}
    await database.close()
    assert stored == acked
