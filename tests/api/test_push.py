"""Push, with firebase-admin as it is and Google on this machine: who is told of what, and what failures do."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from app.core.config import Settings
from app.db.database import database_url
from tests.conftest import StartServer
from tests.support.accounts import Account
from tests.support.firebase import Answer, FakeGoogle, failure, fake_google, unregistered
from tests.support.people import Person, people
from tests.support.secrets import PLANTED, plant
from tests.support.servers import Server

TEXT = "a word that only people in the chat may read"
PATIENCE = 20.0


@pytest.fixture
async def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGoogle]:
    """Google, who at the end of each test must have learnt no more than numbers."""
    plant(TEXT)
    async with fake_google(tmp_path, monkeypatch) as google:
        yield google
        for pushed in google.pushed:
            assert set(pushed.message) <= {"token", "fid", "data", "android", "apns"}
            assert set(pushed.data) == {"type", "chat_id", "seq", "unread"}
            rest = json.dumps({**pushed.message, "token": "", "fid": ""})
            assert not [secret for secret in PLANTED if secret in rest]


@pytest.fixture
def settings(settings: Settings, google: FakeGoogle, request: pytest.FixtureRequest) -> Settings:
    """Push is on."""
    marked: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("settings"))):
        marked |= mark.kwargs
    grace = marked.get("push_grace_seconds", 0.3)
    return settings.model_copy(
        update={"firebase_credentials_path": google.credentials_path, "push_grace_seconds": grace}
    )


@pytest.fixture
async def server(settings: Settings, start_server: StartServer) -> Server:
    """A server that pushes. It is waited for in a thread: the loop here is Google's."""
    server = start_server(settings, ready=False)
    await asyncio.to_thread(server.wait_until_ready)
    return server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with server.client() as client:
        yield client


async def with_device(person: Person, kind: str = "token") -> str:
    """Register a device; its token."""
    token = f"device-{uuid.uuid4().hex}"
    plant(token)
    await person.do("PUT", "/push/device", {"kind": kind, "token": token})
    return token


async def wait_for_health(client: httpx.AsyncClient, **states: str) -> None:
    """Return once the server says so of what it stands on."""
    async with asyncio.timeout(PATIENCE):
        while True:
            ready = await client.get("/health/ready")
            assert ready.status_code == 200
            if states.items() <= ready.json()["checks"].items():
                return
            await asyncio.sleep(0.1)


async def log_in(person: Person) -> Person:
    """Another session of somebody."""
    account = person.account
    form = {"username": account.phone, "password": account.password}
    tokens = (await person.client.post("/api/v1/auth/token", data=form)).raise_for_status().json()
    plant(tokens["access_token"], tokens["refresh_token"])
    other = Account(
        account.id, account.phone, account.username, account.password, tokens["access_token"], tokens["refresh_token"]
    )
    return Person(person.client, other)


def query(settings: Settings, statement: str, **values: Any) -> list[Any]:
    """Ask the database beside the server."""
    engine = create_engine(database_url(settings, driver="sync"), poolclass=NullPool)
    with engine.connect() as connection:
        rows = list(connection.execute(text(statement), values))
    engine.dispose()
    return rows


async def until(predicate: Callable[[], bool]) -> None:
    """Wait for what stands in the database, which tells nobody."""
    async with asyncio.timeout(PATIENCE):
        while not await asyncio.to_thread(predicate):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.05)


async def pushed_up_to(settings: Settings, chat_id: int, seq: int) -> None:
    """Wait until push is done with a chat up to a message."""

    def there() -> bool:
        [(cursor,)] = query(settings, "SELECT pushed_seq FROM chats WHERE id = :id", id=chat_id)
        return bool(cursor >= seq)

    await until(there)


def devices(settings: Settings) -> set[tuple[int, str]]:
    """(user_id, token) of all registered."""
    return {(row[0], row[1]) for row in query(settings, "SELECT user_id, token FROM push_devices")}


# --- who is told, and of what ---


