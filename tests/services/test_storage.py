"""Where bytes are kept: the same behaviour from a folder and from a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from moto.server import ThreadedMotoServer

from app.core.config import Settings
from app.core.errors import StartupError, Unavailable
from app.main import create_app
from app.services import file_service
from app.services.storage import LocalStorage, S3Storage, Storage, clear_incoming, new_key, open_storage
from tests.support.databases import make_settings
from tests.support.images import image
from tests.support.people import people
from tests.support.watch import MB


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 server with the bucket `dialect`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    url = f"http://127.0.0.1:{port}"
    httpx.put(f"{url}/dialect").raise_for_status()
    yield url
    server.stop()


def s3_settings(url: str) -> dict[str, str]:
    """Settings that lead there."""
    return {
        "s3_bucket": "dialect",
        "s3_endpoint_url": url,
        "s3_access_key_id": "key",
        "s3_secret_access_key": "secret",
    }


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Each kind."""
    if request.param == "folder":
        return LocalStorage(tmp_path / "kept")
    return S3Storage(make_settings(**s3_settings(request.getfixturevalue("s3_url"))))


async def whole(storage: Storage, key: str, start: int, end: int) -> bytes:
    """The bytes that reading brings."""
    return b"".join([piece async for piece in storage.read(key, start, end)])


async def test_what_was_put_is_read_in_any_range_until_it_is_deleted(storage: Storage, tmp_path: Path) -> None:
    data, key, source = os.urandom(9_000_000), new_key(), tmp_path / "source"
    source.write_bytes(data)
    await storage.put(key, source)
    for start, end in [(0, len(data)), (0, 1), (8_388_607, 8_388_609), (5, 5), (len(data) - 1, len(data))]:
        assert await whole(storage, key, start, end) == data[start:end]
    longest = max([len(piece) async for piece in storage.read(key, 0, len(data))])
    assert longest <= MB  # a slow client has a piece kept for as long as it likes
    await storage.delete(key)
    await storage.delete(key)
    with pytest.raises(FileNotFoundError):
        await whole(storage, key, 0, 1)


async def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"a file, not a folder")
    source = tmp_path / "source"
    source.write_bytes(b"data")
    with pytest.raises(Unavailable) as refused:
        await LocalStorage(tmp_path / "kept").put(new_key(), source)
    assert refused.value.code == "storage_unavailable"


async def test_what_cannot_be_read_is_unavailable_and_told_once_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "broken").symlink_to("/proc/self/mem")  # it opens, and reading its first byte is EIO
    for key, reason in [("a-folder", "Is a directory"), ("broken", "Input/output error")]:
        for asked in (whole(storage, key, 0, 1), storage.load(key)):
            caplog.clear()
            with caplog.at_level(logging.WARNING), pytest.raises(Unavailable) as refused:
                await asked
            assert (refused.value.code, refused.value.retry_after) == ("storage_unavailable", 30)
            [line] = caplog.records
            told = {name: vars(line)[name] for name in ("action", "key", "error")}
            assert (line.message, told) == ("storage_failed", {"action": "read", "key": key, "error": reason})


def test_what_another_process_has_just_deleted_does_not_keep_a_server_from_starting(tmp_path: Path) -> None:
    clear_incoming(tmp_path, older_than_seconds=60)
    ended = threading.Event()

    def check_readiness() -> None:
        storage = LocalStorage(tmp_path)
        while not ended.is_set():
            assert storage._works()

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            checking = threading.Thread(target=check_readiness)
            checking.start()
            stack.callback(checking.join)
        stack.callback(ended.set)
        for _ in range(2000):
            clear_incoming(tmp_path, older_than_seconds=60)


