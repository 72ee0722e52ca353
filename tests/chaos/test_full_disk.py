"""The disk is full: nothing acknowledged is lost, what cannot be kept is refused, what is there can be read, and once
there is room again all goes on by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch, lacking
from tests.chaos.crowd import Crowd
from tests.chaos.report import SceneReport
from tests.chaos.small_disk import MB, SmallDisk, missing, small_disk
from tests.chaos.world import ANSWER_SECONDS, RECOVERY_SECONDS, SLACK, launched
from tests.support.databases import SqliteTemplate, make_settings
from tests.support.people import Person, people
from tests.support.watch import files_under

PROMISE = "A full disk loses nothing and is survived"
STEP = 200
UPLOAD = 1_500_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Sixteen megabytes."""
    if reason := missing():
        lacking(reason)
    with small_disk(tmp_path / "disk", 16) as disk:
        yield disk


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_a_full_disk_under_sqlite_refuses_sends_and_serves_reads_until_there_is_room(
    sqlite_template: SqliteTemplate,
    disk: SmallDisk,
    launch: Launch,
    tmp_path: Path,
    rng: random.Random,
    report: SceneReport,
) -> None:
    settings = make_settings(**sqlite_template.new(disk.root), upload_path=tmp_path / "uploads")
    server = await launched(launch, settings)
    with Crowd(server.url, rng, tmp_path, 1_000_000) as crowd:
        await crowd.gather(users=6, devices=10, callers=2)
        crowd.up.set()
        async with server.client() as client:
            ann, bo = await people(client, 2)
            chat_id = await ann.personal(bo)
            await ann.say(chat_id, "before")
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(keeper.run()) for keeper in crowd.keepers]
                await crowd.after(STEP).wait()
                disk.fill()
                refusals, slowest, slowest_read = 0, 0.0, 0.0
                while refusals < 3:  # what is left in SQLite's files takes a few messages yet
                    begun = time.monotonic()
                    answer = await ann.request("POST", f"/chats/{chat_id}/messages", {"content": "x" * 4000})
                    slowest = max(slowest, time.monotonic() - begun)
                    if answer.status_code == 201:
                        continue
                    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
                    assert int(answer.headers["retry-after"]) > 0
                    refusals += 1
                    begun = time.monotonic()
                    assert await ann.history(chat_id)
                    assert await bo.do("GET", "/chats")
                    slowest_read = max(slowest_read, time.monotonic() - begun)
                full_at = crowd.acked
                disk.empty()
                begun = time.monotonic()
                while (await ann.request("POST", f"/chats/{chat_id}/messages", {"content": "after"})).is_error:
                    assert time.monotonic() - begun < RECOVERY_SECONDS * 4
                recovered = time.monotonic() - begun
                crowd.target = full_at + STEP
                for keeper in crowd.keepers:
                    await keeper.finished.wait()
                for keeper in crowd.keepers:
                    await keeper.settle()
                for task in tasks:
                    task.cancel()
        checked = await crowd.check()
    await asyncio.to_thread(server.stop)
    with sqlite3.connect(settings.sqlite_path) as connection:
        [[integrity]] = connection.execute("PRAGMA integrity_check").fetchall()
    connection.close()
    report.at_most("slowest answer", slowest, ANSWER_SECONDS + SLACK, "s")
    report.at_most("slowest two reads", slowest_read, 1, "s")
    report.at_most("recovered in", recovered, RECOVERY_SECONDS, "s")
    report.tell("acknowledged", checked.acked)
    report.exactly("complaints of integrity_check", int(integrity != "ok"), 0)
    crowd.hold(report, checked)


@pytest.mark.chaos(PROMISE)
@pytest.mark.timeout(120)
async def test_a_full_upload_folder_refuses_files_leaves_no_parts_and_stops_no_message(
    settings: Settings, disk: SmallDisk, launch: Launch, report: SceneReport
) -> None:
    folder = disk.root / "uploads"
    server = await launched(launch, settings.model_copy(update={"upload_path": folder}))
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        data = os.urandom(UPLOAD)
        file = await ann.upload(data)
        await ann.send_files(chat_id, "file", file)
        before = files_under(folder)
        disk.fill(leaving=MB)
        answers = await asyncio.gather(
            *(person.try_upload(os.urandom(UPLOAD)) for person in (ann, bo) for _ in range(4))
        )
        assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "storage_unavailable")}
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
        left = files_under(folder).keys() - before.keys()
        begun = time.monotonic()
        await ann.say(chat_id, "words need no room there")
        said = time.monotonic() - begun
        assert hashlib.sha256((await bo.fetch(file["file_id"])).content).digest() == hashlib.sha256(data).digest()
        disk.empty()
        again = await _upload_until_taken(bo)
        await bo.send_files(chat_id, "file", again)
        assert (await ann.fetch(again["file_id"])).status_code == 200
    report.tell("uploads refused", len(answers))
    report.exactly("parts of files left behind", len(left), 0)
    report.at_most("a message meanwhile", said, 1, "s")


async def _upload_until_taken(person: Person) -> dict[str, int]:
    async with asyncio.timeout(RECOVERY_SECONDS):
        while True:
            answer = await person.try_upload(os.urandom(UPLOAD))
            if answer.status_code == 201:
                uploaded: dict[str, int] = answer.json()
                return uploaded
