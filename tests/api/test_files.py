"""Files: uploading, sending, fetching, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from PIL import Image
from sqlalchemy import func, select
from sqlalchemy.orm import InstrumentedAttribute

from app.api.v1.files import byte_range
from app.core.config import Settings
from app.core.errors import TooManyRequests
from app.db.models import Attachment, EmptyChat, File
from app.services import file_service
from app.services.container import Services
from tests.conftest import StartServer
from tests.support.images import animation, image, photo_with_place
from tests.support.people import Json, Person, people
from tests.support.servers import ROOT, Door, Server

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


async def test_what_phones_and_browsers_record_can_be_sent_as_what_it_is(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    sound = ["aac.mp4", "amr.3gp", "voice.aac", "opus.ogg", "opus.webm", "aac.m4a", "bare.mp3"]
    films = ["film.mp4", "film.3gp", "film.webm"]
    for name, kind, other, claims in [
        *((name, "audio", "video", "video/mp4") for name in sound),
        *((name, "video", "audio", "audio/mp4") for name in films),
    ]:
        data = (ROOT / "tests" / "files" / "media" / name).read_bytes()
        file = await ann.upload(data, "recorded", claims)  # what its sender says of it decides nothing
        message = await ann.send_files(chat_id, kind, file)
        assert message["attachments"][0]["media_type"].startswith(f"{kind}/"), name
        body = {"message_type": other, "attachments": [file["file_id"]]}
        assert await ann.refused("POST", f"/chats/{chat_id}/messages", body) == (422, "attachment_mismatch"), name
        answer = await bo.fetch(file["file_id"])
        assert (answer.content, answer.headers["content-type"]) == (data, "application/octet-stream")


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


async def test_of_a_jpeg_with_a_second_picture_the_first_is_the_photo(client: httpx.AsyncClient) -> None:
    output = io.BytesIO()
    photo, depth = Image.new("RGB", (64, 48), (200, 30, 30)), Image.new("RGB", (32, 24))
    photo.save(output, "MPO", save_all=True, append_images=[depth])
    [ann] = await people(client, 1)
    file = await ann.upload(output.getvalue(), "a.jpg", "image/jpeg")
    assert (file["media_type"], file["width"], file["height"]) == ("image/jpeg", 64, 48)
    with Image.open(io.BytesIO((await ann.fetch(file["file_id"])).content)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 48))


async def test_an_animation_stays_one(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(animation(12), "a.gif")
    with Image.open(io.BytesIO((await ann.fetch(file["file_id"])).content)) as picture:
        assert getattr(picture, "n_frames", 1) == 12


# --- limits -----------------------------------------------------------------------------------------------------


@pytest.mark.settings(max_upload_bytes=100_000)
async def test_a_file_above_the_limit_is_stopped_as_it_streams(client: httpx.AsyncClient, settings: Settings) -> None:
    [ann] = await people(client, 1)
    assert (await ann.upload(b"x" * 100_000))["size"] == 100_000
    before = on_disk(settings)
    for size in (100_001, 120_000, 5_000_000):
        answer = await ann.try_upload(b"x" * size)
        assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")
    assert on_disk(settings) == before


async def test_uploading_needs_a_token(client: httpx.AsyncClient, settings: Settings) -> None:
    answer = await client.post("/api/v1/messages/upload", files={"file": ("a", b"x")})
    assert (answer.status_code, on_disk(settings)) == (401, [])


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


async def test_what_a_browser_keeps_of_a_file_is_asked_for_again_by_whoever_wants_it(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group(bo)
    file = await ann.upload(image(size=(900, 500)), "a.png")
    await ann.send_files(group, "image", file)
    for suffix in ("", "/thumbnail"):
        kept = await bo.fetch(file["file_id"], suffix)
        again = await bo.fetch(file["file_id"], suffix, **{"If-None-Match": kept.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for answer in (kept, again):
            assert answer.headers["cache-control"] == "private, no-cache"
            assert answer.headers["vary"] == "Authorization"
    await ann.remove(group, bo)
    for header in ({"If-None-Match": "*"}, {"If-Match": "*"}, {"If-Match": '"x"'}):
        answer = await bo.fetch(file["file_id"], **header)
        assert (answer.status_code, answer.headers["cache-control"]) == (404, "no-store")


async def test_a_condition_that_does_not_hold_is_told_before_a_range_is_looked_at(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    file_id = (await ann.upload(b"0123456789"))["file_id"]
    etag = (await ann.fetch(file_id)).headers["etag"]
    for good in (etag, "*", f'"x", {etag}', f'"a,b",{etag}'):
        assert (await ann.fetch(file_id, **{"If-Match": good})).status_code == 200, good
        assert (await ann.fetch(file_id, Range="bytes=2-3", **{"If-Match": good})).content == b"23", good
    for bad in ('"x"', f"W/{etag}", etag.strip('"'), "", '"x", "y"'):
        for rest in ({}, {"Range": "bytes=0-1"}, {"Range": "bytes=99-"}, {"If-None-Match": etag}):
            answer = await ann.fetch(file_id, **{"If-Match": bad, **rest})
            assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed"), (bad, rest)
            assert answer.headers["content-type"] == "application/problem+json"
    both = {"If-Match": etag, "If-None-Match": f'W/"x", W/{etag}'}
    assert (await ann.fetch(file_id, Range="bytes=99-", **both)).status_code == 304


@pytest.mark.parametrize("door", ["tuned", "plain"])
async def test_head_answers_as_get_does_but_without_a_body(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        [ann] = await people(client, 1)
        file = await ann.upload(image(size=(900, 500)), "a.png")
        picture = (await ann.try_upload(image(), "a.png", "image/png", "/users/me/avatar")).json()["avatar_url"]
        path = f"/api/v1/files/{file['file_id']}"
        etag = (await ann.fetch(file["file_id"])).headers["etag"]
        for address, headers, status in [
            (path, {}, 200),
            (f"{path}/thumbnail", {}, 200),
            (picture, {}, 200),
            (f"{picture}?size=small", {}, 200),
            (path, {"If-None-Match": etag}, 304),
            (path, {"If-Match": '"x"'}, 412),
            ("/api/v1/files/999999", {}, 404),
            (f"{picture[:-4]}0000", {}, 404),
            (f"{picture}?size=x", {}, 422),
        ]:
            got = await client.get(address, headers={**ann.account.headers, **headers})
            head, body = await exchange(server, "HEAD", address, {**ann.account.headers, **headers})
            assert (got.status_code, head[""], body) == (status, str(status), b""), address
            for changing in ("date", "x-request-id", "connection"):
                assert head.pop(changing, "") or changing != "date"
                got.headers.pop(changing, "")
            del head[""]
            assert head == dict(got.headers), address
        head, body = await exchange(server, "HEAD", path, {**ann.account.headers, "Range": "bytes=0-1"})
        assert (head[""], head["content-length"], body) == ("200", str(file["size"]), b"")  # only a GET has ranges


async def exchange(server: Server, method: str, path: str, headers: dict[str, str]) -> tuple[dict[str, str], bytes]:
    """All that a server sends back until it hangs up: the headers, their status under "", and the rest."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    first, *fields = head.decode().split("\r\n")
    found = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
    return {"": first.split()[1], **found}, body


