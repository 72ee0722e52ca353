"""What a worker remembers of who is in a chat: never what it knows to be outdated, however late it was read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import httpx
import pytest

from app.db.repositories.chat_log import ChatRow, Executor
from app.services.bus import EVERYBODY, Bus, redis_client
from app.services.chat_log import roster as rosters_module
from app.services.chat_log.changes import Appended
from app.services.chat_log.roster import OUTDATED_MAX, Roster, RosterCache, RosterMember, load_rosters
from app.services.container import Services
from tests.services.test_sequencer import come_online
from tests.support.people import people

Hint = Callable[[Services, Appended], None]


def roster(chat_id: int, members_version: int, *user_ids: int) -> Roster:
    """A group's roster."""
    members = {user_id: RosterMember("member", 1) for user_id in user_ids}
    return Roster(chat_id, "group", members_version, members)


def told(services: Services, appended: Appended) -> None:
    """Another worker tells of the block."""
    for outdated in appended.moved_rosters:
        services.rosters.drop(outdated.chat_id, outdated.members_version)


def lost(services: Services, appended: Appended) -> None:
    """What another worker told is lost, and the loss is noticed."""
    services.rosters.clear()


@pytest.mark.parametrize("hint", [told, lost])
async def test_a_roster_read_before_a_block_on_another_worker_is_not_used_after_it(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch, hint: Hint
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    inbox = await come_online(services, ann)
    services.rosters.clear()
    read, go_on = asyncio.Event(), asyncio.Event()

    async def read_slowly(executor: Executor, chats: Iterable[ChatRow]) -> list[Roster]:
        found = await load_rosters(executor, chats)
        read.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(rosters_module, "load_rosters", read_slowly)
    typing = asyncio.create_task(services.typing.type(bo.id, chat_id, active=True))
    await read.wait()
    monkeypatch.setattr(rosters_module, "load_rosters", load_rosters)
    monkeypatch.setattr(services.unit_of_work, "_announce", lambda appended: hint(services, appended))
    await ann.block(bo)
    go_on.set()
    await typing
    await services.typing.type(bo.id, chat_id, active=True)
    assert inbox.events == []


@pytest.mark.parametrize("change", ["block", "member"])
async def test_that_a_roster_is_outdated_is_told_to_all_workers_even_while_none_is_heard(
    client: httpx.AsyncClient, services: Services, change: str
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo) if change == "block" else await ann.group(bo)
    # Not started: what it has to say stays in the outbox.
    bus = services.cluster.bus = Bus(redis_client("redis://127.0.0.1:1/0"), services.clock)
    await (ann.block(bo) if change == "block" else ann.remove(chat_id, bo))
    services.cluster.bus = None
    told = [item for item in bus._outboxes[EVERYBODY] if item["kind"] == "roster"]
    newest = services.rosters.get(chat_id)
    assert newest is not None
    assert [(item["chat_id"], item["members_version"]) for item in told] == [(chat_id, newest.members_version)]


def test_what_is_outdated_is_not_put_back() -> None:
    cache = RosterCache()
    before = cache.generation
    cache.drop(1, 2)
    assert not cache.put(roster(1, 1))
    assert cache.get(1) is None
    assert cache.put(roster(1, 2), generation=before)
    assert not cache.put(roster(1, 1))
    cache.clear()
    assert not cache.put(roster(1, 2), generation=before)
    assert not cache.put(roster(7, 1), generation=before)
    assert cache.put(roster(7, 1), generation=cache.generation)


def test_a_roster_that_made_room_does_not_come_back_older() -> None:
    cache = RosterCache(max_members=2)
    assert cache.put(roster(1, 5, 1, 2))
    assert cache.put(roster(2, 1, 1, 2))
    assert cache.get(1) is None
    assert not cache.put(roster(1, 4, 1, 2), generation=cache.generation)


def test_when_too_much_is_outdated_to_be_remembered_nothing_read_before_is_believed() -> None:
    cache = RosterCache()
    before = cache.generation
    for chat_id in range(OUTDATED_MAX + 1):
        cache.drop(chat_id, 2)
    assert not cache.put(roster(0, 1), generation=before)
