"""Drafts: what somebody has begun to write in a chat, on all their devices and on nobody else's."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.people import Json, Person, people
from tests.support.servers import Server

NO_DRAFT = {"content": "", "reply_to": None, "updated_at": None, "account_version": 0}


async def draft_of(person: Person, chat_id: int) -> Json:
    """The draft as the chat shows it, which must be what the list shows."""
    draft: Json = (await person.chat(chat_id))["draft"]
    listed = {chat["id"]: chat["draft"] for chat in (await person.do("GET", "/chats"))["items"]}
    assert listed[chat_id] == draft
    return draft


async def write(person: Person, chat_id: int, content: str, **fields: Any) -> Json:
    """Store a draft; the draft."""
    draft: Json = await person.do("PUT", f"/chats/{chat_id}/draft", {"content": content, **fields})
    return draft


async def account_version(person: Person) -> int:
    """How many private changes there were."""
    version: int = (await person.do("GET", "/users/me"))["account_version"]
    return version


async def test_a_draft_is_kept_changed_and_deleted_for_its_author_alone(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    message = await bo.say(chat_id, "a question")
    assert await draft_of(ann, chat_id) == NO_DRAFT
    before = await account_version(ann)
    draft = await write(ann, chat_id, "  Привет, \U0001f600\n", reply_to=message["id"])
    assert (draft["content"], draft["reply_to"]) == ("  Привет, \U0001f600\n", message["id"])
    assert draft["account_version"] == before + 1
    assert draft["updated_at"] is not None
    assert await draft_of(ann, chat_id) == draft
    assert await draft_of(bo, chat_id) == NO_DRAFT
    assert await write(ann, chat_id, draft["content"], reply_to=message["id"]) == draft  # the same once more
    assert await account_version(ann) == before + 1
    changed = await write(ann, chat_id, draft["content"])  # no longer a reply
    assert (changed["reply_to"], changed["account_version"]) == (None, before + 2)
    await ann.do("DELETE", f"/chats/{chat_id}/draft")
    gone = await draft_of(ann, chat_id)
    assert (gone["content"], gone["reply_to"], gone["account_version"]) == ("", None, before + 3)
    await ann.do("DELETE", f"/chats/{chat_id}/draft")
    assert await write(ann, chat_id, "") == gone
    assert await account_version(ann) == before + 3
    for blank in ("", "   ", "\n\t"):
        await write(ann, chat_id, "again")
        assert (await write(ann, chat_id, blank, reply_to=message["id"]))["content"] == ""
        assert (await draft_of(ann, chat_id))["reply_to"] is None
    assert (await ann.chat(chat_id))["version"] == 2  # the log of the chat knows nothing of it


async def test_sending_a_message_leaves_the_draft_alone(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    draft = await write(ann, chat_id, "hello")
    await ann.say(chat_id, "hello")
    await bo.say(chat_id, "hello")
    assert await draft_of(ann, chat_id) == draft


@pytest.mark.settings(max_message_chars=100)
async def test_bad_drafts_are_refused_and_change_nothing(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id, other = await ann.personal(bo), await ann.group()
    elsewhere, own = await ann.say(other, "elsewhere"), await ann.say(chat_id, "here")
    kept = await write(ann, chat_id, "\U0001f600" * 100, reply_to=own["id"])
    path = f"/chats/{chat_id}/draft"
    assert await ann.refused("PUT", path, {"content": "x" * 101}) == (422, "message_too_long")
    assert await ann.refused("PUT", path, {"content": " " * 101}) == (422, "message_too_long")
    for reply_to in (elsewhere["id"], 999_999):
        body: Any = {"content": "x", "reply_to": reply_to}
        assert await ann.refused("PUT", path, body) == (404, "reply_not_found")
    bodies: list[Any] = [
        *({}, [], None, "x", {"content": None}, {"content": 5}, {"content": ["x"]}, {"content": "a\u0000b"}),
        *({"content": "x", "reply_to": "1"}, {"content": "x", "reply_to": 0}, {"content": "x", "reply_to": 2**53}),
        *({"content": "x", "updated_at": "2026-01-31T12:00:00Z"}, {"content": "x", "client_id": "x"}),
        *({"text": "x"}, {"content": "x", "reply_to": own["id"], "unknown": None}),
    ]
    for body in bodies:
        assert await ann.refused("PUT", path, body) == (422, "invalid_request"), body
    assert await draft_of(ann, chat_id) == kept


async def test_a_draft_answers_only_what_its_author_can_see(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group(history_visible=False)
    before = await ann.say(group, "before his time")
    await ann.add(group, bo)
    path = f"/chats/{group}/draft"
    body = {"content": "x", "reply_to": before["id"]}
    assert await bo.refused("PUT", path, body) == (404, "reply_not_found")
    assert (await ann.do("PUT", path, body))["reply_to"] == before["id"]


async def test_a_stranger_or_former_member_finds_no_chat_to_write_in(client: httpx.AsyncClient) -> None:
    ann, bo, eve = await people(client, 3)
    group = await ann.group(bo)
    message = await ann.say(group, "hello")
    await bo.leave(group)
    for person, chat_id in ((bo, group), (eve, group), (eve, 999_999)):
        for method, body in (
            ("PUT", {"content": "x", "reply_to": message["id"]}),
            ("PUT", {"content": ""}),
            ("DELETE", None),
        ):
            assert await person.refused(method, f"/chats/{chat_id}/draft", body) == (404, "chat_not_found")


async def test_who_is_blocked_may_still_keep_a_draft(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    await ann.block(bo)
    for person in (ann, bo):
        assert (await write(person, chat_id, "unsaid"))["content"] == "unsaid"


async def test_drafts_reach_the_other_devices_live_and_after_a_pause(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id, group = await ann.personal(bo), await ann.group(bo)
        before = await account_version(ann)
        versions = {str(one): (await ann.chat(one))["version"] for one in (chat_id, group)}
        async with await ann.open(shared_server) as laptop, await bo.open(shared_server) as his:
            first, second = await write(ann, chat_id, "Hel"), await write(ann, chat_id, "Hello")
            await write(ann, chat_id, "Hello")
            await ann.do("DELETE", f"/chats/{chat_id}/draft")
            deleted = await draft_of(ann, chat_id)
            third = await write(ann, group, "for all")
            expected = [
                {"type": "draft_changed", "account_version": draft["account_version"], "chat_id": one, "draft": draft}
                for one, draft in ((chat_id, first), (chat_id, second), (chat_id, deleted), (group, third))
            ]
            assert [event["account_version"] for event in expected] == [before + number for number in range(1, 5)]
            for socket in (laptop, his):
                await socket.barrier()
            assert [event for event in laptop.seen if event["type"] == "draft_changed"] == expected
            assert not any(text in str(his.seen) for text in ("Hel", "for all"))
        # Who was away hears the last state of each, the deleted one too.
        events = await ann.resume(account_version=before, chats=versions)
        assert [event for event in events if event["type"] == "draft_changed"] == expected[2:]
        assert "draft_changed" not in str(await ann.resume(account_version=before + 4, chats=versions))
        async with await ann.open(shared_server) as phone:
            await phone.send(type="resume", account_version=before, chats=versions, ref="r")
            await phone.wait(type="resumed", ref="r")
            assert [event for event in phone.seen if event["type"] == "draft_changed"] == expected[2:]
            await phone.send(type="resume", ref="s")
            await phone.wait(type="resumed", ref="s")
            resets = {event["chat_id"]: event["chat"]["draft"] for event in phone.seen if event["type"] == "reset"}
            assert resets == {chat_id: deleted, group: third}
