"""Readers that stop reading harm themselves: the others hear everything at once, and the stalled catch up later."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.core.config import Settings
from tests.chaos.conftest import Launch
from tests.chaos.report import SceneReport
from tests.chaos.scale import FORM
from tests.support.accounts import Account, register
from tests.support.servers import Door, Server, free_port
from tests.support.socket_client import SocketClient

HEALTHY = 10
SOCKETS_PER_USER = 5
WINDOW = 16
TEXT = "x" * 3900
WARM_UP = 500
CONTROL = 1000
"""Messages during which the server's memory is watched before anybody stalls: what it gains is not theirs."""
SILENCE_SECONDS = 1.0
CLOSE_SECONDS = 10.0
RSS_EACH = 1.5 * 1024 * 1024
RSS_ONCE = 5 * 1024 * 1024
"""What the allocator may keep of one burst, however few readers cause it."""


class StalledReader:
    """A socket that shakes hands, and from then on leaves everything unread."""

    def __init__(self, server: Server, token: str) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # the kernel makes it as small as it may
        self.socket.settimeout(20)
        self.socket.connect((host, int(port)))
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET /api/v1/messages/ws HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            f"Authorization: Bearer {token}\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        assert b" 101 " in head, head
        self.port: int = self.socket.getsockname()[1]
        self.server_port = int(port)


def wait_until_all_are_closed(
    server: Server, door: Door, readers: list[StalledReader], begun: list[float], seconds: float
) -> list[float]:
    """When the server let each reader go; those that it did not are left out.

    Nobody tells a peer that does not read, not even TCP: its window is shut. So the server's side is looked at. Under
    plain uvicorn an application can end its own part only, and its line in the log says when; the connection itself
    waits there, with what uvicorn holds, for the peer to read or to vanish.
    """
    ends: list[float] = []
    give_up_at = time.monotonic() + seconds
    while len(ends) < len(readers) and time.monotonic() < give_up_at:
        if door == "tuned":
            count = len({reader.port for reader in readers} - open_connections(readers[0].server_port))
        else:
            count = server.log.count('"event":"socket"')
        ends += [time.monotonic()] * (count - len(ends))
        if begun:
            give_up_at = min(give_up_at, begun[0] + CLOSE_SECONDS + 1)
        time.sleep(0.02)  # a look at the server from outside, not a wait for luck
    return ends


def open_connections(server_port: int) -> set[int]:
    """The ports of the peers whose connections the server holds open."""
    peers: set[int] = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state = line.split()[1:4]
        if state == "01" and int(local.rpartition(":")[2], 16) == server_port:
            peers.add(int(remote.rpartition(":")[2], 16))
    return peers


@dataclass
class Healthy:
    """A reader that takes note of when each message came."""

    client: SocketClient
    arrivals: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    async def listen(self) -> None:
        while True:
            event = await self.client.wait(lambda e: e["type"] == "new_message")
            self.arrivals.append(time.monotonic())
            self.ids.append(event["message"]["id"])
            self.client.seen.clear()

    @property
    def silence(self) -> float:
        """The longest time between two messages."""
        return max(after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False))


@dataclass
class Stream:
    """One that keeps sending to a group."""

    client: SocketClient
    chat_id: int
    server: Server
    acked: list[int] = field(default_factory=list)
    rss_peak: int = 0
    passed_at: list[float] = field(default_factory=list)
    """When the bytes sent to each reader passed the bound."""

    async def send(self, enough: asyncio.Event | int, bound: int | None = None) -> None:
        """Send until told that it is enough, with a few messages under way at any time."""
        under_way = 0
        begun = len(self.acked)
        while True:
            done = enough.is_set() if isinstance(enough, asyncio.Event) else len(self.acked) - begun >= enough
            while not done and under_way < WINDOW:
                await self.client.send(
                    type="new_message", chat_id=self.chat_id, content=TEXT, client_id=str(uuid.uuid4())
                )
                under_way += 1
            if not under_way:
                return
            ack = await self.client.wait(lambda e: e["type"] in ("ack", "error"))
            assert ack["type"] == "ack", ack
            under_way -= 1
            self.acked.append(ack["message_id"])
            self.client.inbox[:] = [event for event in self.client.inbox if event["type"] in ("ack", "error")]
            self.client.seen.clear()
            if bound is not None and not self.passed_at and (len(self.acked) - begun) * len(TEXT) > bound:
                self.passed_at.append(time.monotonic())
            if len(self.acked) % 20 == 0:
                self.rss_peak = max(self.rss_peak, rss(self.server.pid))


