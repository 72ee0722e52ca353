"""Profiles and finding people, by the requests that clients make."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from app.core.cursors import encode_cursor
from app.db.repositories import users as user_repository
from app.services.container import Services
from tests.support.accounts import Account, new_person, register

API = "/api/v1"


async def get(client: httpx.AsyncClient, account: Account, path: str, **params: Any) -> httpx.Response:
    return await client.get(f"{API}{path}", headers=account.headers, params=params)


async def patch(client: httpx.AsyncClient, account: Account, **fields: Any) -> httpx.Response:
    return await client.patch(f"{API}/users/me", headers=account.headers, json=fields)


async def block(client: httpx.AsyncClient, account: Account, other: Account) -> None:
    response = await client.post(f"{API}/users/block/{other.id}", headers=account.headers)
    assert response.status_code == 204


async def make_chat(client: httpx.AsyncClient, account: Account, other: Account) -> None:
    response = await client.post(f"{API}/chats/personal", headers=account.headers, json={"user_id": other.id})
    assert response.is_success, response.text


async def find(client: httpx.AsyncClient, account: Account, query: str, limit: int = 20) -> list[int]:
    """All ids that a search finds, page by page."""
    found: list[int] = []
    params: dict[str, Any] = {"q": query, "limit": limit}
    while True:
        response = await get(client, account, "/users/search", **params)
        assert response.status_code == 200, response.text
        page = response.json()
        assert len(page["items"]) <= limit
        found += [user["id"] for user in page["items"]]
        if page["next"] is None:
            return found
        params["cursor"] = page["next"]


# --- one's own ---


async def test_a_change_of_the_profile_is_kept_numbered_and_partial(client: httpx.AsyncClient) -> None:
    account = await register(client)
    first = (await patch(client, account, display_name="  Ann Lee ", bio="Tea.\r\nAnd toast.")).json()
    assert (first["display_name"], first["bio"]) == ("Ann Lee", "Tea.\nAnd toast.")
    assert (first["profile_version"], first["account_version"]) == (2, 1)
    second = (await patch(client, account, bio="")).json()
    assert (second["display_name"], second["bio"], second["profile_version"]) == ("Ann Lee", "", 3)
    assert (await get(client, account, "/users/me")).json() == second


async def test_a_change_that_changes_nothing_is_not_numbered(client: httpx.AsyncClient) -> None:
    account = await register(client)
    before = (await get(client, account, "/users/me")).json()
    for body in ({}, {"username": account.username}, {"bio": ""}):
        assert (await patch(client, account, **body)).json() == before


async def test_changes_made_at_once_are_all_kept(client: httpx.AsyncClient) -> None:
    account = await register(client)
    await asyncio.gather(
        *(patch(client, account, bio=f"Number {number}") for number in range(10)),
        patch(client, account, display_name="Ann"),
        patch(client, account, username="ann_of_old"),
    )
    me = (await get(client, account, "/users/me")).json()
    assert (me["display_name"], me["username"], me["bio"][:6]) == ("Ann", "ann_of_old", "Number")
    assert (me["profile_version"], me["account_version"]) == (13, 12)


@pytest.mark.parametrize(
    "fields",
    [
        {"username": "ab"},
        {"username": "a b c"},
        {"username": 5},
        {"display_name": ""},
        {"display_name": " "},
        {"display_name": "x" * 65},
        {"display_name": "a\u200bb"},
        {"display_name": "a\u202eb"},
        {"display_name": "a\nb"},
        {"bio": "x" * 513},
        {"bio": "\x00"},
        {"phone": "+79991234568"},
        {"id": 5},
        {"account_version": 5},
        {"profile_version": 5},
        {"password": "Maple-harbour-99"},
    ],
)
async def test_what_cannot_be_a_profile_is_refused(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    account = await register(client)
    response = await patch(client, account, **fields)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("name", ["Ünïcodé Ñame", "Мария", "山田太郎", "👩‍👩‍👧 family", "x" * 64, "ﬃ" * 64, "İ" * 64])
async def test_names_of_all_languages_are_kept_and_found(client: httpx.AsyncClient, name: str) -> None:
    account, other = await register(client), await register(client)
    assert (await patch(client, account, display_name=name)).json()["display_name"] == name
    assert account.id in await find(client, other, name[:4])


async def test_a_rename_is_announced_to_availability_at_once(client: httpx.AsyncClient) -> None:
    account, other = await register(client, username="ann_the_first"), await register(client)

    async def available(name: str) -> bool:
        response = await client.get(f"{API}/users/username-available", params={"username": name})
        assert response.json()["username"] == name
        answer: bool = response.json()["available"]
        return answer

    assert not await available("ANN_the_first")
    assert await available("ann_the_second")
    assert (await patch(client, account, username="Ann_The_Second")).json()["username"] == "Ann_The_Second"
    assert not await available("ann_the_second")
    assert await available("ann_the_first")
    assert (await patch(client, other, username="ann_the_first")).status_code == 200
    assert not await available("ann_the_first")
    assert not await available("support")


async def test_a_taken_or_reserved_username_is_refused_and_a_new_case_is_not(client: httpx.AsyncClient) -> None:
    account, other = await register(client, username="ann_lee"), await register(client)
    taken = await patch(client, other, username="ANN_LEE", bio="lost")
    assert (taken.status_code, taken.json()["code"]) == (409, "username_taken")
    reserved = await patch(client, other, username="Support")
    assert (reserved.status_code, reserved.json()["code"]) == (422, "username_reserved")
    assert (await get(client, other, "/users/me")).json()["bio"] == ""
    assert (await patch(client, account, username="Ann_Lee")).json()["username"] == "Ann_Lee"


async def test_of_twenty_who_take_one_username_at_once_one_gets_it(client: httpx.AsyncClient) -> None:
    accounts = [await register(client) for _ in range(20)]
    answers = await asyncio.gather(*(patch(client, account, username="only_one") for account in accounts))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 19


async def test_a_username_freed_in_the_database_is_free_although_the_filter_remembers_it(
    services: Services, client: httpx.AsyncClient
) -> None:
    services.usernames.add("ghost_name")
    response = await client.get(f"{API}/users/username-available", params={"username": "ghost_name"})
    assert response.json()["available"] is True


async def test_a_username_the_filter_has_not_heard_of_is_still_taken_once(
    services: Services, client: httpx.AsyncClient
) -> None:
    account = await register(client)
    # As another worker does it.
    async with services.database.writing() as session:
        await session.execute(
            user_repository.USER.update().where(user_repository.USER.c.id == account.id).values(username="elsewhere")
        )
    other = await register(client)
    assert (await patch(client, other, username="Elsewhere")).status_code == 409


@pytest.mark.settings(limit_username_checks_per_ip="3/minute")
async def test_usernames_cannot_be_walked_through(client: httpx.AsyncClient) -> None:
    codes = [
        (await client.get(f"{API}/users/username-available", params={"username": f"name_{n}"})).status_code
        for n in range(4)
    ]
    assert codes == [200, 200, 200, 429]


@pytest.mark.settings(limit_requests_per_user="5/second")
async def test_one_account_may_ask_only_so_often(client: httpx.AsyncClient) -> None:
    account, other = await register(client), await register(client)
    answers = await asyncio.gather(*(get(client, account, "/users/me") for _ in range(12)))
    assert sum(answer.status_code == 429 for answer in answers) >= 5
    assert (await get(client, other, "/users/me")).status_code == 200


# --- of others ---


async def test_a_stranger_sees_who_one_is_and_nothing_private(client: httpx.AsyncClient) -> None:
    account, stranger = await register(client), await register(client)
    await patch(client, account, bio="Hello!")
    profile = (await get(client, stranger, f"/users/{account.id}")).json()
    assert profile == {
        "id": account.id,
        "username": account.username,
        "display_name": account.username,
        "bio": "Hello!",
        "avatar_url": None,
        "profile_version": 2,
        "relation": "none",
        "online": False,
        "last_seen_at": None,
    }


async def test_nobodys_answer_holds_anybody_elses_phone(client: httpx.AsyncClient) -> None:
    account, stranger = await register(client), await register(client)
    await make_chat(client, stranger, account)
    for path in (f"/users/{account.id}", f"/users/search?q={account.username}", "/users/blocked", "/users/me"):
        answer = (await client.get(API + path, headers=stranger.headers)).text
        assert account.phone.removeprefix("+") not in answer


async def test_last_seen_is_for_those_one_has_a_chat_with_until_a_block(
    services: Services, client: httpx.AsyncClient
) -> None:
    account, friend, stranger = [await register(client) for _ in range(3)]
    await make_chat(client, account, friend)
    async with services.database.writing() as session:
        moment = services.clock.now().replace(tzinfo=None)
        await user_repository.touch_last_seen(session, [account.id], moment, now=moment)

    async def seen_by(viewer: Account) -> bool:
        return (await get(client, viewer, f"/users/{account.id}")).json()["last_seen_at"] is not None

    assert [await seen_by(one) for one in (account, friend, stranger)] == [True, True, False]
    await block(client, friend, account)
    assert not await seen_by(friend)


async def test_online_is_for_those_one_has_a_chat_with(services: Services, client: httpx.AsyncClient) -> None:
    account, friend, stranger = [await register(client) for _ in range(3)]
    await make_chat(client, account, friend)
    services.users.is_online = {account.id}.__contains__
    online = [(await get(client, one, f"/users/{account.id}")).json()["online"] for one in (account, friend, stranger)]
    assert online == [True, True, False]


async def test_oneself_is_seen_as_oneself(client: httpx.AsyncClient) -> None:
    account = await register(client)
    assert (await get(client, account, f"/users/{account.id}")).json()["relation"] == "self"


async def test_whoever_blocked_one_looks_as_if_they_were_missing(client: httpx.AsyncClient) -> None:
    account, blocker = await register(client), await register(client)
    await make_chat(client, account, blocker)
    await block(client, blocker, account)
    hidden = await get(client, account, f"/users/{blocker.id}")
    missing = await get(client, account, "/users/9007199254740991")
    assert hidden.status_code == missing.status_code == 404
    assert hidden.content == missing.content


async def test_somebody_blocked_is_seen_as_blocked_whether_they_block_back_or_not(client: httpx.AsyncClient) -> None:
    account, other = await register(client), await register(client)
    await patch(client, other, bio="Hello!")
    await block(client, account, other)
    before = await get(client, account, f"/users/{other.id}")
    assert before.json()["relation"] == "blocked"
    assert before.json()["bio"] == ""
    await block(client, other, account)
    after = await get(client, account, f"/users/{other.id}")
    assert after.content == before.content


@pytest.mark.parametrize("bad", ["0", "-1", "9007199254740992", "1e3", "x", "٣", "1" * 400])
async def test_what_is_no_id_leads_to_nobody(client: httpx.AsyncClient, bad: str) -> None:
    account = await register(client)
    assert (await get(client, account, f"/users/{bad}")).status_code in (404, 422)


# --- finding ---


async def test_people_are_found_by_the_beginning_of_either_name(client: httpx.AsyncClient) -> None:
    me = await register(client)
    ann = await register(client, username="Annabel_7", display_name="Zoe")
    zoe = await register(client, username="somebody_else", display_name="ANNA Smith")
    both = await register(client, username="annals", display_name="Anna again")
    await register(client, username="joanna", display_name="Joanna")
    assert await find(client, me, "ann") == [ann.id, both.id, zoe.id]
    assert await find(client, me, "ANNA") == [ann.id, both.id, zoe.id]
    assert await find(client, me, "@annab") == [ann.id]
    assert await find(client, me, "anna s") == [zoe.id]
    assert await find(client, me, "nna") == []


async def test_case_folds_in_all_alphabets(client: httpx.AsyncClient) -> None:
    me = await register(client)
    maria = await register(client, display_name="МАРИЯ Иванова")
    street = await register(client, display_name="Straße")
    composed = await register(client, display_name="Cafe\u0301 Noir")
    assert await find(client, me, "мария и") == [maria.id]
    assert await find(client, me, "STRASSE") == [street.id]
    assert await find(client, me, "CAF\u00c9") == [composed.id]


@pytest.mark.parametrize(
    "query", ["%%%", "___", "\\\\\\", "a_%", "per%", "p_rson", "person\\", "'''", '"""', "(((", "***"]
)
async def test_wildcards_mean_only_themselves(client: httpx.AsyncClient, query: str) -> None:
    me, _ = await register(client), await register(client)
    assert await find(client, me, query) == []


