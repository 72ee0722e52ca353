"""Both transports on real uvicorn servers, against clients that own every byte they send."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import logging
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.frames import Close, Frame, Opcode

from app.api import asgi_transport, websocket_protocol
from app.api.asgi_transport import serve_socket
from app.api.websocket_protocol import DialectWebSocketProtocol, RawSocket
from app.services.transport import HIGH_WATER, LOW_WATER, Frames, Transport, frame_close, frame_text

MAX_FRAME = 64 * 1024
PATIENCE = 10.0
T = TypeVar("T")


class Recorder:
    """A receiver that tells the test what it was told, and answers as the test asks."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.texts: list[bytes] = []
        self.echo = True
        self.pause_each = False
        self.fails = False
        self._log: list[tuple[Any, ...]] = []
        self._changed = threading.Condition()

    def _note(self, *event: Any) -> None:
        with self._changed:
            self._log.append(event)
            self._changed.notify_all()

    def on_text(self, data: bytes) -> None:
        if self.fails:
            raise ZeroDivisionError
        self.texts.append(data)
        if self.pause_each:
            self.transport.pause_reading()
        if self.echo:
            self.transport.send(Frames([data]))
        self._note("text", data)

    def on_binary(self, data: bytes) -> None:
        self._note("binary", data)

    def on_drained(self) -> None:
        self._note("drained", self.transport.unsent_bytes)

    def on_shutdown(self) -> None:
        self._note("shutdown")

    def on_closed(self, code: int) -> None:
        self._note("closed", code)

    def events(self, kind: str) -> list[tuple[Any, ...]]:
        with self._changed:
            return [event for event in self._log if event[0] == kind]

    async def wait(self, kind: str, count: int = 1) -> tuple[Any, ...]:
        """The event of that kind, when there are `count` of them."""

        def waiting() -> tuple[Any, ...]:
            with self._changed:
                enough = self._changed.wait_for(lambda: sum(event[0] == kind for event in self._log) >= count, PATIENCE)
                assert enough, f"no {kind} among {[event[0] for event in self._log][-20:]}"
                return [event for event in self._log if event[0] == kind][count - 1]

        return await asyncio.to_thread(waiting)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run something on the server's loop, as the connection manager would."""

        async def there() -> T:
            return function(*args)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), self.loop))

    async def closed_once(self) -> int:
        """The code it closed with; nothing may be told after that."""
        code: int = (await self.wait("closed"))[1]
        await self.call(lambda: None)
        with self._changed:
            assert self._log[-1] == ("closed", code)
        assert len(self.events("closed")) == 1
        return code


