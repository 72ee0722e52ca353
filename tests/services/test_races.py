"""Races: whatever happens at the same moment, it is as if one came after the other."""

from __future__ import annotations

import asyncio
import itertools
import random
from contextlib import AsyncExitStack

import httpx
import pytest
from sqlalchemy import event, select

from app.core.config import Settings
from app.core.errors import Unavailable
from app.db.models import Chat, ChatMember, UserPair
from app.services.container import Services
from app.services.unit_of_work import _Turns
from tests.support.locks import held
from tests.support.people import Json, Person, people
from tests.support.servers import Server
from tests.support.socket_client import SocketClient


@pytest.mark.parametrize("count", [8, 50])
async def test_a_personal_chat_that_many_ask_for_at_once_is_one(client: httpx.AsyncClient, count: int) -> None:
    ann, bo = await people(client, 2)
    if count == 8:  # the other time the row of the two is there already
        await ann.block(bo)
        await ann.unblock(bo)
    requests = [
        person.request("POST", "/chats/personal", {"user_id": peer.id})
        for person, peer in itertools.islice(itertools.cycle(((ann, bo), (bo, ann))), count)
    ]
    answers = await asyncio.gather(*requests)
    assert sorted(answer.status_code for answer in answers) == [200] * (count - 1) + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    for person in (ann, bo):
        assert len((await person.do("GET", "/chats"))["items"]) == 1
    saved = await asyncio.gather(*(ann.request("POST", "/chats/saved") for _ in range(count)))
    assert sorted(answer.status_code for answer in saved) == [200] * (count - 1) + [201]


async def test_after_a_block_no_personal_chat_begins(client: httpx.AsyncClient, services: Services) -> None:
    crowd = await people(client, 16)
    pairs = list(zip(crowd[::2], crowd[1::2], strict=True))
    for number, (ann, bo) in enumerate(pairs):
        blocker, blocked = (ann, bo) if number % 2 else (bo, ann)
        if number % 4 < 2:
            await blocked.block(blocker)
            await blocked.unblock(blocker)
        requests = [ann.request("POST", "/chats/personal", {"user_id": bo.id}) for _ in range(3)]
        requests += [bo.request("POST", "/chats/personal", {"user_id": ann.id}) for _ in range(3)]
        requests.insert(number % 7, blocker.request("POST", f"/users/block/{blocked.id}"))
        answers = await asyncio.gather(*requests)
        del answers[number % 7]
        created = [answer for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code == 403]
        assert {answer.status_code for answer in answers} <= {200, 201, 403}
        assert len(created) == (0 if len(refused) == 6 else 1)
        assert len((await ann.do("GET", "/chats"))["items"]) == len(created)
    # Both take their time under the pair's lock: the order of the two times is the order of the two commits.
    async with services.database.reading() as session:
        query = select(Chat.created_at, UserPair.low_blocked_at, UserPair.high_blocked_at)
        rows = (await session.execute(query.join(UserPair, UserPair.chat_id == Chat.id))).all()
    for created_at, by_low, by_high in rows:
        blocked_at = by_low or by_high
        assert blocked_at is not None
        assert created_at <= blocked_at