async def test_an_underscore_is_a_letter_like_others(client: httpx.AsyncClient) -> None:
    me = await register(client)
    wanted = await register(client, username="ab_cd")
    await register(client, username="abxcd")
    assert await find(client, me, "ab_") == [wanted.id]


@pytest.mark.parametrize("query", ["", "a", "ab", "  ab  ", "@ab", " "])
async def test_a_query_that_is_too_short_is_refused(client: httpx.AsyncClient, query: str) -> None:
    me = await register(client)
    response = await get(client, me, "/users/search", q=query)
    assert (response.status_code, response.json()["code"]) == (422, "query_too_short")


async def test_nobody_is_found_by_their_phone(client: httpx.AsyncClient) -> None:
    me = await register(client)
    # Not planted as a secret: the client of this test logs what it searches for.
    other = new_person() | {"phone": "+79887776655"}
    assert (await client.post(f"{API}/auth/register", json=other)).status_code == 201
    for query in ("+79887776655", "79887776655", "+7988", "887776"):
        assert await find(client, me, query) == []


async def test_a_search_hides_oneself_and_both_sides_of_every_block(client: httpx.AsyncClient) -> None:
    me, friend, blocked, blocker = [await register(client, display_name="Common Name") for _ in range(4)]
    await block(client, me, blocked)
    await block(client, blocker, me)
    assert await find(client, me, "common name") == [friend.id]
    await client.delete(f"{API}/users/block/{blocked.id}", headers=me.headers)
    assert sorted(await find(client, me, "common name")) == sorted([friend.id, blocked.id])


