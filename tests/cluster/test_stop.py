"""A server that is told to stop ends in time, however silent what it depends on is."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.firebase import fake_google
from tests.support.people import people
from tests.support.proxy import FaultProxy
from tests.support.redis_server import RedisServer

SPARE_SECONDS = 2.0
"""So much longer than SHUTDOWN_SECONDS a stop may take."""


@pytest.mark.logs_errors  # uvicorn shows where it has cut a request short
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("silent", "shutdown_seconds"), [("database", 4.0), ("database and redis", 1.0)])
async def test_a_stop_ends_in_time_while_the_database_or_redis_is_silent(
    cluster_settings: Settings,
    redis: RedisServer,
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    silent: str,
    shutdown_seconds: float,
) -> None:
    settings = cluster_settings
    async with (
        fake_google(tmp_path, monkeypatch) as google,
        FaultProxy(settings.db_host or "", settings.db_port) as proxy,
    ):
        behind = settings.model_copy(
            update={
                "db_host": "127.0.0.1",
                "db_port": proxy.port,
                "firebase_credentials_path": google.credentials_path,
                "shutdown_seconds": shutdown_seconds,
            }
        )
        # In threads: the proxy, through which it works, is here.
        server = await asyncio.to_thread(start_server, behind)
        await asyncio.to_thread(server.wait_for_log, "push_leads")
        async with server.client() as client:
            ann, bo = await people(client, 2)
            chat_id = await ann.personal(bo)
            async with await ann.open(server) as anns, await bo.open(server) as bos:
                # Each leaves something to be stored last: marks, when they were seen, cursors of push.
                await anns.say(chat_id, "stored")
                await bos.wait(type="new_message")
                proxy.freeze()
                if silent != "database":
                    redis.signal(signal.SIGSTOP)
                await anns.send(type="new_message", chat_id=chat_id, content="waits", client_id=str(uuid.uuid4()))
                await anns.barrier()
                asked = asyncio.create_task(ann.request("GET", "/chats"))
                await bos.barrier()
                begun = time.monotonic()
                server.signal(signal.SIGTERM)
                await asyncio.to_thread(server.wait)
                took = time.monotonic() - begun
                await asyncio.gather(asked, return_exceptions=True)
                assert await anns.wait_closed() == await bos.wait_closed() == 1012
        proxy.thaw()
    assert took < shutdown_seconds + SPARE_SECONDS
