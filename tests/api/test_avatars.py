"""Pictures of people and of groups."""

from __future__ import annotations

import io

import httpx
import pytest
from PIL import Image

from app.core.config import Settings
from app.services.container import Services
from tests.api.test_files import on_disk
from tests.support.images import image, photo_with_place
from tests.support.people import Json, Person, people


async def put(person: Person, data: bytes, path: str = "/users/me/avatar") -> Json:
    """Upload a picture; what is shown it."""
    answer = await person.try_upload(data, "a.png", "image/png", path)
    assert answer.status_code == 200, answer.text
    shown: Json = answer.json()
    return shown


async def test_a_picture_is_seen_in_two_sizes_by_all_who_see_the_person(client: httpx.AsyncClient) -> None:
    ann, bo, eve = await people(client, 3)
    chat_id = await ann.personal(bo)
    assert (await ann.do("GET", "/users/me"))["avatar_url"] is None
    before = (await ann.do("GET", "/users/me"))["profile_version"]
    me = await put(ann, photo_with_place(size=(1200, 700)))
    url = me["avatar_url"]
    assert me["profile_version"] == before + 1
    assert (await eve.do("GET", f"/users/{ann.id}"))["avatar_url"] == url
    [seen] = [user for user in (await bo.do("GET", "/chats"))["users"] if user["id"] == ann.id]
    assert seen["avatar_url"] == url
    for query, edge in (("", 640), ("?size=small", 160), ("?size=large", 640)):
        answer = await client.get(url + query)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        assert "immutable" in answer.headers["cache-control"]
        assert b"SECRETMAKER" not in answer.content
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.size == (edge, edge)
    await bo.block(ann)
    assert (await bo.do("GET", f"/users/{ann.id}"))["avatar_url"] is None
    [seen] = [user for user in (await bo.do("GET", "/chats"))["users"] if user["id"] == ann.id]
    assert (seen["avatar_url"], (await bo.do("GET", "/users/blocked"))["items"][0]["avatar_url"]) == (None, None)
    assert chat_id


async def test_another_picture_has_another_address_and_the_old_one_is_collected(
    client: httpx.AsyncClient, services: Services, settings: Settings
) -> None:
    [ann] = await people(client, 1)
    first = (await put(ann, image(colour=(1, 2, 3))))["avatar_url"]
    second = (await put(ann, image(colour=(4, 5, 6))))["avatar_url"]
    assert first != second
    await services.files.collect()
    assert [(await client.get(url)).status_code for url in (first, second)] == [404, 200]
    assert len(on_disk(settings)) == 2
    assert (await ann.do("DELETE", "/users/me/avatar"))["avatar_url"] is None
    await services.files.collect()
    assert (await client.get(second)).status_code == 404
    assert on_disk(settings) == []
    version = (await ann.do("GET", "/users/me"))["account_version"]
    assert (await ann.do("DELETE", "/users/me/avatar"))["avatar_url"] is None
    assert (await ann.do("GET", "/users/me"))["account_version"] == version  # nothing to tell of


async def test_a_group_shows_its_picture_and_tells_of_it(client: httpx.AsyncClient) -> None:
    ann, bo, eve = await people(client, 3)
    group, personal = await ann.group(bo), await ann.personal(bo)
    path = f"/chats/{group}/avatar"
    for person, where, expected in [
        (bo, path, (403, "not_allowed")),
        (eve, path, (404, "chat_not_found")),
        (ann, f"/chats/{personal}/avatar", (409, "not_a_group")),
    ]:
        answer = await person.try_upload(image(), "a.png", "image/png", where)
        assert (answer.status_code, answer.json()["code"]) == expected
        assert await person.refused("DELETE", where) == expected
    state = {"chats": {str(group): (await bo.chat(group))["version"]}}
    url = (await put(ann, image(), path))["avatar_url"]
    assert (await bo.chat(group))["avatar_url"] == url
    assert (await client.get(url)).status_code == 200
    told = [event for event in await bo.resume(**state) if event["type"] == "chat_changes"]
    assert [event["info"]["avatar_url"] for event in told if event.get("info")] == [url]
    last = (await bo.history(group))["items"][-1]
    assert last["service"]["action"] == "avatar_changed"
    await ann.do("DELETE", path)
    await ann.do("DELETE", path)
    assert (await bo.chat(group))["avatar_url"] is None


@pytest.mark.settings(max_avatar_bytes=10_000)
async def test_a_picture_has_a_limit_of_its_own(client: httpx.AsyncClient, settings: Settings) -> None:
    [ann] = await people(client, 1)
    answer = await ann.try_upload(b"x" * 10_001, "a.png", "image/png", "/users/me/avatar")
    assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")
    assert (await ann.upload(b"x" * 20_000))["size"] == 20_000


async def test_nothing_but_pictures_is_found_without_a_token(client: httpx.AsyncClient) -> None:
    [ann] = await people(client, 1)
    await put(ann, image())
    for name in ("1-" + "0" * 32, "1", "../../x", "1-" + "0" * 31 + "/", "x" * 40):
        assert (await client.get(f"/api/v1/avatars/{name}")).status_code in (404, 422)
    assert (await ann.fetch(1)).status_code == 404
