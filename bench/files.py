"""Uploads and downloads of large files beside the same bytes through a bare uvicorn app and through nginx."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from bench import machine, servers, world
from bench.failure import Failed
from bench.servers import DatabaseName, MySQL, Server, ServerName

LIMIT_FACTOR = 2.0
"""A transfer may take so many times as long as through the bare uvicorn app."""
BOUNDARY = b"a-boundary-of-the-benchmark"
MIB = 1024 * 1024

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error; {user}
events {{}}
http {{
  access_log off; sendfile on; client_max_body_size 0;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    root {folder}/files;
    location = / {{ return 204; }}
    location / {{ dav_methods PUT; }}
  }}
}}
"""


@dataclass(slots=True)
class Transfers:
    """What one server did."""

    up: list[float] = field(default_factory=list)
    """Seconds of each upload, until it was answered."""
    down: list[float] = field(default_factory=list)
    growth_mib: float = 0.0
    """How far the server's memory rose above where it stood, at its highest."""


def run(
    databases: list[DatabaseName],
    folder: Path,
    cores: tuple[int, int] | None,
    mysql: MySQL | None,
    *,
    size: int,
    repeat: int,
) -> tuple[list[tuple[str, ...]], dict[str, Transfers]]:
    """Measure all servers in turn; rows of a table, and what it was made from.

    Raises Failed when something cannot be started or answers wrongly.
    """
    body = os.urandom(size)
    core = cores[0] if cores else None
    rows: list[tuple[str, ...]] = [
        ("scenario", "database", "bare uvicorn", "nginx", "dialect", "times as long", "memory", "bar", "met?")
    ]
    everything: dict[str, Transfers] = {}
    with contextlib.ExitStack() as stack:
        plain = servers.start("plain", "sqlite", folder, core, None)
        stack.callback(plain.stop)
        nginx = _start_nginx(folder, core)
        if nginx is not None:
            stack.callback(nginx.stop)
        if cores:
            stack.enter_context(_on_core(cores[1]))
        for database in databases:
            dialect = servers.start("dialect", database, folder, core, mysql)
            with contextlib.closing(_Stopper(dialect)):
                token = asyncio.run(_register(dialect.port))
                done: dict[ServerName, Transfers] = {"plain": Transfers(), "nginx": Transfers(), "dialect": Transfers()}
                _dialect_up(dialect, body, token)  # caches fill and pools grow once
                for _ in range(repeat):
                    _measure(plain, done["plain"], body)
                    if nginx is not None:
                        _measure(nginx, done["nginx"], body)
                    _measure(dialect, done["dialect"], body, token)
            rows += _rows(database, size, done)
            everything |= {f"{database} {name}": transfers for name, transfers in done.items()}
    return rows, everything


class _Stopper:
    def __init__(self, server: Server) -> None:
        self.close = server.stop


def _rows(database: str, size: int, done: dict[ServerName, Transfers]) -> list[tuple[str, ...]]:
    rows = []
    for what in ("up", "down"):
        took = {name: statistics.median(getattr(transfers, what) or [0.0]) for name, transfers in done.items()}
        factor = took["dialect"] / took["plain"]
        speeds = [
            f"{size / MIB / took[name]:,.0f} MiB/s" if took[name] else "-" for name in ("plain", "nginx", "dialect")
        ]
        rows.append(
            (
                f"{'upload' if what == 'up' else 'download'} of {size / MIB:,.0f} MiB",
                database,
                *speeds,
                f"{factor:.2f}x",
                f"+{done['dialect'].growth_mib:.1f} MiB",
                f"<= {LIMIT_FACTOR:g}x",
                "yes" if factor <= LIMIT_FACTOR else "NO",
            )
        )
    return rows


def _measure(server: Server, transfers: Transfers, body: bytes, token: str = "") -> None:
    pid = server.process.pid
    before = machine.rss_kib(pid)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here
    if server.name == "dialect":
        took, path = _dialect_up(server, body, token)
    else:
        path = "/a-file"
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        took, _ = _request(server, head.encode(), body, (201, 204))
    transfers.up.append(took)
    bearer = f"Authorization: Bearer {token}\r\n" if token else ""
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\n{bearer}Connection: close\r\n\r\n"
    took, answer = _request(server, head.encode(), b"", (200,))
    if answer[-4096:] != body[-4096:] or len(answer) != len(body):
        raise Failed(f"{server.name} handed out other bytes than it was given")
    transfers.down.append(took)
    transfers.growth_mib = max(transfers.growth_mib, (machine.peak_rss_kib(pid) - before) / 1024)


def _dialect_up(server: Server, body: bytes, token: str) -> tuple[float, str]:
    start = (
        b'--%s\r\nContent-Disposition: form-data; name="file"; filename="large.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" % BOUNDARY
    )
    end = b"\r\n--%s--\r\n" % BOUNDARY
    head = (
        f"POST /api/v1/messages/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\n"
        f"Content-Length: {len(start) + len(body) + len(end)}\r\nConnection: close\r\n\r\n"
    )
    took, answer = _request(server, head.encode() + start, body, (201,), end)
    return took, f"/api/v1/files/{orjson.loads(answer)['file_id']}"


def _request(
    server: Server, head: bytes, body: bytes, accepted: tuple[int, ...], tail: bytes = b""
) -> tuple[float, bytes]:
    """One request on a connection of its own: seconds until the last byte of the answer, and its body."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        began = time.monotonic()
        connection.sendall(head)
        if body:
            connection.sendall(body)
            connection.sendall(tail)
        received = bytearray()
        block = bytearray(MIB)
        while count := connection.recv_into(block):
            received += memoryview(block)[:count]
        took = time.monotonic() - began
    at = received.find(b"\r\n\r\n")
    status = int(received[9:12] or b"0")
    if status not in accepted:
        raise Failed(f"{server.name} answered {status}: {bytes(received[at + 4 : at + 400])!r}\n{server.last_words()}")
    return took, bytes(received[at + 4 :])


async def _register(port: int) -> str:
    api = world.Api(port)
    try:
        return (await api.register(1)).token
    finally:
        await api.http.aclose()


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Keep this thread on a core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _start_nginx(folder: Path, core: int | None) -> Server | None:
    """nginx, where it is installed and can take files in."""
    program = shutil.which("nginx")
    if program is None:
        return None
    about = subprocess.run([program, "-V"], capture_output=True, text=True, check=False).stderr
    if not re.search(r"http_dav_module", about):
        return None
    folder = folder / "nginx"
    (folder / "files").mkdir(parents=True)
    port = servers.free_port()
    (folder / "nginx.conf").write_text(
        NGINX.format(folder=folder, port=port, user="user root;" if os.geteuid() == 0 else "")
    )
    log = folder / "error.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [program, "-p", str(folder), "-c", str(folder / "nginx.conf")],
            stdout=output,
            stderr=output,
            preexec_fn=servers.on_core(core),
        )
    server = Server("nginx", port, process, log, lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        servers.wait_until_ready(server, "/")
    except BaseException:
        server.stop()
        raise
    return server
