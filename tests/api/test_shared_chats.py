"""What those who share a chat see of each other, and what of those who came late or are busy."""

from __future__ import annotations

import httpx

from tests.support.people import Person, people


async def bios(viewer: Person, chat_id: int) -> list[dict[int, str]]:
    """What chat list, member list and `reset` say about people in a chat."""
    [reset] = [event for event in await viewer.resume() if event["type"] == "reset" and event["chat_id"] == chat_id]
    pages = [await viewer.do("GET", "/chats"), await viewer.do("GET", f"/chats/{chat_id}/members"), reset]
    return [{user["id"]: user["bio"] for user in page["users"]} for page in pages]


async def test_no_list_shows_a_bio_across_a_block(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    for person in (ann, bo, cy):
        await person.do("PATCH", "/users/me", {"bio": f"about {person.id}"})
    group = await ann.group(bo, cy)
    for one, other in ((ann, bo), (bo, cy), (ann, cy)):
        await one.personal(other)
    everybody = {person.id: f"about {person.id}" for person in (ann, bo, cy)}
    for viewer in (ann, bo, cy):
        for seen in await bios(viewer, group):
            assert seen.items() <= everybody.items()
    await ann.block(bo)
    for viewer, apart in ((ann, bo), (bo, ann)):
        expected = everybody | {apart.id: ""}
        listed, members, reset = await bios(viewer, group)
        assert listed == {user_id: bio for user_id, bio in expected.items() if user_id in listed}
        assert apart.id in listed
        assert members == reset == expected
    assert (await bios(cy, group))[1] == everybody
    await ann.unblock(bo)
    assert (await bios(bo, group))[1] == everybody


async def test_late_joiners_are_no_readers_of_what_was_said_before(client: httpx.AsyncClient) -> None:
    ann, bo, late = await people(client, 3)
    group = await ann.group(bo, history_visible=True)
    before = await ann.say(group, "before")
    await bo.read(before)
    await ann.add(group, late)
    assert await ann.readers(before) == ({bo.id}, {bo.id})
    after = await ann.say(group, "after")
    await late.read(after)
    assert await ann.readers(after) == ({late.id}, {late.id})
    assert await ann.readers(before) == ({bo.id}, {bo.id})
