"""kill -9 in the middle of uploads: whoever was told 201 has a file, and nobody sees a part of one."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random

import httpx
import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.support.images import image
from tests.support.people import Person, people
from tests.support.servers import free_port

KILLS = 4
SIZE = 3_000_000


@pytest.mark.chaos("An acknowledged file is never lost")
async def test_a_kill_during_uploads_leaves_whole_files_or_none(
    settings: Settings, launch: Launch, rng: random.Random, report: SceneReport
) -> None:
    port = free_port()
    server = launch(settings, port)
    await asyncio.to_thread(server.wait_until_ready)
    kept: dict[int, str] = {}
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        for _ in range(KILLS):
            done = asyncio.Event()
            wanted = len(kept) + rng.randrange(1, 6)

            async def upload_until_it_dies(person: Person, done: asyncio.Event, wanted: int) -> None:
                while True:
                    data = os.urandom(SIZE) if rng.random() < 0.7 else image(size=(300, 300))
                    try:
                        answer = await person.try_upload(data, "a.png" if len(data) < SIZE else "a.bin")
                    except httpx.TransportError:
                        return
                    assert answer.status_code == 201, answer.text
                    file = answer.json()
                    kept[file["file_id"]] = hashlib.sha256(data).hexdigest() if len(data) == SIZE else ""
                    if len(kept) >= wanted:
                        done.set()

            tasks = [asyncio.create_task(upload_until_it_dies(ann, done, wanted)) for _ in range(3)]
            await asyncio.wait_for(done.wait(), 60)
            server.kill()
            await asyncio.gather(*tasks)
            server = launch(settings, port)
            await asyncio.to_thread(server.wait_until_ready)
        last = max(kept)
        intact = 0
        for file_id in range(1, last + 100):
            answer = await ann.fetch(file_id)
            if file_id not in kept:
                if answer.status_code == 200:  # committed, and killed before it could say so
                    assert len(answer.content) in (SIZE, int(answer.headers["content-length"]))
                continue
            assert answer.status_code == 200
            if kept[file_id]:
                assert hashlib.sha256(answer.content).hexdigest() == kept[file_id]
            intact += 1
        report.tell("kills", KILLS)
        report.exactly("acknowledged files that are whole", intact, len(kept))
        message = await ann.send_files(chat_id, "file", {"file_id": last})
        assert message["attachments"][0]["file_id"] == last
        assert (await bo.fetch(last)).status_code == 200