async def test_everybody_but_the_sender_is_told_in_numbers_only(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo, cy = await people(client, 3)
    token_ann, token_bo, token_cy = await with_device(ann), await with_device(bo), await with_device(cy, "fid")
    chat = await ann.group(bo, cy)
    await google.wait(token_bo)
    await google.wait(token_cy)
    message = await ann.say(chat, TEXT)
    _, to_bo = await google.wait(token_bo, 2)
    _, to_cy = await google.wait(token_cy, 2)
    # That there is a group is unread, too.
    data = {"type": "new_message", "chat_id": str(chat), "seq": str(message["seq"]), "unread": "2"}
    key = f"chat-{chat}"
    assert to_bo.message == {
        "token": token_bo,
        "data": data,
        "android": {"collapse_key": key, "priority": "high"},
        "apns": {
            "headers": {"apns-collapse-id": key, "apns-push-type": "background", "apns-priority": "5"},
            "payload": {"aps": {"content-available": 1}},
        },
    }
    assert to_cy.message == {**{name: to_bo.message[name] for name in ("data", "android", "apns")}, "fid": token_cy}
    await pushed_up_to(settings, chat, message["seq"])
    assert google.to(token_ann) == []
    assert len(google.pushed) == 4


async def test_the_badge_counts_all_chats_of_the_user(client: httpx.AsyncClient, google: FakeGoogle) -> None:
    ann, bo = await people(client, 2)
    group, personal = await ann.group(bo), await ann.personal(bo)
    await bo.read((await bo.history(group))["items"][0])
    for _ in range(3):
        await ann.say(group, TEXT)
    token = await with_device(bo)
    await ann.say(personal, TEXT)
    await google.until(lambda: bool(google.to(token)) and google.to(token)[-1].data["unread"] == "4", "a badge of 4")


async def test_who_is_added_to_a_group_is_told_and_other_service_messages_are_not_pushed(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo, cy = await people(client, 3)
    token_bo, token_cy = await with_device(bo), await with_device(cy)
    chat = await ann.group(bo)
    [created] = await google.wait(token_bo)
    assert created.data["seq"] == "1"
    await pushed_up_to(settings, chat, 1)
    await ann.add(chat, cy)
    [added] = await google.wait(token_cy)
    assert added.data == {"type": "new_message", "chat_id": str(chat), "seq": "2", "unread": "1"}
    await ann.do("PATCH", f"/chats/{chat}", {"title": "Another"})
    await pushed_up_to(settings, chat, 3)
    assert (len(google.to(token_bo)), len(google.to(token_cy))) == (1, 1)


async def test_a_device_online_that_has_the_message_is_left_alone_and_others_of_its_user_are_told(
    server: Server, client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    phone = await log_in(bo)
    token_desk, token_phone = await with_device(bo), await with_device(phone)
    async with await bo.open(server) as socket:
        message = await ann.say(chat, TEXT)
        await socket.wait(type="new_message")
        await socket.send(type="message_delivered", chat_id=chat, message_id=message["id"], ref="d")
        await socket.wait(type="ack", ref="d")
        await google.wait(token_phone)
        await pushed_up_to(settings, chat, message["seq"])
        assert google.to(token_desk) == []


async def test_a_device_online_that_says_nothing_is_told_after_the_grace(
    server: Server, client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    async with await bo.open(server) as socket:
        await ann.say(chat, TEXT)
        await socket.wait(type="new_message")
        await google.wait(token)


@pytest.mark.settings(push_grace_seconds=1.5)
async def test_a_device_whose_socket_died_is_told_though_another_of_its_user_has_the_message(
    server: Server, client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    phone = await log_in(bo)
    token = await with_device(phone)
    async with await bo.open(server) as desk:
        pocket = await phone.open(server)
        message = await ann.say(chat, TEXT)
        await desk.wait(type="new_message")
        await desk.send(type="message_delivered", chat_id=chat, message_id=message["id"])
        pocket.abort()
        await google.wait(token)


async def test_what_was_read_elsewhere_or_comes_from_one_now_blocked_is_not_tried_again(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo, cy = await people(client, 3)
    with_bo, with_cy = await ann.personal(bo), await ann.personal(cy)
    token_bo, token_cy = await with_device(bo), await with_device(cy)
    said = asyncio.Event()
    google.answers = {token: [failure(500, "INTERNAL", when=said)] for token in (token_bo, token_cy)}
    to_bo, to_cy = await ann.say(with_bo, TEXT), await ann.say(with_cy, TEXT)
    await google.wait(token_bo)
    await google.wait(token_cy)
    await bo.block(ann)
    await cy.read(to_cy)
    said.set()
    await pushed_up_to(settings, with_bo, to_bo["seq"])
    await pushed_up_to(settings, with_cy, to_cy["seq"])
    assert (len(google.to(token_bo)), len(google.to(token_cy))) == (1, 1)


async def test_who_muted_the_chat_or_all_of_its_kind_is_not_told(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo, cy, di = await people(client, 4)
    tokens = token_bo, token_cy, token_di = await with_device(bo), await with_device(cy), await with_device(di)
    chat = await ann.group(bo, cy, di)
    for token in tokens:
        await google.wait(token)
    await bo.do("PATCH", f"/chats/{chat}/settings", {"muted_until": "9999-12-31T23:59:59.000Z"})
    await di.do("PATCH", "/users/me/settings", {"notify_groups": False})
    message = await ann.say(chat, TEXT)
    await google.wait(token_cy, 2)
    await pushed_up_to(settings, chat, message["seq"])
    assert len(google.to(token_bo)) == len(google.to(token_di)) == 1
    await bo.do("PATCH", f"/chats/{chat}/settings", {"muted_until": "1970-01-01T00:00:00.000Z"})
    await ann.say(chat, TEXT)
    await google.wait(token_bo, 2)


# --- devices and sessions ---


async def test_a_token_moves_to_the_account_that_registered_it_last(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo, cy = await people(client, 3)
    chat, other = await ann.personal(bo), await ann.personal(cy)
    token = await with_device(bo)
    await cy.do("PUT", "/push/device", {"kind": "token", "token": token})
    assert devices(settings) == {(cy.id, token)}
    message = await ann.say(chat, TEXT)
    await pushed_up_to(settings, chat, message["seq"])
    await ann.say(other, TEXT)
    [pushed] = await google.wait(token)
    assert pushed.data["chat_id"] == str(other)


async def test_of_many_who_register_one_token_at_once_one_has_it(client: httpx.AsyncClient, settings: Settings) -> None:
    everybody = await people(client, 8)
    token = f"device-{uuid.uuid4().hex}"
    answers = await asyncio.gather(
        *(one.request("PUT", "/push/device", {"kind": "token", "token": token}) for one in everybody)
    )
    assert {answer.status_code for answer in answers} <= {204, 503}
    assert [token for _, token in devices(settings)] == [token]


async def test_a_session_that_ends_takes_its_device_with_it(client: httpx.AsyncClient, settings: Settings) -> None:
    [ann] = await people(client, 1)
    for end in ("logout", "revoke", "password", "delete"):
        device = await log_in(ann)
        token = await with_device(device)
        assert devices(settings) == {(ann.id, token)}
        if end == "logout":
            await device.do("POST", "/auth/logout")
        elif end == "revoke":
            sessions = await device.do("GET", "/auth/sessions")
            [own] = [session["id"] for session in sessions if session["current"]]
            await ann.do("DELETE", f"/auth/sessions/{own}")
        elif end == "password":
            new = ann.account.password + "+"
            plant(new)
            await ann.do("POST", "/auth/password", {"old_password": ann.account.password, "new_password": new})
            ann.account.password = new
        else:
            await device.do("DELETE", "/push/device")
        assert devices(settings) == set(), end


async def test_after_logging_out_nothing_is_pushed(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    await bo.do("POST", "/auth/logout")
    message = await ann.say(chat, TEXT)
    await pushed_up_to(settings, chat, message["seq"])
    assert google.to(token) == []


# --- what Google may answer ---


@pytest.mark.parametrize("dead", [unregistered(), failure(403, "PERMISSION_DENIED", "SENDER_ID_MISMATCH")])
async def test_a_dead_token_is_forgotten_at_the_first_answer(
    dead: Answer, client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    google.answers[token] = [dead]
    message = await ann.say(chat, TEXT)
    await pushed_up_to(settings, chat, message["seq"])
    assert devices(settings) == set()
    assert len(google.to(token)) == 1


async def test_a_token_registered_anew_while_google_calls_it_dead_stays(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    said = asyncio.Event()
    google.answers[token] = [unregistered(when=said), Answer()]
    message = await ann.say(chat, TEXT)
    await google.wait(token)
    await bo.do("PUT", "/push/device", {"kind": "token", "token": token})
    said.set()
    await pushed_up_to(settings, chat, message["seq"])
    assert devices(settings) == {(bo.id, token)}
    await ann.say(chat, TEXT)
    await google.wait(token, 2)


async def test_a_retry_after_is_waited_for_and_holds_up_nobody_else(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo, cy = await people(client, 3)
    token_bo, token_cy = await with_device(bo), await with_device(cy)
    chat = await ann.group(bo, cy)
    await google.wait(token_bo, answered=True)
    await google.wait(token_cy, answered=True)
    busy = failure(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    busy.headers["Retry-After"] = "3"
    google.answers[token_bo] = [busy, Answer()]
    first = await ann.say(chat, TEXT)
    await google.wait(token_bo, 2, answered=True)
    refused_at = time.monotonic()
    await google.wait(token_cy, 2)
    second = await ann.say(chat, TEXT)
    await google.wait(token_cy, 3)
    assert len(google.to(token_bo)) == 2
    again = (await google.wait(token_bo, 3))[2]
    assert time.monotonic() - refused_at > 2.9
    assert again.data["seq"] == str(second["seq"])  # what came meanwhile joined the retry
    await pushed_up_to(settings, chat, second["seq"])
    assert [pushed.data["seq"] for pushed in google.to(token_bo)] == ["1", str(first["seq"]), str(second["seq"])]


async def test_a_failing_google_is_asked_again_until_it_works(client: httpx.AsyncClient, google: FakeGoogle) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    works_again = asyncio.Event()
    google.answers[token] = [failure(500, "INTERNAL"), failure(503, "UNAVAILABLE"), Answer(when=works_again)]
    await ann.say(chat, TEXT)
    await google.wait(token, 2, answered=True)
    await wait_for_health(client, push="down")  # and yet ready: everything but push is served
    works_again.set()
    await google.wait(token, 3, answered=True)
    assert [pushed.answered for pushed in google.to(token)] == [500, 503, 200]
    await wait_for_health(client, push="ok")


@pytest.mark.settings(push_give_up_seconds=1.2)
async def test_what_always_fails_is_given_up_and_the_next_message_gets_its_chance(
    client: httpx.AsyncClient, settings: Settings, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    google.answers[token] = [failure(503, "UNAVAILABLE")]
    message = await ann.say(chat, TEXT)
    await pushed_up_to(settings, chat, message["seq"])
    tries = len(google.to(token))
    assert 1 <= tries <= 3
    google.answers[token] = [Answer()]
    message = await ann.say(chat, TEXT)
    await pushed_up_to(settings, chat, message["seq"])
    assert google.to(token)[-1].answered == 200
    assert len(google.to(token)) == tries + 1


@pytest.mark.settings(push_threads=4, push_timeout_seconds=1.0)
async def test_devices_for_which_google_hangs_stall_neither_sends_nor_other_chats(
    client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo, *crowd = await people(client, 8)
    big, personal = await ann.group(*crowd), await ann.personal(bo)
    never = asyncio.Event()
    hung = [await with_device(one) for one in crowd]
    google.answers = {token: [Answer(when=never)] for token in hung}
    token = await with_device(bo)
    await ann.say(big, TEXT)
    await google.until(lambda: sum(len(google.to(one)) for one in hung) >= 2, "the first that hang")
    for count in range(1, 4):
        begun = time.monotonic()
        await ann.say(personal, TEXT)
        assert time.monotonic() - begun < 1
        await google.wait(token, count)
        assert time.monotonic() - begun < 3
    # Not the same two for ever: the others get their turn.
    await google.until(lambda: all(google.to(one) for one in hung), "everybody's first try")


async def test_a_token_endpoint_that_hangs_stalls_no_send_and_pushes_follow(
    client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    google.tokens_open.clear()
    await ann.say(chat, TEXT)
    await google.until(lambda: google.tokens_asked > 0, "the question for a token")
    begun = time.monotonic()
    last = [await ann.say(chat, TEXT) for _ in range(20)][-1]
    assert time.monotonic() - begun < 2
    assert google.pushed == []
    google.tokens_open.set()
    await google.until(
        lambda: bool(google.to(token)) and google.to(token)[-1].data["seq"] == str(last["seq"]), "the last message"
    )


# --- restarts ---


async def test_what_was_committed_before_a_kill_and_not_pushed_is_pushed_after_the_restart(
    server: Server, client: httpx.AsyncClient, settings: Settings, google: FakeGoogle, start_server: StartServer
) -> None:
    ann, bo, cy = await people(client, 3)
    chat, quiet = await ann.personal(bo), await ann.personal(cy)
    token = await with_device(bo)
    google.tokens_open.clear()
    message = await ann.say(chat, TEXT)
    await google.until(lambda: google.tokens_asked > 0, "the question for a token")
    # Cursors are stored together: that of a chat with nobody to tell moves, this one must not.
    await pushed_up_to(settings, quiet, (await ann.say(quiet, TEXT))["seq"])
    server.kill()
    assert google.pushed == []
    google.tokens_open.set()
    again = start_server(settings, ready=False)
    await asyncio.to_thread(again.wait_until_ready)
    [pushed] = await google.wait(token)
    assert pushed.data["seq"] == str(message["seq"])
    await pushed_up_to(settings, chat, message["seq"])
    assert len(google.to(token)) == 1


async def test_a_kill_while_google_fails_loses_nothing(
    server: Server, client: httpx.AsyncClient, settings: Settings, google: FakeGoogle, start_server: StartServer
) -> None:
    ann, bo, cy = await people(client, 3)
    chat = await ann.group(bo, cy)
    token, other = await with_device(bo), await with_device(cy)
    google.answers[token] = [failure(503, "UNAVAILABLE")]
    message = await ann.say(chat, TEXT)
    await google.wait(other)
    await google.wait(token, 2, answered=True)
    server.kill()
    google.answers[token] = [Answer()]
    again = start_server(settings, ready=False)
    await asyncio.to_thread(again.wait_until_ready)
    await pushed_up_to(settings, chat, message["seq"])
    told = google.to(token)[-1]
    assert (told.data["seq"], told.answered) == (str(message["seq"]), 200)
    assert {pushed.message["android"]["collapse_key"] for pushed in google.to(other)} == {f"chat-{chat}"}


async def test_a_stop_waits_for_no_hanging_push_and_the_next_start_repeats_it(
    server: Server, client: httpx.AsyncClient, settings: Settings, google: FakeGoogle, start_server: StartServer
) -> None:
    ann, bo = await people(client, 2)
    chat = await ann.personal(bo)
    token = await with_device(bo)
    google.answers[token] = [Answer(when=asyncio.Event()), Answer()]
    await ann.say(chat, TEXT)
    [first] = await google.wait(token)
    begun = time.monotonic()
    server.signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.wait) in (0, -signal.SIGTERM)
    assert time.monotonic() - begun < 5
    again = start_server(settings, ready=False)
    await asyncio.to_thread(again.wait_until_ready)
    _, second = await google.wait(token, 2)
    assert second.message == first.message  # the phone shows it once: it has the same collapse key
