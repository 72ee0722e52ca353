"""Redis is a hint: without it every client is complete all the same, and what protects logins refuses."""

from __future__ import annotations

import asyncio
import signal

import pytest

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.accounts import register
from tests.support.people import Person, people
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