async def test_a_bucket_that_takes_no_files_is_told_from_the_first_failure_until_it_takes_them_again(
    s3_url: str, tmp_path: Path
) -> None:
    storage = S3Storage(make_settings(**{**s3_settings(s3_url), "s3_bucket": "comes-and-goes"}))
    source = tmp_path / "source"
    source.write_bytes(b"data")
    assert await storage.works()  # as far as anybody knows
    with pytest.raises(Unavailable):
        await storage.put(new_key(), source)
    assert not await storage.works()
    (await asyncio.to_thread(httpx.put, f"{s3_url}/comes-and-goes")).raise_for_status()
    assert await storage.works()
    await storage.put(new_key(), source)


@pytest.mark.parametrize("of_aws", [False, True])
async def test_keys_that_the_settings_leave_out_are_those_of_the_environment_of_aws(
    of_aws: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[str] = []

    class Store(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            signed.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    values = s3_settings("")
    if of_aws:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", values.pop("s3_access_key_id"))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", values.pop("s3_secret_access_key"))
    source = tmp_path / "source"
    source.write_bytes(b"data")
    with HTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values["s3_endpoint_url"] = f"http://127.0.0.1:{server.server_port}"
        await S3Storage(make_settings(**values)).put(new_key(), source)
        server.shutdown()
    assert [header.split("/")[0] for header in signed] == ["AWS4-HMAC-SHA256 Credential=key"]


@pytest.mark.parametrize(
    "left_out", [["s3_endpoint_url"], ["s3_endpoint_url", "s3_access_key_id", "s3_secret_access_key"]]
)
def test_without_an_endpoint_the_bucket_is_amazons(left_out: list[str]) -> None:
    values = {name: value for name, value in s3_settings("http://nowhere").items() if name not in left_out}
    assert isinstance(open_storage(make_settings(**values)), S3Storage)


def test_half_a_key_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(StartupError) as refused:
        open_storage(make_settings(s3_bucket="dialect", s3_access_key_id="key"))
    assert str(refused.value) == (
        "The bucket dialect cannot be used (Generic S3 error: Missing SecretAccessKey); check the S3_* settings."
    )


async def test_files_are_kept_in_s3_when_the_settings_say_so(settings: Settings, s3_url: str) -> None:
    app = create_app(make_settings(**{**settings.model_dump(), **s3_settings(s3_url)}))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            ann, bo = await people(client, 2)
            data = os.urandom(1_000_000)
            file, picture = await ann.upload(data), await ann.upload(image(size=(700, 500)), "a.png")
            await ann.send_files(await ann.personal(bo), "file", file, picture)
            assert (await bo.fetch(file["file_id"])).content == data
            assert (await bo.fetch(file["file_id"], Range="bytes=999990-")).content == data[-10:]
            assert (await bo.fetch(picture["file_id"], "/thumbnail")).status_code == 200
    assert [path for path in settings.upload_path.rglob("*") if path.is_file()] == []


PUT = """
import asyncio, json, os, sys
from pathlib import Path
from app.services.storage import S3Storage
from tests.support.databases import make_settings
from tests.support.watch import MemoryWatch

async def main(settings, source):
    storage = S3Storage(make_settings(**json.loads(settings)))
    await storage.put("small", Path("pyproject.toml"))
    watch = MemoryWatch(os.getpid())
    await storage.put("large", Path(source))
    watch.end()
    print(watch.growth, flush=True)
    os._exit(0)  # the library's threads may abort the end of an interpreter

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_large_file_passes_to_a_bucket_in_little_memory(s3_url: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 * MB))
    # In a process of its own: this one has the server, which keeps all in memory.
    command = [sys.executable, "-c", PUT, json.dumps(s3_settings(s3_url)), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25 * MB


@pytest.mark.parametrize("look", [file_service._detect, lambda path: file_service._measure(path, path)])
def test_what_came_in_and_cannot_be_read_again_is_no_fault_of_the_file(
    look: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(Unavailable) as refused:
        look(tmp_path)  # a folder: opening it fails as a disk does
    assert refused.value.code == "storage_unavailable"
