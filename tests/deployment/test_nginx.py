"""A real nginx with the project's own configuration before a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from app.api.middleware import MULTIPART_BYTES
from app.core.config import Settings
from tests.conftest import StartServer
from tests.support.accounts import register
from tests.support.databases import SqliteTemplate, make_settings
from tests.support.people import Person, people
from tests.support.redis_server import RedisServer
from tests.support.servers import PATIENCE, ROOT, Server, free_port
from tests.support.socket_client import SocketClient
from tests.support.tools import require_tools

pytestmark = pytest.mark.deployment

TEMPLATE = ROOT / "deploy/nginx.conf.template"
MIB = 1024 * 1024
MAIN = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/main-error.log notice;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/main-access.log;
    client_body_temp_path {folder}/spool/body;
    proxy_temp_path {folder}/spool/proxy;
    fastcgi_temp_path {folder}/spool/fastcgi;
    uwsgi_temp_path {folder}/spool/uwsgi;
    scgi_temp_path {folder}/spool/scgi;
    include {folder}/dialect.conf;
}}
"""


class Nginx:
    """nginx with our file, filled in as the head of the file says."""

    def __init__(self, folder: Path, upstream: str, *more: str) -> None:
        self.folder = folder
        self.port, self.plain_port = free_port(), free_port()
        (folder / "spool").mkdir(parents=True)
        self.trust = _certificate(folder)
        values = {
            "DIALECT_SERVER_NAME": "localhost",
            "DIALECT_HTTP": f"127.0.0.1:{self.plain_port}",
            "DIALECT_HTTPS": f"127.0.0.1:{self.port}",
            "DIALECT_UPSTREAM": upstream,
            "DIALECT_CERTIFICATE": str(folder / "certificate.pem"),
            "DIALECT_CERTIFICATE_KEY": str(folder / "key.pem"),
            "DIALECT_ACCESS_LOG": str(folder / "access.log"),
            "DIALECT_ERROR_LOG": str(folder / "error.log"),
        }
        template = TEMPLATE.read_text()
        assert set(re.findall(r"\$\{(DIALECT_[A-Z_]+)\}", template)) == set(values)
        assert all(f"{name}=" in template.partition("map ")[0] for name in values), "a name that nobody is told of"
        [command] = re.findall(r"^# +(envsubst .+) < deploy", template, re.MULTILINE)
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        filled = subprocess.run(
            ["sh", "-c", command], env={"PATH": path, **values}, input=template, capture_output=True, text=True
        )
        assert filled.returncode == 0, filled.stderr
        one = f"    server {upstream};\n"
        assert filled.stdout.count(one) == 1
        servers = "".join(f"    server {address};\n" for address in (upstream, *more))
        (folder / "dialect.conf").write_text(filled.stdout.replace(one, servers))
        # The folders of pytest are closed to whom nginx would otherwise become.
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user))
        arguments = ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "main-error.log")]
        checked = subprocess.run(
            [*arguments, "-t", "-q"], env={"PATH": path}, capture_output=True, text=True, timeout=PATIENCE
        )
        assert (checked.returncode, checked.stderr) == (0, "")
        self._process = subprocess.Popen(arguments, env={"PATH": path}, stdin=subprocess.DEVNULL)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://localhost:{self.port}"

    @property
    def ws_url(self) -> str:
        """The brief's door for sockets."""
        return f"wss://localhost:{self.port}/api/v1/messages/ws"

    async def listens(self) -> None:
        """Wait until it does."""
        async with asyncio.timeout(PATIENCE):
            while True:
                assert self._process.poll() is None, self.logs()
                with contextlib.suppress(ConnectionError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.01)

    def client(self, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """A client at that address of this machine."""
        transport = httpx.AsyncHTTPTransport(verify=self.trust, local_address=address)
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=PATIENCE)

    def logs(self) -> str:
        """All it has written, wherever."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def spooled(self) -> int:
        """Bytes that it keeps on disk for others, in files that it has unlinked at once."""
        master = self._process.pid
        workers = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        open_files = [file for worker in workers for file in Path(f"/proc/{worker}/fd").iterdir()]
        return sum(file.stat().st_size for file in open_files if str(self.folder / "spool") in os.readlink(file))

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(PATIENCE)


def _certificate(folder: Path) -> ssl.SSLContext:
    """A certificate for localhost, and a context that trusts it and no other."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return ssl.create_default_context(cafile=str(folder / "certificate.pem"))


