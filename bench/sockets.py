"""`python -m bench.sockets`: what a socket costs, our protocol class and plain ASGI side by side.

The server is a bare FastAPI route over `serve_socket`, on one core; the client, on another, only counts bytes. No
database and no chat: this is the roof under which the whole server works.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import uvicorn
import uvloop
from fastapi import FastAPI, WebSocket

from app.api.asgi_transport import serve_socket
from app.services.transport import Frames, Transport, frame_text
from bench.websocket import Socket, client_frame, connect

TEXT = b'{"type":"new_message","chat_id":1,"content":"' + b"x" * 80 + b'"}'
TO_ALL = b"!" + TEXT
ECHOERS, IN_FLIGHT = 64, 8
KINDS = ("tuned", "plain")


class Everybody:
    """Sends a text back, or to all when it begins with an exclamation mark."""

    sockets: set[Transport] = set()  # noqa: RUF012 - one server, one set

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.sockets.add(transport)

    def on_text(self, data: bytes) -> None:
        frames = Frames([data])
        if data[:1] == b"!":
            for transport in self.sockets:
                transport.send(frames)
        else:
            self.transport.send(frames)

    def on_binary(self, data: bytes) -> None: ...

    def on_drained(self) -> None: ...

    def on_shutdown(self) -> None:
        self.transport.close(1012)

    def on_closed(self, code: int) -> None:
        self.sockets.discard(self.transport)


def serve(kind: str) -> None:
    """Run a server and print its port."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    app = FastAPI()

    @app.websocket("/ws")
    async def route(websocket: WebSocket) -> None:
        await serve_socket(websocket, Everybody, 64 * 1024)

    config = uvicorn.Config(
        app,
        port=0,
        loop="uvloop",
        ws="app.api.websocket_protocol:DialectWebSocketProtocol" if kind == "tuned" else "auto",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=4096,
    )
    listening = config.bind_socket()
    listening.listen(4096)  # who comes before the server is up waits
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(config).run([listening])


class Counter(Socket):
    """Counts frames of one size by their bytes, and goes on asking if it is to."""

    received = 0

    def __init__(self, expected: bytes, again: bytes = b"") -> None:
        super().__init__()
        self._size = len(frame_text(expected))
        self._again = client_frame(again) if again else b""
        self._part = 0

    def data_received(self, data: bytes) -> None:
        if not self._is_open or data[0] == 0x89:
            super().data_received(data)
            return
        count, self._part = divmod(self._part + len(data), self._size)
        Counter.received += count
        if self._again and self.transport is not None:
            self.transport.write(self._again * count)


def resident(pid: int) -> int:
    """Bytes of memory a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


class Pace(NamedTuple):
    """Frames a second, and what each took of the server's processor: the second holds on a busy machine too."""

    a_second: float
    microseconds: float


async def pace(pid: int, seconds: float) -> Pace:
    """Frames received, once things run."""
    await asyncio.sleep(seconds / 4)
    begin, cpu, before = time.perf_counter(), cpu_seconds(pid), Counter.received
    await asyncio.sleep(seconds)
    count = max(1, Counter.received - before)
    return Pace(count / (time.perf_counter() - begin), (cpu_seconds(pid) - cpu) * 1e6 / count)


async def measure(pid: int, port: int, seconds: float, idle: int, listeners: int) -> tuple[Pace, Pace, float]:
    """Echoes, deliveries, and bytes for each idle connection."""

    async def open_some(count: int, expected: bytes, again: bytes = b"") -> list[Counter]:
        return [await connect(lambda: Counter(expected, again), port, "/ws") for _ in range(count)]

    async def close(sockets: list[Counter]) -> None:
        for socket in sockets:
            socket.close()
        await asyncio.sleep(0.5)

    await close(await open_some(50, TEXT))  # whatever is loaded once, is loaded now
    before = resident(pid)
    idlers = await open_some(idle, TEXT)
    await asyncio.sleep(1)
    each = (resident(pid) - before) / idle
    await close(idlers)

    echoers = await open_some(ECHOERS, TEXT, TEXT)
    for socket in echoers:
        for _ in range(IN_FLIGHT):
            socket.send(TEXT)
    echoes = await pace(pid, seconds)
    await close(echoers)

    crowd = await open_some(listeners - 1, TO_ALL)
    [caller] = await open_some(1, TO_ALL, TO_ALL)
    caller.send(TO_ALL)
    caller.send(TO_ALL)
    deliveries = await pace(pid, seconds)
    await close([*crowd, caller])
    return echoes, deliveries, each


def main() -> None:
    """Measure both, in turn, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.sockets", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--idle", type=int, default=2000, help="connections held for the memory of one")
    parser.add_argument("--listeners", type=int, default=1000, help="connections of the fan-out")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given.serve:
        serve(given.serve)
        return

    print(
        f"| server | echo/s | µs of processor each | deliveries/s to {given.listeners} | µs each "
        "| KB per idle connection |"
    )
    print("|---|---|---|---|---|---|")
    for kind in KINDS * given.repeat:
        command = [sys.executable, "-m", "bench.sockets", "--serve", kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {max(cores)})
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    echoes, deliveries, each = runner.run(
                        measure(server.pid, port, given.seconds, given.idle, given.listeners)
                    )
            finally:
                os.sched_setaffinity(0, cores)
                server.terminate()
            server.wait(20)
        figures = (f"{pace.a_second:,.0f} | {pace.microseconds:.1f}" for pace in (echoes, deliveries))
        print(f"| {kind} | {' | '.join(figures)} | {each / 1024:.1f} |", flush=True)


if __name__ == "__main__":
    main()
