"""Files: uploading, sending, fetching, and what is refused."""

from __future__ import annotations

import asyncio
import io
import os
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.api.v1.files import byte_range, disposition
from app.core.config import Settings
from app.services.container import Services
from app.services.file_service import clean_name, detect
from tests.support.images import animation, image, photo_with_place, png_bomb
from tests.support.people import Json, Person, people

MP4 = b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + os.urandom(4096)
MP3 = b"ID3\x04\x00\x00\x00\x00\x00\x00" + os.urandom(2048)


def on_disk(settings: Settings) -> list[Path]:
    """All files under the folder of uploads."""
    return sorted(path for path in settings.upload_path.rglob("*") if path.is_file())


# --- sending ----------------------------------------------------------------------------------------------------


async def test_a_file_comes_back_to_the_byte_and_is_the_message_of_whoever_gets_it(client: httpx.AsyncClient) -> None:
    ann, bo, eve = await people(client, 3)
    chat_id = await ann.personal(bo)
    data = os.urandom(3_000_001)
    file = await ann.upload(data, "Отчёт «2026».pdf", "application/pdf")
    assert (file["kind"], file["name"], file["size"]) == ("file", "Отчёт «2026».pdf", len(data))
    assert (await bo.fetch(file["file_id"])).status_code == 404  # nobody has sent it yet
    message = await ann.send_files(chat_id, "file", file)
    assert message["content"] == ""
    [attachment] = message["attachments"]
    assert attachment == {name: value for name, value in file.items() if name != "created_at"}
    for person in (ann, bo):
        [stored] = [one for one in (await person.history(chat_id))["items"] if one["id"] == message["id"]]
        assert stored["attachments"] == [attachment]
        answer = await person.fetch(file["file_id"])
        assert (answer.status_code, answer.content) == (200, data)
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["content-disposition"].startswith("attachment;")
        assert "filename*=UTF-8''%D0%9E" in answer.headers["content-disposition"]
    missing, foreign = await eve.fetch(999_999), await eve.fetch(file["file_id"])
    assert (missing.status_code, missing.content) == (foreign.status_code, foreign.content)
    assert missing.status_code == 404