def rss(pid: int) -> int:
    """Bytes of memory a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory")


@contextlib.contextmanager
def stalled_readers(server: Server, accounts: list[Account], count: int) -> Iterator[list[StalledReader]]:
    """So many sockets that read nothing, spread over the accounts."""
    readers: list[StalledReader] = []
    try:
        for number in range(count):
            reader = StalledReader(server, accounts[number % len(accounts)].access_token)
            readers.append(reader)
        yield readers
    finally:
        for reader in readers:
            reader.socket.close()


# On a quick machine more is sent meanwhile than a client may catch up with by default.
@pytest.mark.settings(resume_max_changes=1_000_000)
@pytest.mark.chaos("A slow or dead reader hurts only itself")
@pytest.mark.timeout(180 if FORM == "short" else 900)
@pytest.mark.parametrize("count", [1, 10, 100, *([1000] if FORM == "long" else [])])
@pytest.mark.parametrize("door", ["tuned", "plain"])
async def test_stalled_readers_silence_nobody_are_closed_cost_little_and_catch_up(
    sqlite_settings: Settings, launch: Launch, door: Door, count: int, report: SceneReport
) -> None:
    server = launch(sqlite_settings, free_port(), door)
    await asyncio.to_thread(server.wait_until_ready)
    async with server.client() as client:
        sender, *healthy_people = [await register(client) for _ in range(1 + HEALTHY)]
        stalled_people = [await register(client) for _ in range(max(1, count // SOCKETS_PER_USER))]
        members = [person.id for person in (*healthy_people, *stalled_people)]
        body = {"title": "Stream", "member_ids": members}
        chat = (await client.post("/api/v1/chats/group", json=body, headers=sender.headers)).json()
    async with contextlib.AsyncExitStack() as stack:

        async def open_socket(account: Account) -> SocketClient:
            return await stack.enter_async_context(await SocketClient.open(server.ws_url, account.access_token))

        healthy = [Healthy(await open_socket(person)) for person in healthy_people]
        listening = [asyncio.create_task(reader.listen()) for reader in healthy]
        stream = Stream(await open_socket(sender), chat["id"], server)
        await stream.send(WARM_UP)
        warm = stream.rss_peak = rss(server.pid)
        await stream.send(CONTROL)
        gained_anyway = stream.rss_peak - warm
        with stalled_readers(server, stalled_people, count) as readers:
            rss_before = stream.rss_peak = rss(server.pid)
            async with server.client() as client:
                version = (await client.get(f"/api/v1/chats/{chat['id']}", headers=sender.headers)).json()["version"]
            before = len(stream.acked)
            for reader in healthy:
                reader.arrivals.clear()
            enough = asyncio.Event()
            sending = asyncio.create_task(stream.send(enough, sqlite_settings.socket_max_unsent_bytes))
            ends = await asyncio.to_thread(wait_until_all_are_closed, server, door, readers, stream.passed_at, 60.0)
            enough.set()
            await sending
        rss_growth = stream.rss_peak - rss_before
        silence = max(reader.silence for reader in healthy)
        closed_after = max(ends, default=float("inf")) - stream.passed_at[0]
        report.tell("messages meanwhile", len(stream.acked) - before)
        for reader in healthy:
            async with asyncio.timeout(20):
                while len(reader.ids) < len(stream.acked):
                    await asyncio.wait(listening, timeout=0.01)
                    assert not any(task.done() for task in listening)
            assert reader.ids == stream.acked
            assert reader.client.close_code is None
        for task in listening:
            task.cancel()
        report.at_most("longest silence for the others", silence, SILENCE_SECONDS, "s")
        report.exactly("stalled readers closed", len(ends), count)
        report.at_most("the last closed after", closed_after, CLOSE_SECONDS, "s")
        assert len([line for line in server.log.splitlines() if "slow_reader_closed" in line]) == count
        bound = (RSS_EACH * count + RSS_ONCE) / 2**20
        report.at_most("memory gained", (rss_growth - gained_anyway) / 2**20, bound, "MiB")
        for person in stalled_people:
            async with await SocketClient.open(server.ws_url, person.access_token) as client_again:
                await client_again.send(type="resume", chats={str(chat["id"]): version}, ref="again")
                await client_again.wait(type="resumed", ref="again")
                caught_up: list[dict[str, Any]] = [
                    message
                    for event in client_again.seen
                    if event["type"] == "chat_changes"
                    for message in event["messages"]
                ]
            assert [message["id"] for message in caught_up] == stream.acked[before:]
