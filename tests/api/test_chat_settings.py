"""Mute, pin, archive, mark unread: each for one member alone, on all their devices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from app.core.clock import timestamp
from app.db.database import Database
from app.db.models import ChatSettings
from app.db.repositories import push as push_repository
from app.services.container import Services
from tests.support.people import Json, Person, people
from tests.support.servers import Server
from tests.support.socket_client import SocketClient
from tests.support.statements import statements

FOR_EVER = "9999-12-31T23:59:59.000Z"
NOT_MUTED = "1970-01-01T00:00:00.000Z"
NOTHING_SET = {
    "muted_until": NOT_MUTED,
    "pinned": False,
    "pin_order": 0,
    "archived": False,
    "marked_unread": False,
    "account_version": 0,
}


async def change(person: Person, chat_id: int, **fields: Any) -> Json:
    """Change settings of a chat; all of them as they are then."""
    settings: Json = await person.do("PATCH", f"/chats/{chat_id}/settings", fields)
    return settings


async def settings_of(person: Person, chat_id: int) -> Json:
    """Settings as the chat shows them, which must be what the list shows."""
    settings: Json = (await person.chat(chat_id))["settings"]
    listed = {chat["id"]: chat["settings"] for chat in (await person.do("GET", "/chats"))["items"]}
    assert listed[chat_id] == settings
    return settings


async def account_version(person: Person) -> int:
    """How many private changes there were."""
    version: int = (await person.do("GET", "/users/me"))["account_version"]
    return version


async def listed(person: Person, **params: Any) -> list[int]:
    """Ids of the chats of a list, from pages of two."""
    found: list[int] = []
    while True:
        page = await person.do("GET", "/chats", limit=2, **params)
        found += [chat["id"] for chat in page["items"]]
        if page["next"] is None:
            return found
        params["cursor"] = page["next"]


# --- what they are ----------------------------------------------------------------------------------------------


async def test_each_setting_changes_by_itself_and_shows_to_its_owner_alone(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.personal(bo), await ann.group(bo), (await ann.do("POST", "/chats/saved"))["id"]]
    for chat_id in chats:
        assert await settings_of(ann, chat_id) == NOTHING_SET
        expected = dict(NOTHING_SET)
        steps: list[Json] = [
            {"muted_until": FOR_EVER},
            {"archived": True},
            {"marked_unread": True},
            {"muted_until": "2100-01-01T00:00:00.000Z", "archived": False},
            {"pinned": True},
            {"marked_unread": False},
            {"muted_until": NOT_MUTED},
            {"pinned": False, "archived": True},
        ]
        for step in steps:
            version = await account_version(ann) + 1
            expected |= {**step, "account_version": version}
            if "pinned" in step:
                expected["pin_order"] = version if step["pinned"] else 0
            assert await change(ann, chat_id, **step) == expected
            assert await settings_of(ann, chat_id) == expected
    assert await settings_of(bo, chats[0]) == await settings_of(bo, chats[1]) == NOTHING_SET
    assert (await ann.chat(chats[0]))["version"] == 1  # the log of the chat knows nothing of it


async def test_what_changes_nothing_makes_no_event(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    before = await account_version(ann)
    fresh: list[Json] = [
        {},
        {"pinned": False, "archived": False, "marked_unread": False, "muted_until": NOT_MUTED},
        {"pinned": None, "archived": None, "marked_unread": None, "muted_until": None},
        {"muted_until": "2001-01-01T00:00:00Z"},
    ]
    for body in fresh:
        assert await change(ann, chat_id, **body) == NOTHING_SET
    assert await account_version(ann) == before
    settings = await change(ann, chat_id, pinned=True, archived=True, marked_unread=True, muted_until=FOR_EVER)
    told = {key: value for key, value in settings.items() if key not in ("pin_order", "account_version")}
    for body in ({}, told, {"pinned": True}, {"muted_until": "9999-12-31T23:59:59.999Z"}):
        assert await change(ann, chat_id, **body) == settings
    assert await account_version(ann) == before + 1


async def test_a_mute_is_kept_to_the_millisecond_in_utc(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    for given, kept in (
        ("2100-01-01T03:00:00.1239+03:00", "2100-01-01T00:00:00.123Z"),
        ("2100-01-01t00:00:00z", "2100-01-01T00:00:00.000Z"),
        ("9999-12-31T23:59:59.999999999Z", FOR_EVER),
        ("0001-01-01T00:00:00Z", NOT_MUTED),
        ("2100-06-30T23:59:59.5-00:00", "2100-06-30T23:59:59.500Z"),
    ):
        settings = await change(ann, chat_id, muted_until=given)
        assert settings["muted_until"] == kept
        assert await change(ann, chat_id, muted_until=kept) == settings == await settings_of(ann, chat_id)


async def test_bad_settings_are_refused_and_change_nothing(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    moments: list[Any] = [
        *("", "soon", "forever", "2100-01-01", "2100-01-01T00:00:00", "2100-01-01 00:00:00Z", "12:00:00Z"),
        *("10000-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+14:00", "0000-01-01T00:00:00Z"),
        *("2100-02-30T00:00:00Z", "2100-13-01T00:00:00Z", "2100-01-01T24:00:01Z", "2100-01-01T00:00:60Z"),
        *("2100-01-01T00:00:00+24:00", "2100-01-01T00:00:00+0300", "2100-01-01T00:00:00.Z", " 2100-01-01T00:00:00Z"),
        *("٢١٠٠-01-01T00:00:00Z", "2100-01-01T00:00:00Z\n", "2100-W01-1T00:00:00Z", "-2100-01-01T00:00:00Z"),
        *(4102444800, 4102444800.5, 0, True, [], {}, ["2100-01-01T00:00:00Z"]),
    ]
    bodies: list[Any] = [{"muted_until": moment} for moment in moments]
    no_booleans: list[Any] = ["true", "", 1, 0, 1.0, [], {}, "yes"]
    for name in ("pinned", "archived", "marked_unread"):
        bodies += [{name: value} for value in no_booleans]
    bodies += [{"colour": "red"}, {"pin_order": 3}, {"account_version": 1}, {"pinned": True, "draft": "x"}]
    bodies += [{"chat_id": chat_id}, {"muted_until": FOR_EVER, "pinned": "x"}]
    for body in [*bodies, [], None, "x"]:
        assert await ann.refused("PATCH", f"/chats/{chat_id}/settings", body) == (422, "invalid_request"), body
    assert await settings_of(ann, chat_id) == NOTHING_SET


async def test_a_chat_that_is_not_ones_own_cannot_be_set(client: httpx.AsyncClient) -> None:
    ann, bo, eve = await people(client, 3)
    group = await ann.group(bo)
    await ann.remove(group, bo)
    for person, chat_id in ((bo, group), (eve, group), (eve, 999_999)):
        version = await account_version(person)
        for body in ({}, {"pinned": True}, {"muted_until": FOR_EVER}):
            assert await person.refused("PATCH", f"/chats/{chat_id}/settings", body) == (404, "chat_not_found")
        assert await account_version(person) == version


# --- pins and the list ------------------------------------------------------------------------------------------


@pytest.mark.settings(max_pinned_chats=3)
async def test_pins_are_ordered_and_no_more_than_allowed(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(4)]

    async def pinned() -> list[int]:
        page = (await ann.do("GET", "/chats", pinned=True))["items"]
        return [chat["id"] for chat in sorted(page, key=lambda chat: -chat["settings"]["pin_order"])]

    for chat_id in (chats[2], chats[0], chats[3]):
        await change(ann, chat_id, pinned=True)
    assert await pinned() == [chats[3], chats[0], chats[2]]
    too_many = (409, "too_many_pinned")
    assert await ann.refused("PATCH", f"/chats/{chats[1]}/settings", {"pinned": True, "archived": True}) == too_many
    assert await settings_of(ann, chats[1]) == NOTHING_SET
    await change(ann, chats[2], pinned=True)  # it is pinned already
    await change(ann, chats[0], pinned=False)
    await change(ann, chats[1], pinned=True)
    assert await pinned() == [chats[1], chats[3], chats[2]]
    await change(ann, chats[2], pinned=False)
    await change(ann, chats[2], pinned=True)  # to the top
    assert await pinned() == [chats[2], chats[1], chats[3]]
    await bo.leave(chats[0])
    await change(bo, chats[3], pinned=True)  # everybody has pins of their own
    assert await pinned() == [chats[2], chats[1], chats[3]]


@pytest.mark.settings(max_pinned_chats=2)
async def test_a_chat_that_was_left_makes_room_for_another_pin(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(4)]
    await change(bo, chats[0], pinned=True)
    await change(bo, chats[1], pinned=True)
    await bo.leave(chats[0])
    await ann.remove(chats[1], bo)
    await change(bo, chats[2], pinned=True)
    await change(bo, chats[3], pinned=True)
    assert await listed(bo, pinned=True) == [chats[3], chats[2]]


@pytest.mark.settings(max_pinned_chats=0)
async def test_pins_can_be_forbidden(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    group = await ann.group()
    assert await ann.refused("PATCH", f"/chats/{group}/settings", {"pinned": True}) == (409, "too_many_pinned")
    assert await change(ann, group, pinned=False, archived=True)


async def test_the_list_goes_by_activity_whatever_is_pinned_and_can_be_filtered(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo, title=f"g{number}") for number in range(7)]
    newest_first = chats[::-1]
    for number in (0, 3, 6):
        await change(ann, chats[number], pinned=True)
    for number in (3, 4):
        await change(ann, chats[number], archived=True)
    await change(ann, chats[5], pinned=True)
    await change(ann, chats[5], pinned=False)
    is_pinned, is_archived = {chats[0], chats[3], chats[6]}, {chats[3], chats[4]}
    assert await listed(ann) == newest_first
    assert await listed(ann, pinned=True) == [one for one in newest_first if one in is_pinned]
    assert await listed(ann, pinned=False) == [one for one in newest_first if one not in is_pinned]
    assert await listed(ann, archived=True) == [one for one in newest_first if one in is_archived]
    assert await listed(ann, archived=False) == [one for one in newest_first if one not in is_archived]
    assert await listed(ann, archived=False, pinned=True) == [chats[6], chats[0]]
    assert await listed(bo, pinned=True) == await listed(bo, archived=True) == []
    assert await listed(bo, pinned=False) == await listed(bo, archived=False) == newest_first
    # A pin between two pages moves nothing.
    page = await ann.do("GET", "/chats", limit=3)
    await change(ann, chats[1], pinned=True)
    await change(ann, chats[6], pinned=False)
    rest = await ann.do("GET", "/chats", cursor=page["next"])
    assert [chat["id"] for chat in page["items"] + rest["items"]] == newest_first


async def test_settings_cost_the_list_no_query(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    for number in range(3):
        chat_id = await ann.group(bo)
        await bo.say(chat_id, "hello")
        await change(ann, chat_id, pinned=number > 0, muted_until=FOR_EVER)
        await ann.do("PUT", f"/chats/{chat_id}/draft", {"content": "x"})
    with statements(services.database) as seen:
        await services.chats.list_chats(ann.id, cursor=None, limit=100, pinned=True, archived=False)
    assert len(seen) <= 4, seen


# --- unread -----------------------------------------------------------------------------------------------------


@pytest.mark.settings(receipts_members_max=2)
async def test_reading_ends_what_was_marked_as_unread(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    for chat_id in (await ann.personal(bo), await ann.group(bo, cy)):  # marks for all, and for oneself alone
        first, last = await bo.say(chat_id, "first"), await bo.say(chat_id, "last")
        kept = await change(ann, chat_id, marked_unread=True, muted_until=FOR_EVER, pinned=True)
        other = await change(bo, chat_id, marked_unread=True)
        for message in (last, first, last):  # which moves the mark, and which moves nothing
            await ann.read(message)
            settings = await settings_of(ann, chat_id)
            assert settings["account_version"] == await account_version(ann)
            expected = {**kept, "marked_unread": False, "account_version": settings["account_version"]}
            assert settings == expected
            before = await account_version(ann)
            await ann.read(message)
            assert await account_version(ann) == before
            await change(ann, chat_id, marked_unread=True)
        assert await settings_of(bo, chat_id) == other
        # What is refused reads nothing, what is sent or received does not show that somebody looked.
        assert await ann.refused("POST", f"/chats/{chat_id}/messages/999999/read") == (404, "message_not_found")
        await ann.say(chat_id, "sent")
        await bo.say(chat_id, "received")
        assert (await settings_of(ann, chat_id))["marked_unread"] is True


async def test_only_read_marks_look_for_what_is_marked_as_unread(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    with statements(services.database) as seen:
        message = await bo.say(chat_id, "hello")
        await bo.edit(message, "hello!")
    assert not any("chat_settings" in statement for statement in seen)
    with statements(services.database) as seen:
        await ann.read(message)
    assert len([statement for statement in seen if "chat_settings" in statement]) == 1
    await change(ann, chat_id, archived=True)
    with statements(services.database) as seen:  # settings, and none of them that would have to end
        await ann.read(await bo.say(chat_id, "again"))
    assert not any("UPDATE chat_settings" in statement for statement in seen)


async def test_marking_as_unread_and_reading_at_once_loses_no_other_setting(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    message = await bo.say(chat_id, "hello")
    for number in range(15):
        moment = f"2100-01-01T00:00:{number:02}.000Z"
        await change(ann, chat_id, marked_unread=True)
        await asyncio.gather(ann.read(message), change(ann, chat_id, muted_until=moment, archived=number % 2 == 0))
        settings = await settings_of(ann, chat_id)
        assert (settings["muted_until"], settings["archived"]) == (moment, number % 2 == 0)
        assert settings["marked_unread"] is False


# --- devices ----------------------------------------------------------------------------------------------------


def told(socket: SocketClient) -> list[Json]:
    return [event for event in socket.seen if event["type"] == "chat_settings_changed"]


async def test_every_change_reaches_all_devices_and_nobody_else(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        message = await bo.say(chat_id, "hello")
        await ann.read(message)
        async with (
            await ann.open(shared_server) as phone,
            await ann.open(shared_server) as laptop,
            await bo.open(shared_server) as his,
        ):
            bodies: list[Json] = [
                {"muted_until": FOR_EVER},
                {"muted_until": NOT_MUTED},
                {"pinned": True},
                {"pinned": False},
                {"archived": True},
                {"archived": False},
                {"marked_unread": True},
            ]
            expected = []
            for body in [*bodies, bodies[-1]]:
                settings = await change(ann, chat_id, **body)
                expected.append(
                    {
                        "type": "chat_settings_changed",
                        "account_version": settings["account_version"],
                        "chat_id": chat_id,
                        "settings": settings,
                    }
                )
            del expected[-1]  # the last one changed nothing
            await phone.send(type="message_read", chat_id=chat_id, message_id=message["id"], ref="r")
            await phone.wait(type="ack", ref="r")
            read = await settings_of(ann, chat_id)
            assert read["marked_unread"] is False
            expected.append(
                {
                    "type": "chat_settings_changed",
                    "account_version": read["account_version"],
                    "chat_id": chat_id,
                    "settings": read,
                }
            )
            for socket in (phone, laptop, his):
                await socket.barrier()
            assert told(phone) == told(laptop) == expected
            versions = [event["account_version"] for event in expected]
            assert versions == list(range(versions[0], versions[0] + len(bodies) + 1))
            assert told(his) == []


async def test_a_device_that_was_away_is_told_the_last_state_of_each_chat(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        one, two, three = await ann.personal(bo), await ann.group(bo), await ann.group(bo)
        await change(ann, three, archived=True)
        before = await account_version(ann)
        versions = {str(chat_id): (await ann.chat(chat_id))["version"] for chat_id in (one, two, three)}
        await change(ann, one, pinned=True)
        last_two = await change(ann, two, muted_until=FOR_EVER)
        last_one = await change(ann, one, archived=True)
        expected = [
            {"type": "chat_settings_changed", "account_version": last["account_version"]}
            | {"chat_id": chat_id, "settings": last}
            for chat_id, last in ((two, last_two), (one, last_one))
        ]
        events = await ann.resume(account_version=before, chats=versions)
        assert [event for event in events if event["type"] == "chat_settings_changed"] == expected
        assert events[-1]["account_version"] == before + 3
        async with await ann.open(shared_server) as phone:
            await phone.send(type="resume", account_version=before, chats=versions, ref="r")
            await phone.wait(type="resumed", ref="r")
            assert told(phone) == expected
            # Who holds nothing is told by each `reset`.
            await phone.send(type="resume", ref="s")
            await phone.wait(type="resumed", ref="s")
            assert told(phone) == expected
            resets = {event["chat_id"]: event["chat"] for event in phone.seen if event["type"] == "reset"}
            for chat_id in (one, two, three):
                assert resets[chat_id]["settings"] == await settings_of(ann, chat_id)


async def test_leaving_ends_settings_and_draft_and_who_returns_begins_anew(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        group, other = await ann.group(bo), await ann.group(bo)
        for goes_willingly in (True, False):
            async with await bo.open(shared_server) as phone:
                kept = await change(bo, other, archived=True)
                await change(bo, group, pinned=True, archived=True, marked_unread=True, muted_until=FOR_EVER)
                await bo.do("PUT", f"/chats/{group}/draft", {"content": "unsaid"})
                before = await account_version(bo)
                await (bo.leave(group) if goes_willingly else ann.remove(group, bo))
                for method, path, body in (
                    ("PATCH", "settings", {"pinned": False}),
                    ("PUT", "draft", {"content": "x"}),
                    ("DELETE", "draft", None),
                ):
                    assert await bo.refused(method, f"/chats/{group}/{path}", body) == (404, "chat_not_found")
                await ann.add(group, bo)
                reset = await phone.wait(type="reset", chat_id=group)
                assert (reset["chat"]["settings"], reset["chat"]["draft"]["content"]) == (NOTHING_SET, "")
                assert await settings_of(bo, group) == NOTHING_SET
                assert (await bo.chat(group))["draft"]["account_version"] == 0
                assert await settings_of(bo, other) == kept
                # Another device, which was away all the time, hears of the new membership only.
                events = await bo.resume(account_version=before, chats={str(group): 1})
                assert "chat_settings_changed" not in [event["type"] for event in events]
                [reset] = [event for event in events if event["type"] == "reset" and event["chat_id"] == group]
                assert reset["chat"]["settings"] == NOTHING_SET


async def test_setting_a_chat_while_being_thrown_out_of_it_leaves_nothing_behind(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    for _ in range(12):
        group = await ann.group(bo)
        answers = await asyncio.gather(
            bo.request("PATCH", f"/chats/{group}/settings", {"archived": True}),
            bo.request("PUT", f"/chats/{group}/draft", {"content": "unsaid"}),
            ann.remove(group, bo),
            bo.request("PATCH", f"/chats/{group}/settings", {"pinned": True}),
        )
        assert {answer.status_code for answer in answers if answer is not None} <= {200, 404}
    async with services.database.reading() as session:
        left = await session.execute(select(func.count()).select_from(ChatSettings))
        assert left.scalar_one() == 0


@pytest.mark.settings(max_pinned_chats=4)
async def test_pins_at_the_same_moment_do_not_pass_the_limit(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chats = [await ann.group(bo) for _ in range(8)]
    answers = await asyncio.gather(
        *(ann.request("PATCH", f"/chats/{chat_id}/settings", {"pinned": True}) for chat_id in chats)
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [409] * 4
    orders = [answer.json()["pin_order"] for answer in answers if answer.is_success]
    assert len(set(orders)) == len(await listed(ann, pinned=True)) == 4


# --- who is muted -----------------------------------------------------------------------------------------------


async def muted(database: Database, keys: Sequence[tuple[int, int]], now: datetime) -> set[tuple[int, int]]:
    async with database.reading() as session:
        member, chat = push_repository.MEMBER, push_repository.CHAT
        query = (
            select(member.c.chat_id, member.c.user_id)
            .select_from(member.join(chat, chat.c.id == member.c.chat_id))
            .where(push_repository.is_muted(now))
        )
        return {(row[0], row[1]) for row in await session.execute(query)} & set(keys)


async def test_push_learns_who_is_muted_now(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo, cy = await people(client, 3)
    personal, group = await ann.personal(bo), await ann.group(bo, cy)
    keys = [(personal, ann.id), (personal, bo.id), (group, ann.id), (group, bo.id), (group, cy.id)]
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    assert await muted(services.database, keys, now) == await muted(services.database, [], now) == set()
    soon = now + timedelta(hours=1)
    await change(ann, group, muted_until=timestamp(soon))
    await change(bo, group, muted_until=FOR_EVER)
    await change(bo, personal, archived=True, pinned=True)  # which silences nothing
    assert await muted(services.database, keys, now) == {(group, ann.id), (group, bo.id)}
    assert await muted(services.database, keys, soon) == {(group, bo.id)}
    await change(bo, group, muted_until=NOT_MUTED)
    assert await muted(services.database, keys, now) == {(group, ann.id)}
    assert await muted(services.database, [(group, cy.id), (personal, ann.id)], now) == set()
    await ann.do("PATCH", "/users/me/settings", {"notify_personal": False})
    await cy.do("PATCH", "/users/me/settings", {"notify_groups": False})
    assert await muted(services.database, keys, soon) == {(personal, ann.id), (group, cy.id)}
    await ann.do("PATCH", "/users/me/settings", {"notify_personal": True, "notify_groups": False})
    assert await muted(services.database, keys, soon) == {(group, ann.id), (group, cy.id)}
    assert await muted(services.database, [(group, 999_999), (999_999, cy.id)], now) == set()
