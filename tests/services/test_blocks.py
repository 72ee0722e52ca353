"""Blocks: what they are, and that they cannot be raced."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from app.core.errors import Unavailable
from app.db.repositories import pairs as pair_repository
from app.services.chat_log.changes import Appended
from app.services.container import Services
from tests.support.accounts import Account, register

API = "/api/v1"


async def set_block(
    client: httpx.AsyncClient, account: Account, other_id: int, *, blocked: bool = True
) -> httpx.Response:
    method = "POST" if blocked else "DELETE"
    return await client.request(method, f"{API}/users/block/{other_id}", headers=account.headers)


async def list_blocked(client: httpx.AsyncClient, account: Account, **params: Any) -> dict[str, Any]:
    response = await client.get(f"{API}/users/blocked", headers=account.headers, params=params)
    assert response.status_code == 200
    page: dict[str, Any] = response.json()
    return page


async def account_version(client: httpx.AsyncClient, account: Account) -> int:
    version: int = (await client.get(f"{API}/users/me", headers=account.headers)).json()["account_version"]
    return version


def heard_by(services: Services) -> list[tuple[int, dict[str, Any]]]:
    """Collects the private events that units of work announce from now on."""
    heard: list[tuple[int, dict[str, Any]]] = []
    announce = services.unit_of_work._announce

    def listen(appended: Appended) -> None:
        heard.extend((user_id, dict(event)) for user_id, event in appended.account_events)
        announce(appended)

    services.unit_of_work._announce = listen
    return heard


async def test_a_block_is_listed_and_lifted(client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    assert (await set_block(client, me, other.id)).status_code == 204
    page = await list_blocked(client, me)
    assert [user["id"] for user in page["items"]] == [other.id]
    assert page["next"] is None
    assert (await list_blocked(client, other))["items"] == []
    assert (await set_block(client, me, other.id, blocked=False)).status_code == 204
    assert (await list_blocked(client, me))["items"] == []


async def test_blocking_twice_is_blocking_once(services: Services, client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    heard = heard_by(services)
    for blocked in (True, True, False, False, True):
        assert (await set_block(client, me, other.id, blocked=blocked)).status_code == 204
    assert heard == [
        (me.id, {"type": "block_changed", "account_version": version, "user_id": other.id, "blocked": blocked})
        for version, blocked in ((1, True), (2, False), (3, True))
    ]
    assert await account_version(client, me) == 3
    assert await account_version(client, other) == 0


async def test_who_is_blocked_is_told_nothing(services: Services, client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    heard = heard_by(services)
    await set_block(client, me, other.id)
    assert {user_id for user_id, _ in heard} == {me.id}


async def test_the_row_of_the_pair_says_who_blocks_whom_since_when_and_by_which_change(
    services: Services, client: httpx.AsyncClient
) -> None:
    low, high = await register(client), await register(client)
    await set_block(client, high, low.id)
    async with services.database.reading() as session:
        row = (await session.execute(pair_repository.PAIR.select())).mappings().one()
    assert (row["low_id"], row["high_id"], row["chat_id"]) == (low.id, high.id, None)
    assert (row["low_blocks_high"], row["high_blocks_low"]) == (False, True)
    assert row["low_blocked_at"] is None
    assert row["high_blocked_at"] is not None
    assert (row["low_account_version"], row["high_account_version"]) == (0, 1)


async def test_both_may_block_each_other_and_lift_only_their_own(client: httpx.AsyncClient) -> None:
    one, two = await register(client), await register(client)
    await set_block(client, one, two.id)
    assert (await set_block(client, two, one.id)).status_code == 204
    await set_block(client, one, two.id, blocked=False)
    assert (await list_blocked(client, one))["items"] == []
    assert [user["id"] for user in (await list_blocked(client, two))["items"]] == [one.id]


async def test_nobody_blocks_themselves_or_somebody_missing(client: httpx.AsyncClient) -> None:
    me = await register(client)
    own = await set_block(client, me, me.id)
    assert (own.status_code, own.json()["code"]) == (409, "cannot_block_self")
    for blocked in (True, False):
        missing = await set_block(client, me, 2**53 - 1, blocked=blocked)
        assert (missing.status_code, missing.json()["code"]) == (404, "user_not_found")
    for bad in (0, -1, 2**53):
        assert (await set_block(client, me, bad)).status_code in (404, 422)


async def test_pages_of_the_blocked_bring_everybody_once(client: httpx.AsyncClient) -> None:
    others = [await register(client) for _ in range(4)]
    me = await register(client)
    others += [await register(client) for _ in range(4)]
    for other in others:
        await set_block(client, me, other.id)
    await set_block(client, others[0], me.id)
    found: list[int] = []
    page = await list_blocked(client, me, limit=3)
    found += [user["id"] for user in page["items"]]
    while page["next"]:
        page = await list_blocked(client, me, limit=3, cursor=page["next"])
        found += [user["id"] for user in page["items"]]
    assert found == [other.id for other in others]
    for cursor in ("x", "WyJhIl0", "Wy0xXQ"):
        response = await client.get(f"{API}/users/blocked", headers=me.headers, params={"cursor": cursor})
        assert response.status_code == 422


async def test_a_block_moves_the_members_version_of_the_personal_chat(
    services: Services, client: httpx.AsyncClient
) -> None:
    me, other = await register(client), await register(client)
    chat = await client.post(f"{API}/chats/personal", headers=me.headers, json={"user_id": other.id})
    chat_id = chat.json()["id"]

    async def state() -> tuple[int, int, frozenset[int]]:
        async with services.unit_of_work() as uow:
            locked = await uow.lock_chat(chat_id)
        assert locked is not None
        row, roster = locked
        return row.members_version, row.version, roster.blockers

    members_version, version, blockers = await state()
    assert blockers == frozenset()
    await set_block(client, me, other.id)
    assert await state() == (members_version + 1, version, frozenset({me.id}))
    await set_block(client, other, me.id)
    assert await state() == (members_version + 2, version, frozenset({me.id, other.id}))
    await set_block(client, me, other.id, blocked=False)
    assert await state() == (members_version + 3, version, frozenset({other.id}))


async def test_nothing_passes_between_two_while_either_blocks(client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    chat = await client.post(f"{API}/chats/personal", headers=me.headers, json={"user_id": other.id})
    path = f"{API}/chats/{chat.json()['id']}/messages"

    async def codes() -> list[str]:
        answers = [await client.post(path, headers=one.headers, json={"content": "Hello"}) for one in (me, other)]
        return [answer.json().get("code", "sent") for answer in answers]

    assert await codes() == ["sent", "sent"]
    await set_block(client, me, other.id)
    assert await codes() == ["peer_blocked", "peer_unavailable"]
    await set_block(client, me, other.id, blocked=False)
    assert await codes() == ["sent", "sent"]


async def test_listeners_hear_of_blocks_once_they_are_committed(services: Services, client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    heard: list[tuple[int, int]] = []
    services.blocks.on_blocked.append(lambda user_id, other_id: heard.append((user_id, other_id)))
    for blocked in (True, True, False):
        await set_block(client, me, other.id, blocked=blocked)
    assert heard == [(me.id, other.id)]


# --- races ---


@pytest.mark.parametrize("existing", [False, True])
async def test_fifty_who_lock_one_pair_at_once_all_get_it_in_turn(
    services: Services, client: httpx.AsyncClient, existing: bool
) -> None:
    one, two = await register(client), await register(client)
    if existing:
        await set_block(client, one, two.id)
    holders = 0

    async def lock(a: int, b: int) -> None:
        nonlocal holders
        async with services.database.writing() as session:
            row = await pair_repository.lock_pair(session, a, b)
            assert (row.low_id, row.high_id) == (one.id, two.id)
            holders += 1
            assert holders == 1
            await pair_repository.find_pairs(session, a, [b])
            holders -= 1

    await asyncio.gather(*(lock(one.id, two.id) for _ in range(25)), *(lock(two.id, one.id) for _ in range(25)))


async def test_many_new_pairs_locked_in_opposite_orders_never_deadlock(
    services: Services, client: httpx.AsyncClient
) -> None:
    people = [(await register(client)).id for _ in range(6)]

    async def lock(a: int, b: int) -> str:
        try:
            async with services.database.writing() as session:
                await pair_repository.lock_pair(session, a, b)
        except Unavailable as error:
            return error.code
        return "locked"

    pairs = [(a, b) for a in people for b in people if a != b]
    assert set(await asyncio.gather(*(lock(a, b) for a, b in pairs * 3))) == {"locked"}


async def test_blocks_both_ways_against_the_making_of_the_chat_end_in_one_of_the_two_orders(
    client: httpx.AsyncClient,
) -> None:
    for _ in range(5):
        me, other = await register(client), await register(client)
        answers = await asyncio.gather(
            set_block(client, me, other.id),
            *(
                client.post(f"{API}/chats/personal", headers=one.headers, json={"user_id": two.id})
                for one, two in ((me, other), (other, me)) * 3
            ),
            set_block(client, other, me.id),
        )
        assert {answer.status_code for answer in answers} <= {200, 201, 204, 403}
        assert answers[0].status_code == answers[-1].status_code == 204
        ids = {answer.json()["id"] for answer in answers[1:-1] if answer.is_success}
        assert len(ids) <= 1
        for chat_id in ids:
            sent = await client.post(f"{API}/chats/{chat_id}/messages", headers=me.headers, json={"content": "Hello"})
            assert sent.json()["code"] == "peer_blocked"


async def test_many_blocks_and_unblocks_at_once_keep_their_numbers_dense(client: httpx.AsyncClient) -> None:
    me, other = await register(client), await register(client)
    answers = await asyncio.gather(
        *(set_block(client, me, other.id, blocked=bool(number % 2)) for number in range(20)),
        *(set_block(client, other, me.id, blocked=bool(number % 2)) for number in range(20)),
    )
    assert {answer.status_code for answer in answers} == {204}
    for one, two in ((me, other), (other, me)):
        version = await account_version(client, one)
        listed = [user["id"] for user in (await list_blocked(client, one))["items"]]
        # Every change turned it over: an odd number of them ends in a block.
        assert listed == ([two.id] if version % 2 else [])
