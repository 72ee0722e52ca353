"""What a block ends between two people, in both directions, and what comes back with its end."""

from __future__ import annotations

from tests.support.people import Person, people
from tests.support.servers import Server
from tests.support.socket_client import SocketClient

Answer = tuple[int, str] | None
"""How a request was refused; None when it was not."""


async def ask(person: Person, method: str, path: str, body: object = None) -> Answer:
    """What comes of a request."""
    answer = await person.request(method, path, body)
    return None if answer.is_success else (answer.status_code, answer.json()["code"])


async def test_a_block_ends_everything_personal_both_ways_until_it_is_lifted(shared_server: Server) -> None:
    async with shared_server.client() as client:
        await _matrix(shared_server, *await people(client, 3), blocker_has_lower_id=True)
        cy, ann, bo = await people(client, 3)
        await _matrix(shared_server, bo, ann, cy, blocker_has_lower_id=False)


async def _matrix(server: Server, ann: Person, bo: Person, cy: Person, *, blocker_has_lower_id: bool) -> None:
    """Ann blocks Bo; Cy is in a group with both."""
    assert (ann.id < bo.id) is blocker_has_lower_id
    chat_id, group = await ann.personal(bo), await cy.group(ann, bo)
    own_groups = {ann.id: await ann.group(), bo.id: await bo.group()}
    sent = {person.id: await person.say(chat_id, "before") for person in (ann, bo)}

    async def effects(person: Person, peer: Person, number: int) -> dict[str, Answer | bool | str]:
        message = sent[person.id]
        path = f"/chats/{chat_id}/messages/{message['id']}"
        invite = await ask(person, "POST", f"/chats/{own_groups[person.id]}/members", {"user_ids": [peer.id]})
        if invite is None:
            await person.remove(own_groups[person.id], peer)
        profile = await person.request("GET", f"/users/{peer.id}")
        found = await person.do("GET", "/users/search", q=peer.account.username)
        return {
            "send": await ask(person, "POST", f"/chats/{chat_id}/messages", {"content": "hello"}),
            "edit": await ask(person, "PATCH", path, {"content": f"edited {number}"}),
            "invite": invite,
            "create": await ask(person, "POST", "/chats/group", {"title": "x", "member_ids": [peer.id]}),
            "profile": "hidden" if profile.is_error else str(profile.json()["relation"]),
            "search": peer.id in {user["id"] for user in found["items"]},
        }

    open_to_all = {
        "send": None,
        "edit": None,
        "invite": None,
        "create": None,
        "profile": "none",
        "search": True,
    }
    by_blocker = (403, "peer_blocked")
    of_blocked = (403, "peer_unavailable")

    assert await effects(ann, bo, 1) == await effects(bo, ann, 1) == open_to_all
    await bo.do("PATCH", "/users/me", {"bio": "about Bo"})
    async with await ann.open(server) as hers, await bo.open(server) as his:
        for socket, peer in ((hers, bo), (his, ann)):
            await socket.send(type="subscribe_presence", user_ids=[peer.id])
            assert (await socket.wait(type="presence"))["online"] is True
        await ann.block(bo)
        await ann.block(bo)  # twice is once
        assert (await hers.wait(type="block_changed"))["user_id"] == bo.id
        before = await ann.chat(chat_id)

        assert await effects(ann, bo, 2) == {
            **dict.fromkeys(("send", "edit", "invite", "create"), by_blocker),
            "profile": "blocked",
            "search": False,
        }
        assert await effects(bo, ann, 2) == {
            **dict.fromkeys(("send", "edit", "invite", "create"), of_blocked),
            "profile": "hidden",
            "search": False,
        }
        # A profile that is blocked shows less; one that blocks looks as if it were not there.
        profile = await ann.do("GET", f"/users/{bo.id}")
        assert (profile["bio"], profile["online"], profile["last_seen_at"]) == ("", False, None)
        hidden = await bo.request("GET", f"/users/{ann.id}")
        missing = await bo.request("GET", "/users/999999")
        assert (hidden.status_code, hidden.content) == (missing.status_code, missing.content)
        # The chat they have is still there to read, and to delete from.
        for person in (ann, bo):
            assert (await person.do("POST", "/chats/personal", {"user_id": (bo if person is ann else ann).id}))[
                "id"
            ] == chat_id
            assert (await person.history(chat_id))["items"][0]["content"] == "edited 1"
        # Over the socket it is the same, and the words are those of anybody who cannot be reached.
        assert (await his.say(chat_id, "psst"))["code"] == "peer_unavailable"
        assert (await hers.say(chat_id, "psst"))["code"] == "peer_blocked"
        for socket in (hers, his):
            await socket.send(type="typing", chat_id=chat_id)
        await bo.read(sent[ann.id])
        # In the common group both stay, and hear each other.
        for number, (person, socket) in enumerate(((ann, his), (bo, hers))):
            await person.say(group, f"group {number}")
            heard = await socket.wait(type="new_message", chat_id=group)
            while heard["message"]["sender_id"] != person.id:
                heard = await socket.wait(type="new_message", chat_id=group)
            assert heard["message"]["content"] == f"group {number}"
            await (hers if person is ann else his).send(type="typing", chat_id=group)
            assert (await socket.wait(type="typing"))["chat_id"] == group
        assert set(await cy.members(group)) == {ann.id, bo.id, cy.id}
        # Nothing else has passed, in either direction; Bo was not told.
        for socket in (hers, his):
            await socket.barrier()
            assert not [event for event in socket.inbox if event.get("chat_id") == chat_id and "prev" in event]
            assert not [event for event in socket.inbox if event["type"] in ("presence", "typing")]
        assert not [event for event in his.seen if event["type"] == "block_changed"]
        assert (await ann.chat(chat_id))["version"] == before["version"]

        await ann.unblock(bo)
        await ann.unblock(bo)
        assert (await hers.wait(type="block_changed", blocked=False))["user_id"] == bo.id
        assert await effects(ann, bo, 3) == await effects(bo, ann, 3) == open_to_all
        for socket in (hers, his):
            await socket.wait(lambda event: event["message"]["content"] == "edited 3", type="message_edited")


