"""What SQLite acknowledges is on the disk, not in the kernel's memory: the order of the server's calls shows it."""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from app.core.config import Settings
from tests.crash.conftest import Launch, free_port
from tests.crash.strace import ACKS, CALLS, check_trace
from tests.support.accounts import register
from tests.support.socket_client import SocketClient

SENDS = 200
REQUESTS = 20

PATH = "/data/dialect.db-wal"
ACK = r'77 write(9<socket:[1]>, "\201~\0\212{\"type\":\"ack\",\"ref\":\"1\"}", 138) = 138'
GOOD = [
    f'80 pwrite64(5<{PATH}>, "7f", 24, 0) = 24',
    f'80 pwrite64(5<{PATH}>, "page", 4096, 24) = 4096',
    f"80 fdatasync(5<{PATH}>) = 0",
    ACK,
]


def test_the_checker_accepts_a_trace_in_which_each_ack_waited_for_the_disk() -> None:
    verdict = check_trace(GOOD * 3)
    assert (verdict.acks, verdict.good, verdict.faults) == (3, 3, [])


def test_the_checker_follows_calls_of_several_threads_that_overlap() -> None:
    trace = [
        *GOOD[:2],
        f"80 fdatasync(5<{PATH}> <unfinished ...>",
        '77 write(9<socket:[1]>, "\\201\\3new", 5) = 5',
        "80 <... fdatasync resumed>) = 0",
        ACK.replace("= 138", "<unfinished ...>").replace(", 138)", ", 138"),
        "77 <... write resumed>) = 138",
    ]
    assert check_trace(trace).faults == []


@pytest.mark.parametrize(
    ("planted", "bad_acks"),
    [
        pytest.param([*GOOD[:2], ACK, GOOD[2]], 1, id="the ack leaves before the sync"),
        pytest.param([*GOOD[:2], ACK], 1, id="no sync at all"),
        pytest.param([GOOD[2], *GOOD[:2], ACK], 1, id="the sync comes before the write"),
        pytest.param([GOOD[0], GOOD[2], GOOD[1], ACK], 1, id="half is written after the sync"),
        pytest.param([ACK], 1, id="nothing is written"),
        pytest.param(
            [*GOOD[:2], f"80 fdatasync(5<{PATH}>) = -1 EIO (Input/output error)", ACK], 1, id="the sync fails"
        ),
        pytest.param([*GOOD[:2], "80 fdatasync(6</data/other>) = 0", ACK], 1, id="another file is synced"),
        pytest.param(
            [*GOOD[:2], f"80 fdatasync(5<{PATH}> <unfinished ...>", ACK, "80 <... fdatasync resumed>) = 0"],
            1,
            id="the ack leaves during the sync",
        ),
        pytest.param([*GOOD, ACK], 1, id="two acks for one sync"),
        pytest.param([*GOOD[:3], ACK.replace(r"\"ref\"", r"\"type\":\"ack\"")], 1, id="two acks in one write"),
        pytest.param([*GOOD[:2], '77 write(9<socket:[1]>, "HTTP/1.1 201 Created", 20) = 20'], 1, id="over REST"),
    ],
)
def test_the_checker_finds_an_ack_that_did_not_wait_for_the_disk(planted: list[str], bad_acks: int) -> None:
    verdict = check_trace([*GOOD, *planted, *GOOD])
    assert len(verdict.faults) == bad_acks
    assert verdict.good == verdict.acks - bad_acks


@pytest.mark.timeout(120)
async def test_each_ack_leaves_after_its_message_is_on_the_disk(
    sqlite_settings: Settings, launch: Launch, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        reason = "strace is not installed (Debian: apt-get install strace): nobody checks that acks wait for the disk"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    trace = tmp_path / "trace"
    # -D: the server stays our own child, and signals reach it and not strace.
    strace = ["strace", "-D", "-f", "-y", "-qq", "-s", "100000", "-e", f"trace={CALLS}", "-e", "signal=none"]
    server = launch(sqlite_settings, free_port(), through=[*strace, "-o", str(trace)])
    await asyncio.to_thread(server.wait_until_ready)
    async with server.client() as client:
        ann, bob = await register(client), await register(client)
        chat = await client.post("/api/v1/chats/personal", json={"user_id": bob.id}, headers=ann.headers)
        chat_id = chat.json()["id"]
        async with await SocketClient.open(server.ws_url, ann.access_token) as socket:
            ack: dict[str, Any] = {}
            for number in range(SENDS):
                ack = await socket.say(chat_id, f"message {number}", client_id=str(uuid.uuid4()))
                assert ack["type"] == "ack"
                socket.inbox.clear()
            for what in (
                {"type": "edit_message", "content": "edited"},
                {"type": "delete_message", "for_everyone": True},
            ):
                await socket.send(**what, chat_id=chat_id, message_id=ack["message_id"], ref=what["type"])
                await socket.wait(type="ack", ref=what["type"])
            for number in range(REQUESTS):
                path = f"/api/v1/chats/{chat_id}/messages"
                sent = await client.post(path, json={"content": f"over REST {number}"}, headers=ann.headers)
                assert sent.status_code == 201
    await asyncio.to_thread(server.stop)
    with trace.open(encoding="utf-8", errors="replace") as lines:
        verdict = check_trace(lines)
    print(f"{verdict.good} of {verdict.acks} acks waited for the disk")  # noqa: T201 - the figure of the run
    assert verdict.faults == []
    # Three accounts and chats were made over REST (201), the rest are the commands above.
    assert verdict.acks == 3 + SENDS + 2 + REQUESTS
    assert all(ack in trace.read_text(errors="replace") for ack in ACKS)
