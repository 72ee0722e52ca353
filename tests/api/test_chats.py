"""Chats over REST: making them, who may do what, what late joiners see, and the list."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pydantic import ValidationError
from sqlalchemy import insert

from app.db.models import Chat, ChatMember, Message
from app.db.repositories.pairs import lock_pair
from app.services.chat_log.changes import SendMessage
from app.services.container import Services
from tests.support.databases import make_settings
from tests.support.people import Json, Person, contents, people
from tests.support.servers import Server
from tests.support.statements import statements

# --- personal and saved chats -----------------------------------------------------------------------------------


async def test_two_people_have_one_personal_chat_whoever_asks(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    first = await ann.request("POST", "/chats/personal", {"user_id": bo.id})
    again = await ann.request("POST", "/chats/personal", {"user_id": bo.id})
    other_side = await bo.request("POST", "/chats/personal", {"user_id": ann.id})
    assert [answer.status_code for answer in (first, again, other_side)] == [201, 200, 200]
    assert first.json() == again.json()
    assert first.json() == {
        "id": first.json()["id"],
        "type": "personal",
        "title": "",
        "description": "",
        "avatar_url": None,
        "history_visible": True,
        "version": 1,
        "last_seq": 0,
        "member_count": 2,
        "role": "member",
        "created_at": first.json()["created_at"],
        "last_activity_at": first.json()["created_at"],
        "unread_count": 0,
        "read_seq": 0,
        "peer_id": bo.id,
        "peer_read_seq": 0,
        "peer_delivered_seq": 0,
        "last_message": None,
        "settings": {
            "muted_until": "1970-01-01T00:00:00.000Z",
            "pinned": False,
            "pin_order": 0,
            "archived": False,
            "marked_unread": False,
            "account_version": 0,
        },
        "draft": {"content": "", "reply_to": None, "updated_at": None, "account_version": 0},
    }
    assert other_side.json() == {**first.json(), "peer_id": ann.id}


async def test_while_a_new_chat_is_counted_nobody_waits_for_a_lock(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bo = await people(client, 2)
    hit = services.rate_limiter.hit
    counted = 0

    async def hit_slowly(name: str, *parts: str | int) -> None:
        nonlocal counted
        if name == "limit_chats_created_per_user":
            counted += 1
            # A Redis that takes its time: the two people's lock, and SQLite's only writer, are free all the while.
            async with services.database.writing() as session:
                await lock_pair(session, ann.id, bo.id)
        await hit(name, *parts)

    monkeypatch.setattr(services.rate_limiter, "hit", hit_slowly)
    made, found = [await ann.request("POST", "/chats/personal", {"user_id": bo.id}) for _ in range(2)]
    assert (made.status_code, found.status_code) == (201, 200)
    assert made.json() == found.json()
    assert counted == 1
    assert await ann.refused("POST", "/chats/personal", {"user_id": 999_999}) == (404, "user_not_found")


async def test_saved_messages_are_the_chat_with_oneself(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    first = await ann.request("POST", "/chats/saved")
    again = await ann.request("POST", "/chats/saved")
    personal = await ann.request("POST", "/chats/personal", {"user_id": ann.id})
    assert [answer.status_code for answer in (first, again, personal)] == [201, 200, 200]
    assert first.json() == again.json() == personal.json()
    chat = first.json()
    assert (chat["type"], chat["member_count"], chat["role"], chat["peer_id"]) == ("saved", 1, "owner", None)
    message = await ann.say(chat["id"], "a note")
    assert (await ann.chat(chat["id"]))["unread_count"] == 0
    assert contents(await ann.history(chat["id"])) == ["a note"]
    assert await bo.refused("GET", f"/chats/{chat['id']}") == (404, "chat_not_found")
    assert await bo.refused("GET", f"/chats/{chat['id']}/messages/{message['id']}") == (404, "chat_not_found")


async def test_what_works_in_groups_only_is_refused_elsewhere(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    saved = (await ann.do("POST", "/chats/saved"))["id"]
    for chat_id in (await ann.personal(bo), saved):
        path = f"/chats/{chat_id}"
        for method, route, body in (
            ("PATCH", "", {"title": "x"}),
            ("POST", "/members", {"user_ids": [cy.id]}),
            ("DELETE", f"/members/{bo.id}", None),
            ("DELETE", f"/members/{ann.id}", None),
            ("PUT", f"/members/{bo.id}/role", {"role": "admin"}),
            ("POST", "/leave", None),
        ):
            assert await ann.refused(method, path + route, body) == (409, "not_a_group"), (method, route)


# --- groups -----------------------------------------------------------------------------------------------------


async def test_a_group_is_made_changed_and_tells_so_in_service_messages(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    body = {"title": " Cooks ", "description": "Soup\nand more", "member_ids": [bo.id, ann.id, bo.id]}
    chat = await ann.do("POST", "/chats/group", body)
    assert (chat["title"], chat["description"], chat["member_count"], chat["role"]) == (
        "Cooks",
        "Soup\nand more",
        2,
        "owner",
    )
    group = chat["id"]
    chat = await ann.do("PATCH", f"/chats/{group}", {"title": "Chefs", "description": "", "history_visible": False})
    assert (chat["title"], chat["description"], chat["history_visible"]) == ("Chefs", "", False)
    unchanged = await ann.do("PATCH", f"/chats/{group}", {"title": "Chefs"})
    assert unchanged["version"] == chat["version"]
    assert (await ann.add(group, cy, bo))["member_count"] == 3
    assert (await ann.add(group, cy))["version"] == (await ann.chat(group))["version"]
    await bo.leave(group)
    await ann.remove(group, cy)
    assert await ann.members(group) == {ann.id: "owner"}
    history = await ann.history(group)
    assert [message["service"] for message in history["items"]] == [
        {"action": "chat_created", "user_ids": [bo.id], "text": "Cooks"},
        {"action": "title_changed", "user_ids": [], "text": "Chefs"},
        {"action": "description_changed", "user_ids": [], "text": ""},
        {"action": "members_added", "user_ids": [cy.id], "text": ""},
        {"action": "member_left", "user_ids": [bo.id], "text": ""},
        {"action": "member_removed", "user_ids": [cy.id], "text": ""},
    ]
    assert [message["sender_id"] for message in history["items"]] == [ann.id] * 4 + [bo.id, ann.id]
    assert [message["seq"] for message in history["items"]] == [1, 2, 3, 4, 5, 6]
    await ann.leave(group)  # the last one may go although they own it
    assert await ann.refused("GET", f"/chats/{group}") == (404, "chat_not_found")


async def test_group_bodies_that_make_no_sense_are_refused(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    bodies: list[Json] = [
        {},
        {"title": ""},
        {"title": "   "},
        {"title": "x" * 129},
        {"title": "a\u202eb"},
        {"title": "x", "description": "x" * 513},
        {"title": "x", "member_ids": [0]},
        {"title": "x", "member_ids": ["1"]},
        {"title": "x", "colour": "red"},
    ]
    for body in bodies:
        assert await ann.refused("POST", "/chats/group", body) == (422, "invalid_request"), body
    group = await ann.group(bo)
    bodies = [{"title": ""}, {"title": None, "colour": 1}, {"history_visible": "no"}]
    for body in bodies:
        assert await ann.refused("PATCH", f"/chats/{group}", body) == (422, "invalid_request"), body
    bodies = [{"user_ids": []}, {"user_ids": [bo.id] * 201}]
    for body in bodies:
        assert await ann.refused("POST", f"/chats/{group}/members", body) == (422, "invalid_request")
    missing = {"title": "x", "member_ids": [bo.id, 999_999]}
    assert await ann.refused("POST", "/chats/group", missing) == (404, "user_not_found")
    assert await ann.refused("POST", f"/chats/{group}/members", {"user_ids": [999_999]}) == (404, "user_not_found")
    assert await ann.refused("DELETE", f"/chats/{group}/members/999999") == (404, "user_not_found")
    role = {"role": "admin"}
    assert await ann.refused("PUT", f"/chats/{group}/members/999999/role", role) == (404, "user_not_found")
    assert [chat["id"] for chat in (await ann.do("GET", "/chats"))["items"]] == [group]


@pytest.mark.settings(max_group_members=3)
async def test_a_full_group_takes_nobody(client: httpx.AsyncClient) -> None:
    ann, bo, cy, di = await people(client, 4)
    everybody = {"title": "x", "member_ids": [bo.id, cy.id, di.id]}
    assert await ann.refused("POST", "/chats/group", everybody) == (409, "group_full")
    group = await ann.group(bo)
    both = {"user_ids": [cy.id, di.id]}
    assert await ann.refused("POST", f"/chats/{group}/members", both) == (409, "group_full")
    await ann.add(group, cy)
    assert await ann.refused("POST", f"/chats/{group}/members", {"user_ids": [di.id]}) == (409, "group_full")
    await ann.remove(group, bo)
    await ann.add(group, di)
    assert await ann.members(group) == {ann.id: "owner", cy.id: "member", di.id: "member"}


async def test_every_role_may_do_exactly_what_it_may(client: httpx.AsyncClient) -> None:
    owner, admin, member, other_admin, other_member, outsider, guest = await people(client, 7)
    not_allowed, hidden, conflict = (403, "not_allowed"), (404, "chat_not_found"), (409, "owner_must_transfer")

    async def group() -> int:
        chat_id = await owner.group(admin, member, other_admin, other_member)
        await owner.set_role(chat_id, admin, "admin")
        await owner.set_role(chat_id, other_admin, "admin")
        return chat_id

    # What: (method, route, body), then the answers to owner, admin, member and outsider; None is a success.
    actions: list[tuple[str, str, Any, list[tuple[int, str] | None]]] = [
        ("PATCH", "", {"title": "New"}, [None, None, not_allowed, hidden]),
        ("PATCH", "", {"description": "New"}, [None, None, not_allowed, hidden]),
        ("PATCH", "", {"history_visible": False}, [None, None, not_allowed, hidden]),
        ("POST", "/members", {"user_ids": [guest.id]}, [None, None, not_allowed, hidden]),
        ("DELETE", f"/members/{other_member.id}", None, [None, None, not_allowed, hidden]),
        ("DELETE", f"/members/{other_admin.id}", None, [None, not_allowed, not_allowed, hidden]),
        ("PUT", f"/members/{other_member.id}/role", {"role": "admin"}, [None, not_allowed, not_allowed, hidden]),
        ("PUT", f"/members/{other_admin.id}/role", {"role": "member"}, [None, not_allowed, not_allowed, hidden]),
        ("PUT", f"/members/{other_member.id}/role", {"role": "owner"}, [None, not_allowed, not_allowed, hidden]),
        ("POST", "/leave", None, [conflict, None, None, hidden]),
        ("GET", "", None, [None, None, None, hidden]),
        ("GET", "/members", None, [None, None, None, hidden]),
        ("POST", "/messages", {"content": "x"}, [None, None, None, hidden]),
    ]
    shared = await group()
    for method, route, body, answers in actions:
        for person, expected in zip((owner, admin, member, outsider), answers, strict=True):
            takes_away = expected is None and ("/members/" in route or route == "/leave")
            chat_id = await group() if takes_away else shared
            answer = await person.request(method, f"/chats/{chat_id}{route}", body)
            got = None if answer.is_success else (answer.status_code, answer.json()["code"])
            assert got == expected, (method, route, body, person.account.username)
    # Against the owner nobody can do anything.
    for person in (admin, member):
        assert await person.refused("DELETE", f"/chats/{shared}/members/{owner.id}") == not_allowed
        role = {"role": "member"}
        assert await person.refused("PUT", f"/chats/{shared}/members/{owner.id}/role", role) == not_allowed
    assert await owner.refused("PUT", f"/chats/{shared}/members/{owner.id}/role", {"role": "admin"}) == conflict
    assert (await owner.set_role(shared, owner, "owner"))["role"] == "owner"
    # Taking oneself out is leaving.
    await member.remove(shared, member)
    assert await member.refused("GET", f"/chats/{shared}") == hidden


async def test_handing_a_group_over_makes_the_old_owner_an_admin(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    group = await ann.group(bo, cy)
    assert (await ann.set_role(group, bo, "owner"))["role"] == "admin"
    assert await cy.members(group) == {ann.id: "admin", bo.id: "owner", cy.id: "member"}
    assert await ann.refused("PUT", f"/chats/{group}/members/{cy.id}/role", {"role": "admin"}) == (403, "not_allowed")
    await bo.set_role(group, ann, "member")
    assert await ann.refused("PATCH", f"/chats/{group}", {"title": "x"}) == (403, "not_allowed")
    await ann.leave(group)
    assert await bo.members(group) == {bo.id: "owner", cy.id: "member"}


async def test_a_foreign_chat_and_a_missing_one_look_the_same_to_the_byte(client: httpx.AsyncClient) -> None:
    ann, bo, cy, eve = await people(client, 4)
    group, personal = await ann.group(bo, cy), await ann.personal(bo)
    await ann.remove(group, cy)
    in_group, in_personal = await ann.say(group, "secret"), await ann.say(personal, "secret")
    calls: list[tuple[str, str, Any]] = [
        ("GET", "/chats/{chat}", None),
        ("PATCH", "/chats/{chat}", {"title": "x"}),
        ("GET", "/chats/{chat}/members", None),
        ("POST", "/chats/{chat}/members", {"user_ids": [eve.id]}),
        ("DELETE", "/chats/{chat}/members/{member}", None),
        ("DELETE", "/chats/{chat}/members/{self}", None),
        ("PUT", "/chats/{chat}/members/{member}/role", {"role": "admin"}),
        ("POST", "/chats/{chat}/leave", None),
        ("POST", "/chats/{chat}/messages", {"content": "x"}),
        ("POST", "/chats/{chat}/messages", {"content": "x", "reply_to": in_group["id"]}),
        ("GET", "/chats/{chat}/messages/{message}", None),
        ("PATCH", "/chats/{chat}/messages/{message}", {"content": "x"}),
        ("DELETE", "/chats/{chat}/messages/{message}", None),
        ("DELETE", "/chats/{chat}/messages/{message}?for_everyone=false", None),
        ("POST", "/chats/{chat}/messages/{message}/read", None),
        ("POST", "/chats/{chat}/messages/{message}/delivered", None),
        ("GET", "/chats/{chat}/messages/{message}/readers", None),
        ("PATCH", "/chats/{chat}/settings", {"pinned": True}),
        ("PATCH", "/chats/{chat}/settings", {}),
        ("PUT", "/chats/{chat}/draft", {"content": "x"}),
        ("PUT", "/chats/{chat}/draft", {"content": "", "reply_to": in_group["id"]}),
        ("DELETE", "/chats/{chat}/draft", None),
        ("GET", "/messages/history/{chat}", None),
    ]

    async def ask(person: Person, method: str, path: str, body: Any, chat_id: int, message_id: int) -> Any:
        names = {"chat": chat_id, "message": message_id, "member": ann.id, "self": person.id}
        url = "/api/v1" + path.format(**names)
        answer = await client.request(method, url, json=body, headers=person.account.headers)
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        return answer.status_code, answer.content, headers

    for person, chat_id, message in ((eve, group, in_group), (cy, group, in_group), (eve, personal, in_personal)):
        for method, path, body in calls:
            foreign = await ask(person, method, path, body, chat_id, message["id"])
            missing = await ask(person, method, path, body, 999_999, 999_999)
            assert foreign == missing, (method, path)
            assert foreign[0] == 404, (method, path)
    # A message of a chat one is not in, under a chat one is in: as if there were no such message.
    own = await eve.group()
    for method, path, body in calls:
        if "{message}" in path:
            foreign = await ask(eve, method, path, body, own, in_group["id"])
            assert foreign == await ask(eve, method, path, body, own, 999_999), (method, path)
            assert foreign[0] == 404, (method, path)
    smuggled = {"content": "x", "reply_to": in_group["id"]}
    assert await eve.refused("POST", f"/chats/{own}/messages", smuggled) == (404, "reply_not_found")
    assert contents(await ann.history(group)) == ["secret"]


async def test_the_members_of_a_chat_come_in_pages(client: httpx.AsyncClient) -> None:
    ann, *others = await people(client, 6)
    group = await ann.group(*others)
    found: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        page = await ann.do("GET", f"/chats/{group}/members", limit=2, **cursor)
        assert {user["id"] for user in page["users"]} == {member["user_id"] for member in page["items"]}
        found += [member["user_id"] for member in page["items"]]
        if page["next"] is None:
            break
        assert len(page["items"]) == 2
        cursor = {"cursor": page["next"]}
    assert found == sorted(person.id for person in (ann, *others))
    assert await ann.refused("GET", f"/chats/{group}/members", cursor="nonsense") == (422, "invalid_cursor")


# --- late joiners -----------------------------------------------------------------------------------------------


async def test_late_joiners_see_what_was_said_before_unless_the_group_says_no(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        for visible in (True, False):
            await _late_joiner(shared_server, ann, bo, visible=visible)


async def _late_joiner(server: Server, ann: Person, bo: Person, *, visible: bool) -> None:
    group = await ann.group(history_visible=visible)
    before = await ann.say(group, "old words")
    doomed = await ann.say(group, "doomed words")
    hidden = [] if visible else ["old words", "doomed words", "new words"]
    async with await bo.open(server) as socket:
        await ann.add(group, bo)
        reset = await socket.wait(type="reset", chat_id=group)
        await socket.wait(type="synced", chat_id=group)
        after = await ann.say(group, "after")
        await socket.wait(lambda event: event["message"]["id"] == after["id"], type="new_message")
        # Changes of what was said before one's time take a version, and no more.
        await ann.edit(before, "new words")
        await ann.delete(doomed)
        version = (await ann.chat(group))["version"]
        last = await socket.wait(chat_id=group, version=version)
        live = [event for event in socket.seen if event.get("chat_id") == group and "prev" in event]
        assert [event["prev"] for event in live[1:]] == [event["version"] for event in live[:-1]]
        if visible:
            assert contents(reset) == ["old words", "doomed words"]
            assert (last["type"], last["message"]["content"]) == ("message_deleted", "")
        else:
            assert reset["messages"] == [reset["chat"]["last_message"]]
            assert reset["messages"][0]["service"]["action"] == "members_added"
            assert [event["type"] for event in live[-2:]] == ["chat_changes", "chat_changes"]
            assert [event["messages"] for event in live[-2:]] == [[], []]
        assert not any(text in str(event) for text in hidden for event in socket.seen)
    first = 1 if visible else reset["messages"][0]["seq"]
    page = await bo.history(group)
    assert page["items"][0]["seq"] == first
    assert page["has_before"] is False
    assert (await bo.history(group, before=first))["items"] == []
    assert (await bo.history(group, around=1))["items"][0]["seq"] == first
    assert contents(page) == (["new words", "", "after"] if visible else ["after"])
    # Catching up from before one's time, or from the moment of joining, brings no more than the history does.
    for since in (None, 1, reset["version"]):
        state = {"chats": {str(group): since}} if since is not None else {}
        events = [one for one in await bo.resume(**state) if one.get("chat_id") == group]
        assert all(message["seq"] >= first for one in events for message in one.get("messages", []))
        assert not any(text in str(one) for text in hidden for one in events)
    one, mark, reply = (
        await bo.request("GET", f"/chats/{group}/messages/{before['id']}"),
        await bo.request("POST", f"/chats/{group}/messages/{before['id']}/read"),
        await bo.request("POST", f"/chats/{group}/messages", {"content": "x", "reply_to": before["id"]}),
    )
    expected = (200, 204, 201) if visible else (404, 404, 404)
    assert (one.status_code, mark.status_code, reply.status_code) == expected


async def test_who_comes_back_sees_what_a_newcomer_sees(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    for visible in (True, False):
        group = await ann.group(bo, history_visible=visible)
        await bo.say(group, "mine")
        await bo.leave(group)
        assert await bo.refused("GET", f"/messages/history/{group}") == (404, "chat_not_found")
        missed = await ann.say(group, "missed")
        chat = await ann.add(group, bo)
        assert chat["member_count"] == 2
        mine = await bo.chat(group)
        assert (mine["role"], mine["unread_count"]) == ("member", 1)  # "Ann added Bo"
        assert contents(await bo.history(group)) == (["mine", "missed"] if visible else [])
        assert (await bo.request("GET", f"/chats/{group}/messages/{missed['id']}")).is_success is visible
        await bo.say(group, "again")
        assert contents(await ann.history(group)) == ["mine", "missed", "again"]


async def test_who_was_an_admin_comes_back_as_a_member(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group(bo)
    await ann.set_role(group, bo, "admin")
    await ann.remove(group, bo)
    await ann.add(group, bo)
    assert await bo.refused("PATCH", f"/chats/{group}", {"title": "x"}) == (403, "not_allowed")


# --- the list ---------------------------------------------------------------------------------------------------


async def test_the_list_has_all_that_is_needed_to_draw_it(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1, display_name="Ann")
    [bo] = await people(client, 1, display_name="Bo")
    [cy] = await people(client, 1, display_name="Cy")
    personal, group = await ann.personal(bo), await ann.group(bo, cy, title="Cooks")
    saved = (await ann.do("POST", "/chats/saved"))["id"]
    question = await ann.say(personal, "hello?")
    await bo.read(question)
    await cy.say(group, "one")
    latest = await cy.say(group, "two")
    page = await ann.do("GET", "/chats")
    assert [chat["id"] for chat in page["items"]] == [group, personal, saved]
    cooks, with_bo, notes = page["items"]
    assert (cooks["type"], cooks["title"], cooks["unread_count"], cooks["member_count"]) == ("group", "Cooks", 2, 3)
    assert cooks["last_message"] == latest
    assert (with_bo["type"], with_bo["title"], with_bo["peer_id"], with_bo["unread_count"]) == (
        "personal",
        "",
        bo.id,
        0,
    )
    assert (with_bo["read_seq"], with_bo["peer_read_seq"], with_bo["peer_delivered_seq"]) == (1, 1, 1)
    assert with_bo["last_message"] == question
    assert (notes["type"], notes["last_message"]) == ("saved", None)
    names = {user["id"]: user["display_name"] for user in page["users"]}
    assert names == {ann.id: "Ann", bo.id: "Bo", cy.id: "Cy"}
    assert not any("phone" in user for user in page["users"])
    assert page["next"] is None
    for chat in page["items"]:
        assert await ann.chat(chat["id"]) == chat
    # What is deleted or hidden shows as its place only.
    await ann.delete(latest, for_everyone=False)
    await bo.say(personal, "oops")
    await bo.delete((await bo.chat(personal))["last_message"])
    with_bo, cooks = (await ann.do("GET", "/chats"))["items"][:2]
    assert (cooks["last_message"]["content"], cooks["last_message"]["hidden"], cooks["unread_count"]) == ("", True, 1)
    assert (with_bo["last_message"]["content"], with_bo["last_message"]["deleted"]) == ("", True)
    assert with_bo["unread_count"] == 0
    assert (await cy.do("GET", "/chats"))["items"][0]["last_message"] == latest


async def test_list_and_reset_bring_the_names_of_the_first_three_whom_a_service_message_is_about(
    client: httpx.AsyncClient,
) -> None:
    ann, bo, *more = await people(client, 7)
    group = await ann.group(bo)
    await ann.add(group, *more)
    page = await bo.do("GET", "/chats")
    assert page["items"][0]["last_message"]["service"]["user_ids"] == [one.id for one in more]
    assert {user["id"] for user in page["users"]} == {ann.id, *(one.id for one in more[:3])}
    # In the chat or not.
    await ann.remove(group, more[4])
    assert {user["id"] for user in (await bo.do("GET", "/chats"))["users"]} == {ann.id, more[4].id}
    [reset] = [event for event in await bo.resume() if event["type"] == "reset"]
    members = {member["user_id"] for member in reset["members"]}
    assert {user["id"] for user in reset["users"]} == {*members, more[4].id}


async def test_pages_of_the_list_neither_skip_nor_repeat_while_messages_arrive(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo, title=f"g{number}") for number in range(10)]
    for chat_id in (chats[4], chats[8]):
        await bo.say(chat_id, "hello")
    order = [chats[i] for i in (8, 4, 9, 7, 6, 5, 3, 2, 1, 0)]
    assert [chat["id"] for chat in (await ann.do("GET", "/chats"))["items"]] == order
    found: list[int] = []
    moved: set[int] = set()
    page: Json = {"next": None}
    for busy in (chats[3], chats[9], None):  # the first is still to come, the second has been
        page = await ann.do("GET", "/chats", limit=3, **({"cursor": page["next"]} if page["next"] else {}))
        found += [chat["id"] for chat in page["items"]]
        if busy is not None:
            await bo.say(busy, "busy")
            moved |= {busy} - set(found)
    assert page["next"] is None
    assert len(set(found)) == len(found)
    assert found == [chat_id for chat_id in order if chat_id not in moved]
    # What has moved up meanwhile stands at the top.
    top = [chat["id"] for chat in (await ann.do("GET", "/chats", limit=3))["items"]]
    assert moved <= set(top)
    for nonsense in ("nonsense", "bm9uc2Vuc2U", page["items"][0]["created_at"], "%00"):
        assert await ann.refused("GET", "/chats", cursor=nonsense) == (422, "invalid_cursor")


@pytest.mark.settings(page_size_max=2)
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/chats", {"limit": 100}),
        ("/chats/{chat}/members", {"limit": 100}),
        ("/messages/history/{chat}", {"limit": 100}),
        ("/users/search", {"limit": 20, "q": "person"}),
        ("/users/blocked", {"limit": 100}),
    ],
)
async def test_no_page_of_any_list_is_longer_than_the_operator_allows(
    client: httpx.AsyncClient, path: str, asked: dict[str, Any]
) -> None:
    ann, *others = await people(client, 5)
    chat = await ann.group(*others)
    for other in others:
        await ann.personal(other)
        await ann.say(chat, "hi")
    if path.endswith("/blocked"):
        for other in others:
            await ann.block(other)
    page = await ann.do("GET", path.format(chat=chat), **asked)
    assert len(page["items"]) == 2


@pytest.mark.parametrize("size", [0, 101])
def test_a_page_longer_than_a_request_may_ask_for_is_no_setting(size: int) -> None:
    with pytest.raises(ValidationError, match="page_size_max"):
        make_settings(page_size_max=size)


async def test_a_list_of_500_chats_takes_no_more_than_four_queries(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than any request may ask for: what grows with the page shows.
    monkeypatch.setattr(services.chats, "_settings", services.settings.model_copy(update={"page_size_max": 500}))
    ann, *others = await people(client, 4)
    first = 10_001
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    chats: list[Json] = []
    members: list[Json] = []
    messages: list[Json] = []
    for number in range(500):
        chat_id, moment = first + number, now + timedelta(seconds=number)
        peer = others[number % 3].id
        counters = {"version": 2, "members_version": 1, "info_version": 0, "member_count": 2, "last_seq": 1}
        chats.append(
            {"id": chat_id, "type": "personal", "created_by": ann.id, "created_at": now, **counters}
            | {"last_activity_at": moment, "changed_at": now}
        )
        joined = {"joined_at": now, "joined_seq": 1, "joined_version": 1, "role": "member"}
        members += [{"chat_id": chat_id, "user_id": user_id, **joined} for user_id in (ann.id, peer)]
        messages.append(
            {"chat_id": chat_id, "seq": 1, "id": chat_id, "version": 2, "sender_id": peer, "created_at": moment}
            | {"client_id": uuid4().bytes, "message_type": "text", "content": f"hello {number}"}
        )
    async with services.database.writing() as session:
        for table, rows in ((Chat, chats), (ChatMember, members), (Message, messages)):
            await session.execute(insert(table), rows)
    with statements(services.database) as whole:
        page = await services.chats.list_chats(ann.id, cursor=None, limit=500)
    assert [chat["id"] for chat in page["items"]] == [first + number for number in reversed(range(500))]
    assert page["items"][0]["unread_count"] == 1
    assert page["items"][0]["last_message"] is not None
    assert len(whole) <= 4, whole
    # The whole request, authentication included, and whatever the length of the page.
    counts = []
    for limit in (1, 100):
        with statements(services.database) as seen:
            assert len((await ann.do("GET", "/chats", limit=limit))["items"]) == limit
        counts.append(len([statement for statement in seen if "chats" in statement or "users" in statement]))
    assert counts[0] == counts[1] <= 4


@pytest.mark.settings(writer_batch_max=400)
async def test_unread_is_exact_to_999_then_1000_stands_for_more(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)

    async def say(count: int) -> None:
        changes = [SendMessage(chat_id, bo.id, uuid4().bytes, "x") for _ in range(count)]
        await asyncio.gather(*(services.writer.write(change) for change in changes))

    async def unread() -> int:
        listed = (await ann.do("GET", "/chats"))["items"][0]["unread_count"]
        assert listed == (await ann.chat(chat_id))["unread_count"]
        return int(listed)

    await say(998)
    assert await unread() == 998
    await say(1)
    assert await unread() == 999
    await say(1)
    assert await unread() == 1000
    await say(5)
    assert await unread() == 1000
    [message] = (await ann.history(chat_id, after=4, limit=1))["items"]
    await ann.read(message)
    assert await unread() == 1000  # 1005 - 5
    [message] = (await ann.history(chat_id, after=5, limit=1))["items"]
    await ann.read(message)
    assert await unread() == 999
    await bo.delete((await ann.history(chat_id, limit=1))["items"][0])
    assert await unread() == 998
    await ann.say(chat_id, "an answer: all is read")
    assert await unread() == 0


@pytest.mark.settings(limit_chats_created_per_user="2/hour")
async def test_chats_that_one_account_creates_are_limited(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    await ann.group(bo)
    personal = await ann.personal(bo)
    assert await ann.refused("POST", "/chats/group", {"title": "x"}) == (429, "rate_limited")
    refusal = await ann.request("POST", "/chats/personal", {"user_id": cy.id})
    assert (refusal.status_code, int(refusal.headers["retry-after"]) > 0) == (429, True)
    assert await ann.personal(bo) == personal  # what exists costs nothing
    await bo.group()