@pytest.mark.parametrize("limit", [1, 2, 7, 20])
async def test_pages_bring_everybody_once(services: Services, client: httpx.AsyncClient, limit: int) -> None:
    me = await register(client)
    everybody = []
    # Enough for several reads of an index, with many of the same name, and some who match by both.
    async with services.database.writing() as session:
        for number in range(130):
            row = user_repository.UserRow(
                id=100_000 + number,
                phone=f"+1555{number:07d}",
                username=f"walker_{number}" if number % 3 else f"other_{number}",
                display_name="Walker",
                bio="",
                avatar=None,
                profile_version=1,
                account_version=0,
                created_at=services.clock.now().replace(tzinfo=None),
                last_seen_at=None,
            )
            everybody.append(row.id)
            await user_repository.insert_user(session, row, display_name_key="walker", password_hash="none")
    found = await find(client, me, "walker", limit)
    assert len(found) == len(set(found))
    assert sorted(found) == everybody


@pytest.mark.parametrize(
    "cursor",
    ["x", "é", "AAAA", "W10", encode_cursor("u"), encode_cursor(1, 2, 3), encode_cursor("u", "a", -1), "x" * 3000],
)
async def test_cursors_of_another_form_are_refused(client: httpx.AsyncClient, cursor: str) -> None:
    me = await register(client)
    assert (await get(client, me, "/users/search", q="abc", cursor=cursor)).status_code == 422