@pytest.fixture
def settings(sqlite_template: SqliteTemplate, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """On SQLite alone: nginx does not care."""
    values: dict[str, Any] = {**sqlite_template.new(tmp_path), "upload_path": tmp_path / "uploads"}
    for mark in request.node.iter_markers("settings"):
        values |= mark.kwargs
    return make_settings(**values)


@pytest.fixture
async def nginx(server: Server, tmp_path: Path) -> AsyncIterator[Nginx]:
    """nginx before `server`."""
    require_tools(["nginx", "envsubst"], "nginx-light gettext-base")
    nginx = Nginx(tmp_path / "nginx", server.url.removeprefix("http://"))
    try:
        await nginx.listens()
        yield nginx
    finally:
        nginx.stop()


# --- what the file says -----------------------------------------------------------------------------------------


def _seconds(name: str, text: str) -> list[int]:
    return [int(value) for value in re.findall(rf"^\s*{name} (\d+)s;", text, re.MULTILINE)]


def test_the_proxy_is_more_patient_than_the_server() -> None:
    text = TEMPLATE.read_text()
    [socket_door] = re.findall(r"location = /api/v1/messages/ws \{.+?\n    \}", text, re.DOTALL)
    defaults = Settings.model_fields
    silence = defaults["socket_heartbeat_seconds"].default + defaults["socket_timeout_seconds"].default
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        [seconds] = _seconds(name, socket_door)
        assert seconds > silence


def test_the_proxy_lets_through_what_the_server_takes_and_little_more() -> None:
    text = TEMPLATE.read_text()
    others, uploads = (int(value) * MIB for value in re.findall(r"client_max_body_size (\d+)m;", text))
    defaults = Settings.model_fields
    assert 0 <= uploads - defaults["max_upload_bytes"].default - MULTIPART_BYTES < MIB
    assert defaults["max_avatar_bytes"].default + MULTIPART_BYTES < uploads
    assert defaults["max_body_bytes"].default < others < uploads


# --- requests ---------------------------------------------------------------------------------------------------


async def test_requests_arrive_and_plain_http_is_sent_to_https(nginx: Nginx) -> None:
    async with nginx.client() as client:
        someone = await register(client)
        answer = await client.get("/api/v1/users/me", headers=someone.headers)
        assert (answer.status_code, answer.json()["id"]) == (200, someone.id)
        sent_on = await client.get(f"http://localhost:{nginx.plain_port}/docs?a=b")
        assert (sent_on.status_code, sent_on.headers["location"]) == (308, "https://localhost/docs?a=b")


@pytest.mark.settings(limit_username_checks_per_ip="3/hour")
async def test_the_limits_per_address_see_the_true_address_and_nobody_can_claim_another(
    nginx: Nginx, server: Server
) -> None:
    path = "/api/v1/users/username-available?username=somebody"
    names = ("X-Forwarded-For", "X-Forwarded-For", "X-Real-IP", "X-Forwarded-For", "Forwarded")
    # The first is one that the server trusts as a proxy: it would believe even a list that ends with it.
    for address in ("127.0.0.1", "127.0.0.2"):
        async with nginx.client(address) as hasty:
            codes = [
                (await hasty.get(path, headers={name: f"203.0.113.{number}"})).status_code
                for number, name in enumerate(names)
            ]
            assert codes == [200, 200, 200, 429, 429], address
    server.wait_for_log('"client":"127.0.0.2"')
    assert "203.0.113" not in server.log


async def test_a_body_above_the_limit_is_refused_as_the_server_does_it(nginx: Nginx) -> None:
    async with nginx.client() as client:
        for size in (MIB + 1, 3 * MIB):  # the server's answer, and nginx's
            answer = await client.post("/api/v1/auth/register", json={"username": "x" * size})
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json().keys() == {"type", "title", "status", "detail", "code"}


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_the_largest_file_goes_through_and_a_larger_one_is_refused_in_our_words(nginx: Nginx) -> None:
    limit = int(Settings.model_fields["max_upload_bytes"].default)
    async with nginx.client() as client:
        [ann] = await people(client, 1)
        file = await ann.upload(os.urandom(limit), "film.bin")
        assert file["size"] == limit
        for size in (limit + 1, limit + MIB // 2, limit + 2 * MIB):  # the server's answers, and nginx's
            answer = await ann.try_upload(bytes(size))
            assert answer.status_code == 413
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] in ("file_too_large", "body_too_large")


@pytest.mark.timeout(120)
async def test_an_upload_reaches_the_server_while_it_is_still_on_its_way(nginx: Nginx, settings: Settings) -> None:
    async def has_arrived(size: int) -> None:
        folder = settings.upload_path / "incoming"
        while True:
            if sum(path.stat().st_size for path in folder.iterdir()) >= size:
                return
            await asyncio.sleep(0.01)

    async with nginx.client() as client:
        [ann] = await people(client, 1)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b"\r\n--x--\r\n"
    size = 20 * MIB
    reader, writer = await asyncio.open_connection("localhost", nginx.port, ssl=nginx.trust)
    writer.write(
        b"POST /api/v1/messages/upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n"
        + f"Authorization: Bearer {ann.account.access_token}\r\n".encode()
        + f"Content-Length: {len(head) + size + len(tail)}\r\n\r\n".encode()
        + head
        + bytes(size // 2)
    )
    await writer.drain()
    async with asyncio.timeout(PATIENCE):
        await has_arrived(size // 4)
    assert nginx.spooled() == 0
    writer.write(bytes(size // 2) + tail)
    await writer.drain()
    assert b" 201 " in await asyncio.wait_for(reader.readline(), PATIENCE)
    writer.close()


async def test_a_part_of_a_file_can_be_fetched_and_a_slow_reader_costs_no_disk(nginx: Nginx) -> None:
    data = os.urandom(30 * MIB)
    async with nginx.client() as client:
        [ann] = await people(client, 1)
        file = await ann.upload(data, "film.bin")
        part = await ann.fetch(file["file_id"], Range="bytes=1000000-1000999")
        assert (part.status_code, part.content) == (206, data[1_000_000:1_001_000])
        assert part.headers["content-range"] == f"bytes 1000000-1000999/{len(data)}"
        path = f"/api/v1/files/{file['file_id']}"
        async with client.stream("GET", path, headers=ann.account.headers) as answer:
            chunks = answer.aiter_bytes()
            first = await anext(chunks)
            # Enough turns for nginx to fill all that it would fill while nobody reads.
            for _ in range(20):
                assert (await client.get("/health/live")).status_code == 200
            assert nginx.spooled() == 0
            assert first + b"".join([chunk async for chunk in chunks]) == data


# --- sockets ----------------------------------------------------------------------------------------------------


@pytest.mark.settings(socket_heartbeat_seconds=0.5, socket_timeout_seconds=2)
async def test_a_chat_over_sockets_goes_on_after_silence_longer_than_heartbeats(nginx: Nginx) -> None:
    async with nginx.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        options = {"ssl": nginx.trust, "origin": f"https://localhost:{nginx.port}"}  # a page of the same host
        async with (
            await SocketClient.open(nginx.ws_url, ann.account.access_token, **options) as of_ann,
            await SocketClient.open(nginx.ws_url, bo.account.access_token, **options) as of_bo,
        ):
            await of_ann.say(chat_id, "Before")
            assert (await of_bo.wait(type="new_message"))["message"]["content"] == "Before"
            for _ in range(6):
                await of_bo.wait(type="heartbeat")
            await of_bo.say(chat_id, "After")
            await of_ann.wait(lambda event: event.get("message", {}).get("content") == "After", type="new_message")


async def test_a_stop_of_the_server_reaches_clients_as_a_stop_and_later_requests_are_told_to_come_back(
    nginx: Nginx, server: Server
) -> None:
    async with nginx.client() as client:
        [ann] = await people(client, 1)
        socket = await SocketClient.open(nginx.ws_url, ann.account.access_token, ssl=nginx.trust)
        server.signal(signal.SIGTERM)
        assert await socket.wait_closed() == 1012
        await asyncio.to_thread(server.wait)
        await socket.close()
        assert await ann.refused("GET", "/users/me") == (503, "shutting_down")
        answer = await ann.try_upload(b"data")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


async def test_no_log_of_the_proxy_shows_a_token(nginx: Nginx, server: Server) -> None:
    async with nginx.client() as client:
        [ann] = await people(client, 1)
        token = ann.account.access_token
        address = f"{nginx.ws_url}?token={token}"
        async with connect(address, ssl=nginx.trust) as socket:
            assert "hello" in str(await socket.recv())
        for path in ("/api/v1/messages/ws", "/api/v1//messages/ws", "/api/v1/messages/%77s"):
            assert (await client.get(path, params={"token": token})).status_code in (404, 426)
        await client.get(f"http://localhost:{nginx.plain_port}/api/v1/messages/ws", params={"token": token})
        server.stop()
        with pytest.raises(InvalidStatus) as refused:  # what nginx complains about loudest
            await connect(address, ssl=nginx.trust)
        assert refused.value.response.status_code == 503
        assert (await Person(client, ann.account).request("GET", "/users/me")).status_code == 503
    nginx.stop()
    logs = nginx.logs()
    assert '"GET /api/v1/messages/ws HTTP/1.1" 101' in logs, "we look in the wrong place"
    assert "connect() failed" in logs, "it has an error log"
    assert token not in logs
    assert token.split(".")[1] not in logs


# --- several servers --------------------------------------------------------------------------------------------


@pytest.mark.timeout(180)
async def test_two_servers_behind_the_proxy_are_one_and_one_may_stop(
    mysql_settings: Settings, redis: RedisServer, start_server: StartServer, tmp_path: Path
) -> None:
    settings = mysql_settings.model_copy(update={"redis_url": SecretStr(redis.url)})
    first, second = start_server(settings), start_server(settings)
    for server in (first, second):
        server.wait_for_log("worker_joined")
    nginx = Nginx(tmp_path / "nginx", *(server.url.removeprefix("http://") for server in (first, second)))
    try:
        await nginx.listens()
        async with nginx.client() as client:
            ann, bo = await people(client, 2)
            chat_id = await ann.personal(bo)
            tokens = [ann.account.access_token, ann.account.access_token, bo.account.access_token]
            sockets = [await SocketClient.open(nginx.ws_url, token, ssl=nginx.trust) for token in tokens]
            await sockets[0].say(chat_id, "to whoever is where")
            for socket in sockets:
                await socket.wait(type="new_message")
            waits = [asyncio.create_task(socket.wait_closed()) for socket in sockets]
            await asyncio.to_thread(first.stop)
            # nginx takes the servers in turn: each has one or two.
            closed, open_ones = await asyncio.wait(waits, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            assert {wait.result() for wait in closed} == {1012}
            assert open_ones
            for _ in range(4):
                await ann.say(chat_id, "and on")
            for wait in open_ones:
                wait.cancel()
            for socket in sockets:
                await socket.close()
    finally:
        nginx.stop()