async def test_a_head_of_a_file_whose_bytes_are_gone_does_not_promise_them(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(b"data")
    for path in on_disk(settings):
        path.unlink()
    for method in ("GET", "HEAD"):
        answer = await client.request(method, f"/api/v1/files/{file['file_id']}", headers=ann.account.headers)
        assert answer.status_code == 404


def test_a_range_of_an_empty_file_is_empty() -> None:
    assert byte_range("bytes=0-", 0) == (0, 0)
    assert byte_range("bytes=-5", 0) == (0, 0)


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
    later(services, hours=25)
    await services.files.collect()
    assert [await status(ann, file) for file in files] == [200, 200, 404, 404]
    assert len(on_disk(settings)) == 4


async def test_a_file_that_cannot_be_deleted_keeps_no_other_from_going_and_is_tried_again(
    client: httpx.AsyncClient, services: Services, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    [ann] = await people(client, 1)
    for number in range(3):
        await ann.upload(bytes([number]) * 100)
    stuck = on_disk(settings)
    for path in stuck[:2]:  # what is a folder is not unlinked
        path.unlink()
        path.mkdir()
    later(services, hours=25)
    assert not await services.files.collect()
    assert on_disk(settings) == []
    [line] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (line.message, vars(line)["files"], vars(line)["error"]) == ("files_not_deleted", 2, "Is a directory")
    assert await stored(services, File.id) == 2
    for path in stuck[:2]:
        path.rmdir()
    await services.files.collect()  # not yet
    assert await stored(services, File.id) == 2
    later(services, hours=25.2)
    await services.files.collect()
    assert await stored(services, File.id) == 0


async def test_files_of_a_chat_that_everybody_left_are_collected_unless_another_chat_holds_them(
    client: httpx.AsyncClient, services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_service, "COLLECT_PAGE", 2)
    ann, bo = await people(client, 2)
    group, personal = await ann.group(bo), await ann.personal(bo)
    assert (await ann.try_upload(image(), "a.png", path=f"/chats/{group}/avatar")).is_success
    files = [await ann.upload(bytes([number]) * 100) for number in range(5)]
    for file in files[:4]:
        await ann.send_files(group, "file", file)
    await ann.send_files(group, "file", files[0])
    kept = await bo.upload(b"of bo")
    await bo.send_files(group, "file", kept)
    await bo.send_files(personal, "file", kept)
    await ann.send_files(personal, "file", files[4])
    await bo.leave(group)
    while await services.files.collect():
        pass
    assert await stored(services, Attachment.seq) == 8  # somebody is in it still
    await ann.leave(group)
    for left in (6, 4, 2):  # a page at a time
        assert await services.files.collect()
        assert await stored(services, Attachment.seq) == left
    while await services.files.collect():
        pass
    assert [await status(ann, file) for file in files] == [404, 404, 404, 404, 200]
    assert [await status(one, kept) for one in (ann, bo)] == [200, 200]
    assert (await stored(services, Attachment.seq), await stored(services, EmptyChat.chat_id)) == (2, 0)
    assert len(on_disk(settings)) == 2  # the group's picture has gone, too


async def test_a_file_sent_to_another_chat_as_its_own_is_left_is_there_or_was_refused(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    personal = await ann.personal(bo)
    for _ in range(10):
        group, file = await ann.group(), await ann.upload(b"data")
        await ann.send_files(group, "file", file)
        body = {"message_type": "file", "attachments": [file["file_id"]]}
        send = ann.request("POST", f"/chats/{personal}/messages", body)
        collect = services.files.collect
        _, _, answer, _, _ = await asyncio.gather(ann.leave(group), collect(), send, collect(), collect())
        while await collect():
            pass
        assert (answer.status_code, await status(bo, file)) in ((201, 200), (404, 404))
    assert await stored(services, EmptyChat.chat_id) == 0


# --- deleting ---------------------------------------------------------------------------------------------------


@pytest.mark.settings(max_stored_bytes_per_user=1000)
async def test_deleting_a_file_that_no_message_holds_makes_room_at_once(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    [ann] = await people(client, 1)
    for size in (900, 1000):
        file = await ann.upload(b"x" * size)
        assert (await ann.try_upload(b"x" * 200)).json()["code"] == "quota_exceeded"
        assert (await ann.delete_file(file)).status_code == 204
        assert await status(ann, file) == 404
        assert (await ann.delete_file(file)).status_code == 404
    await ann.upload(b"x" * 200)
    await services.files.collect()
    assert (len(on_disk(settings)), await stored(services, File.id)) == (1, 1)


async def test_a_file_is_deleted_only_when_no_message_holds_it_any_more_wherever_it_stands(
    client: httpx.AsyncClient,
) -> None:
    ann, bo, cy = await people(client, 3)
    group = await bo.group(ann, cy)
    file = await ann.upload(b"data")
    first, second = [await ann.send_files(group, "file", file) for _ in range(2)]
    await ann.delete(first)
    await bo.remove(group, ann)  # she cannot delete the other any more, and it stands
    refused = await ann.delete_file(file)
    assert (refused.status_code, refused.json()["code"]) == (409, "file_in_use")
    foreign, missing = await cy.delete_file(file), await cy.delete_file({"file_id": 999_999})
    assert (foreign.status_code, foreign.content) == (missing.status_code, missing.content)
    assert await status(cy, file) == 200
    await bo.delete(second)
    assert (await ann.delete_file(file)).status_code == 204
    assert await status(ann, file) == 404


async def test_a_picture_of_a_person_is_no_file_to_delete(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    url = (await ann.try_upload(image(), "a.png", path="/users/me/avatar")).json()["avatar_url"]
    file_id = int(url.rpartition("/")[2].partition("-")[0])
    assert (await ann.delete_file({"file_id": file_id})).status_code == 404
    assert (await client.get(url)).status_code == 200


async def test_of_a_deletion_and_a_send_at_the_same_moment_one_is_refused(
    client: httpx.AsyncClient, services: Services
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    for _ in range(10):
        file = await ann.upload(b"data")
        body = {"message_type": "file", "attachments": [file["file_id"]]}
        send = ann.request("POST", f"/chats/{chat_id}/messages", body)
        deleted, sent, _ = await asyncio.gather(ann.delete_file(file), send, services.files.collect())
        assert (deleted.status_code, sent.status_code, await status(bo, file)) in ((204, 404, 404), (409, 201, 200))


# --- storage in trouble -----------------------------------------------------------------------------------------


async def test_what_the_disk_cannot_read_is_told_as_such_and_may_be_asked_for_again(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(image(), "a.png", "image/png")
    url = (await ann.try_upload(image(), "a.png", path="/users/me/avatar")).json()["avatar_url"]
    for path in on_disk(settings):
        path.unlink()
        path.mkdir()
    answers = [await ann.fetch(file["file_id"]), await ann.fetch(file["file_id"], "/thumbnail"), await client.get(url)]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert answer.headers["retry-after"] == "30"


@pytest.mark.settings(max_uploads_at_once=3)
async def test_of_many_uploads_that_begin_at_the_same_moment_no_more_are_let_in(services: Services) -> None:
    async def begin(stack: contextlib.AsyncExitStack) -> bool:
        try:
            await stack.enter_async_context(await services.files.receive(1))
        except TooManyRequests:
            return False
        return True

    for _ in range(2):  # the second time: what has ended counts no more
        async with contextlib.AsyncExitStack() as stack:
            assert sum(await asyncio.gather(*(begin(stack) for _ in range(10)))) == 3


class _Later:
    """The services' clock, some hours on."""

    def __init__(self, services: Services, hours: float) -> None:
        self._clock = services.clock
        self._step = timedelta(hours=hours)

    def now(self) -> object:
        """The time then."""
        return self._clock.now() + self._step


def later(services: Services, hours: float) -> None:
    """Let so much time pass for the collector."""
    services.files._clock = _Later(services, hours)  # type: ignore[assignment]


async def stored(services: Services, column: InstrumentedAttribute[int]) -> int:
    """How many rows a table has."""
    async with services.database.reading() as session:
        return int((await session.execute(select(func.count(column)))).scalar_one())


async def status(person: Person, file: Json) -> int:
    """What asking for a file answers."""
    return (await person.fetch(file["file_id"])).status_code
