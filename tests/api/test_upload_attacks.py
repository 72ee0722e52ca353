"""Hostile files and requests against both doors for files: each gets its answer, costs little, and leaves nothing.

The server is a real one with its default limits; only the patience for silent senders and for images without end is
shorter. Whatever comes in, its memory stays flat, nothing of what was refused is left on its disk, and those who chat
meanwhile notice nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import socket
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.core.config import Settings
from tests.support import hostile
from tests.support.databases import ENGINES, MysqlDatabase, SqliteTemplate, make_settings
from tests.support.hostile import BAD_BODY, FORM, NO_IMAGE, PART, Answer, Encoded, HostileFile, Kept, Refused, form
from tests.support.images import image
from tests.support.people import Json, Person, people
from tests.support.secrets import check_log
from tests.support.servers import COMMANDS, Server, environment
from tests.support.watch import MB, Bystander, MemoryWatch, files_under, undisturbed

SERVER_GROWTH = 48 * MB
"""Of the server's own process, at its peak, whatever is sent to it."""
TOGETHER_GROWTH = 200 * MB
"""With the process that decodes images."""
OTHERS_SECONDS = 2.0
"""A bystander's message and request together. They take milliseconds; the rest is room for a busy machine."""
IDLE_SECONDS = 2.0
STORED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{32}(\.\d+)?")
AVATAR = re.compile(r"avatars/[0-9a-f/]+\.\d+|" + STORED.pattern)

UPLOAD, MY_AVATAR = "/messages/upload", "/users/me/avatar"
DOORS = [UPLOAD, MY_AVATAR]
FILES, BODIES = hostile.files(), hostile.bodies()


# --- the server under attack ------------------------------------------------------------------------------------


@dataclass
class Target:
    """A server, and the folder in which all of its files are."""

    server: Server
    settings: Settings
    folder: Path

    def on_disk(self) -> dict[str, int]:
        """Its uploads and its temporary files."""
        return files_under(self.folder)


