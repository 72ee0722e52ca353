"""deploy/nginx.conf before a real server. Its places and ports are changed, as its head asks for, and nothing else."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.client import connect

from app.core.config import Settings
from tests.conftest import StartServer
from tests.crash.conftest import free_port
from tests.support.accounts import register
from tests.support.servers import PATIENCE, ROOT, Server
from tests.support.socket_client import SocketClient

pytestmark = pytest.mark.deployment

API = "/api/v1"
HEARTBEAT_SECONDS = 1.0


@dataclass
class Nginx:
    """A running nginx."""

    port: int
    plain_port: int
    folder: Path
    context: ssl.SSLContext

    @property
    def log(self) -> str:
        """All that it wrote."""
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def files(self) -> list[Path]:
        """The bodies that it keeps on its disk."""
        return [path for path in (self.folder / "bodies").rglob("*") if path.is_file()]


def certificate(folder: Path) -> None:
    """A certificate of 127.0.0.1 by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "fullchain.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "privkey.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


@pytest.fixture
def server(settings: Settings, start_server: StartServer) -> Server:
    """The server behind it: few logins a minute from one address, quick heartbeats."""
    changes = {"limit_login_per_ip": "3/minute", "socket_heartbeat_seconds": HEARTBEAT_SECONDS}
    return start_server(settings.model_copy(update=changes))


@pytest.fixture
def nginx(server: Server, tmp_path: Path) -> Iterator[Nginx]:
    """nginx with the project's file."""
    assert shutil.which("nginx"), "nginx is missing; on Debian: apt-get install nginx-light"
    folder = tmp_path / "nginx"
    folder.mkdir()
    certificate(folder)
    port, plain_port = free_port(), free_port()
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    for ours, theirs in {
        "server 127.0.0.1:8000;": f"server {server.url.removeprefix('http://')};",
        "listen 80;": f"listen 127.0.0.1:{plain_port};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/letsencrypt/live/chat.example.org/": f"{folder}/",
        "/var/log/nginx/": f"{folder}/",
    }.items():
        assert ours in text, ours
        text = text.replace(ours, theirs)
    (folder / "dialect.conf").write_text(text)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"{'user root;' if os.geteuid() == 0 else ''}\n"
        f"http {{ client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/bodies/proxy;"
        f" fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;"
        f" include {folder}/dialect.conf; }}\n"
    )
    (folder / "bodies").mkdir()
    process = subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
    context = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
    try:
        give_up_at = time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"https://127.0.0.1:{port}/health/live", verify=context)
                break
            except httpx.ConnectError:
                assert process.poll() is None, (folder / "error.log").read_text()
                assert time.monotonic() < give_up_at
        yield Nginx(port, plain_port, folder, context)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


@pytest.fixture
async def client(nginx: Nginx) -> AsyncIterator[httpx.AsyncClient]:
    """A client that only sees nginx."""
    async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{nginx.port}", verify=nginx.context, timeout=60) as one:
        yield one


async def test_a_forged_address_gets_nobody_around_a_limit(client: httpx.AsyncClient, nginx: Nginx) -> None:
    answers = []
    for number in range(5):
        form = {"username": "+79991234567", "password": "SecurePass123!"}
        forged = {"X-Forwarded-For": f"203.0.113.{number}"}
        answers.append((await client.post(f"{API}/auth/token", data=form, headers=forged)).status_code)
    assert answers == [401, 401, 401, 429, 429]
    plain = await client.get(f"http://127.0.0.1:{nginx.plain_port}/docs")
    assert (plain.status_code, plain.headers["location"]) == (301, "https://127.0.0.1/docs")


async def test_a_socket_chats_outlives_silence_and_hears_of_the_end_and_its_token_is_not_logged(
    client: httpx.AsyncClient, nginx: Nginx, server: Server
) -> None:
    john, jane = await register(client), await register(client)
    body = {"user_id": jane.id}
    chat = (await client.post(f"{API}/chats/personal", json=body, headers=john.headers)).json()
    url = f"wss://127.0.0.1:{nginx.port}{API}/messages/ws"
    # With ?token=, as the brief has it: the header is tried by all other tests.
    connection = await connect(f"{url}?token={jane.access_token}", ssl=nginx.context)
    async with SocketClient(connection) as socket:
        for _ in range(3):
            await socket.wait(type="heartbeat")
            socket.seen.clear()
        sent = await client.post(f"{API}/chats/{chat['id']}/messages", json={"content": "Hi!"}, headers=john.headers)
        assert sent.status_code == 201
        event = await socket.wait(type="new_message")
        assert event["message"]["content"] == "Hi!"
        server.stop()
        assert await socket.wait_closed() == 1012
    assert "/messages/ws" in nginx.log
    assert jane.access_token not in nginx.log


@pytest.mark.timeout(120)
async def test_large_files_pass_both_ways_and_leave_nothing_on_the_disk_of_nginx(
    client: httpx.AsyncClient, nginx: Nginx
) -> None:
    john = await register(client)
    content = os.urandom(50 * 2**20)
    on_disk: list[Path] = []

    async def watched() -> AsyncIterator[bytes]:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
        yield head
        for start in range(0, len(content), 2**20):
            yield content[start : start + 2**20]
            on_disk.extend(nginx.files())
        yield b"\r\n--b--\r\n"

    headers = {**john.headers, "Content-Type": "multipart/form-data; boundary=b"}
    done = await client.post(f"{API}/messages/upload", content=watched(), headers=headers)
    assert done.status_code == 201, done.text
    path = f"{API}/files/{done.json()['file_id']}"
    part = await client.get(path, headers={**john.headers, "Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, content[1000:2000])
    assert (await client.get(path, headers=john.headers)).content == content
    assert not on_disk
    too_large = {"file": ("b.bin", bytes(len(content) + 1))}
    refused = await client.post(f"{API}/messages/upload", files=too_large, headers=john.headers)
    assert (refused.status_code, refused.json()["code"]) == (413, "file_too_large")
