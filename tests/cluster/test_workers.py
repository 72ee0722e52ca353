"""Two workers on one MySQL, joined by Redis, behave as one server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.accounts import register
from tests.support.people import Json, Person
from tests.support.servers import Server, run
from tests.support.socket_client import SocketClient


@dataclass
class Scene:
    """Ann uses the first worker, Bo the second."""

    ann: Person
    bo: Person
    ann_elsewhere: Person
    """Ann, at the second worker."""


@pytest.fixture
async def scene(servers: tuple[Server, Server]) -> AsyncIterator[Scene]:
    first, second = servers
    async with first.client() as here, second.client() as there:
        ann = Person(here, await register(here))
        bo = Person(there, await register(there))
        yield Scene(ann, bo, Person(there, ann.account))


@contextlib.asynccontextmanager
async def both_online(scene: Scene, servers: tuple[Server, Server]) -> AsyncIterator[tuple[SocketClient, SocketClient]]:
    """A socket of Ann's at the first worker and one of Bo's at the second, who know of each other."""
    async with await scene.ann.open(servers[0]) as ann, await scene.bo.open(servers[1]) as bo:
        await until_seen(scene.ann, scene.bo, servers)
        yield ann, bo


async def until_seen(ann: Person, bo: Person, servers: tuple[Server, Server]) -> None:
    """Return once each worker knows that the other's user is online: profiles show it to peers."""
    await ann.personal(bo)
    async with asyncio.timeout(10):
        while not (await ann.do("GET", f"/users/{bo.id}"))["online"]:
            pass
        while not (await bo.do("GET", f"/users/{ann.id}"))["online"]:
            pass


async def test_a_message_reaches_who_is_on_the_other_worker(scene: Scene, servers: tuple[Server, Server]) -> None:
    chat_id = await scene.ann.personal(scene.bo)
    async with both_online(scene, servers) as (ann, bo):
        sent = await ann.say(chat_id, "over the bus")
        came = await bo.wait(type="new_message", chat_id=chat_id)
        assert came["message"]["id"] == sent["message_id"]
        await bo.send(type="message_read", chat_id=chat_id, message_id=sent["message_id"])
        read = await ann.wait(type="message_read", chat_id=chat_id, user_id=scene.bo.id)
        assert read["prev"] == came["version"]


async def test_both_see_one_order_when_both_workers_write_at_once(scene: Scene, servers: tuple[Server, Server]) -> None:
    chat_id = await scene.ann.personal(scene.bo)
    async with both_online(scene, servers) as (ann, bo):
        await asyncio.gather(
            *(ann.say(chat_id, f"ann {number}") for number in range(50)),
            *(bo.say(chat_id, f"bo {number}") for number in range(50)),
        )

        async def all_of(client: SocketClient) -> list[tuple[int, str]]:
            seen: dict[int, str] = {}
            while len(seen) < 100:
                event = await client.wait(lambda event: event["type"] in ("new_message", "chat_changes"))
                for message in [event["message"]] if "message" in event else event["messages"]:
                    seen[message["seq"]] = message["content"]
            return sorted(seen.items())

        assert await all_of(ann) == await all_of(bo)
        for client in (ann, bo):
            versions = [
                (event["prev"], event["version"])
                for event in client.seen
                if event.get("chat_id") == chat_id and "prev" in event
            ]
            assert all(before[1] == after[0] for before, after in itertools.pairwise(versions)), versions


async def test_who_is_let_in_or_taken_out_elsewhere_hears_of_it(scene: Scene, servers: tuple[Server, Server]) -> None:
    async with both_online(scene, servers) as (_ann, bo):
        chat_id = await scene.ann.group(title="Across")
        await scene.ann.add(chat_id, scene.bo)
        await bo.wait(type="chat_added", chat_id=chat_id)
        await bo.wait(type="reset", chat_id=chat_id)
        await scene.ann.say(chat_id, "welcome")
        await bo.wait(lambda event: event["message"]["content"] == "welcome", type="new_message", chat_id=chat_id)
        await scene.ann.remove(chat_id, scene.bo)
        await bo.wait(type="chat_removed", chat_id=chat_id)
        await scene.ann.say(chat_id, "without you")
        await scene.ann.say(await scene.ann.personal(scene.bo), "barrier")
        await bo.wait(lambda event: event["message"]["content"] == "barrier", type="new_message")
        assert not [event for event in bo.seen if "without you" in str(event)]


