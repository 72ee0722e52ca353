"""Clients that cost and say nothing: floods of small frames, and connections that never ask. Others notice nothing.

`DIALECT_FLOOD_CONNECTIONS` and `DIALECT_FLOOD_SECONDS` make the second kind as long as security reviews want it
(5000 connections for 60 seconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import httpx
import pytest

from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.metrics import value
from tests.support.people import Person, people
from tests.support.servers import Door, Server
from tests.support.watch import MB, memory, watched
from tests.support.wire import CLOSE, PING, PONG, TEXT, Client, frame

CONNECTIONS = int(os.environ.get("DIALECT_FLOOD_CONNECTIONS", "200"))
SECONDS = float(os.environ.get("DIALECT_FLOOD_SECONDS", "3"))
PATH = "/api/v1/messages/ws"
LIMIT = 1000
DOORS: list[Door] = ["tuned", "plain"]
CUT = "dialect_http_connections_cut_total"

FLOODS = {
    "pings": (b"", frame(PING)),
    "long pings": (b"", frame(PING, b"p" * 125)),
    "pongs": (b"", frame(PONG)),
    "empty fragments": (frame(TEXT, b"", fin=False), frame(0, b"", fin=False)),
    "fragments of one byte": (frame(TEXT, b'{"', fin=False), frame(0, b"x", fin=False)),
    "messages in two fragments": (b"", frame(TEXT, b"[", fin=False) + frame(0, b"]")),
}


def processor_seconds(pid: int) -> float:
    """What a process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


def open_raw(server: Server, person: Person) -> Client:
    """A socket of theirs, after its hello."""
    client = Client(port_of(server), PATH, f"Authorization: Bearer {person.account.access_token}\r\n")
    assert client.frame()[0] == TEXT
    return client


def pour(client: Client, begin: bytes, small: bytes) -> int | None:
    """Send up to a million small frames; the code that the server closed with before."""
    with contextlib.suppress(ConnectionError):
        client.socket.sendall(begin)
        for _ in range(1000):
            client.socket.sendall(small * 1000)
            client.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if b"\x88" in client.socket.recv(1, socket.MSG_PEEK):
                    break
            client.socket.setblocking(True)
            client.socket.settimeout(10)
    client.socket.settimeout(10)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            opcode, payload = client.frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2])
    return None


@pytest.mark.settings(limit_small_frames_per_second=LIMIT)
async def test_a_flood_of_small_frames_is_closed_and_costs_little(server: Server) -> None:
    async with server.client() as client:
        ann, bo, cy = await people(client, 3)
        async with watched(server, bo, cy) as watch, watch.talking(least=150):
            for name, (begin, small) in FLOODS.items():
                used = processor_seconds(server.pid)
                with await asyncio.to_thread(open_raw, server, ann) as flooder:
                    code = await asyncio.to_thread(pour, flooder, begin, small)
                assert code == 4429, name
                assert processor_seconds(server.pid) - used < 1, name


@pytest.mark.settings(limit_small_frames_per_second=LIMIT)
async def test_what_stays_within_the_limit_goes_through(server: Server) -> None:
    async with server.client() as client:
        [ann] = await people(client, 1)
        with await asyncio.to_thread(open_raw, server, ann) as socket:

            def talk() -> None:
                pieces = [frame(0, b" ", fin=False)] * (LIMIT - 200)
                socket.send([frame(TEXT, b'{"type": "ping",', fin=False), *pieces, frame(0, b'"ref": "r"}')])
                assert socket.frame() == (TEXT, b'{"type":"pong","ref":"r"}')
                socket.send([frame(PING, b"%d" % number) for number in range(150)])
                assert [socket.frame() for _ in range(150)] == [(PONG, b"%d" % number) for number in range(150)]

            await asyncio.to_thread(talk)


# --- connections that never ask ---------------------------------------------------------------------------------

HALF = f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n".encode()
BEGINNINGS = {
    "nothing": b"",
    "half a line": b"GET /health",
    "half a handshake": HALF,
}


@pytest.mark.settings(request_head_seconds=1.0)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_who_does_not_ask_in_time_is_hung_up_on(server: Server, beginning: str) -> None:
    with socket.create_connection(("127.0.0.1", port_of(server)), 10) as connection:
        connection.sendall(BEGINNINGS[beginning])
        begun = time.monotonic()
        assert connection.recv(100) == b""
        assert 0.5 < time.monotonic() - begun < 8


