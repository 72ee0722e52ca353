"""The image as a stranger gets it: what is in it, and a server's whole life in it, with a read-only root."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pymysql
import pytest

from app import __version__
from scripts.dockerfile import Image
from tests.deployment.conftest import Container, StartContainer, end
from tests.support.databases import ENGINES, MYSQL_URL, MysqlDatabase
from tests.support.images import image as picture
from tests.support.people import Person, people
from tests.support.secrets import plant
from tests.support.servers import PATIENCE, free_port
from tests.support.socket_client import SocketClient

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(300)]  # the first test waits for the image

UID = 10001


# --- what is in it ----------------------------------------------------------------------------------------------


def test_the_image_holds_the_code_and_its_packages_and_nothing_that_lay_about(image: Image) -> None:
    assert sorted(path.name for path in image.inside("/app").iterdir()) == [
        "alembic", "alembic.ini", "app", "requirements.txt",
    ]  # fmt: skip
    assert list(image.inside("/data").iterdir()) == []
    for path in image.inside("/app").rglob("*"):
        assert path.is_dir() or b"planted-secret" not in path.read_bytes(), path


def test_the_image_has_no_compiler_and_no_installer(image: Image) -> None:
    names = {path.name for folder in ("/opt/venv/bin", "/usr/local/bin") for path in image.inside(folder).iterdir()}
    assert "uvicorn" in names, "we look in the wrong place"
    assert [name for name in names if name.startswith(("pip", "gcc", "cc", "make"))] == []


def test_nothing_of_the_code_can_be_changed_by_the_server(image: Image) -> None:
    for folder in ("/app", "/opt/venv"):
        for path in (image.inside(folder), *image.inside(folder).rglob("*")):
            about = path.lstat()
            assert about.st_uid == about.st_gid == 0, path
            assert stat.S_ISLNK(about.st_mode) or not about.st_mode & 0o022, path


def test_the_image_says_what_it_is_and_how_it_wants_to_be_run(image: Image) -> None:
    assert image.labels["org.opencontainers.image.version"] == __version__
    assert image.user == (UID, UID)
    assert image.volumes == ("/data",)
    assert image.ports == (int(image.environment["PORT"]),)
    assert image.stop_signal == "SIGTERM"


# --- what keeps it from starting --------------------------------------------------------------------------------


def test_without_a_key_it_says_so(start_container: StartContainer) -> None:
    container = start_container(SECRET_KEY="")
    assert container.wait() != 0
    assert "SECRET_KEY is missing" in container.log


def test_it_does_not_start_on_a_database_that_was_not_migrated(start_container: StartContainer) -> None:
    container = start_container()
    assert container.wait() != 0
    assert "The database is empty; run: python -m app migrate" in container.log


# --- a life -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=ENGINES)
def database(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Settings of a fresh database: none, or those of an account with the rights that MySQL's image gives."""
    if request.param == "sqlite":
        yield {}
        return
    assert MYSQL_URL, "DIALECT_TEST_ENGINES asks for MySQL: set DIALECT_TEST_MYSQL_URL"
    root: MysqlDatabase = request.getfixturevalue("mysql_database")
    name, password = f"dialect_image_{os.getpid()}", "Quiet-harbour-4711"
    plant(password)
    host, port = str(root.values["db_host"]), int(root.values["db_port"])
    with (
        pymysql.connect(
            host=host, port=port, user=root.values["db_user"], password=root.values["db_password"]
        ) as connection,
        connection.cursor() as cursor,
    ):
        for statement in (
            f"DROP DATABASE IF EXISTS `{name}`",
            f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
            f"DROP USER IF EXISTS `{name}`@`%`",
            f"CREATE USER `{name}`@`%` IDENTIFIED BY '{password}'",
            f"GRANT ALL ON `{name}`.* TO `{name}`@`%`",
        ):
            cursor.execute(statement)
        yield {"DB_HOST": host, "DB_PORT": str(port), "DB_USER": name, "DB_PASSWORD": password, "DB_NAME": name}
        cursor.execute(f"DROP USER `{name}`@`%`")
        cursor.execute(f"DROP DATABASE `{name}`")


def health(image: Image, container: Container, port: int) -> int:
    """The status of HEALTHCHECK."""
    arguments = image.healthcheck_arguments(container.pid, {"PORT": str(port)})
    return subprocess.run(arguments, capture_output=True, timeout=PATIENCE).returncode


def rights(container: Container) -> str:
    """What the kernel lets it do."""
    return Path(f"/proc/{container.pid}/status").read_text()


async def healthy(image: Image, container: Container, port: int) -> None:
    """Wait until it listens, and fail unless HEALTHCHECK is content then."""
    await asyncio.to_thread(container.wait_until_ready)
    assert await asyncio.to_thread(health, image, container, port) == 0


async def test_a_server_in_the_image_lives_stops_and_comes_back_with_all_it_had(
    image: Image, start_container: StartContainer, database: dict[str, str], tmp_path: Path
) -> None:
    port = free_port()
    settings = {**database, "PORT": str(port)}
    migration = start_container("migrate", **settings)
    assert migration.wait() == 0, migration.log
    assert "The database is up to date: " in migration.log

    container = start_container(**settings)
    await healthy(image, container, port)
    assert health(image, container, free_port()) != 0, "a check that cannot fail"
    status = rights(container)
    assert f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}" in status
    assert "Groups:\t \n" in status
    assert "CapBnd:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    async with container.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        message = await ann.say(chat_id, "Before the stop")
        file = await ann.upload(picture(size=(900, 500)), "a.png", "image/png")
        sent = await ann.send_files(chat_id, "image", file)
        original, thumbnail = [await bo.fetch(file["file_id"], suffix) for suffix in ("", "/thumbnail")]
        assert (original.status_code, thumbnail.status_code) == (200, 200)
        async with await SocketClient.open(container.ws_url, bo.account.access_token) as socket:
            await socket.say(chat_id, "Over a socket")
            code = asyncio.create_task(socket.wait_closed())
            exit_code = await asyncio.to_thread(end, container)
            assert await code == 1012
    assert exit_code == 0, container.log

    kept = list((tmp_path / "volume").rglob("*"))
    assert any(path.is_file() and "uploads" in path.parts for path in kept)
    assert database or (tmp_path / "volume/dialect.db") in kept
    assert {path.stat().st_uid for path in kept} == {UID}

    container = start_container(**settings)
    await healthy(image, container, port)
    async with container.client() as client:
        bo = Person(client, bo.account)  # the key is the same, and so is the token still good
        texts = [one["content"] for one in (await bo.history(chat_id))["items"]]
        assert texts == [message["content"], sent["content"], "Over a socket"]
        assert (await bo.fetch(file["file_id"])).content == original.content
    assert await asyncio.to_thread(end, container) == 0


async def test_a_request_that_never_ends_does_not_hold_up_a_stop(image: Image, start_container: StartContainer) -> None:
    port = free_port()
    assert start_container("migrate").wait() == 0
    container = start_container(PORT=str(port))
    await healthy(image, container, port)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /api/v1/auth/token HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
    await writer.drain()
    container.signal(signal.SIGTERM)
    assert await asyncio.to_thread(container.wait) == 0
    writer.close()
