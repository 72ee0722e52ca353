"""Push, when the machine or our own code fails it: with the services in this process, to hurt them from within."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.config import Settings
from app.db.events import MessageDeliveredCommand
from app.db.models import Chat
from app.db.repositories import push as repository
from app.db.repositories.push import DeviceRow, Target, UnpushedChat
from app.services import notification_service
from app.services.caller import Caller
from app.services.container import Services
from app.services.firebase import Push
from app.services.notification_service import NotificationService
from tests.support.firebase import Answer, FakeGoogle, failure, fake_google
from tests.support.no_network import Wire
from tests.support.people import Person, people
from tests.support.secrets import plant


@pytest.fixture
async def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGoogle]:
    """Google, on this machine."""
    async with fake_google(tmp_path, monkeypatch) as google:
        yield google


@pytest.fixture
def settings(settings: Settings, google: FakeGoogle) -> Settings:
    """Push is on."""
    return settings.model_copy(update={"firebase_credentials_path": google.credentials_path})


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry comes soon."""
    monkeypatch.setattr(notification_service, "BACKOFF_SECONDS", 0.01)


async def with_device(person: Person) -> str:
    token = f"device-{uuid.uuid4().hex}"
    plant(token)
    await person.do("PUT", "/push/device", {"kind": "token", "token": token})
    return token


async def test_a_push_for_which_the_system_has_no_thread_is_tried_again(
    client: httpx.AsyncClient, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    start, refused = threading.Thread.start, 0

    def start_or_not(thread: threading.Thread) -> None:
        nonlocal refused
        if thread.name == "push" and refused < 2:
            refused += 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)
    await ann.say(chat, "hi")
    await google.wait(token)
    assert refused == 2