@pytest.mark.settings(request_head_seconds=1.0)
def test_who_asks_a_byte_at_a_time_is_hung_up_on(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", port_of(server)), 0.1) as connection:
        end = time.monotonic() + 8
        gone = False
        while not gone and time.monotonic() < end:
            try:
                connection.sendall(b"G")
                gone = not connection.recv(1)
            except TimeoutError:
                continue
            except ConnectionError:
                gone = True
        assert gone


@pytest.mark.settings(request_head_seconds=1.0)
def test_the_second_request_of_a_connection_has_its_time_too(server: Server) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), 10) as connection:
        connection.sendall(request)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
            answer += connection.recv(65536)
        begun = time.monotonic()
        connection.sendall(request[:20])
        assert connection.recv(100) == b""
        assert time.monotonic() - begun < 4, "that is not the keep-alive's own timeout"


def test_a_handshake_by_http_1_0_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", port_of(server)), 10) as connection:
        connection.sendall(HALF.replace(b"1.1", b"1.0") + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


# --- bodies that do not come --------------------------------------------------------------------------------------

POST = "POST /api/v1/auth/register HTTP/1.1\r\nHost: x\r\nContent-Type: {type}\r\nContent-Length: 1000\r\n\r\n"
FORM = "application/x-www-form-urlencoded"


@contextlib.contextmanager
def said(server: Server, text: str | bytes, patience: float = 20.0) -> Iterator[socket.socket]:
    """A connection on which this was sent."""
    with socket.create_connection(("127.0.0.1", port_of(server)), patience) as connection:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        yield connection


def until_closed(connection: socket.socket, drop: bytes = b"1") -> bytes:
    """All that comes until the server hangs up; some bytes a moment are sent meanwhile, which must not help."""
    got = b""
    connection.settimeout(0.2)
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        try:
            connection.sendall(drop)
            data = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return got
        if not data:
            return got
        got += data
    raise AssertionError(f"20 s passed, and the connection is still open: {got!r}")


@pytest.mark.settings(request_body_seconds=1.0)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["application/json", FORM])
async def test_a_body_that_does_not_come_in_time_is_answered_408_and_hung_up_on(
    settings: Settings, start_server: StartServer, door: Door, kind: str
) -> None:
    server = start_server(settings, door)
    path = "register" if "json" in kind else "token"
    with said(server, POST.replace("register", path).format(type=kind)) as connection:
        answer = await asyncio.to_thread(until_closed, connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close" in head.lower()
    assert json.loads(body)["code"] == "body_too_slow"
    async with server.client() as client:
        assert value((await client.get("/metrics")).text, CUT, reason="body") == 1
        await people(client, 1)  # a body in time is one as ever


GET = "GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"
OWED = {
    "to nobody": POST.replace("/auth/register", "/nowhere").format(type=FORM),
    "with a GET": GET.format(path="/health/live", headers="Content-Length: 1000\r\n"),
    "to an upload that was refused": POST.replace("/auth/register", "/messages/upload").format(
        type="multipart/form-data; boundary=b"
    ),
}


@pytest.mark.settings(request_body_seconds=0.2)
@pytest.mark.parametrize("owed", OWED)
async def test_a_body_that_nobody_reads_keeps_no_connection_open(server: Server, owed: str) -> None:
    with said(server, OWED[owed]) as connection:
        answer = await asyncio.to_thread(until_closed, connection)
    assert answer.startswith(b"HTTP/1.1 ")
    await cut(server, "body", 1)


@pytest.mark.settings(request_head_seconds=1.0)
async def test_line_ends_between_two_requests_keep_no_connection_open(server: Server) -> None:
    with said(server, GET.format(path="/health/live", headers="")) as connection:
        answer = await asyncio.to_thread(until_closed, connection, b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    await cut(server, "head", 1)


async def cut(server: Server, reason: str, count: int) -> None:
    """Return once so many connections were cut for this reason."""

    async def is_counted() -> bool:
        return await shown(server, CUT, reason=reason) >= count

    await until(is_counted)


async def shown(server: Server, name: str, **labels: str) -> float:
    """What a server tells of itself."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        return value((await client.get("/metrics")).text, name, **labels) or 0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once it is so; requests that are turned away meanwhile say nothing about it."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if await condition():
                    return
            await asyncio.sleep(0.05)


# --- answers that nobody reads ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def download(server: Server) -> AsyncIterator[tuple[socket.socket, int]]:
    """The beginning of an answer of so many megabytes, to a client whose system takes little of it."""
    size = 12 * MB
    async with server.client() as client:
        [ann] = await people(client, 1)
        path = f"/api/v1/files/{(await ann.upload(os.urandom(size), 'a.bin'))['file_id']}"
        headers = f"Authorization: Bearer {ann.account.access_token}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", port_of(server)))
        connection.sendall(GET.format(path=path, headers=headers).encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection, size


def open_files(server: Server, settings: Settings) -> list[str]:
    """The uploaded files that a server holds open."""
    found = []
    for entry in os.scandir(f"/proc/{server.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry.path))
    return [path for path in found if path.startswith(str(settings.upload_path))]


@pytest.mark.settings(response_idle_seconds=1.0)
async def test_who_does_not_read_their_answer_is_cut_off_and_the_file_is_closed(
    server: Server, settings: Settings
) -> None:
    async with download(server):
        assert len(open_files(server, settings)) == 1
        await cut(server, "reading", 1)

        async def is_closed() -> bool:
            return not open_files(server, settings)

        await until(is_closed)


@pytest.mark.settings(response_idle_seconds=1.0)
async def test_who_reads_slowly_gets_all_of_their_answer(server: Server) -> None:
    async with download(server) as (connection, size):

        def read_slowly() -> int:
            got, until = 0, time.monotonic() + 4
            while time.monotonic() < until:
                got += len(connection.recv(4096))
                time.sleep(0.1)  # its pace: 40 KB/s, at which our buffer stays full for longer than a second
            while data := connection.recv(1 << 20):
                got += len(data)
                if got >= size:
                    break
            return got

        assert await asyncio.to_thread(read_slowly) >= size


# --- more connections than there is room for ----------------------------------------------------------------------


@pytest.mark.settings(max_http_connections=20, request_body_seconds=60.0, request_head_seconds=60.0)
async def test_when_there_is_no_room_whoever_was_waited_for_longest_makes_some(server: Server) -> None:
    beginnings = [*BEGINNINGS.values(), POST.format(type=FORM).encode()]
    with contextlib.ExitStack() as stack:
        for number in range(60):
            stack.enter_context(said(server, beginnings[number % len(beginnings)]))
        for _ in range(10):
            async with server.client() as client:
                assert (await client.get("/health/live")).status_code == 200
        await cut(server, "crowded", 40)
    assert "too_many_connections" in server.log


@pytest.mark.settings(max_http_connections_per_ip=3, forwarded_allow_ips="192.0.2.1")
async def test_an_address_has_so_many_connections_and_sockets_are_not_among_them(server: Server) -> None:
    async with contextlib.AsyncExitStack() as sockets:
        async with server.client() as client:
            [ann] = await people(client, 1)
        for _ in range(5):
            await sockets.enter_async_context(await ann.open(server))

        async def only_this_one() -> bool:
            return await shown(server, "dialect_http_connections_open") == 1  # the one that asks

        await until(only_this_one)
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(said(server, b""))
            with said(server, b"") as connection:
                head, _, body = (await asyncio.to_thread(read_all, connection)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        assert b"\r\nretry-after: " in head
        assert b"\r\nconnection: close" in head
        assert json.loads(body)["code"] == "too_many_connections"
        await until(only_this_one)
    assert "too_many_connections_from_one_address" in server.log


def read_all(connection: socket.socket) -> bytes:
    """All that comes."""
    got = b""
    while data := connection.recv(65536):
        got += data
    return got


@pytest.mark.timeout(120 + 3 * SECONDS)
async def test_thousands_of_silent_connections_harm_nobody(
    settings: Settings, start_server: StartServer, capsys: pytest.CaptureFixture[str]
) -> None:
    head_seconds = min(10.0, SECONDS / 2)
    server = start_server(settings.model_copy(update={"request_head_seconds": head_seconds}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, CONNECTIONS + 500)), hard))
    async with server.client() as client:
        ann, bo = await people(client, 2)
        async with watched(server, ann, bo) as watch, watch.talking(least=150):
            before = memory(server.pid, "VmRSS")
            end = time.monotonic() + SECONDS
            hung_up = 0

            async def be_silent(number: int) -> None:
                """Hold a connection all the time: open another whenever the server has closed one."""
                nonlocal hung_up
                while time.monotonic() < end:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                    try:
                        writer.write(list(BEGINNINGS.values())[number % len(BEGINNINGS)])
                        assert await reader.read(1) == b""
                        hung_up += 1
                    finally:
                        writer.close()

            async with asyncio.timeout(60 + 2 * SECONDS):
                await asyncio.gather(*map(be_silent, range(CONNECTIONS)))
            grown = memory(server.pid, "VmRSS") - before
    with capsys.disabled():
        sys.stdout.write(
            f"\n{CONNECTIONS} silent connections for {SECONDS:.0f} s: {hung_up} hung up on; p99 of others "
            f"{watch.p99 * 1000:.0f} ms of {len(watch.seconds)}; memory {grown / MB:+.1f} MB\n"
        )
    assert hung_up >= CONNECTIONS
    assert grown < 8 * MB + CONNECTIONS * 20_000
