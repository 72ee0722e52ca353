"""Google, played on this machine: the endpoint that gives tokens, and FCM v1 behind a proxy.

firebase-admin has no setting for FCM's address. But it goes through the proxy that HTTPS_PROXY names and trusts the
authorities in REQUESTS_CA_BUNDLE, as any program that uses `requests`: the proxy here leads fcm.googleapis.com home.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

Json = dict[str, Any]
PROJECT = "dialect-test"
ACCOUNT = f"push@{PROJECT}.iam.gserviceaccount.com"
AUDIENCE = "https://oauth2.googleapis.com/token"
FCM = "fcm.googleapis.com"
PATIENCE = 20.0


@dataclass
class Answer:
    """What FCM says. It waits until `when` is set."""

    status: int = 200
    body: Json = field(default_factory=lambda: {"name": f"projects/{PROJECT}/messages/1"})
    headers: dict[str, str] = field(default_factory=dict)
    when: asyncio.Event | None = None


def failure(status: int, code: str = "", error_code: str = "", *, when: asyncio.Event | None = None) -> Answer:
    """An error as FCM v1 writes it."""
    details = [{"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": error_code}]
    error: Json = {"code": status, "message": "made up", "status": code, "details": details if error_code else []}
    return Answer(status, {"error": error}, when=when)


def unregistered(*, when: asyncio.Event | None = None) -> Answer:
    """The app was removed from the device."""
    return failure(404, "NOT_FOUND", "UNREGISTERED", when=when)


@dataclass
class Pushed:
    """A message that reached FCM."""

    message: Json
    answered: int = 0

    @property
    def token(self) -> str:
        """Whom it is for."""
        return str(self.message.get("token") or self.message["fid"])

    @property
    def data(self) -> dict[str, str]:
        """What it says."""
        data: dict[str, str] = self.message["data"]
        return data


class FakeGoogle:
    """Both servers. `answers[token]` are given in turn, the last one for ever; others get 200."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.pushed: list[Pushed] = []
        self.answers: dict[str, list[Answer]] = {}
        self.tokens_open = asyncio.Event()
        """Cleared, the endpoint for tokens hangs."""
        self.tokens_open.set()
        self.tokens_asked = 0
        self.url = ""
        self._changed = asyncio.Condition()
        self._servers: list[asyncio.Server] = []
        self._faults: list[Exception] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def credentials_path(self) -> Path:
        """The service account."""
        return self.folder / "service-account.json"

    @property
    def environment(self) -> dict[str, str]:
        """What leads a process here."""
        proxy, bundle = self.url, str(self.folder / "authority.pem")
        return {"HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "127.0.0.1", "REQUESTS_CA_BUNDLE": bundle}

    async def start(self) -> None:
        """Listen, and write the service account and the certificate."""
        context = self._certify()
        fcm = await asyncio.start_server(self._track(self._fcm), "127.0.0.1", 0, ssl=context)
        self._fcm_port = fcm.sockets[0].getsockname()[1]
        front = await asyncio.start_server(self._track(self._front), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{front.sockets[0].getsockname()[1]}"
        self._servers = [fcm, front]
        private = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": "1",
            "private_key": private.decode(),
            "client_email": ACCOUNT,
            "token_uri": f"{self.url}/token",
        }
        self.credentials_path.write_text(json.dumps(account))

    async def stop(self) -> None:
        """Hang up on everybody. Fails when something came that no client of Google sends."""
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self._faults == []

    # --- what tests ask ---

    def to(self, token: str) -> list[Pushed]:
        """Everything for a device."""
        return [pushed for pushed in self.pushed if pushed.token == token]

    async def wait(self, token: str, count: int = 1, *, answered: bool = False) -> list[Pushed]:
        """Wait until so many messages for a device have come (and were answered)."""

        def enough() -> bool:
            return sum(1 for pushed in self.to(token) if pushed.answered or not answered) >= count

        await self.until(enough, f"{count} pushes to {token}")
        return self.to(token)

    async def until(self, predicate: Callable[[], bool], what: str) -> None:
        """Wait until something holds that only a request can change."""
        try:
            async with asyncio.timeout(PATIENCE), self._changed:
                await self._changed.wait_for(predicate)
        except TimeoutError:
            raise AssertionError(f"{what} did not come; there are {self.pushed}") from None

    # --- the servers ---

    def _track(
        self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                pass  # the client is gone
            except Exception as error:
                self._faults.append(error)
            finally:
                await _hang_up(writer)

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(run(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _front(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The proxy, and the endpoint for tokens, on one port."""
        request, headers = await _head(reader)
        if request.startswith("CONNECT"):
            if not request.startswith(f"CONNECT {FCM}:443 "):
                # google-auth asks iamcredentials.googleapis.com, beside, in which regions the account may be used.
                assert request.startswith("CONNECT iamcredentials.googleapis.com:443 "), request
                await reader.read()  # as if it hung: nothing may depend on it
                return
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._fcm_port)
            try:
                await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
            finally:
                await _hang_up(inner_writer)
            return
        assert request.startswith("POST /token "), request
        form = parse_qs((await reader.readexactly(int(headers["content-length"]))).decode())
        self.tokens_asked += 1
        await self._notify()
        claims = jwt.decode(form["assertion"][0], self.key.public_key(), ["RS256"], audience=AUDIENCE, issuer=ACCOUNT)
        assert (
            "https://www.googleapis.com/auth/firebase" in claims["scope"].split() or "cloud-platform" in claims["scope"]
        )
        await self.tokens_open.wait()
        writer.write(_response(Answer(200, {"access_token": "a-token", "expires_in": 3600, "token_type": "Bearer"})))
        await writer.drain()

    async def _fcm(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request, headers = await _head(reader)
            assert request == f"POST /v1/projects/{PROJECT}/messages:send HTTP/1.1", request
            assert headers["authorization"] == "Bearer a-token", headers
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            pushed = Pushed(body["message"])
            self.pushed.append(pushed)
            answers = self.answers.get(pushed.token, [Answer()])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            await self._notify()
            if answer.when is not None:
                await answer.when.wait()
            writer.write(_response(answer))
            await writer.drain()
            pushed.answered = answer.status
            await self._notify()

    def _certify(self) -> ssl.SSLContext:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, FCM)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(FCM)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        (self.folder / "authority.pem").write_bytes(pem)
        private = self.folder / "server.pem"
        private.write_bytes(
            pem
            + self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(private)
        return context


@contextlib.asynccontextmanager
async def fake_google(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeGoogle]:
    """Google on this machine; this process and those it starts are led to it."""
    google = FakeGoogle(folder)
    await google.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in google.environment.items():
        monkeypatch.setenv(name, value)
    yield google
    await google.stop()


async def _head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """The request line and the headers of the next request."""
    request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.split(":", 1) for line in lines if line)
    return request, {name.lower(): value.strip() for name, value in pairs}


def _response(answer: Answer) -> bytes:
    body = json.dumps(answer.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
    lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until either side ends, and end both."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        async with asyncio.timeout(1):
            await writer.wait_closed()