async def test_a_session_that_is_logged_out_on_one_worker_is_closed_on_the_other(
    scene: Scene, servers: tuple[Server, Server]
) -> None:
    async with await scene.ann.open(servers[1]) as socket:
        assert (await scene.ann_elsewhere.request("GET", "/users/me")).status_code == 200
        await scene.ann.do("POST", "/auth/logout")
        assert await socket.wait_closed() == 4401
    assert (await scene.ann_elsewhere.request("GET", "/users/me")).status_code == 401


async def test_presence_and_typing_cross_the_bus_and_a_block_ends_both(
    scene: Scene, servers: tuple[Server, Server]
) -> None:
    chat_id = await scene.ann.personal(scene.bo)
    async with both_online(scene, servers) as (ann, bo):
        await ann.send(type="subscribe_presence", user_ids=[scene.bo.id])
        assert (await ann.wait(type="presence", user_id=scene.bo.id))["online"]
        await bo.send(type="typing", chat_id=chat_id, active=True)
        await ann.wait(type="typing", chat_id=chat_id, user_id=scene.bo.id)
        await bo.close()
        gone = await ann.wait(type="presence", user_id=scene.bo.id)
        assert not gone["online"]
        assert gone["last_seen_at"]
        async with await scene.bo.open(servers[1]) as back:
            assert (await ann.wait(type="presence", user_id=scene.bo.id))["online"]
            await scene.ann.block(scene.bo)
            await back.send(type="typing", chat_id=chat_id, active=True)
            await back.barrier()
        await ann.barrier()
        assert not [event for event in ann.inbox if event["type"] in ("typing", "presence")]


@pytest.mark.parametrize("how", ["blocked", "removed"])
async def test_who_was_shut_out_while_the_chat_was_offline_on_a_worker_types_to_nobody_there_afterwards(
    scene: Scene, servers: tuple[Server, Server], how: str
) -> None:
    first, second = servers
    ann, bo = scene.ann, scene.bo
    async with first.client() as here:
        witness = Person(here, await register(here))
        chat_id = await ann.personal(bo) if how == "blocked" else await ann.group(bo, witness)
        async with await ann.open(second) as anns, await bo.open(second) as bos:
            await bos.send(type="typing", chat_id=chat_id, active=False)  # that worker knows who is in the chat now
            await anns.wait(type="typing", chat_id=chat_id)
            await until_seen(ann, bo, servers)
        async with asyncio.timeout(10):
            while (await ann.do("GET", f"/users/{bo.id}"))["online"]:
                pass
        await (ann.block(bo) if how == "blocked" else ann.remove(chat_id, bo))
        # What one worker tells the other comes in order: behind the block comes somebody who is online.
        await witness.personal(bo)
        async with await witness.open(first), await ann.open(second) as anns, await bo.open(second) as bos:
            async with asyncio.timeout(10):
                while not (await bo.do("GET", f"/users/{witness.id}"))["online"]:
                    pass
            await bos.send(type="typing", chat_id=chat_id, active=True, ref="shut out")
            if how == "removed":
                assert (await bos.wait(type="error", ref="shut out"))["code"] == "chat_not_found"
            await bos.barrier()
            await anns.barrier()
            assert not [event for event in anns.inbox if event["type"] == "typing"]