@pytest.mark.logs_errors
async def test_a_push_that_meets_an_error_nobody_expected_is_tried_again(
    client: httpx.AsyncClient, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    count, failed = repository.count_unread, 0

    async def count_or_not(*args: Any, **options: Any) -> int:
        nonlocal failed
        if failed < 2:
            failed += 1
            raise ProgrammingError("SELECT", {}, Exception("no such column"))
        return await count(*args, **options)

    monkeypatch.setattr(repository, "count_unread", count_or_not)
    await ann.say(chat, "hi")
    await google.wait(token)
    assert failed == 2


@pytest.mark.logs_errors
@pytest.mark.settings(push_give_up_seconds=0.5)
async def test_a_push_that_always_fails_for_our_own_fault_is_given_up_and_the_cursor_goes_on(
    client: httpx.AsyncClient, services: Services, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    tries = 0

    async def fail(*args: Any, **options: Any) -> int:
        nonlocal tries
        tries += 1
        raise ProgrammingError("SELECT", {}, Exception("no such column"))

    monkeypatch.setattr(repository, "count_unread", fail)
    message = await ann.say(chat, "hi")
    await cursor_at(services, chat, message["seq"])
    assert tries > 1
    assert services.notifications.devices_waiting == 0
    assert not google.to(token)


def out_of_quota(retry_after: str | None = None) -> Answer:
    """Too much of it, Google says."""
    answer = failure(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    if retry_after is not None:
        answer.headers["Retry-After"] = retry_after
    return answer


def answered(google: FakeGoogle, token: str) -> list[int]:
    """What Google said to each push to a device."""
    return [push.answered for push in google.to(token)]


async def test_time_alone_ends_the_tries_however_many_there_are(
    client: httpx.AsyncClient, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "BACKOFF_MAX_SECONDS", 0.01)
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    google.answers[token] = [failure(503, "UNAVAILABLE") for _ in range(20)] + [Answer()]
    await ann.say(chat, "hi")
    await google.wait(token, 21, answered=True)
    assert answered(google, token) == [503] * 20 + [200]


@pytest.mark.settings(push_give_up_seconds=0.1)
async def test_a_retry_after_longer_than_the_patience_is_waited_for_and_followed_by_a_try(
    client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    google.answers[token] = [out_of_quota("1"), Answer()]
    await ann.say(chat, "hi")
    await google.wait(token, 1, answered=True)
    refused_at = time.monotonic()
    await google.wait(token, 2, answered=True)
    assert time.monotonic() - refused_at > 0.9
    assert answered(google, token) == [429, 200]


@pytest.mark.settings(push_retry_after_max_seconds=0.2)
async def test_a_retry_after_of_a_day_is_not_believed(client: httpx.AsyncClient, google: FakeGoogle) -> None:
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    google.answers[token] = [out_of_quota("86400"), Answer()]
    await ann.say(chat, "hi")
    await google.wait(token, 2, answered=True)


async def test_who_is_out_of_quota_and_hears_of_no_time_waits_a_minute(services: Services, google: FakeGoogle) -> None:
    firebase = services.notifications._firebase
    assert firebase is not None
    google.answers = {"of nobody": [out_of_quota(), out_of_quota("3"), failure(503, "UNAVAILABLE")]}
    waits = [(await firebase.send(Push("token", "of nobody", "key", {}))).retry_after for _ in range(3)]
    assert waits == [60, 3, None]


@pytest.mark.settings(push_threads=1, push_timeout_seconds=0.5, push_give_up_seconds=0.2)
async def test_what_waited_long_for_its_turn_has_all_its_time_to_fail(
    client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo, cy = await people(client, 3)
    with_bo, with_cy = await ann.personal(bo), await ann.personal(cy)
    token_bo, token_cy = await with_device(bo), await with_device(cy)
    google.answers = {token_bo: [Answer(when=asyncio.Event())], token_cy: [failure(503, "UNAVAILABLE"), Answer()]}
    await ann.say(with_bo, "hangs for a second, twice what a read may take")
    await google.wait(token_bo)
    await ann.say(with_cy, "hi")
    await google.wait(token_cy, 2, answered=True)
    assert answered(google, token_cy) == [503, 200]


@pytest.mark.settings(push_give_up_seconds=1.0)
async def test_what_is_said_while_another_message_is_retried_joins_it_and_has_its_own_time(
    client: httpx.AsyncClient, services: Services, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "BACKOFF_MAX_SECONDS", 0.05)
    monkeypatch.setattr(notification_service, "STORE_SECONDS", 0.05)
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    google.answers[token] = [failure(503, "UNAVAILABLE")]
    first = await ann.say(chat, "hi")
    await google.wait(token, 3)
    second = await ann.say(chat, "are you there?")
    await cursor_at(services, chat, first["seq"])  # this one is given up
    assert services.notifications.devices_waiting == 1
    google.answers[token] = [Answer()]
    await cursor_at(services, chat, second["seq"])
    seqs = [int(push.data["seq"]) for push in google.to(token)]
    assert seqs == sorted(seqs)
    assert answered(google, token)[-1] == 200


@pytest.mark.settings(push_threads=2, push_timeout_seconds=60)
async def test_devices_that_hang_when_tried_again_leave_others_their_turn(
    client: httpx.AsyncClient, google: FakeGoogle
) -> None:
    ann, bo, cy, di = await people(client, 4)
    never = asyncio.Event()
    failing = [(await ann.personal(one), await with_device(one)) for one in (bo, cy)]
    chat, token = await ann.personal(di), await with_device(di)
    google.answers = {bad: [failure(503, "UNAVAILABLE"), Answer(when=never)] for _, bad in failing}
    for other, _ in failing:
        await ann.say(other, "hi")
    tries = [bad for _, bad in failing]
    await google.until(lambda: sum(len(google.to(bad)) for bad in tries) >= 3, "a second try that hangs")
    await ann.say(chat, "hi")
    await google.wait(token, answered=True)


async def test_chats_are_looked_at_together_and_those_beyond_a_look_come_next(
    client: httpx.AsyncClient, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "LOOK_CHATS", 10)
    monkeypatch.setattr(notification_service, "LOOK_MEMBERS", 7)
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(24)]
    token = await with_device(bo)
    looks: list[int] = []
    list_targets = repository.list_targets

    async def counted(session: AsyncSession, chat_ids: Sequence[int], **options: Any) -> list[Target]:
        if "session_id" not in options:
            looks.append(len(chat_ids))
        return await list_targets(session, chat_ids, **options)

    monkeypatch.setattr(repository, "list_targets", counted)
    await asyncio.gather(*(ann.say(chat, "hi") for chat in chats))
    all_chats = {str(chat) for chat in chats}
    await google.until(lambda: {push.data["chat_id"] for push in google.to(token)} == all_chats, "a push of each chat")
    assert 1 < max(looks) <= 4  # the fourth chat of two brings a look to its seven members


async def test_a_busy_chat_that_fills_a_look_holds_up_no_other(
    client: httpx.AsyncClient, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "LOOK_MEMBERS", 2)
    ann, bo, cy = await people(client, 3)
    busy = await ann.group(cy)
    others = [await ann.group(bo) for _ in range(3)]
    token = await with_device(bo)
    find_chats = repository.find_chats

    async def find_and_say(session: AsyncSession, chat_ids: Sequence[int]) -> list[UnpushedChat]:
        await ann.say(busy, "and on")
        return await find_chats(session, chat_ids)

    monkeypatch.setattr(repository, "find_chats", find_and_say)
    await ann.say(busy, "it begins")
    wanted = {(chat, (await ann.say(chat, "hi"))["seq"]) for chat in others}
    await google.until(lambda: wanted <= pushed(google, token), "a push of each chat")


def pushed(google: FakeGoogle, token: str) -> set[tuple[int, int]]:
    """(chat_id, seq) that a device was told of."""
    return {(int(push.data["chat_id"]), int(push.data["seq"])) for push in google.to(token)}


@pytest.mark.logs_errors
@pytest.mark.parametrize("fails", ["once", "always"])
async def test_a_chat_that_cannot_be_looked_at_holds_up_no_other(
    client: httpx.AsyncClient, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(4)]
    token = await with_device(bo)
    await ann.say(chats[0], "the first look, with the search before it, is over")
    await google.wait(token)
    monkeypatch.setattr(notification_service, "SEARCH_SECONDS", 1000.0)
    find_chats = repository.find_chats
    broken = {chats[1]}

    async def find_others(session: AsyncSession, chat_ids: Sequence[int]) -> list[UnpushedChat]:
        if broken.intersection(chat_ids):
            if fails == "once":
                broken.clear()
            raise ProgrammingError("SELECT", {}, Exception("of this chat"))
        return await find_chats(session, chat_ids)

    monkeypatch.setattr(repository, "find_chats", find_others)
    said = await asyncio.gather(*(ann.say(chat, "hi") for chat in chats))
    wanted = {(one["chat_id"], one["seq"]) for one in said if fails == "once" or one["chat_id"] != chats[1]}
    await google.until(lambda: wanted <= pushed(google, token), "a push of each chat")


async def test_across_a_block_neither_is_told_whoever_set_it(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo, cy = await people(client, 3)
    chat = await ann.personal(bo)
    for person in (ann, bo, cy):
        await with_device(person)
    await cy.block(ann)  # concerns nobody else

    async def targets() -> set[int]:
        async with services.database.reading() as session:
            now = datetime.now(UTC).replace(tzinfo=None)
            return {target.device.user_id for target in await repository.list_targets(session, [chat], now=now)}

    assert await targets() == {ann.id, bo.id}
    for one, other in ((ann, bo), (bo, ann)):
        await one.block(other)
        assert await targets() == set()
        await one.unblock(other)
        assert await targets() == {ann.id, bo.id}


async def test_a_cursor_is_stored_soon_past_what_a_device_turned_out_to_have(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "STORE_UNTOLD_SECONDS", 1000.0)

    async def needs_none(*_: object) -> None:
        """Bo's socket has marked it delivered."""

    monkeypatch.setattr(NotificationService, "_attempt", needs_none)
    ann, bo = await people(client, 2)
    await with_device(bo)
    chat = await ann.personal(bo)
    message = await ann.say(chat, "hi")
    await cursor_at(services, chat, message["seq"])  # else it would be pushed after a crash


async def test_a_cursor_waits_for_others_unless_a_push_would_be_repeated(
    client: httpx.AsyncClient, services: Services, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "STORE_UNTOLD_SECONDS", 1000.0)
    ann, bo, cy = await people(client, 3)
    token = await with_device(bo)
    told, untold = await ann.personal(bo), await ann.personal(cy)
    await ann.say(untold, "nobody has a device here")
    message = await ann.say(told, "hi")
    await google.wait(token)
    await cursor_at(services, told, message["seq"])
    assert await cursor_of(services, untold) == 0
    await services.notifications._stop_pushing()
    assert await cursor_of(services, untold) == 1


async def test_a_search_finds_what_lags_behind_however_many_chats_are_busy(
    client: httpx.AsyncClient, services: Services, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notification_service, "SEARCH_CHATS", 2)
    monkeypatch.setattr(notification_service, "SEARCH_SECONDS", 0.05)
    monkeypatch.setattr(notification_service, "STORE_UNTOLD_SECONDS", 1000.0)
    ann, bo, cy = await people(client, 3)
    token = await with_device(bo)
    lagging = await ann.personal(bo)
    busy = [await ann.group(cy) for _ in range(4)]
    monkeypatch.setattr(services.notifications, "hint", lambda _: None)
    for chat in (lagging, *busy):
        await ann.say(chat, "hi")
    [push] = await google.wait(token)
    assert push.data["chat_id"] == str(lagging)


@pytest.mark.settings(push_grace_seconds=1, socket_heartbeat_seconds=0.1, socket_timeout_seconds=0.1)
@pytest.mark.parametrize("desk", ["stays", "leaves", "leaves another worker", "has no socket"])
async def test_a_phone_half_dead_is_told_though_the_desk_marked_the_message_whether_that_stays_or_leaves(
    client: httpx.AsyncClient, services: Services, google: FakeGoogle, monkeypatch: pytest.MonkeyPatch, desk: str
) -> None:
    monkeypatch.setattr(notification_service, "WATCH_SECONDS", 0.3)
    ann, bo = await people(client, 2)
    chat, token = await ann.personal(bo), await with_device(bo)
    [session] = await bo.do("GET", "/auth/sessions")
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    phone = services.connections.add(Wire(), bo.id, session["id"], expires_at)
    another = session["id"] + 1
    if elsewhere := desk == "leaves another worker":
        services.online.update("other", [(bo.id, frozenset({another}))])
    here = (
        None if elsewhere or desk == "has no socket" else services.connections.add(Wire(), bo.id, another, expires_at)
    )
    looks, questions = asyncio.Semaphore(0), 0
    attempt, list_targets = services.notifications._attempt, repository.list_targets

    async def counted_attempt(*arguments: Any) -> float | None:
        looks.release()
        return await attempt(*arguments)

    async def counted(session: AsyncSession, chat_ids: Sequence[int], **options: Any) -> list[Target]:
        nonlocal questions
        questions += "session_id" in options
        return await list_targets(session, chat_ids, **options)

    monkeypatch.setattr(services.notifications, "_attempt", counted_attempt)
    monkeypatch.setattr(repository, "list_targets", counted)
    message = await ann.say(chat, "hi")
    delivered = MessageDeliveredCommand(type="message_delivered", chat_id=chat, message_id=message["id"])
    if desk == "has no socket":
        await services.messages.mark(Caller(bo.id, another, expires_at), delivered)
    else:
        await services.messages.write(bo.id, delivered)
    if elsewhere:
        services.online.update("other", [(bo.id, frozenset())])
    elif here is not None and desk == "leaves":
        services.connections.remove(here)
    async with asyncio.timeout(20):
        for _ in range(5):  # a ping is missed by now, but the farewell to the phone is still on its way
            await looks.acquire()
    assert questions == 1  # the socket alone is watched
    services.connections.remove(phone)
    await google.wait(token)


async def cursor_of(services: Services, chat_id: int) -> int | None:
    async with services.database.reading() as session:
        return await session.scalar(select(Chat.pushed_seq).where(Chat.id == chat_id))


async def cursor_at(services: Services, chat_id: int, seq: int) -> None:
    async with asyncio.timeout(20):
        while True:
            if await cursor_of(services, chat_id) == seq:
                break
            await asyncio.sleep(0.05)


async def test_whoever_ends_to_push_counts_no_device_any_more(services: Services) -> None:
    service = NotificationService(
        settings=services.settings,
        clock=services.clock,
        database=services.database,
        unit_of_work=services.unit_of_work,
        online=services.online,
    )
    chat = notification_service._Chat(1, 0, 0, 0.0, asyncio.Semaphore(), asyncio.Semaphore())
    service._tell(chat, DeviceRow(1, 1, "token", "of nobody", datetime.now(UTC).replace(tzinfo=None)), 1, 1)
    assert service.devices_waiting == 1
    await service._stop_pushing()  # before the device's task takes its first step
    assert service.devices_waiting == 0
    await service.stop()


async def test_a_stop_after_a_stop_does_nothing(services: Services) -> None:
    await services.notifications.stop()
    await services.notifications.stop()
