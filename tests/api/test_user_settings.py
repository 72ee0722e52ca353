"""What people set for all their chats."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.people import Json, people
from tests.support.servers import Server

DEFAULTS = {"notify_personal": True, "notify_groups": True, "account_version": 0}
PATH = "/users/me/settings"


async def test_settings_change_one_by_one_for_their_owner_alone(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    assert await ann.do("GET", PATH) == DEFAULTS
    expected: Json = dict(DEFAULTS)
    for version, change in enumerate(
        ({"notify_groups": False}, {"notify_personal": False}, {"notify_groups": True}), 1
    ):
        expected |= {**change, "account_version": version}
        assert await ann.do("PATCH", PATH, change) == expected
        assert await ann.do("GET", PATH) == expected
    same: list[Json] = [{}, {"notify_groups": True}, {"notify_personal": False, "notify_groups": None}]
    for change in same:
        assert await ann.do("PATCH", PATH, change) == expected
    assert (await ann.do("GET", "/users/me"))["account_version"] == 3
    assert await bo.do("GET", PATH) == DEFAULTS
    assert await bo.do("PATCH", PATH, {"notify_personal": True}) == DEFAULTS  # nothing to change, nothing stored


async def test_bad_settings_are_refused_and_change_nothing(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    bodies: list[Any] = [
        *([], None, "x", {"notify_groups": "no"}, {"notify_groups": 0}, {"notify_personal": []}),
        *({"notify_channels": True}, {"account_version": 7}, {"notify_groups": False, "unknown": None}),
    ]
    for body in bodies:
        assert await ann.refused("PATCH", PATH, body) == (422, "invalid_request"), body
    assert await ann.do("GET", PATH) == DEFAULTS


async def test_settings_reach_the_other_devices_live_and_after_a_pause(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        async with await ann.open(shared_server) as laptop, await bo.open(shared_server) as his:
            events = []
            for change in ({"notify_groups": False}, {"notify_groups": False}, {"notify_personal": False}):
                settings = await ann.do("PATCH", PATH, change)
                events.append(
                    {
                        "type": "user_settings_changed",
                        "account_version": settings["account_version"],
                        "settings": settings,
                    }
                )
            del events[1]  # which changed nothing
            for socket in (laptop, his):
                await socket.barrier()
            assert [event for event in laptop.seen if event["type"] == "user_settings_changed"] == events
            assert "user_settings_changed" not in str(his.seen)
        for state in ({}, {"account_version": 0}, {"account_version": 1}):
            told = [event for event in await ann.resume(**state) if event["type"] == "user_settings_changed"]
            assert told == events[1:]
        assert "user_settings_changed" not in str(await ann.resume(account_version=2))
        async with await ann.open(shared_server) as phone:
            await phone.send(type="resume", ref="r")
            await phone.wait(type="resumed", ref="r")
            assert [event for event in phone.seen if event["type"] == "user_settings_changed"] == events[1:]
