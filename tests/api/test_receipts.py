"""Receipts: who has read and received what, who is told, and where marks stay private."""

from __future__ import annotations

import httpx
import pytest

from tests.support.people import Json, people
from tests.support.servers import Server
from tests.support.socket_client import SocketClient


def marks(socket: SocketClient) -> list[Json]:
    """The marks a socket was told of, in order."""
    return [event for event in socket.seen if event["type"] in ("message_read", "message_delivered", "read_mark")]


async def test_read_and_delivered_marks_reach_everybody_once_and_only_rise(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo, eve = await people(client, 3)
        chat_id = await ann.personal(bo)
        sent = [await ann.say(chat_id, str(number)) for number in range(1, 6)]
        async with (
            await ann.open(shared_server) as hers,
            await bo.open(shared_server) as phone,
            await bo.open(shared_server) as laptop,
            await eve.open(shared_server) as stranger,
        ):

            async def mark(socket: SocketClient, type: str, number: int) -> str:
                await socket.send(type=type, chat_id=chat_id, message_id=sent[number - 1]["id"], ref="m")
                answer = await socket.wait(lambda event: event["type"] in ("ack", "error"), ref="m")
                return str(answer.get("code", "ack"))

            assert await mark(phone, "message_delivered", 3) == "ack"
            assert await mark(phone, "message_delivered", 2) == "ack"  # late, and so nothing
            assert await mark(laptop, "message_read", 2) == "ack"
            assert await mark(laptop, "message_read", 4) == "ack"  # what is read has been received
            assert await mark(phone, "message_delivered", 4) == "ack"
            assert await mark(phone, "message_read", 4) == "ack"
            assert await mark(hers, "message_read", 5) == "ack"  # one's own: sending has read it
            for type in ("message_read", "message_delivered"):
                assert await mark(stranger, type, 5) == "chat_not_found"
            told = [("message_delivered", 3), ("message_read", 2), ("message_read", 4)]
            for socket in (hers, phone, laptop):
                await socket.barrier()
                assert [(event["type"], event["seq"]) for event in marks(socket)] == told
                assert {event["user_id"] for event in marks(socket)} == {bo.id}
                assert [(event["prev"], event["version"]) for event in marks(socket)] == [(6, 7), (7, 8), (8, 9)]
            assert marks(stranger) == []
        mine = await ann.chat(chat_id)
        assert (mine["peer_read_seq"], mine["peer_delivered_seq"], mine["unread_count"]) == (4, 4, 0)
        assert ((await bo.chat(chat_id))["read_seq"], (await bo.chat(chat_id))["unread_count"]) == (4, 1)
        # Who was away learns where the marks stand.
        events = await ann.resume(chats={str(chat_id): 6})
        [changes] = [event for event in events if event["type"] == "chat_changes"]
        [member] = changes["members"]
        assert (member["user_id"], member["read_seq"], member["delivered_seq"]) == (bo.id, 4, 4)


@pytest.mark.settings(receipts_members_max=3)
async def test_in_large_chats_marks_are_kept_and_told_to_those_who_ask(server: Server) -> None:
    async with server.client() as client:
        ann, bo, cy, di = await people(client, 4)
        group = await ann.group(bo, cy, di)
        message = await ann.say(group, "hello")
        version = (await ann.chat(group))["version"]
        account_version = (await bo.do("GET", "/users/me"))["account_version"]
        async with (
            await ann.open(server) as hers,
            await bo.open(server) as phone,
            await bo.open(server) as laptop,
        ):
            for type in ("message_delivered", "message_read", "message_read"):
                await phone.send(type=type, chat_id=group, message_id=message["id"], ref="m")
                await phone.wait(type="ack", ref="m")
            own = {"type": "read_mark", "account_version": account_version + 1, "chat_id": group, "seq": message["seq"]}
            for socket in (phone, laptop):
                assert await socket.wait(type="read_mark") == own
                await socket.barrier()
                assert marks(socket) == [own]
            await hers.barrier()
            assert marks(hers) == []
            assert (await ann.chat(group))["version"] == version
            assert await cy.readers(message) == ({bo.id}, {bo.id})
            assert (await bo.chat(group))["unread_count"] == 0
            events = await bo.resume(account_version=account_version, chats={str(group): version})
            assert [event for event in events if event["type"] == "read_mark"] == [own]
            # The members' list says no more than the log.
            members: Json = await ann.do("GET", f"/chats/{group}/members")
            assert {one["user_id"]: one["read_seq"] for one in members["items"]}[bo.id] < message["seq"]
            # Once the group is small enough, the next mark is for everybody.
            await ann.remove(group, di)
            latest = await ann.say(group, "smaller")
            await phone.send(type="message_read", chat_id=group, message_id=latest["id"])
            event = await hers.wait(type="message_read")
            assert (event["user_id"], event["seq"]) == (bo.id, latest["seq"])


async def test_a_resume_brings_the_read_mark_of_a_chat_that_was_joined_since(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    old = await ann.group()
    before = (await ann.resume(account_version=0, chats={}))[-1]
    chat_id = await bo.personal(ann)
    await bo.say(chat_id, "1")
    await ann.read(await bo.say(chat_id, "2"))
    events = await ann.resume(account_version=before["account_version"], chats={str(old): 1}, epoch=before["epoch"])
    [mark] = [event for event in events if event["type"] == "read_mark"]
    [reset] = [event for event in events if event["type"] == "reset"]
    assert (mark["chat_id"], mark["seq"]) == (chat_id, 2)
    assert reset["chat"]["read_seq"] == mark["seq"]


async def test_behind_a_block_marks_of_the_personal_chat_stay_private(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo, cy = await people(client, 3)
        chat_id, group = await ann.personal(bo), await ann.group(bo, cy)
        first, second = await ann.say(chat_id, "1"), await ann.say(chat_id, "2")
        in_group = await ann.say(group, "3")
        await bo.read(first)
        for blocker, blocked in ((ann, bo), (bo, ann)):
            async with await ann.open(shared_server) as hers, await bo.open(shared_server) as his:
                await blocker.block(blocked)
                await his.send(type="message_delivered", chat_id=chat_id, message_id=second["id"], ref="d")
                await his.wait(type="ack", ref="d")
                await hers.barrier()
                assert marks(hers) == []
                assert (await ann.chat(chat_id))["peer_delivered_seq"] == 1
                await blocker.unblock(blocked)
        await ann.block(bo)
        async with await ann.open(shared_server) as hers, await bo.open(shared_server) as his:
            await bo.read(second)
            assert (await his.wait(type="read_mark"))["seq"] == 2
            assert (await bo.chat(chat_id))["unread_count"] == 0
            await bo.read(in_group)
            # In the group they hear each other, marks included; that is also where the silence before it shows.
            assert (await hers.wait(type="message_read"))["chat_id"] == group
            assert [event["chat_id"] for event in marks(hers)] == [group]
            assert (await ann.chat(chat_id))["peer_read_seq"] == 1
            # Who read a message says the same: in the group it names them, here it does not.
            assert await ann.readers(second) == (set(), set())
            assert await bo.readers(second) == ({bo.id}, {bo.id})  # who knows their own
            for asker in (ann, cy):
                assert await asker.readers(in_group) == ({bo.id}, {bo.id})
            await ann.unblock(bo)
            await hers.barrier()
            assert (await ann.chat(chat_id))["peer_read_seq"] == 1  # not told afterwards either
            assert await ann.readers(second) == (set(), set())
            third = await ann.say(chat_id, "3")
            await bo.read(third)
            assert (await hers.wait(type="message_read", chat_id=chat_id))["seq"] == 3
            assert await ann.readers(second) == await ann.readers(third) == ({bo.id}, {bo.id})
