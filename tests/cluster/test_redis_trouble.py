"""Redis is a hint: without it every client is complete all the same, and what protects logins refuses."""

from __future__ import annotations

import asyncio
import signal
import socket

import httpx
import pytest
from pydantic import SecretStr

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.accounts import register
from tests.support.metrics import value
from tests.support.people import Person, people
from tests.support.proxy import FaultProxy
from tests.support.redis_messages import LosesMessages
from tests.support.redis_server import RedisServer
from tests.support.servers import Server

COMPLETE_SECONDS = 30.0
"""A client is complete by then, whatever becomes of Redis."""


@pytest.fixture
def two(cluster_settings: Settings, start_server: StartServer) -> tuple[Server, Server]:
    """Two servers of one's own."""
    first, second = start_server(cluster_settings), start_server(cluster_settings)
    first.wait_for_log("worker_joined")
    second.wait_for_log("worker_joined")
    return first, second


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["killed", "frozen"])
@pytest.mark.settings(limit_login_per_ip="1000/minute", limit_search_per_user="1000/minute")
async def test_without_redis_messages_arrive_logins_are_refused_and_all_is_well_again_with_it(
    two: tuple[Server, Server], redis: RedisServer, how: str
) -> None:
    first, second = two
    async with first.client() as here, second.client() as there:
        [ann] = await people(here, 1)
        bo = Person(there, await register(there))
        chat_id = await ann.personal(bo)
        login = {"username": ann.account.phone, "password": ann.account.password}
        async with await ann.open(first) as anns, await bo.open(second) as bos:
            if how == "killed":
                redis.kill()
            else:
                redis.signal(signal.SIGSTOP)
            for number in range(3):
                await anns.say(chat_id, f"while it is away {number}")
            await ann.do("GET", "/users/search", q="person")  # a limit that fails open
            refused = await here.post("/api/v1/auth/token", data=login)
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert "retry-after" in refused.headers
            seen: set[str] = set()
            async with asyncio.timeout(COMPLETE_SECONDS):
                while len(seen) < 3:
                    event = await bos.wait(lambda event: event["type"] in ("new_message", "chat_changes"))
                    came = [event["message"]] if "message" in event else event["messages"]
                    seen |= {message["content"] for message in came}
            if how == "killed":
                redis.start()
            else:
                redis.signal(signal.SIGCONT)
            async with asyncio.timeout(COMPLETE_SECONDS):
                while (await here.post("/api/v1/auth/token", data=login)).status_code != 200:
                    pass
                while (await there.get("/health/ready")).json()["checks"]["redis"] != "ok":
                    pass
            await anns.say(chat_id, "it is back")
            await bos.wait(lambda event: "it is back" in str(event))
            assert anns.close_code is None
            assert bos.close_code is None


async def test_a_block_of_which_the_bus_lost_the_word_ends_presence_once_the_loss_is_noticed(
    cluster_settings: Settings, redis: RedisServer, start_server: StartServer
) -> None:
    async with FaultProxy("127.0.0.1", redis.port) as proxy:
        proxy.edit_answers = lambda: LosesMessages(lambda message: b"separated" in message)
        first = start_server(cluster_settings)
        lossy = cluster_settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{proxy.port}/0")})
        # In a thread: the proxy, through which it starts, is here.
        second = await asyncio.to_thread(start_server, lossy)
        for server in (first, second):
            await asyncio.to_thread(server.wait_for_log, "worker_joined")
        async with first.client() as here, second.client() as there:
            [ann] = await people(here, 1)
            bo, cy = Person(there, await register(there)), Person(there, await register(there))
            for friend in (bo, cy):
                await ann.personal(friend)
            async with await bo.open(second) as bos, await cy.open(second) as cys:
                for socket in (bos, cys):
                    await socket.send(type="subscribe_presence", user_ids=[ann.id])
                    await socket.wait(type="presence", online=False)
                await ann.block(bo)
                await asyncio.to_thread(second.wait_for_log, 'presence_rechecked.*"ended": ?1')
                async with await ann.open(first):
                    await cys.wait(type="presence", user_id=ann.id, online=True)
                await cys.wait(type="presence", user_id=ann.id, online=False)
                await bos.barrier()
                assert not [event for event in bos.inbox if event["type"] == "presence"]
            shown = (await there.get("/metrics")).text
            assert value(shown, "dialect_bus_messages_lost_total") >= 1
            assert value(shown, "dialect_presence_rechecks_total") >= 1


# What heartbeats would find out must come of the loss, or not at all.
@pytest.mark.settings(socket_heartbeat_seconds=3600, limit_messages_per_second=0)
async def test_sessions_that_ended_while_a_worker_was_cut_off_lose_their_sockets_within_seconds_of_its_return(
    cluster_settings: Settings, redis: RedisServer, start_server: StartServer
) -> None:
    async with FaultProxy("127.0.0.1", redis.port) as proxy:
        first = start_server(cluster_settings)
        cut_off = cluster_settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{proxy.port}/0")})
        # In a thread: the proxy, through which it starts, is here.
        second = await asyncio.to_thread(start_server, cut_off)
        for server in (first, second):
            await asyncio.to_thread(server.wait_for_log, "worker_joined")
        async with first.client() as here:
            ann, bo = await people(here, 2)
            chat_id = await ann.group(bo)
            for _ in range(10):
                await asyncio.gather(*(bo.say(chat_id, "\N{EURO SIGN}" * 4096) for _ in range(10)))
            narrow = socket.socket()
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            narrow.connect(("127.0.0.1", httpx.URL(second.url).port))
            async with await ann.open(second, sock=narrow) as slow, await bo.open(second) as quick:
                slow.connection.transport.pause_reading()
                await slow.send(type="resume", ref="r", chats={str(chat_id): 1})
                await quick.barrier()
                proxy.refusing = True
                proxy.reset()
                await asyncio.to_thread(second.wait_for_log, "bus_is_down")
                for person in (ann, bo):
                    await person.do("POST", "/auth/logout")
                await quick.barrier()  # nobody could tell
                proxy.refusing = False
                async with asyncio.timeout(5):
                    assert await quick.wait_closed() == 4401
                    await asyncio.to_thread(second.wait_for_log, 'ended_sessions_found.*"sockets": ?2')
                slow.connection.transport.resume_reading()
                assert await slow.wait_closed() == 4401
                assert "resumed" not in {event["type"] for event in slow.seen}  # it was catching up all the time