class Server:
    """uvicorn in a thread, with one route whose receivers the tests can hold."""

    def __init__(self, *, tuned: bool, loop: str = "uvloop", **options: Any) -> None:
        self.tuned = tuned
        self.plain_echo = False
        self.delay_accept = threading.Event()
        self.delay_accept.set()
        self.asked = threading.Event()
        self._receivers: dict[str, Recorder] = {}
        self._made = threading.Condition()
        app = Starlette(
            routes=[
                WebSocketRoute("/ws", self._serve),
                WebSocketRoute("/plain", self._plain),
                WebSocketRoute("/broken", self._broken),
            ],
        )
        options.setdefault("ws_ping_interval", None)
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            ws=DialectWebSocketProtocol if tuned else "websockets-sansio",
            loop=loop,
            lifespan="off",
            log_config=None,
            **options,
        )
        self._sock = config.bind_socket()
        self._sock.listen()  # who comes before the loop runs waits in the backlog
        self.port = self._sock.getsockname()[1]
        self.uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.uvicorn.run, args=([self._sock],), daemon=True)

    async def _serve(self, websocket: WebSocket) -> None:
        self.asked.set()
        if not self.delay_accept.is_set():
            await asyncio.to_thread(self.delay_accept.wait, PATIENCE)

        def make(transport: Transport) -> Recorder:
            receiver = Recorder(transport)
            with self._made:
                self._receivers[websocket.url.query] = receiver
                self._made.notify_all()
            return receiver

        await serve_socket(websocket, make, MAX_FRAME)

    async def _broken(self, websocket: WebSocket) -> None:
        def make(transport: Transport) -> Recorder:
            transport.send(Frames([b"hello"]))
            raise ZeroDivisionError

        await serve_socket(websocket, make, MAX_FRAME)

    async def _plain(self, websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    async def receiver(self, name: str) -> Recorder:
        """The receiver of the connection that was opened with this query string."""

        def waiting() -> Recorder:
            with self._made:
                assert self._made.wait_for(lambda: name in self._receivers, PATIENCE)
                return self._receivers.pop(name)

        return await asyncio.to_thread(waiting)

    def start(self) -> None:
        self._thread.start()

    def ask_to_stop(self) -> None:
        self.uvicorn.should_exit = True

    async def stopped(self, seconds: float = PATIENCE) -> None:
        await asyncio.to_thread(self._thread.join, seconds)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        self.delay_accept.set()
        self.ask_to_stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._sock.close()


class Client:
    """A WebSocket client that reads only when told."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    @classmethod
    async def connect(
        cls, server: Server, *, path: str = "/ws", receive_buffer: int | None = None, headers: str = ""
    ) -> Client:
        client = cls(socket.socket())
        if receive_buffer is not None:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client.sock, ("127.0.0.1", server.port))
        key = base64.b64encode(os.urandom(16)).decode()
        await client.send_raw(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"{headers}\r\n".encode()
        )
        return client

    @classmethod
    async def open(cls, server: Server, **options: Any) -> tuple[Client, Recorder]:
        name = os.urandom(8).hex()
        client = await cls.connect(server, path=f"/ws?{name}", **options)
        await client.accepted()
        return client, await server.receiver(name)

    async def accepted(self) -> bytes:
        while b"\r\n\r\n" not in self._rest:
            self._rest += await self._receive()
        head, self._rest = self._rest.split(b"\r\n\r\n", 1)
        assert head.startswith(b"HTTP/1.1 101 "), head
        return head

    async def send_raw(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def send(self, *frames: bytes) -> None:
        await self.send_raw(b"".join(frames))

    async def _receive(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 20)
        if not data:
            raise EOFError
        return data

    async def _exactly(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._rest += await self._receive()
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: its opcode and payload."""
        head, length = await self._exactly(2)
        if length == 126:
            (length,) = struct.unpack("!H", await self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self._exactly(8))
        assert head & 0x80
        return head & 0x7F, await self._exactly(length)

    async def close_code(self) -> int:
        """The code of the close frame, which must be the next frame, and then the end of the stream."""
        opcode, payload = await self.frame()
        assert opcode == 8
        await self.ended()
        return int.from_bytes(payload[:2])

    async def ended(self) -> None:
        """Answer as a client should, and see the end."""
        with contextlib.suppress(ConnectionError):
            await self.send(frame(8, b"\x03\xe8"))
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                await self._receive()
        self.sock.close()

    def reset(self) -> None:
        """End with an RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True) -> bytes:
    """A frame as the websockets library would make it on a client."""
    return Frame(Opcode(opcode), payload, fin).serialize(mask=mask)


VARIANTS = [
    pytest.param(("tuned", "uvloop"), id="tuned-uvloop"),
    pytest.param(("tuned", "asyncio"), id="tuned-asyncio"),
    pytest.param(("plain", "uvloop"), id="plain"),
]


@pytest.fixture(scope="module", params=VARIANTS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    kind, loop = request.param
    running = Server(tuned=kind == "tuned", loop=loop)
    running.start()
    yield running
    running.stop()


@pytest.fixture
async def clients() -> AsyncIterator[Callable[..., Any]]:
    """Opens clients that are closed when the test is over."""
    opened: list[Client] = []

    async def open_one(server: Server, **options: Any) -> tuple[Client, Recorder]:
        client, receiver = await Client.open(server, **options)
        opened.append(client)
        return client, receiver

    yield open_one
    for client in opened:
        client.sock.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits five seconds for a peer in a test."""
    for module in (websocket_protocol, asgi_transport):
        monkeypatch.setattr(module, "CLOSE_SECONDS", 0.3)


Clients = Callable[..., Any]


# --- messages ---------------------------------------------------------------------------------------------------


async def test_echo(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    for text in ("", "hello", "привет 👋", "x" * 125, "x" * 126, "x" * MAX_FRAME):
        await client.send(frame(1, text.encode()))
        assert await client.frame() == (1, text.encode())
    await client.send(frame(8, b"\x03\xe8"))
    assert await client.close_code() == 1000
    assert await receiver.closed_once() == 1000


async def test_fragments_with_a_ping_between(server: Server, clients: Clients) -> None:
    client, _ = await clients(server)
    letter = "я".encode()
    # The character is torn apart: only the whole message has to be UTF-8.
    await client.send(frame(1, b"a" + letter[:1], fin=False), frame(9, b"p"), frame(0, b"", fin=False))
    assert await client.frame() == (10, b"p")
    await client.send(frame(0, letter[1:]))
    assert await client.frame() == (1, b"a" + letter)


async def test_frames_byte_by_byte(server: Server, clients: Clients) -> None:
    client, _ = await clients(server)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in frame(1, b"y" * 200) + frame(9, b"q"):
        await client.send_raw(bytes((byte,)))
    assert {await client.frame() for _ in range(2)} == {(1, b"y" * 200), (10, b"q")}


async def test_many_messages_in_one_piece_stay_in_order(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    sent = [str(number).encode() for number in range(5 * websocket_protocol.MESSAGES_PER_TURN + 7)]
    await client.send(*(frame(1, text) for text in sent))
    assert [(await client.frame())[1] for _ in sent] == sent
    assert receiver.texts == sent


async def test_what_is_sent_before_the_accept_is_not_lost(server: Server) -> None:
    server.asked.clear()
    server.delay_accept.clear()
    client = await Client.connect(server)
    whole = frame(1, b"one") + frame(1, b"two")  # and the second is torn apart
    try:
        assert await asyncio.to_thread(server.asked.wait, PATIENCE)
        await client.send_raw(whole[:-3])
        server.delay_accept.set()
        await client.accepted()
        assert await client.frame() == (1, b"one")
        await client.send_raw(whole[-3:])
        assert await client.frame() == (1, b"two")
    finally:
        server.delay_accept.set()
        client.sock.close()


async def test_binary(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    await client.send(frame(2, b"\xff"), frame(2, b"a", fin=False), frame(0, b"b"), frame(1, b"still here"))
    assert await client.frame() == (1, b"still here")
    assert receiver.events("binary") == [("binary", b"\xff"), ("binary", b"ab")]


async def test_pings(server: Server, clients: Clients) -> None:
    client, _ = await clients(server)
    await client.send(*(frame(9, str(number).encode()) for number in range(10)), frame(10, b"unasked"))
    assert [await client.frame() for _ in range(10)] == [(10, str(n).encode()) for n in range(10)]


async def test_no_compression_is_agreed_upon(server: Server) -> None:
    if not server.tuned:
        pytest.skip("the plain server's own affair")
    client = await Client.connect(server, headers="Sec-WebSocket-Extensions: permessage-deflate\r\n")
    assert b"permessage-deflate" not in await client.accepted()
    client.sock.close()


# --- refusals ---------------------------------------------------------------------------------------------------

# One frame, or the same bytes in fragments of 1000.
FORMS = pytest.mark.parametrize("size", [MAX_FRAME + 1, 1000], ids=["whole", "fragments"])


def in_fragments(payload: bytes, size: int) -> bytes:
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    last = len(pieces) - 1
    return b"".join(frame(0 if n else 1, piece, fin=n == last) for n, piece in enumerate(pieces))


@FORMS
async def test_size_limit(server: Server, clients: Clients, size: int) -> None:
    client, receiver = await clients(server)
    await client.send(in_fragments(b"z" * MAX_FRAME, size))
    assert await client.frame() == (1, b"z" * MAX_FRAME)
    await client.send(in_fragments(b"z" * (MAX_FRAME + 1), size))
    assert await client.close_code() == 1009
    assert await receiver.closed_once() == 1009
    assert len(receiver.texts) == 1


@FORMS
async def test_bad_utf8(server: Server, clients: Clients, caplog: pytest.LogCaptureFixture, size: int) -> None:
    client, receiver = await clients(server)
    await client.send(in_fragments(b"abc\xed\xa0\x80" * 300, size))
    assert await client.close_code() == 1007
    assert await receiver.closed_once() == 1007
    assert receiver.texts == []
    if server.tuned:
        assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize(
    "data",
    [
        frame(1, b"not masked", mask=False),
        b"\x89\x00",  # neither is this ping
        b"\xc1\x80\0\0\0\0",  # reserved bit
        b"\x83\x80\0\0\0\0",  # opcode 3
        b"\x8b\x80\0\0\0\0",  # opcode 11
        b"\x09\x80\0\0\0\0",  # a ping in fragments
        b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126),  # a long ping
        frame(0, b"continues nothing"),
        frame(1, b"begins", fin=False) + frame(1, b"again"),
        frame(8, b"\x03"),  # half a code
        frame(8, b"\x03\xed"),  # 1005 is never sent
    ],
    ids=lambda data: data[:2].hex(),
)
async def test_breaches_of_the_protocol(server: Server, clients: Clients, data: bytes) -> None:
    client, receiver = await clients(server)
    await client.send(data)
    assert await client.close_code() == 1002
    assert await receiver.closed_once() == 1002


async def test_a_refusal_reaches_a_client_that_is_still_sending(server: Server, clients: Clients) -> None:
    if not server.tuned:
        pytest.skip("plain uvicorn resets, and the reset may overtake the close frame")
    client, receiver = await clients(server)
    await client.send(b"\x81\xff" + (1 << 20).to_bytes(8) + b"mask")
    await client.send_raw(bytes(1 << 20))  # is read and thrown away
    assert (await client.frame())[1][:2] == (1009).to_bytes(2)
    with pytest.raises(EOFError):
        await client.frame()
    client.sock.close()
    assert await receiver.closed_once() == 1009


@pytest.mark.logs_errors
async def test_a_failing_receiver_closes_its_socket(
    server: Server, clients: Clients, caplog: pytest.LogCaptureFixture
) -> None:
    client, receiver = await clients(server)
    receiver.fails = True
    await client.send(frame(1, b"boom"), frame(1, b"boom"))
    assert await client.close_code() == 1011
    assert await receiver.closed_once() == 1011
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == [
        "a socket's receiver failed"
    ]


@pytest.mark.logs_errors
async def test_no_receiver(server: Server) -> None:
    client = await Client.connect(server, path="/broken")
    await client.accepted()
    if server.tuned:
        assert await client.frame() == (1, b"hello")
    assert await client.close_code() == 1011


async def test_an_attached_connection_keeps_no_task(server: Server, clients: Clients) -> None:
    _, receiver = await clients(server)
    _, other = await clients(server)
    state = server.uvicorn.server_state
    await receiver.call(lambda: None)
    # The route's task ended when its receiver was there, which is before the second client was let in.
    tasks, connections = await other.call(lambda: (len(state.tasks), len(state.connections)))
    assert connections >= 2
    assert tasks <= 1 if server.tuned else tasks >= 2


# --- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("payload", "code"), [(b"", 1005), (b"\x03\xe8", 1000), (b"\x0f\xa0bye", 4000)], ids=str)
async def test_the_peer_closes(server: Server, clients: Clients, payload: bytes, code: int) -> None:
    client, receiver = await clients(server)
    await client.send(frame(1, b"last"), frame(8, payload), frame(1, b"too late"))
    if server.tuned:  # the plain server answers the close before the app sees the message
        assert await client.frame() == (1, b"last")
    assert await client.frame() == (8, payload)
    await client.ended()
    assert await receiver.closed_once() == code
    assert receiver.texts == [b"last"]


async def test_close_comes_after_what_was_sent_and_only_once(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)

    def end() -> None:
        receiver.transport.send(Frames([b"first", b"second"]))
        receiver.transport.close(4401, "о" * 100)
        receiver.transport.close(4000)
        receiver.transport.send(Frames([b"never"]))

    await receiver.call(end)
    await client.send(frame(1, b"ignored"))
    assert await client.frame() == (1, b"first")
    assert await client.frame() == (1, b"second")
    opcode, payload = await client.frame()
    assert opcode == 8
    close = Close.parse(payload)
    assert close.code == 4401
    await client.ended()
    assert await receiver.closed_once() == 4401
    assert receiver.texts == []
    await receiver.call(receiver.transport.send, Frames([b"nor now"]))
    await receiver.call(receiver.transport.close, 4000)
    assert await receiver.call(lambda: receiver.transport.unsent_bytes) == 0


async def test_reset_in_the_middle_of_a_frame(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    await client.send(frame(1, b"whole"), frame(1, b"x" * 1000)[:500])
    assert await client.frame() == (1, b"whole")
    client.reset()
    assert await receiver.closed_once() == (1006 if server.tuned else 1005)
    assert receiver.texts == [b"whole"]


async def test_end_of_stream_without_a_close_frame(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    client.sock.close()
    assert await receiver.closed_once() in (1005, 1006)


async def test_a_peer_that_does_not_answer_the_close_is_cut_off(
    server: Server, clients: Clients, hurried: None
) -> None:
    client, receiver = await clients(server)
    await receiver.call(receiver.transport.close, 4000)
    assert (await client.frame())[0] == 8
    assert await receiver.closed_once() == 4000


# --- slow peers -------------------------------------------------------------------------------------------------


async def stuff(receiver: Recorder, beyond: int = 4 * HIGH_WATER) -> int:
    """Send to a peer that does not read until much is left here; returns how many messages that took."""
    chunk = Frames([b"s" * 16384] * 8)

    def send() -> int:
        count = 0
        while receiver.transport.unsent_bytes <= beyond:
            receiver.transport.send(chunk)
            count += 8
        return count

    total = await receiver.call(send)
    # Meanwhile the kernel may have taken some: go on until it takes no more.
    while added := await receiver.call(send):
        total += added
    return total


async def test_a_stalled_reader_is_cut_off(server: Server, clients: Clients, hurried: None) -> None:
    _, receiver = await clients(server, receive_buffer=4096)
    await stuff(receiver)
    assert await receiver.call(lambda: receiver.transport.unsent_bytes) > HIGH_WATER
    drained = receiver.events("drained")
    await receiver.call(receiver.transport.close, 4408)
    assert await receiver.closed_once() == 4408
    assert receiver.events("drained") == drained


async def test_drained(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server, receive_buffer=4096)
    count = await stuff(receiver)
    for _ in range(count):
        assert await client.frame() == (1, b"s" * 16384)
    assert (await receiver.wait("drained"))[1] <= LOW_WATER
    await client.send(frame(1, b"and on it goes"))
    assert await client.frame() == (1, b"and on it goes")


async def test_reading_paused(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    receiver.pause_each = True
    sent = [str(number).encode() for number in range(5)]
    await client.send(*(frame(1, text) for text in sent), frame(8, b"\x03\xe8"))
    for count in range(1, 6):
        await receiver.wait("text", count)
        assert await receiver.call(receiver.texts.copy) == sent[:count]
        await receiver.call(receiver.transport.resume_reading)
    assert await receiver.closed_once() == 1000


async def test_closing_while_paused(server: Server, clients: Clients) -> None:
    client, receiver = await clients(server)
    receiver.pause_each = True
    await client.send(frame(1, b"a"), frame(1, b"b"))
    await receiver.wait("text")
    await receiver.call(receiver.transport.close, 4000)
    assert await client.frame() == (1, b"a")
    assert await client.close_code() == 4000
    assert await receiver.closed_once() == 4000
    assert receiver.texts == [b"a"]


async def test_a_flood_of_pings_fills_no_memory(server: Server, clients: Clients) -> None:
    if not server.tuned:
        pytest.skip("plain uvicorn answers them all")
    client, receiver = await clients(server, receive_buffer=4096)
    ping = frame(9, b"p" * 125)
    for _ in range(100):
        await client.send(ping * 1000)
    await client.send(frame(1, b"after"))
    await receiver.wait("text")
    unsent = await receiver.call(lambda: receiver.transport.unsent_bytes)
    assert HIGH_WATER < unsent < HIGH_WATER + 3 * LOW_WATER
    answers = [await client.frame()]
    while answers[-1] != (1, b"after"):
        answers.append(await client.frame())
    assert await client.frame() == (10, b"p" * 125), "the newest ping was answered once there was room"
    assert len(answers) < 100_000


# --- the server's own ends --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def own_server(**options: Any) -> AsyncIterator[Server]:
    running = Server(tuned=True, **options)
    running.start()
    try:
        yield running
    finally:
        await asyncio.to_thread(running.stop)


async def test_shutdown_leaves_the_end_to_the_receiver(clients: Clients) -> None:
    async with own_server() as server:
        client, receiver = await clients(server)
        await client.send(frame(1, b"before"))
        assert await client.frame() == (1, b"before")
        server.ask_to_stop()
        await receiver.wait("shutdown")
        await client.send(frame(1, b"nobody reads this"))
        # What was under way may still be answered.
        await receiver.call(receiver.transport.send, Frames([b"ack"]))
        await receiver.call(receiver.transport.resume_reading)
        await receiver.call(receiver.transport.close, 1012)
        assert await client.frame() == (1, b"ack")
        assert await client.close_code() == 1012
        await server.stopped()
    assert [event[1] for event in receiver.events("closed")] == [1012]
    assert receiver.texts == [b"before"]


async def test_a_stalled_peer_does_not_hold_the_shutdown(clients: Clients, hurried: None) -> None:
    async with own_server() as server:
        _, receiver = await clients(server, receive_buffer=4096)
        await stuff(receiver)
        server.ask_to_stop()
        await receiver.wait("shutdown")
        await receiver.call(receiver.transport.close, 1012)
        await server.stopped()
    assert [event[1] for event in receiver.events("closed")] == [1012]


async def test_the_graceful_timeout_cuts_what_is_left(clients: Clients) -> None:
    async with own_server(timeout_graceful_shutdown=1) as server:
        client, receiver = await clients(server)
        server.ask_to_stop()
        await receiver.wait("shutdown")
        assert await client.close_code() == 1012
        await server.stopped()
    assert [event[1] for event in receiver.events("closed")] == [1012]


async def test_plain_shutdown(clients: Clients) -> None:
    running = Server(tuned=False)
    running.start()
    client, receiver = await clients(running)
    running.ask_to_stop()
    assert await client.close_code() == 1012
    await asyncio.to_thread(running.stop)
    assert receiver.events("closed") == [("closed", 1012)]
    assert receiver.events("shutdown") == []


async def test_keepalive(clients: Clients, hurried: None) -> None:
    async with own_server(ws_ping_interval=0.1, ws_ping_timeout=0.1) as server:
        client, receiver = await clients(server)
        for _ in range(3):
            assert await client.frame() == (9, b"")
            await client.send(frame(10, b""))
        # From here on it is silent, as if its machine had lost power.
        opcode, payload = await client.frame()
        while opcode == 9:
            opcode, payload = await client.frame()
        assert (opcode, payload[:2]) == (8, (1011).to_bytes(2))
        assert await receiver.closed_once() == 1011


async def test_an_ordinary_asgi_route_works_too(server: Server) -> None:
    client = await Client.connect(server, path="/plain")
    await client.accepted()
    await client.send(frame(1, b"one"), frame(9, b"p"), frame(1, b"two"))
    got = {await client.frame() for _ in range(3)}
    assert got == {(1, b"one"), (10, b"p"), (1, b"two")}
    await client.send(frame(8, b"\x03\xe8"))
    assert await client.close_code() == 1000
    client.sock.close()


# --- without a network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_framing(size: int) -> None:
    payload = b"x" * size
    assert frame_text(payload) == frame(1, payload, mask=False)


def test_frames_are_made_once() -> None:
    frames = Frames.of({"a": 1}, {"b": "я"})
    assert list(frames.payloads) == [b'{"a":1}', '{"b":"я"}'.encode()]
    assert frames.size == 7 + 10
    assert frames.framed == b"".join(map(frame_text, frames.payloads))
    assert frames.framed is frames.framed


def test_close_reasons_fit() -> None:
    long = frame_close(4408, "я" * 100)
    assert len(long) <= 127
    close = Close.parse(long[2:])
    assert (close.code, close.reason) == (4408, "я" * 61)
    assert frame_close(1000) == b"\x88\x02\x03\xe8"


NO_PINGS = uvicorn.Config(lambda: None, ws_ping_interval=None, log_config=None)


class FakeTransport(asyncio.Transport):
    """Takes all and reads as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...

    def abort(self) -> None: ...


async def test_one_client_does_not_take_all_the_time() -> None:
    raw = RawSocket(FakeTransport(), asyncio.get_running_loop(), set(), NO_PINGS, MAX_FRAME)
    receiver = Recorder(raw)
    raw.start(receiver, b"")
    turn = websocket_protocol.MESSAGES_PER_TURN
    raw.data_received(frame(1, b"x") * (2 * turn))
    assert len(receiver.texts) == turn
    raw.data_received(frame(1, b"y"))
    assert len(receiver.texts) == turn
    await asyncio.sleep(0)
    assert len(receiver.texts) == 2 * turn
    await asyncio.sleep(0)
    assert receiver.texts == [b"x"] * 2 * turn + [b"y"]


MESSAGES = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.text(max_size=200).map(str.encode), st.integers(1, 40)),
        st.tuples(st.just(2), st.binary(max_size=20), st.integers(1, 40)),
        st.tuples(st.just(9), st.binary(max_size=20), st.just(40)),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 4000), max_size=12))
def test_any_cutting_of_the_stream_gives_the_same(messages: list[tuple[int, bytes, int]], cuts: list[int]) -> None:
    stream = b""
    for opcode, payload, size in messages:
        pieces = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
        for number, piece in enumerate(pieces):
            stream += frame(0 if number else opcode, piece, fin=number == len(pieces) - 1)
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]

    async def play() -> tuple[Recorder, bytes]:
        wire = FakeTransport()
        raw = RawSocket(wire, asyncio.get_running_loop(), set(), NO_PINGS, MAX_FRAME)
        receiver = Recorder(raw)
        raw.start(receiver, b"")
        for begin, end in itertools.pairwise(edges):
            raw.data_received(stream[begin:end])
        return receiver, wire.written

    receiver, written = asyncio.run(play())
    assert receiver.texts == [payload for opcode, payload, _ in messages if opcode == 1]
    assert receiver.events("binary") == [("binary", payload) for opcode, payload, _ in messages if opcode == 2]
    answers = [(1 if op == 1 else 10, payload) for op, payload, _ in messages if op != 2]
    assert written == b"".join(frame(opcode, payload, mask=False) for opcode, payload in answers)
