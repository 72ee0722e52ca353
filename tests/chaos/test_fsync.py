"""What SQLite acknowledges is on the disk, not in the kernel's memory: the order of the server's calls shows it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch, lacking
from tests.chaos.report import SceneReport
from tests.chaos.scale import scaled
from tests.chaos.strace import CALLS, LONGEST, check_trace, new_mark
from tests.support.accounts import register
from tests.support.servers import free_port
from tests.support.socket_client import SocketClient

SENDS = scaled("FSYNC_SENDS", short=200, long=1000)
REQUESTS = 20

PATH = "/data/dialect.db-wal"
MARK = "mark-00000000000000000000000000000001"
OTHER = "mark-00000000000000000000000000000002"
HEADER = f'80 pwrite64(5<{PATH}>, "7\\177", 24, 0) = 24'
PAGE = f'80 pwrite64(5<{PATH}>, "\\r\\0\\0hello {MARK}\\0\\0", 4096, 24) = 4096'
SYNC = f"80 fdatasync(5<{PATH}>) = 0"
ACK = f'77 write(9<socket:[1]>, "\\201~\\0\\212{{\\"type\\":\\"ack\\",\\"ref\\":\\"{MARK}\\"}}", 138) = 138'
GOOD = [HEADER, PAGE, SYNC, ACK]


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(GOOD, id="one after the other"),
        pytest.param([*GOOD, ACK], id="told once more"),
        pytest.param(
            [
                PAGE.replace(" = 4096", " <unfinished ...>").replace(")", ""),
                '77 write(9<socket:[1]>, "\\201\\3new", 5) = 5',
                "80 <... pwrite64 resumed>) = 4096",
                f"80 fdatasync(5<{PATH}> <unfinished ...>",
                "80 <... fdatasync resumed>) = 0",
                ACK.replace(") = 138", " <unfinished ...>"),
                "77 <... write resumed>) = 138",
            ],
            id="calls of two threads that overlap",
        ),
    ],
)
def test_the_checker_accepts_what_waited_for_the_disk(trace: list[str]) -> None:
    verdict = check_trace(trace)
    assert (verdict.told, verdict.faults) == ({MARK}, [])


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param([PAGE, ACK, SYNC], id="the ack leaves before the sync"),
        pytest.param([ACK, PAGE, SYNC], id="the ack leaves before the write"),
        pytest.param([PAGE, ACK], id="no sync at all"),
        pytest.param([SYNC, PAGE, ACK], id="the sync comes before the write"),
        pytest.param([SYNC, ACK], id="nothing is written"),
        pytest.param([PAGE.replace(MARK, OTHER), SYNC, ACK], id="the sync is that of another message"),
        pytest.param([PAGE, SYNC.replace("= 0", "= -1 EIO (Input/output error)"), ACK], id="the sync fails"),
        pytest.param([PAGE, SYNC.replace(PATH, "/data/other"), ACK], id="another file is synced"),
        pytest.param([PAGE.replace(PATH, "/data/other"), SYNC, ACK], id="another file is written"),
        pytest.param(
            [PAGE, f"80 fdatasync(5<{PATH}> <unfinished ...>", ACK, "80 <... fdatasync resumed>) = 0"],
            id="the ack leaves during the sync",
        ),
        pytest.param([PAGE, ACK.replace("ack", "new_message"), SYNC, ACK], id="the others hear of it too early"),
        pytest.param([PAGE, f'77 write(9<socket:[1]>, "HTTP/1.1 201 {MARK}", 60) = 60', SYNC], id="over REST"),
        pytest.param([PAGE, f'77 sendto(9<socket:[1]>, "{MARK}", 60, 0, NULL, 0) = 60', SYNC], id="by another call"),
    ],
)
def test_the_checker_finds_what_did_not_wait_for_the_disk(trace: list[str]) -> None:
    around = [line.replace(MARK, "mark-" + "f" * 32) for line in GOOD]
    verdict = check_trace([*around, *trace, *around])
    assert verdict.early == {MARK}
    assert len(verdict.faults) == 1


@pytest.mark.chaos("An acknowledged message is never lost, doubled or reordered")
@pytest.mark.timeout(120 + SENDS // 5)
async def test_each_ack_leaves_after_its_message_is_on_the_disk(
    sqlite_settings: Settings, launch: Launch, tmp_path: Path, report: SceneReport
) -> None:
    if shutil.which("strace") is None:
        lacking("strace is not installed (Debian: apt-get install strace): nobody checks that acks wait for the disk")
    trace = tmp_path / "trace"
    # -D: the server stays our own child, and signals reach it and not strace.
    strace = ["strace", "-D", "-f", "-y", "-qq", "-s", str(LONGEST), "-e", f"trace={CALLS}", "-e", "signal=none"]
    server = launch(sqlite_settings, free_port(), through=[*strace, "-o", str(trace)])
    await asyncio.to_thread(server.wait_until_ready)
    marks = [new_mark() for _ in range(SENDS + REQUESTS + 1)]
    async with server.client() as client:
        ann, bob = await register(client), await register(client)
        chat = await client.post("/api/v1/chats/personal", json={"user_id": bob.id}, headers=ann.headers)
        chat_id = chat.json()["id"]
        async with await SocketClient.open(server.ws_url, ann.access_token) as socket:
            message_id = 0
            for mark in marks[:SENDS]:
                await socket.send(type="new_message", chat_id=chat_id, content=f"hello {mark}", ref=mark)
                message_id = (await socket.wait(type="ack", ref=mark))["message_id"]
                socket.inbox.clear()
            edit = marks[SENDS]
            await socket.send(type="edit_message", chat_id=chat_id, message_id=message_id, content=edit, ref=edit)
            await socket.wait(type="ack", ref=edit)
            for mark in marks[SENDS + 1 :]:
                path = f"/api/v1/chats/{chat_id}/messages"
                sent = await client.post(path, json={"content": mark}, headers=ann.headers)
                assert sent.status_code == 201
    await asyncio.to_thread(server.stop)
    with trace.open(encoding="utf-8", errors="replace") as lines:
        verdict = check_trace(lines)
    report.exactly("acks that waited for the disk", len(verdict.told) - len(verdict.early), len(marks))
    assert verdict.faults == []
    assert verdict.told == set(marks)
