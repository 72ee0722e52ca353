"""More requests than connections to the database: all are answered, none waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

import httpx
import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.world import RECOVERY_SECONDS, launched, populated, recovery
from tests.support.proxy import FaultProxy

POOL = 5
REQUESTS = 500
ALL_SECONDS = 10.0
OF_CLIENT = 20
"""Requests of one client: at each answer it looks through all its connections, and 500 cost it four seconds."""
SLOW_SECONDS = 1.0
"""Each way, so that the least query takes two seconds."""


@pytest.mark.chaos("A pool that is exhausted does not deadlock")
@pytest.mark.settings(db_pool_size=POOL)
@pytest.mark.timeout(90)
async def test_five_hundred_requests_at_once_and_five_slow_connections_are_all_answered(
    mysql_settings: Settings, launch: Launch, report: SceneReport
) -> None:
    async with FaultProxy(mysql_settings.db_host or "", mysql_settings.db_port) as proxy:
        behind = mysql_settings.model_copy(update={"db_host": "127.0.0.1", "db_port": proxy.port})
        async with populated(await launched(launch, behind)) as world:
            async with contextlib.AsyncExitStack() as open_clients:
                clients = [
                    await open_clients.enter_async_context(
                        httpx.AsyncClient(base_url=world.server.url, timeout=ALL_SECONDS * 3)
                    )
                    for _ in range(REQUESTS // OF_CLIENT)
                ]
                asked = [
                    ("GET", "/api/v1/chats", None),
                    ("GET", f"/api/v1/messages/history/{world.chat_id}", None),
                    ("PATCH", "/api/v1/users/me", {"bio": "one of many"}),
                    ("POST", f"/api/v1/chats/{world.chat_id}/messages", {"content": "one of many"}),
                    ("POST", "/api/v1/chats/group", {"title": "One of many"}),
                ]

                async def ask(number: int) -> tuple[float, int, bool]:
                    client = clients[number // OF_CLIENT]
                    method, path, body = asked[number % len(asked)]
                    begun = time.monotonic()
                    answer = await client.request(method, path, json=body, headers=world.ann.headers)
                    return time.monotonic() - begun, answer.status_code, "retry-after" in answer.headers

                proxy.delay_seconds = SLOW_SECONDS
                answers = await asyncio.gather(*(ask(number) for number in range(REQUESTS)))
                proxy.delay_seconds = 0.0
            recovered = await recovery(world)
    statuses = Counter(status for _, status, _ in answers)
    report.exactly("answers", sum(statuses.values()), REQUESTS)
    report.at_most("the last after", max(seconds for seconds, _, _ in answers), ALL_SECONDS, "s")
    report.tell("of them 503 with Retry-After", statuses[503])
    assert statuses.keys() <= {200, 201, 503}, statuses
    assert all(told for _, status, told in answers if status == 503)
    report.at_most("recovered in", recovered, RECOVERY_SECONDS, "s")