async def test_an_album_is_one_message_and_its_caption_can_be_edited(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    files = [await ann.upload(image(colour=(number, 0, 0)), f"{number}.png", "image/png") for number in range(3)]
    files.append(await ann.upload(MP4, "clip.mp4", "video/mp4"))
    message = await ann.send_files(chat_id, "image", *files, content="Holiday")
    assert [one["file_id"] for one in message["attachments"]] == [file["file_id"] for file in files]
    assert [one["kind"] for one in message["attachments"]] == ["image", "image", "image", "video"]
    edited = await ann.edit(message, "Holidays")
    assert (edited["content"], edited["attachments"]) == ("Holidays", message["attachments"])
    assert (await bo.chat(chat_id))["last_message"]["attachments"] == message["attachments"]


async def test_a_retry_of_a_send_with_files_gets_the_first_answer(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    file = await ann.upload(b"data")
    client_id = "11111111-1111-4111-8111-111111111111"
    messages = [await ann.send_files(chat_id, "file", file, client_id=client_id) for _ in range(3)]
    assert messages[0] == messages[1] == messages[2]
    assert (await bo.chat(chat_id))["last_seq"] == 1


@pytest.mark.settings(max_attachments=3)
async def test_what_does_not_go_together_is_refused(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    path = f"/chats/{chat_id}/messages"
    picture, data, sound = await ann.upload(image(), "a.png"), await ann.upload(b"data"), await ann.upload(MP3, "a.mp3")
    foreign = await bo.upload(b"of bo")
    assert (picture["kind"], data["kind"], sound["kind"]) == ("image", "file", "audio")
    for message_type, files, expected in [
        ("text", [picture], (422, "attachment_mismatch")),
        ("image", [data], (422, "attachment_mismatch")),
        ("audio", [picture], (422, "attachment_mismatch")),
        ("video", [sound], (422, "attachment_mismatch")),
        ("image", [picture, picture], (422, "attachment_mismatch")),
        ("file", [data, foreign], (404, "file_not_found")),
        ("file", [{"file_id": 999_999}], (404, "file_not_found")),
        ("file", [data, picture, sound, foreign], (422, "too_many_attachments")),
        ("image", [], (422, "message_empty")),
    ]:
        body = {"message_type": message_type, "attachments": [file["file_id"] for file in files]}
        assert await ann.refused("POST", path, body) == expected, (message_type, files)
    assert await ann.refused("POST", path, {"content": "x", "message_type": "image"}) == (422, "attachment_mismatch")
    assert await ann.refused("POST", path, {}) == (422, "message_empty")
    assert (await ann.chat(chat_id))["last_seq"] == 0


async def test_only_who_may_see_the_message_may_fetch_its_file(client: httpx.AsyncClient) -> None:
    ann, bo, cy, di = await people(client, 4)
    group = await ann.group(bo, cy, history_visible=False)
    file = await ann.upload(image(size=(900, 500)), "a.png")
    message = await ann.send_files(group, "image", file)
    await ann.add(group, di)  # sees nothing of what was before

    async def allowed() -> list[bool]:
        answers = [
            await one.fetch(file["file_id"], suffix) for one in (ann, bo, cy, di) for suffix in ("", "/thumbnail")
        ]
        assert {answer.status_code for answer in answers} <= {200, 404}
        whole, small = answers[::2], answers[1::2]
        assert [one.status_code for one in whole] == [one.status_code for one in small]
        return [answer.status_code == 200 for answer in whole]

    assert await allowed() == [True, True, True, False]
    await ann.remove(group, cy)
    assert await allowed() == [True, True, False, False]
    await ann.delete(message)
    assert await allowed() == [True, False, False, False]  # its owner may send it once more
    again = await ann.send_files(group, "file", file)
    assert await allowed() == [True, True, False, True]
    [gone] = [one for one in (await bo.history(group))["items"] if one["id"] == message["id"]]
    assert (gone["deleted"], gone["attachments"]) == (True, [])
    assert again["attachments"][0]["file_id"] == file["file_id"]


# --- images -----------------------------------------------------------------------------------------------------


async def test_a_photo_is_turned_upright_and_loses_all_that_is_not_picture(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(photo_with_place(orientation=6, size=(640, 480)), "IMG_1.jpg", "image/jpeg")
    assert (file["kind"], file["media_type"], file["width"], file["height"]) == ("image", "image/jpeg", 480, 640)
    assert file["thumbnail"]
    assert len(file["blurhash"]) >= 6
    answer = await ann.fetch(file["file_id"])
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-disposition"].startswith("inline;")
    assert (b"SECRETMAKER" in answer.content, b"Exif" in answer.content) == (False, False)
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert (picture.size, dict(picture.getexif())) == ((480, 640), {})
    small = await ann.fetch(file["file_id"], "/thumbnail")
    with Image.open(io.BytesIO(small.content)) as picture:
        assert (picture.format, picture.size) == ("WEBP", (240, 320))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "JPEG"])
async def test_every_kind_of_image_keeps_its_kind(client: httpx.AsyncClient, kind: str) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(image(kind), f"a.{kind}")
    with Image.open(io.BytesIO((await ann.fetch(file["file_id"])).content)) as picture:
        assert (picture.format, picture.size) == (kind, (64, 48))


async def test_an_animation_stays_one(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(animation(12), "a.gif")
    with Image.open(io.BytesIO((await ann.fetch(file["file_id"])).content)) as picture:
        assert getattr(picture, "n_frames", 1) == 12


HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "81 megapixels in 10 KB": (png_bomb(9000, 9000), "a.png", "image/png"),
    "900 megapixels": (png_bomb(30_000, 30_000), "a.png", "image/png"),
    "a claim of 2^31 pixels a side": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\x7f\xff\xff\xff" * 2 + b"\x08\x02\0\0\0" + b"\0" * 20,
        "a.png",
        "image/png",
    ),
    "an animation of 101 pictures": (animation(101), "a.gif", "image/gif"),
    "a truncated JPEG": (photo_with_place()[:2000], "a.jpg", "image/jpeg"),
    "a truncated PNG": (image(size=(500, 500))[:200], "a.png", "image/png"),
    "a truncated GIF": (animation(5)[:60], "a.gif", "image/gif"),
    "a truncated WebP": (image("WEBP", (300, 300))[:60], "a.webp", "image/webp"),
    "HTML called jpg": (b"<html><script>alert(1)</script></html>", "a.jpg", "text/html"),
    "HTML that claims image/png": (b"<html><script>alert(1)</script></html>", "a.html", "image/png"),
    "SVG with a script": (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "a.svg", "image/svg+xml"),
    "SVG called png": (b"<?xml version='1.0'?><svg onload='alert(1)'/>", "a.png", "image/png"),
    "a GIF that is JavaScript": (b"GIF89a/*" + b"\0" * 20 + b"*/=1;alert(1)//", "a.gif", "image/gif"),
    "a JPEG header and a zip": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"PK\x03\x04" * 50, "a.jpg", "image/jpeg"),
    "a BMP": (image("BMP"), "a.bmp", "image/bmp"),
    "a TIFF": (image("TIFF"), "a.tiff", "image/tiff"),
    "an icon": (image("ICO"), "a.ico", "image/x-icon"),
    "nothing but a PNG's signature": (b"\x89PNG\r\n\x1a\n", "a.png", "image/png"),
    "noise called png": (os.urandom(5000), "a.png", "image/png"),
    "nothing at all": (b"", "a.png", "image/png"),
    "a PDF that claims to be an image": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a.pdf", "image/jpeg"),
    "an empty file": (b"", "a.txt", "text/plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_image_is_refused_and_leaves_nothing(
    client: httpx.AsyncClient, settings: Settings, name: str
) -> None:
    [ann] = await people(client, 1)
    answer = await ann.try_upload(*HOSTILE[name])
    assert answer.status_code in (413, 422), answer.text
    assert answer.json()["code"] in ("invalid_image", "image_too_large", "file_empty")
    assert on_disk(settings) == []


@pytest.mark.parametrize(
    ("data", "name", "content_type"),
    [
        (b"<html><script>alert(1)</script></html>", "page.html", "text/html"),
        (b"%PDF-1.7\n", "a.pdf", "application/pdf"),
        (b"PK\x03\x04" + os.urandom(100), "a.jar", "application/java-archive"),
        (b"#!/bin/sh\n", "run.sh", "text/x-sh"),
        (b"MZ" + os.urandom(100), "CON", "application/x-msdownload"),
        (MP4, "a.mp4", "video/mp4"),
        (MP3, "a.mp3", "audio/mpeg"),
    ],
)
async def test_what_is_no_image_is_only_ever_handed_out_for_saving(
    client: httpx.AsyncClient, data: bytes, name: str, content_type: str
) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(data, name, content_type)
    answer = await ann.fetch(file["file_id"])
    assert answer.content == data
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert not file["thumbnail"]
    assert (await ann.fetch(file["file_id"], "/thumbnail")).status_code == 404


# --- bodies -----------------------------------------------------------------------------------------------------

PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
BODIES: dict[str, tuple[str, bytes]] = {
    "no body": ("multipart/form-data; boundary=b", b""),
    "no boundary": ("multipart/form-data", PART + b"x\r\n--b--\r\n"),
    "a boundary of 71 letters": (f"multipart/form-data; boundary={'b' * 71}", b"--" + b"b" * 71),
    "JSON": ("application/json", b'{"file": "x"}'),
    "no type": ("", b"x"),
    "a form": ("application/x-www-form-urlencoded", b"file=x"),
    "the end is missing": ("multipart/form-data; boundary=b", PART + b"x"),
    "another boundary": ("multipart/form-data; boundary=c", PART + b"x\r\n--b--\r\n"),
    "a field, not a file": (
        "multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n'
    ),
    "another name": ("multipart/form-data; boundary=b", PART.replace(b'"file"', b'"avatar"') + b"x\r\n--b--\r\n"),
    "two files": ("multipart/form-data; boundary=b", PART + b"x\r\n" + PART + b"y\r\n--b--\r\n"),
    "100,000 parts": (
        "multipart/form-data; boundary=b",
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 10_000 + PART + b"x\r\n--b--\r\n",
    ),
    "a thousand headers": (
        "multipart/form-data; boundary=b",
        PART.replace(b"\r\n\r\n", b"\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n") + b"x\r\n--b--\r\n",
    ),
    "a header of 100 KB": (
        "multipart/form-data; boundary=b", PART.replace(b"a.txt", b"a" * 100_000) + b"x\r\n--b--\r\n"
    ),
    "a broken header": ("multipart/form-data; boundary=b", b"--b\r\n\xff\xfe\x00: x\r\n\r\nx\r\n--b--\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_that_is_not_one_file_is_refused(client: httpx.AsyncClient, settings: Settings, name: str) -> None:
    [ann] = await people(client, 1)
    content_type, body = BODIES[name]
    headers = {**ann.account.headers, "Content-Type": content_type}
    answer = await client.post("/api/v1/messages/upload", content=body, headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] in ("invalid_upload", "file_empty")
    assert on_disk(settings) == []


@pytest.mark.settings(max_upload_bytes=100_000)
async def test_a_file_above_the_limit_is_stopped_as_it_streams(client: httpx.AsyncClient, settings: Settings) -> None:
    [ann] = await people(client, 1)
    assert (await ann.upload(b"x" * 100_000))["size"] == 100_000
    before = on_disk(settings)
    for size in (100_001, 120_000, 5_000_000):
        answer = await ann.try_upload(b"x" * size)
        assert (answer.status_code, answer.json()["code"]) in [(413, "file_too_large"), (413, "body_too_large")]
    sent = 0

    async def endless() -> object:
        nonlocal sent
        yield PART
        while sent < 50_000_000:
            sent += 65_536
            yield b"x" * 65_536

    headers = {**ann.account.headers, "Content-Type": "multipart/form-data; boundary=b"}
    answer = await client.post("/api/v1/messages/upload", content=endless(), headers=headers)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) in [(413, "file_too_large"), (413, "body_too_large")]
    assert on_disk(settings) == before


async def test_uploading_needs_a_token(client: httpx.AsyncClient, settings: Settings) -> None:
    answer = await client.post("/api/v1/messages/upload", files={"file": ("a", b"x")})
    assert (answer.status_code, on_disk(settings)) == (401, [])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/etc/shadow", "shadow"),
        ("a\r\nSet-Cookie: x=y", "aSet-Cookie: x=y"),
        ("a\x00b.txt", "ab.txt"),
        ("\u202egpj.exe", "gpj.exe"),
        ("", "file"),
        ("...", "file"),
        (".", "file"),
        ("é" * 300 + ".jpeg", "é" * 125 + ".jpeg"),
        ("CON", "CON"),
        ("a;b\"c'd%2e.txt", "a;b\"c'd%2e.txt"),
    ],
)
def test_a_name_is_for_people_and_never_a_path(name: str, shown: str) -> None:
    assert clean_name(name) == shown
    assert len(shown.encode()) <= 255
    header = disposition(shown, inline=False)
    assert header.isascii()
    assert not set("\r\n\0") & set(header)