@pytest.fixture(scope="module", params=ENGINES)
def target(
    request: pytest.FixtureRequest, sqlite_template: SqliteTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """One server for all attacks: what one of them breaks, the next ones notice."""
    folder = tmp_path_factory.mktemp("attacked")
    mysql = MysqlDatabase(f"dialect_attacked_{os.getpid()}") if request.param == "mysql" else None
    world = folder / "world"  # so that a path out of the uploads still ends where we look
    for name in ("home", "tmp"):
        (world / name).mkdir(parents=True)
    values = mysql.new() if mysql else sqlite_template.new(folder)
    settings = make_settings(
        **values,
        upload_path=world / "home" / "uploads",
        upload_idle_seconds=IDLE_SECONDS,
        image_cpu_seconds=3,
        image_seconds=120.0,  # however busy this machine is
    )
    env = environment(settings, TMPDIR=str(world / "tmp"))
    server = Server(COMMANDS["tuned"], cwd=world / "home", env=env, log_path=folder / "server.log")
    try:
        server.wait_until_ready()
        yield Target(server, settings, world)
        server.stop()
    finally:
        server.kill()
        if mysql:
            mysql.close()
    check_log(server.log, "the log of the attacked server")


@dataclass
class Ground:
    """The server with an attacker and a bystander."""

    target: Target
    attacker: Person
    other: Person
    bystander: Bystander
    group: int

    @contextlib.asynccontextmanager
    async def attack(self, *, keeps: re.Pattern[str] | None = None) -> AsyncIterator[None]:
        """What happens in here costs little memory, disturbs nobody, and leaves only files that match `keeps`."""
        before = self.target.on_disk()
        watch = MemoryWatch(self.target.server.pid)
        try:
            async with undisturbed(self.bystander, OTHERS_SECONDS):
                yield
        finally:
            watch.end()
        assert watch.growth < SERVER_GROWTH, f"the server grew by {watch.growth / MB:.0f} MB"
        assert watch.growth_with_children < TOGETHER_GROWTH, f"grew by {watch.growth_with_children / MB:.0f} MB"
        after = self.target.on_disk()
        # The collector may have taken old pictures meanwhile.
        assert {path: size for path, size in after.items() if path in before}.items() <= before.items()
        left = [path.removeprefix("home/uploads/") for path in after.keys() - before.keys()]
        if keeps is None:
            assert left == []
        else:
            assert left
            assert [path for path in left if not keeps.fullmatch(path)] == []

    async def eventually_clean(self, before: dict[str, int]) -> None:
        """Wait until nothing is there that was not before."""
        async with asyncio.timeout(10):
            while self.target.on_disk().keys() - before.keys():
                await self.attacker.do("GET", "/users/me")


@pytest.fixture
async def ground(target: Target) -> AsyncIterator[Ground]:
    """People on the server under attack."""
    async with target.server.client() as client:
        attacker, other, peer = await people(client, 3)
        chat_id = await other.personal(peer)
        group = await attacker.group(other)
        async with await other.open(target.server) as socket:
            yield Ground(target, attacker, other, Bystander(other, socket, chat_id), group)
        await attacker.do("DELETE", MY_AVATAR)


# --- what is asserted of every answer ---------------------------------------------------------------------------


async def post(person: Person, door: str, body: Any, content_type: str = FORM) -> httpx.Response:
    """A body, as it stands."""
    headers = {**person.account.headers, "Content-Type": content_type}
    return await person.client.post(f"/api/v1{door}", content=body, headers=headers)


def assert_refused(answer: httpx.Response, expected: Refused) -> None:
    """The answer is this error, and says so as all errors do."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert (answer.status_code, answer.json()["code"]) == expected, answer.text


def assert_inert(answer: httpx.Response, media_type: str, *, inline: bool) -> None:
    """A browser will neither run nor guess."""
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert {"sandbox", "default-src 'none'"} <= set(answer.headers["content-security-policy"].split("; "))
    disposition = answer.headers["content-disposition"]
    assert re.split("[; ]", disposition)[0] == ("inline" if inline else "attachment")


def assert_only_pixels(data: bytes, kind: str) -> None:
    """An image that holds nothing of what was sent with it."""
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == kind
        picture.load()
    for trace in (hostile.MARK, b"<script", b"PK\x03\x04", b"Exif"):
        assert trace not in data


async def check(ground: Ground, door: str, answer: httpx.Response, expected: Answer, data: bytes) -> None:
    """The answer, and what is handed out afterwards."""
    match expected:
        case Refused():
            assert_refused(answer, expected)
            if door == MY_AVATAR:
                assert (await ground.attacker.do("GET", "/users/me"))["avatar_url"] is None
        case Kept(kind):
            assert answer.status_code == 201, answer.text
            file = answer.json()
            assert (file["kind"], file["thumbnail"]) == (kind, False)
            served = await ground.attacker.fetch(file["file_id"])
            assert_inert(served, "application/octet-stream", inline=False)
            assert served.content == data
            assert (await ground.attacker.fetch(file["file_id"], "/thumbnail")).status_code == 404
        case Encoded(media_type):
            assert answer.is_success, answer.text
            await _check_image(ground, answer.json(), media_type)


async def _check_image(ground: Ground, shown: Json, media_type: str) -> None:
    kind = media_type.removeprefix("image/").upper()
    if "file_id" not in shown:
        for query in ("", "?size=small"):
            served = await ground.attacker.client.get(shown["avatar_url"] + query)
            assert_inert(served, "image/webp", inline=True)
            assert_only_pixels(served.content, "WEBP")
        return
    served = await ground.attacker.fetch(shown["file_id"])
    assert_inert(served, media_type, inline=True)
    assert_only_pixels(served.content, kind)
    small = await ground.attacker.fetch(shown["file_id"], "/thumbnail")
    assert_inert(small, "image/webp", inline=True)
    assert_only_pixels(small.content, "WEBP")


def stays(expected: Answer, door: str) -> re.Pattern[str] | None:
    """What may be on the disk afterwards."""
    return None if isinstance(expected, Refused) else STORED if door == UPLOAD else AVATAR


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", FILES)
async def test_a_hostile_file_gets_its_answer_and_harms_nobody(ground: Ground, name: str, door: str) -> None:
    file = FILES[name]
    data = await asyncio.to_thread(file.make)
    await send_file(ground, door, file, data)


async def send_file(ground: Ground, door: str, file: HostileFile, data: bytes) -> None:
    """One file through one door."""
    expected = file.upload if door == UPLOAD else file.avatar
    async with ground.attack(keeps=stays(expected, door)):
        answer = await post(ground.attacker, door, form(data, file.name.encode(), file.claims))
        await check(ground, door, answer, expected, data)


@pytest.mark.parametrize(
    "name", ["PNG: 81 megapixels in 10 KB", "SVG", "a good GIF that is JavaScript", "GIF: 10,000 pictures"]
)
async def test_the_picture_of_a_group_is_no_other_door(ground: Ground, name: str) -> None:
    await send_file(ground, f"/chats/{ground.group}/avatar", FILES[name], FILES[name].make())


async def test_many_bombs_at_once_are_opened_one_after_the_other(ground: Ground) -> None:
    bombs = [
        FILES[name] for name in hostile.bombs() if name.startswith(("PNG", "GIF")) and FILES[name].avatar[0] == 422
    ]
    bodies = [form(bomb.make(), bomb.name.encode(), bomb.claims) for bomb in bombs]
    async with ground.attack():
        answers = await asyncio.gather(*(post(ground.attacker, UPLOAD, body) for body in bodies))
        codes = {(answer.status_code, answer.json()["code"]) for answer in answers}
        assert codes <= {NO_IMAGE, hostile.TOO_MANY_PIXELS, (429, "rate_limited")}


async def test_the_largest_image_that_is_allowed_leaves_the_server_itself_alone(ground: Ground) -> None:
    data = await asyncio.to_thread(image, "JPEG", (5000, 4990), progressive=True)
    watch = MemoryWatch(ground.target.server.pid)
    async with undisturbed(ground.bystander, OTHERS_SECONDS):
        file = await ground.attacker.upload(data, "a.jpg", "image/jpeg")
    watch.end()
    assert (file["width"], file["height"]) == (5000, 4990)
    assert watch.growth < SERVER_GROWTH
    assert watch.growth_with_children < 400 * MB


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.NAMES)
async def test_a_name_is_for_people_and_never_a_path(ground: Ground, name: str) -> None:
    raw, shown = hostile.NAMES[name]
    async with ground.attack(keeps=STORED):
        answer = await post(ground.attacker, UPLOAD, form(b"data", raw))
        assert answer.status_code == 201, answer.text
        assert answer.json()["name"] == shown
        assert len(shown.encode()) <= 255
        served = await ground.attacker.fetch(answer.json()["file_id"])
    assert_inert(served, "application/octet-stream", inline=False)
    assert "set-cookie" not in served.headers
    assert served.headers["content-disposition"].isascii()


# --- bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BODIES)
async def test_a_body_that_is_not_one_file_is_refused(ground: Ground, name: str, door: str) -> None:
    body = BODIES[name]
    expected = body.answer if door == UPLOAD or body.answer == BAD_BODY else NO_IMAGE
    async with ground.attack(keeps=stays(expected, door)):
        answer = await post(ground.attacker, door, body.make(), body.content_type)
        if isinstance(expected, Refused):
            assert_refused(answer, expected)
        else:
            assert (answer.status_code, answer.json()["name"]) == (201, "a.txt")
            served = await ground.attacker.fetch(answer.json()["file_id"])
            assert_inert(served, "application/octet-stream", inline=False)


# --- requests that lie about themselves ---------------------------------------------------------------------------


class Wire:
    """A connection on which anything may be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self.reader = reader
        self.writer = writer
        self.head = head

    def begin(self, *headers: str) -> None:
        """Send the start of a request."""
        self.writer.write("\r\n".join([self.head, f"Content-Type: {FORM}", *headers, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        """Send something and wait until the server has room for more."""
        self.writer.write(data)
        await self.writer.drain()
        # `drain` gives nobody else a turn while the system takes all: the answer could not be read meanwhile.
        await asyncio.sleep(0)

    async def answer(self) -> tuple[int, bytes]:
        """The next answer: status and body."""
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await self.reader.readexactly(int(length[1])) if length else await self.reader.read()
        return int(head.split(b" ")[1]), body


@contextlib.asynccontextmanager
async def wire(ground: Ground, door: str, person: Person | None = None) -> AsyncIterator[Wire]:
    """A connection to a door."""
    host, port = ground.target.server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    token = (person or ground.attacker).account.access_token
    head = f"POST /api/v1{door} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}"
    try:
        yield Wire(reader, writer, head)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def assert_code(answer: tuple[int, bytes], status: int, code: str) -> None:
    """The problem that an answer tells of."""
    assert answer[0] == status, answer
    assert f'"code":"{code}"'.encode() in answer[1]


@pytest.mark.parametrize("door", DOORS)
async def test_a_length_that_is_too_short_ends_the_body_there(ground: Ground, door: str) -> None:
    body = form(os.urandom(10_000))
    async with ground.attack(), wire(ground, door) as line:
        line.begin(f"Content-Length: {len(body) - 5000}")
        await line.send(body)
        assert (await line.answer())[0] == 400  # what comes behind is no request


@pytest.mark.parametrize("door", DOORS)
async def test_a_length_that_is_too_long_is_waited_for_only_so_long(ground: Ground, door: str) -> None:
    body = form(os.urandom(10_000))
    async with ground.attack(), wire(ground, door) as line:
        line.begin(f"Content-Length: {len(body) + 5000}")
        await line.send(body)
        assert_code(await line.answer(), 422, "invalid_upload")


@pytest.mark.parametrize("door", DOORS)
async def test_a_sender_that_falls_silent_is_given_up(ground: Ground, door: str) -> None:
    async with ground.attack(), wire(ground, door) as line:
        line.begin("Content-Length: 1000000")
        await line.send(PART)
        assert_code(await line.answer(), 422, "invalid_upload")


@pytest.mark.parametrize("door", DOORS)
async def test_a_sender_that_drips_is_given_up(ground: Ground, door: str) -> None:
    async with ground.attack(), wire(ground, door) as line:
        line.begin("Content-Length: 1000000")
        await line.send(PART)
        answer = asyncio.create_task(line.answer())
        while not answer.done():
            await line.send(b"x")
            await asyncio.wait([answer], timeout=0.05)
        assert_code(answer.result(), 422, "invalid_upload")


@pytest.mark.parametrize("door", DOORS)
async def test_a_sender_that_hangs_up_leaves_nothing(ground: Ground, door: str) -> None:
    before = ground.target.on_disk()
    async with wire(ground, door) as line:
        line.begin("Content-Length: 9000000")
        await line.send(PART + os.urandom(2_000_000))
        async with asyncio.timeout(10):
            while not ground.target.on_disk().keys() - before.keys():  # what has come is on the disk by now, under way
                await ground.attacker.do("GET", "/users/me")
        line.writer.transport.abort()
    await ground.eventually_clean(before)


@pytest.mark.parametrize("door", DOORS)
async def test_a_body_without_end_is_stopped_at_the_limit(ground: Ground, door: str) -> None:
    limit = ground.target.settings.max_upload_bytes if door == UPLOAD else ground.target.settings.max_avatar_bytes
    piece = os.urandom(64 * 1024)
    async with ground.attack(), wire(ground, door) as line:
        line.begin("Transfer-Encoding: chunked")
        await line.send(b"%x\r\n%s\r\n" % (len(PART), PART))
        async with asyncio.TaskGroup() as tasks:
            answer, sent = tasks.create_task(line.answer()), 0
            while not answer.done():
                assert sent < limit + 32 * MB
                await line.send(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
        assert_code(answer.result(), 413, "file_too_large")
        assert sent > limit


@pytest.mark.parametrize("door", DOORS)
async def test_who_sends_all_of_too_much_before_listening_still_hears_the_answer(ground: Ground, door: str) -> None:
    host, port = ground.target.server.url.removeprefix("http://").split(":")
    size = 70 * MB
    head = (
        f"POST /api/v1{door} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {FORM}\r\nContent-Length: {size}\r\n"
        f"Connection: close\r\nAuthorization: Bearer {ground.attacker.account.access_token}\r\n\r\n"
    )

    def send_then_listen() -> bytes:
        # Not asyncio: it would read what has come while it still sends.
        with socket.create_connection((host, int(port)), timeout=30) as line:
            line.sendall(head.encode() + PART)
            for _ in range(size // MB):
                line.sendall(bytes(MB))
            return line.recv(64 * 1024)

    async with ground.attack():
        answer = await asyncio.to_thread(send_then_listen)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"file_too_large"' in answer


@pytest.mark.parametrize("door", DOORS)
async def test_who_asks_first_whether_to_send_ten_gigabytes_is_told_no(ground: Ground, door: str) -> None:
    async with ground.attack(), wire(ground, door) as line:
        line.begin(f"Content-Length: {10 * 1024**3}", "Expect: 100-continue")
        assert_code(await line.answer(), 413, "file_too_large")


async def test_a_stranger_with_a_long_body_is_a_stranger(ground: Ground) -> None:
    async with ground.attack(), wire(ground, UPLOAD) as line:
        line.head = re.sub("Bearer .*", "Bearer nonsense", line.head)
        line.begin(f"Content-Length: {20 * MB}")
        for _ in range(20):
            await line.send(bytes(MB))
        assert_code(await line.answer(), 401, "invalid_token")


@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("a length below nothing", ["Content-Length: -5"]),
        ("a length that is none", ["Content-Length: 5x"]),
        ("a length beyond all numbers", ["Content-Length: " + "9" * 40]),
        ("two lengths", ["Content-Length: 5", "Content-Length: 6"]),
        ("a length and chunks", ["Content-Length: 5", "Transfer-Encoding: chunked"]),
        ("chunks of no number", ["Transfer-Encoding: chunked"]),
        ("an encoding nobody knows", ["Transfer-Encoding: chunked, nonsense"]),
    ],
)
async def test_a_request_that_contradicts_itself_is_no_request(ground: Ground, name: str, headers: list[str]) -> None:
    async with ground.attack(), wire(ground, UPLOAD) as line:
        line.begin(*headers)
        await line.send(b"zz\r\n" + form(b"data") + b"\r\n0\r\n\r\n")
        status, _ = await line.answer()
        assert status == 400, name


async def test_a_packed_body_is_not_unpacked(ground: Ground) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(packer.compress(bytes(MB)) for _ in range(200)) + packer.flush()
    async with ground.attack(), wire(ground, UPLOAD) as line:
        line.begin(f"Content-Length: {len(body)}", "Content-Encoding: gzip")
        await line.send(body)
        assert_code(await line.answer(), 422, "invalid_upload")


async def test_one_account_has_only_so_many_uploads_under_way(ground: Ground) -> None:
    at_once = ground.target.settings.max_uploads_at_once
    before = ground.target.on_disk()
    async with contextlib.AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(wire(ground, UPLOAD)) for _ in range(at_once)]
        for line in lines:
            line.begin("Content-Length: 1000000")
            await line.send(PART)
        async with asyncio.timeout(10):
            while len(ground.target.on_disk().keys() - before.keys()) < at_once:
                await ground.attacker.do("GET", "/users/me")
        assert_refused(await post(ground.attacker, UPLOAD, form(b"one more")), Refused(429, "rate_limited"))
        assert (await post(ground.other, UPLOAD, form(b"of somebody else"))).status_code == 201
        for line in lines:
            line.writer.transport.abort()
    async with asyncio.timeout(10):
        while (await post(ground.attacker, UPLOAD, form(b"again"))).status_code == 429:
            pass


# --- large files --------------------------------------------------------------------------------------------------


async def test_fifty_megabytes_go_up_and_down_without_the_server_growing(ground: Ground) -> None:
    data = os.urandom(ground.target.settings.max_upload_bytes)
    await ground.attacker.upload(data)  # what grows once and stays is no leak
    watch = MemoryWatch(ground.target.server.pid)
    async with undisturbed(ground.bystander, OTHERS_SECONDS):
        file = await ground.attacker.upload(data)
        answer = await ground.attacker.fetch(file["file_id"])
    watch.end()
    assert answer.content == data
    assert watch.growth < 16 * MB