async def test_a_ticket_of_one_worker_opens_one_socket_on_the_other(
    scene: Scene, servers: tuple[Server, Server]
) -> None:
    ticket = (await scene.ann.do("POST", "/auth/ws-ticket"))["ticket"]
    url = f"{servers[1].ws_url}?ticket={ticket}"
    async with await SocketClient.open(url, "", headers={"Authorization": ""}):
        pass
    with pytest.raises(Exception, match="401"):
        await SocketClient.open(url, "", headers={"Authorization": ""})


async def test_a_username_taken_on_one_worker_is_known_to_be_taken_on_the_other(scene: Scene) -> None:
    async with asyncio.timeout(10):
        while True:
            taken: Json = await scene.bo.do("GET", "/users/username-available", username=scene.ann.account.username)
            free: Json = await scene.bo.do("GET", "/users/username-available", username="nobody_has_this")
            if not taken["available"] and free["available"]:
                break


async def test_a_limit_counts_what_was_asked_of_all_workers(scene: Scene) -> None:
    for _ in range(3):
        await scene.ann.do("GET", "/users/search", q="person")
    for _ in range(2):
        await scene.ann_elsewhere.do("GET", "/users/search", q="person")
    for person in (scene.ann, scene.ann_elsewhere):
        assert await person.refused("GET", "/users/search", q="person") == (429, "rate_limited")


async def test_a_trace_names_the_worker_that_committed_and_the_operator_sees_who_let_it_out(
    scene: Scene, servers: tuple[Server, Server], tmp_path: Path
) -> None:
    chat_id = await scene.ann.personal(scene.bo)
    names = [server.wait_for_log(r'"worker_named".*"worker":"([0-9a-f]{12})"').group(1) for server in servers]
    async with both_online(scene, servers) as (ann, bo):
        for socket, asker, committer in ((ann, scene.ann_elsewhere, names[0]), (bo, scene.bo, names[1])):
            sent = await socket.say(chat_id, "over the bus")
            await asyncio.gather(*(one.wait(type="new_message", chat_id=chat_id) for one in (ann, bo)))
            async with asyncio.timeout(10):
                while not (traced := await asker.do("GET", f"/messages/{sent['message_id']}/trace"))["fanned_out"]:
                    pass
            assert traced["fanned_out"]["worker"] == committer
            # Of a socket on another worker it is known, too.
            [recipient] = traced["recipients"]
            assert recipient["connected"]
            async with asyncio.timeout(20):
                while len(runs := await _runs(servers[0], sent["message_id"], tmp_path)) < 3:
                    pass
            assert runs == {(committer, "commit"), (names[0], "sockets"), (names[1], "sockets")}


async def test_of_a_conversation_over_two_workers_every_message_keeps_the_one_that_committed_it(
    scene: Scene, servers: tuple[Server, Server]
) -> None:
    chat_id = await scene.ann.personal(scene.bo)
    names = [server.wait_for_log(r'"worker_named".*"worker":"([0-9a-f]{12})"').group(1) for server in servers]
    said: list[tuple[Person, int, str]] = []
    async with both_online(scene, servers) as (ann, bo):
        for _ in range(3):
            for socket, asker, name in ((ann, scene.ann_elsewhere, names[0]), (bo, scene.bo, names[1])):
                sent = await socket.say(chat_id, "in turns")
                await asyncio.gather(*(one.wait(type="new_message", chat_id=chat_id) for one in (ann, bo)))
                said.append((asker, sent["message_id"], name))
    async with asyncio.timeout(20):
        for asker, message_id, name in said:
            while not (told := (await asker.do("GET", f"/messages/{message_id}/trace"))["fanned_out"]):
                pass
            assert told["worker"] == name


async def _runs(server: Server, message_id: int, folder: Path) -> set[tuple[str, str]]:
    """(worker, part) of all that the operator is told to have told of a message."""
    command = [sys.executable, "-m", "app", "trace", str(message_id), "--json"]
    done = await asyncio.to_thread(run, command, cwd=folder, env=server.env)
    assert done.returncode == 0, done.stderr
    return {(told["worker"], told["part"]) for told in json.loads(done.stdout)["fanout"] if told["covers"]}