@pytest.mark.parametrize(
    "parts",
    [
        ("n", "zzz", 1),
        ("u", "", 0),
        ("x", "", 0),
        ("u", "a", 2**53),
        ("n", "nul\x00", 1),
        ("n", "\U0010ffff", 9),
        ("u", "é", 0),
    ],
)
async def test_cursors_that_the_server_would_not_have_made_are_harmless(
    client: httpx.AsyncClient, parts: tuple[str, str, int]
) -> None:
    me = await register(client)
    response = await get(client, me, "/users/search", q="abc", cursor=encode_cursor(*parts))
    assert response.status_code == 422 or response.json() == {"items": [], "next": None}


@pytest.mark.parametrize("limit", ["0", "21", "-1", "x"])
async def test_a_page_has_its_bounds(client: httpx.AsyncClient, limit: str) -> None:
    me = await register(client)
    assert (await get(client, me, "/users/search", q="abc", limit=limit)).status_code == 422


@pytest.mark.settings(limit_search_per_user="3/minute")
async def test_one_account_may_search_only_so_often(client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    assert [(await get(client, me, "/users/search", q="abc")).status_code for _ in range(4)] == [200, 200, 200, 429]
    assert (await get(client, other, "/users/search", q="abc")).status_code == 200


async def test_a_search_reads_an_index_and_no_table(services: Services, client: httpx.AsyncClient) -> None:
    await register(client)
    queries = {
        "uq_users_username": "SELECT id FROM users WHERE username >= 'per' AND username > ''"
        " AND username < 'per\x7f' ORDER BY username LIMIT 50",
        "ix_users_display_name_key": "SELECT id, bio FROM users WHERE display_name_key >= 'per'"
        " AND display_name_key < 'per\U0010ffff'"
        " AND (display_name_key > 'per' OR (display_name_key = 'per' AND id > 5))"
        " ORDER BY display_name_key, id LIMIT 50",
    }
    async with services.database.writing() as session:
        await session.execute(
            text(
                "INSERT INTO users (id, phone, username, display_name, display_name_key, bio, password_hash,"
                " profile_version, account_version, created_at)"
                " VALUES (:id, :phone, :name, :name, :name, '', '', 1, 0, '2026-01-01 00:00:00')"
            ),
            [
                {"id": 100_000 + number, "phone": f"+1555{number:07d}", "name": f"n{number:05d}"}
                for number in range(2000)
            ],
        )
    async with services.database.reading() as session:
        for index, query in queries.items():
            if services.database.is_mysql:
                plan = (await session.execute(text(f"EXPLAIN FORMAT=TRADITIONAL {query}"))).mappings().one()
                assert (plan["key"], plan["type"]) == (index, "range"), dict(plan)
                assert "filesort" not in (plan["Extra"] or "")
            else:
                rows = (await session.execute(text(f"EXPLAIN QUERY PLAN {query}"))).all()
                details = " ".join(row[-1] for row in rows)
                # SQLite names the index of a constraint itself.
                assert "SEARCH users USING" in details
                assert index in details or "autoindex_users" in details
                assert "TEMP B-TREE" not in details