@pytest.mark.settings(max_stored_bytes_per_user=1000)
async def test_a_quota_holds_for_parallel_uploads_too(client: httpx.AsyncClient, services: Services) -> None:
    [ann] = await people(client, 1)
    answers = await asyncio.gather(*(ann.try_upload(b"x" * 300) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 5
    assert {answer.json()["code"] for answer in answers if answer.is_error} == {"quota_exceeded"}


@pytest.mark.settings(max_stored_bytes_per_user=1000)
async def test_an_upload_that_the_disk_refuses_takes_nothing_of_the_quota(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    [ann] = await people(client, 1)
    in_the_way = [settings.upload_path / f"{number:02x}" for number in range(256)]
    for path in in_the_way:
        path.write_bytes(b"")  # where a folder is wanted
    answer = await ann.try_upload(b"x" * 900)
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    for path in in_the_way:
        path.unlink()
    await services.files.collect()
    assert (await ann.upload(b"x" * 900))["size"] == 900
    assert len(on_disk(settings)) == 1


# --- fetching ---------------------------------------------------------------------------------------------------


async def test_ranges_and_caches_are_served_as_http_has_it(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    data = os.urandom(700_000)
    file_id = (await ann.upload(data))["file_id"]
    whole = await ann.fetch(file_id)
    etag = whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"
    assert "immutable" in whole.headers["cache-control"]
    for asked, start, end in [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=699990-", 699_990, 700_000),
        ("bytes=-10", 699_990, 700_000),
        ("bytes=0-99999999", 0, 700_000),
        ("bytes=-99999999", 0, 700_000),
        ("bytes=262100-262200", 262_100, 262_201),
    ]:
        answer = await ann.fetch(file_id, Range=asked)
        assert (answer.status_code, answer.content) == (206, data[start:end]), asked
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/700000"
    for unsatisfiable in ("bytes=700000-", "bytes=-0", "bytes=800000-900000"):
        answer = await ann.fetch(file_id, Range=unsatisfiable)
        assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */700000")
    for unknown in ("bytes=5-2", "bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "bytes=", "bytes=--5"):
        assert (await ann.fetch(file_id, Range=unknown)).status_code == 200
    assert (await ann.fetch(file_id, **{"If-None-Match": etag})).status_code == 304
    assert (await ann.fetch(file_id, **{"If-None-Match": 'W/"x", ' + etag})).status_code == 304
    assert (await ann.fetch(file_id, **{"If-None-Match": '"x"'})).status_code == 200
    assert (await ann.fetch(file_id, Range="bytes=0-9", **{"If-Range": etag})).status_code == 206
    assert (await ann.fetch(file_id, Range="bytes=0-9", **{"If-Range": '"x"'})).status_code == 200


def test_a_range_of_an_empty_file_is_empty() -> None:
    assert byte_range("bytes=0-", 0) == (0, 0)
    assert byte_range("bytes=-5", 0) == (0, 0)


def test_a_file_is_told_by_its_content() -> None:
    assert detect(MP4) == ("video/mp4", "video")
    assert detect(MP3)[1] == "audio"
    assert detect(b"") == ("application/octet-stream", "file")


# --- collecting -------------------------------------------------------------------------------------------------


async def test_what_no_message_holds_is_collected_and_nothing_else(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    files: list[Json] = [await ann.upload(image(), "a.png") for _ in range(4)]
    await ann.send_files(chat_id, "image", files[0], files[1])
    deleted = await ann.send_files(chat_id, "image", files[1], files[2])
    assert len(on_disk(settings)) == 8
    await services.files.collect()
    await ann.delete(deleted)
    await services.files.collect()  # one file is in no message any more; another was never in any, but is young
    assert [await status(ann, file) for file in files] == [200, 200, 404, 200]
    services.files._clock = _Later(services, hours=25)  # type: ignore[assignment]
    await services.files.collect()
    assert [await status(ann, file) for file in files] == [200, 200, 404, 404]
    assert len(on_disk(settings)) == 4


class _Later:
    """The services' clock, some hours on."""

    def __init__(self, services: Services, hours: float) -> None:
        self._clock = services.clock
        self._step = timedelta(hours=hours)

    def now(self) -> object:
        """The time then."""
        return self._clock.now() + self._step


async def status(person: Person, file: Json) -> int:
    """What asking for a file answers."""
    return (await person.fetch(file["file_id"])).status_code