async def test_two_who_block_each_other_need_both_to_relent(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo, cy, di = await people(client, 4)
        chat_id = await ann.personal(bo)
        await ann.block(bo)
        await bo.block(ann)
        path, body = f"/chats/{chat_id}/messages", {"content": "x"}
        for person in (ann, bo):
            assert await ask(person, "POST", path, body) == (403, "peer_blocked")
        await ann.unblock(bo)
        assert await ask(ann, "POST", path, body) == (403, "peer_unavailable")
        assert await ask(bo, "POST", path, body) == (403, "peer_blocked")
        await bo.unblock(ann)
        assert await ask(ann, "POST", path, body) is None
        # Those who have no chat cannot begin one.
        await cy.block(di)
        for person, peer, answer in ((cy, di, (403, "peer_blocked")), (di, cy, (403, "peer_unavailable"))):
            assert await ask(person, "POST", "/chats/personal", {"user_id": peer.id}) == answer
        assert (await cy.do("GET", "/chats"))["items"] == (await di.do("GET", "/chats"))["items"] == []
        await cy.unblock(di)
        assert await di.personal(cy) == await cy.personal(di)


async def test_a_block_takes_effect_on_what_is_open_already(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        async with await ann.open(shared_server) as hers, await bo.open(shared_server) as his:

            async def send_many(socket: SocketClient) -> list[str]:
                return [(await socket.say(chat_id, str(number)))["type"] for number in range(30)]

            assert set(await send_many(his)) == {"ack"}
            await ann.block(bo)
            assert set(await send_many(his)) == {"error"}
            await hers.barrier()
            assert len([event for event in hers.seen if event["type"] == "new_message"]) == 30
