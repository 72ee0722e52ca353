"""A backup by the commands of docs/operations.md while people chat: what was acknowledged before is in it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.chaos.conftest import Launch
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.chaos.world import launched
from tests.deployment.test_backup import obey
from tests.support.databases import SqliteTemplate, make_settings
from tests.support.people import people

STEP = 600
FILES = 5


@pytest.mark.chaos("A backup restores")
@pytest.mark.timeout(120)
async def test_a_backup_under_load_holds_every_message_and_file_acknowledged_before_it(
    sqlite_template: SqliteTemplate, launch: Launch, tmp_path: Path, rng: random.Random, report: SceneReport
) -> None:
    settings = make_settings(**sqlite_template.new(tmp_path), upload_path=tmp_path / "uploads")
    ledgers = tmp_path / "ledgers"
    ledgers.mkdir()
    server = await launched(launch, settings)
    with Crowd(server.url, rng, ledgers, STEP * 2) as crowd:
        await crowd.gather(users=6, devices=8, callers=2)
        crowd.up.set()
        kept: dict[int, bytes] = {}
        async with server.client() as client, asyncio.TaskGroup() as group:
            [ann] = await people(client, 1)
            tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
            for _ in range(FILES):
                data = os.urandom(500_000)
                kept[(await ann.upload(data))["file_id"]] = hashlib.sha256(data).digest()
            await crowd.after(STEP).wait()
            before = {
                row.client_id: (row.message_id, row.seq) for keeper in crowd.keepers for row in keeper.ledger.acked_rows
            }
            await asyncio.to_thread(obey, "sqlite backup", settings, tmp_path)
            meanwhile = crowd.acked - len(before)
            for keeper in crowd.keepers:
                await keeper.finished.wait()
            for task in tasks:
                task.cancel()
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(obey, "sqlite restore", settings, tmp_path)
        server = await launched(launch, settings)
        crowd.url = server.url
        stored = await crowd.stored_places()
        async with server.client() as client:
            ann.client = client
            intact = 0
            for file_id, digest in kept.items():
                answer = await ann.fetch(file_id)
                intact += answer.status_code == 200 and hashlib.sha256(answer.content).digest() == digest
    report.tell("acknowledged before the backup", len(before))
    report.tell("acknowledged while it was made", meanwhile)
    found = sum(stored.get(client_id) == place for client_id, place in before.items())
    report.exactly("of them there after the restore", found, len(before))
    report.exactly("files that are whole", intact, FILES)
