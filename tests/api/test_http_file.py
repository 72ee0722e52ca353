"""tests/websocket-test.http tells the truth: every request and every frame of it, top to bottom, on a fresh server."""

from __future__ import annotations

import json
import re
from typing import get_args

import httpx
import pytest
from websockets.asyncio.client import connect

from app.api.webhooks import type_of
from app.db.events import AnyCommand
from tests.support.contract import document, operation_of
from tests.support.rest_client import Expected, HttpFile, HttpRequest, Sender
from tests.support.secrets import plant
from tests.support.servers import ROOT, Server
from tests.support.socket_client import SocketClient

PATH = ROOT / "tests" / "websocket-test.http"
BRIEF = """\
### Регистрация
POST http://localhost:8000/api/v1/auth/register
Content-Type: application/json

{
  "phone": "+79991234567",
  "password": "SecurePass123!",
  "username": "john_doe"
}

### Вход
POST http://localhost:8000/api/v1/auth/token
Content-Type: application/x-www-form-urlencoded

username=+79991234567&password=SecurePass123!

### WebSocket подключение
GET http://localhost:8000/api/v1/messages/ws?token=YOUR_JWT_TOKEN
"""
ANSWERS = {"ack", "error", "pong", "resumed"}


@pytest.fixture
def file() -> HttpFile:
    return HttpFile(PATH)


def _story(file: HttpFile) -> tuple[list[HttpRequest], HttpRequest]:
    """(the requests, the socket at the end)."""
    *requests, socket = file.requests
    assert socket.method == "WEBSOCKET"
    return requests, socket


def _matches(answer: httpx.Response, expected: list[Expected]) -> bool:
    if not expected:
        return answer.is_success
    code = answer.json()["code"] if answer.is_error else None
    return (answer.status_code, code) in expected


async def _send(sender: Sender, request: HttpRequest, *, again: bool) -> httpx.Response:
    answer = await sender.send(request)
    expected = request.expected if again else request.expected[:1]
    assert _matches(answer, expected), (str(request), expected, answer.status_code, answer.text)
    plant(*re.findall(r'"(?:access_token|refresh_token|ticket)":"(.+?)"', answer.text))
    return answer


@pytest.mark.timeout(120)
async def test_every_request_and_frame_of_the_file_is_answered_as_it_says(file: HttpFile, server: Server) -> None:
    requests, socket = _story(file)
    async with server.client() as client:
        sender = Sender(file, client)
        asked = {operation_of((await _send(sender, request, again=False)).request) for request in requests}
        frames = sender.frames(socket)
        connection = await connect(sender.url(socket), max_size=None)
        async with SocketClient(connection) as john:
            await john.wait(type="hello")
            assert len(frames) == len(socket.steps)
            for frame, step in zip(frames, socket.steps, strict=True):
                await _say(john, frame, step)
        routes = {(path, method) for path, methods in document()["paths"].items() for method in methods}
        assert sorted(routes - asked) == [], "the file has no request of these"
        # Whoever tries it a second time, on the database of the first, is told nothing wrong. The person of the
        # first request is registered for good.
        sender = Sender(file, client)
        for request in requests[1:]:
            await _send(sender, request, again=True)


async def _say(john: SocketClient, frame: str, step: tuple[str, str, str | None]) -> None:
    """Send one frame and wait for the answer that the file promises, and for no other."""
    command, expected, code = step
    assert json.loads(frame)["type"] == command
    seen = len(john.seen)
    await john.connection.send(frame)
    if expected != "nothing":
        answer = await john.wait(lambda event: event["type"] in ANSWERS)
        assert (answer["type"], answer.get("code")) == (expected, code), (frame, answer)
    await john.barrier()
    # The last one is the barrier's.
    answers = [event["type"] for event in john.seen[seen:] if event["type"] in ANSWERS][:-1]
    assert answers == ([] if expected == "nothing" else [expected]), frame


def test_the_file_begins_with_the_requests_that_people_know() -> None:
    assert PATH.read_text(encoding="utf-8").startswith(BRIEF + "\n")


def test_every_command_occurs_in_the_file(file: HttpFile) -> None:
    _, socket = _story(file)
    commands = [command for command, *_ in socket.steps]
    assert {type_of(kind) for kind in get_args(AnyCommand)} <= set(commands)
    shown = re.findall(r'"type": "(\w+)"', "\n".join(socket.body))
    assert shown == commands