async def test_who_is_removed_says_nothing_after_their_removal(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group()
    accepted = 0
    for round_number in range(6):
        await ann.add(group, bo)
        await bo.say(group, "x")
        sends = [bo.request("POST", f"/chats/{group}/messages", {"content": "x"}) for _ in range(12)]
        sends.insert(2 * round_number, ann.request("DELETE", f"/chats/{group}/members/{bo.id}"))
        answers = await asyncio.gather(*sends)
        removal = answers.pop(2 * round_number)
        assert removal.status_code == 204
        assert {answer.status_code for answer in answers} <= {201, 404}
        sent = [answer.json()["message"]["seq"] for answer in answers if answer.status_code == 201]
        accepted += len(sent) + 1
        last = (await ann.chat(group))["last_message"]
        assert last["service"] == {"action": "member_removed", "user_ids": [bo.id], "text": ""}
        assert all(seq < last["seq"] for seq in sent)
    history = [message for message in await _all(ann, group) if message["sender_id"] == bo.id]
    assert len(history) == accepted


async def _all(person: Person, chat_id: int) -> list[Json]:
    """The whole history."""
    found: list[Json] = []
    while True:
        page = await person.history(chat_id, after=found[-1]["seq"] if found else 0, limit=100)
        found += page["items"]
        if not page["has_after"]:
            return found


async def test_a_group_has_exactly_one_owner_whatever_happens_at_once(
    client: httpx.AsyncClient, services: Services
) -> None:
    crowd = await people(client, 7)
    group = await crowd[0].group(*crowd[1:])
    await crowd[0].set_role(group, crowd[1], "admin")
    dice = random.Random(7)
    watched = 0
    busy = True

    async def watch() -> None:
        nonlocal watched
        while busy:
            async with services.database.reading() as session:
                query = select(ChatMember.role).where(ChatMember.chat_id == group, ChatMember.left_seq.is_(None))
                roles = list((await session.execute(query)).scalars())
            assert roles.count("owner") == 1
            watched += 1

    async def act(person: Person) -> int:
        other = dice.choice(crowd)
        path = f"/chats/{group}/members/{other.id}"
        method, route, body = dice.choice(
            [
                ("PUT", f"{path}/role", {"role": "owner"}),
                ("PUT", f"{path}/role", {"role": "owner"}),
                ("PUT", f"{path}/role", {"role": "admin"}),
                ("PUT", f"{path}/role", {"role": "member"}),
                ("POST", f"/chats/{group}/members", {"user_ids": [other.id]}),
                ("DELETE", path, None),
                ("POST", f"/chats/{group}/leave", None),
            ]
        )
        return (await person.request(method, route, body)).status_code

    watching = asyncio.create_task(watch())
    codes: list[int] = []
    for _ in range(4):
        codes += await asyncio.gather(*(act(person) for person in (*crowd, *crowd)))
    busy = False
    await watching
    assert set(codes) <= {200, 204, 403, 404, 409}
    assert len([code for code in codes if code < 300]) > 3
    assert watched > 3
    # The log tells of every change, and at no version of two owners.
    async with services.database.reading() as session:
        query = select(ChatMember.user_id).where(ChatMember.chat_id == group, ChatMember.role == "owner")
        owners = list((await session.execute(query.where(ChatMember.left_seq.is_(None)))).scalars())
        count = (await session.execute(select(Chat.member_count).where(Chat.id == group))).scalar_one()
    owner = next(person for person in crowd if person.id == owners[0])
    members = await owner.members(group)
    assert (len(members), members[owner.id]) == (count, "owner")


async def test_announcements_of_sends_edits_marks_and_members_leave_in_the_order_of_the_log(server: Server) -> None:
    async with server.client() as client, AsyncExitStack() as stack:
        ann, bo, cy, di = await people(client, 4)
        group = await ann.group(bo, cy)
        first = await ann.say(group, "first")
        sockets = {person.id: await stack.enter_async_context(await person.open(server)) for person in (ann, bo, cy)}

        async def chatter(person: Person, socket: SocketClient) -> None:
            for number in range(15):
                acks = await asyncio.gather(*(socket.say(group, f"{number}") for _ in range(4)))
                message = {"chat_id": group, "message_id": acks[0]["message_id"]}
                await socket.send(type="edit_message", content=f"edited {number}", **message)
                heard = [event["message"] for event in socket.seen if event["type"] == "new_message"]
                others = [one["id"] for one in heard if one["sender_id"] != person.id]
                if others:
                    await socket.send(type="message_read", chat_id=group, message_id=others[-1])
                if number % 5 == 4:
                    await socket.send(type="delete_message", **message)

        async def administer() -> None:
            for number in range(8):
                await ann.add(group, di)
                await ann.do("PATCH", f"/chats/{group}", {"title": f"title {number}"})
                await ann.edit(first, f"edited {number}")
                await ann.remove(group, di)

        people_there = (ann, bo, cy)
        await asyncio.gather(*(chatter(person, sockets[person.id]) for person in people_there), administer())
        for socket in sockets.values():
            await socket.barrier()
        last = (await ann.chat(group))["version"]
        for person in people_there:
            socket = sockets[person.id]
            await socket.barrier()
            events = [event for event in socket.seen if event.get("chat_id") == group and "prev" in event]
            assert events[-1]["version"] == last
            spans = [(event["prev"], event["version"]) for event in events]
            assert spans == [(version - 1, version) for version in range(events[0]["version"], last + 1)]
            assert {event["type"] for event in events} >= {
                "new_message",
                "message_edited",
                "message_deleted",
                "members_changed",
                "chat_updated",
            }
            new = [event["message"] for event in events if event["type"] == "new_message"]
            assert [message["seq"] for message in new] == list(range(new[0]["seq"], new[-1]["seq"] + 1))
        heard = [[event for event in socket.seen if "prev" in event] for socket in sockets.values()]
        assert heard[0] == heard[1] == heard[2]


async def test_what_one_account_changes_at_once_holds_one_connection_and_nobody_up(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group(bo)
    messages = [await ann.say(group, str(number)) for number in range(10)]
    in_use = most = 0

    def checkout(*_: object) -> None:
        nonlocal in_use, most
        in_use += 1
        most = max(most, in_use)

    def checkin(*_: object) -> None:
        nonlocal in_use
        in_use -= 1

    done: list[int] = []

    async def change(person: Person, number: int) -> None:
        if number % 2:
            await person.delete(messages[number], for_everyone=False)
        else:
            await person.do("PUT", f"/chats/{group}/draft", {"content": str(number)})
        done.append(person.id)

    engine = services.database.write_engine.sync_engine
    event.listen(engine, "checkout", checkout)
    event.listen(engine, "checkin", checkin)
    with held(settings, f"users WHERE id = {ann.id}"):
        hers = [asyncio.create_task(change(ann, number)) for number in range(10)]
        his = asyncio.create_task(change(bo, 1))
        async with asyncio.timeout(10):
            while not in_use:
                await services.database.ping()
        if settings.uses_mysql:  # where only hers waits
            await his
            assert done == [bo.id]
    await asyncio.gather(*hers, his)
    assert most <= 2
    assert bo.id in done[:2]


async def test_who_stands_in_line_behind_oneself_is_refused_with_the_first_when_the_database_fails(
    services: Services,
) -> None:
    begun: list[int] = []
    all_there = asyncio.Event()

    async def change(number: int) -> None:
        async with services.unit_of_work.of(1):
            begun.append(number)
            await all_there.wait()
            raise Unavailable("database_unavailable", "The database does not answer.")

    async def arrive_last() -> None:
        all_there.set()

    refused = await asyncio.gather(*map(change, range(5)), arrive_last(), return_exceptions=True)
    assert [error.code for error in refused if isinstance(error, Unavailable)] == ["database_unavailable"] * 5
    assert begun == [0]
    for user_id in (1, 2):
        async with services.unit_of_work.of(user_id):
            pass
    assert 2 not in services.unit_of_work._turns  # nothing is kept of who waits for nothing


@pytest.mark.settings(db_timeout_seconds=0.1)
async def test_whose_turn_does_not_come_in_time_is_told_to_come_back(services: Services) -> None:
    turns = services.unit_of_work._turns.setdefault(1, _Turns(1))
    async with turns.free:
        with pytest.raises(Unavailable) as refused:
            async with services.unit_of_work.of(1):
                pass
    assert (refused.value.code, refused.value.retry_after) == ("busy", 1)
