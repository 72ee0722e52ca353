"""Bad input to every route of the OpenAPI document: a precise problem, never a 5xx, never a traceback in the log.

`ROUTES` says how each route is used well; what is bad follows from the document. A route without an entry fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.support.accounts import new_person
from tests.support.databases import SECRET_KEY
from tests.support.images import image
from tests.support.people import Person, people
from tests.support.secrets import plant
from tests.support.tokens import forgeries

pytestmark = pytest.mark.timeout(300)

Json = dict[str, Any]
API = "/api/v1"
IDS = {"chat_id", "message_id", "user_id", "session_id", "file_id"}
MISSING = 999_999
UPLOAD = b"".join(
    (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n', image(size=(8, 8)), b"\r\n--b--\r\n")
)


# --- what good requests look like -------------------------------------------------------------------------------


@dataclass
class Scene:
    """People in all relations to a group of `owner`, to whom `message` and `session` belong."""

    caller: Person
    owner: Person
    member: Person
    other_member: Person
    ex_member: Person
    stranger: Person
    bystander: Person
    chat: int
    message: int
    other_chat: int
    other_message: int
    file: int
    unsent_file: int
    other_file: int

    def id(self, name: str) -> int:
        """A good value of a path parameter."""
        return {
            "chat_id": self.chat,
            "message_id": self.message,
            "user_id": self.bystander.id,
            "session_id": 0,
            "file_id": self.file,
        }[name]


async def set_scene(client: httpx.AsyncClient) -> Scene:
    owner, member, other_member, ex_member, stranger, bystander = await people(client, 6)
    chat = await owner.group(member, other_member, ex_member)
    message = await owner.say(chat, "of the owner")
    file, other_file = await owner.upload(image(), "a.png"), await bystander.upload(b"of others")
    unsent_file = await owner.upload(b"of the owner")
    await owner.send_files(chat, "image", file)
    await owner.remove(chat, ex_member)
    other_chat = await bystander.group()
    other = await bystander.say(other_chat, "of others")
    return Scene(
        owner,
        owner,
        member,
        other_member,
        ex_member,
        stranger,
        bystander,
        chat,
        message["id"],
        other_chat,
        other["id"],
        file["file_id"],
        unsent_file["file_id"],
        other_file["file_id"],
    )


@dataclass
class Route:
    """How a route is used well: its body or form, and what of the path is not what `Scene.id` says."""

    body: Callable[[Scene], Json] | None = None
    form: Callable[[Scene], Json] | None = None
    upload: bool = False
    query: Callable[[Scene], Json] = lambda _scene: {}
    ids: Callable[[Scene], Json] = lambda _scene: {}
    may: str = "ok ok ok ok"
    """What comes of it for an owner, member, ex-member and stranger."""


def login(scene: Scene) -> Json:
    return {"username": scene.caller.account.phone, "password": scene.caller.account.password}


def new_password(scene: Scene) -> Json:
    changed = scene.caller.account.password + "+"
    plant(changed)
    return {"old_password": scene.caller.account.password, "new_password": changed}


ROUTES: dict[str, Route] = {
    "GET /health/live": Route(),
    "GET /health/ready": Route(),
    f"POST {API}/auth/register": Route(
        body=lambda _scene: {**new_person(), "display_name": "A", "device_name": "B", "platform": "C"}
    ),
    f"POST {API}/auth/token": Route(form=login),
    f"POST {API}/auth/refresh": Route(body=lambda scene: {"refresh_token": scene.caller.account.refresh_token}),
    f"POST {API}/auth/logout": Route(),
    f"POST {API}/auth/ws-ticket": Route(),
    f"GET {API}/auth/sessions": Route(),
    f"DELETE {API}/auth/sessions": Route(),
    f"DELETE {API}/auth/sessions/{{session_id}}": Route(),
    f"POST {API}/auth/password": Route(body=new_password),
    f"GET {API}/users/me": Route(),
    f"PATCH {API}/users/me": Route(body=lambda _scene: {"display_name": "A", "bio": "B"}),
    f"POST {API}/users/me/avatar": Route(upload=True),
    f"DELETE {API}/users/me/avatar": Route(),
    f"GET {API}/users/me/settings": Route(),
    f"PATCH {API}/users/me/settings": Route(body=lambda _scene: {"notify_personal": False, "notify_groups": True}),
    f"GET {API}/users/search": Route(query=lambda _scene: {"q": "person"}),
    f"GET {API}/users/username-available": Route(query=lambda _scene: {"username": "somebody_new"}),
    f"GET {API}/users/blocked": Route(),
    f"GET {API}/users/{{user_id}}": Route(),
    f"POST {API}/users/block/{{user_id}}": Route(),
    f"DELETE {API}/users/block/{{user_id}}": Route(),
    f"PUT {API}/push/device": Route(body=lambda _scene: {"kind": "token", "token": "a-device"}),
    f"DELETE {API}/push/device": Route(),
    f"GET {API}/chats": Route(),
    f"POST {API}/chats/personal": Route(body=lambda scene: {"user_id": scene.bystander.id}),
    f"POST {API}/chats/saved": Route(),
    f"POST {API}/chats/group": Route(
        body=lambda scene: {
            "title": "A",
            "description": "B",
            "member_ids": [scene.bystander.id],
            "history_visible": True,
        }
    ),
    f"GET {API}/chats/{{chat_id}}": Route(may="ok ok 404 404"),
    f"PATCH {API}/chats/{{chat_id}}": Route(
        body=lambda _scene: {"title": "A", "description": "B", "history_visible": True}, may="ok 403 404 404"
    ),
    f"POST {API}/chats/{{chat_id}}/avatar": Route(upload=True, may="ok 403 404 404"),
    f"DELETE {API}/chats/{{chat_id}}/avatar": Route(may="ok 403 404 404"),
    f"PATCH {API}/chats/{{chat_id}}/settings": Route(
        body=lambda _scene: {
            "muted_until": "9999-12-31T23:59:59.000Z",
            "pinned": True,
            "archived": True,
            "marked_unread": True,
        },
        may="ok ok 404 404",
    ),
    f"PUT {API}/chats/{{chat_id}}/draft": Route(
        body=lambda scene: {"content": "A", "reply_to": scene.message}, may="ok ok 404 404"
    ),
    f"DELETE {API}/chats/{{chat_id}}/draft": Route(may="ok ok 404 404"),
    f"GET {API}/chats/{{chat_id}}/members": Route(may="ok ok 404 404"),
    f"POST {API}/chats/{{chat_id}}/members": Route(
        body=lambda scene: {"user_ids": [scene.bystander.id]}, may="ok 403 404 404"
    ),
    f"DELETE {API}/chats/{{chat_id}}/members/{{user_id}}": Route(
        ids=lambda scene: {"user_id": scene.other_member.id}, may="ok 403 404 404"
    ),
    f"PUT {API}/chats/{{chat_id}}/members/{{user_id}}/role": Route(
        body=lambda _scene: {"role": "admin"},
        ids=lambda scene: {"user_id": scene.other_member.id},
        may="ok 403 404 404",
    ),
    f"POST {API}/chats/{{chat_id}}/leave": Route(may="409 ok 404 404"),
    f"POST {API}/chats/{{chat_id}}/messages": Route(
        body=lambda scene: {
            "content": "A",
            "message_type": "text",
            "client_id": "4fa0e1d4-0f0f-4d1e-9a5e-0c6bdb3c9a51",
            "attachments": [],
            "reply_to": scene.message,
        },
        may="ok ok 404 404",
    ),
    f"GET {API}/chats/{{chat_id}}/messages/{{message_id}}": Route(may="ok ok 404 404"),
    f"PATCH {API}/chats/{{chat_id}}/messages/{{message_id}}": Route(
        body=lambda _scene: {"content": "A"}, may="ok 403 404 404"
    ),
    f"DELETE {API}/chats/{{chat_id}}/messages/{{message_id}}": Route(may="ok 403 404 404"),
    f"POST {API}/chats/{{chat_id}}/messages/{{message_id}}/read": Route(may="ok ok 404 404"),
    f"POST {API}/chats/{{chat_id}}/messages/{{message_id}}/delivered": Route(may="ok ok 404 404"),
    f"GET {API}/chats/{{chat_id}}/messages/{{message_id}}/readers": Route(may="ok ok 404 404"),
    f"GET {API}/messages/history/{{chat_id}}": Route(may="ok ok 404 404"),
    f"GET {API}/messages/{{message_id}}/trace": Route(may="ok 404 404 404"),
    f"POST {API}/messages/upload": Route(upload=True),
    f"GET {API}/files/{{file_id}}": Route(may="ok ok 404 404"),
    f"DELETE {API}/files/{{file_id}}": Route(ids=lambda scene: {"file_id": scene.unsent_file}, may="ok 404 404 404"),
    f"GET {API}/files/{{file_id}}/thumbnail": Route(may="ok ok 404 404"),
    f"POST {API}/messages/resume": Route(
        body=lambda scene: {"epoch": "x", "account_version": 0, "chats": {str(scene.chat): 0}}
    ),
}


class Call:
    """A good request of a route, to be spoilt in one place."""

    def __init__(self, client: httpx.AsyncClient, key: str, scene: Scene, **ids: int) -> None:
        self.client = client
        self.key = key
        self.method, self.template = key.split(" ")
        route = ROUTES[key]
        self.body = route.body(scene) if route.body else None
        self.form = route.form(scene) if route.form else None
        self.upload = route.upload
        self.query = route.query(scene)
        self.ids = {name: scene.id(name) for name in re.findall(r"{(\w+)}", self.template)}
        self.ids |= route.ids(scene) | ids
        self.headers = dict(scene.caller.account.headers)

    async def send(self, **changes: Any) -> httpx.Response:
        """Send it; `path`, `query`, `content`, `headers` replace what is good, `type` the content type."""
        path = changes.get("path", self.template.format(**self.ids))
        query = changes.get("query", str(httpx.QueryParams(self.query)))
        headers = changes.get("headers", self.headers)
        content, kind = b"", ""
        if self.form is not None:
            content, kind = str(httpx.QueryParams(self.form)).encode(), "application/x-www-form-urlencoded"
        elif self.upload:
            content, kind = UPLOAD, "multipart/form-data; boundary=b"
        elif self.body is not None:
            content, kind = json.dumps(self.body).encode(), "application/json"
        content, kind = changes.get("content", content), changes.get("type", kind)
        if kind:
            headers = {**headers, "Content-Type": kind}
        # As raw bytes: httpx would mend what is wrong with a path.
        url = httpx.URL("http://test").copy_with(raw_path=path.encode() + (b"?" + query.encode() if query else b""))
        return await self.client.request(self.method, url, content=content, headers=headers)


def assert_refused(answer: httpx.Response, *what: Any, codes: tuple[str, ...] = ()) -> None:
    """A problem below 500, with its code, and exactly what a problem has."""
    told = (*[str(item)[:300] for item in what], answer.status_code, answer.text[:1000])
    assert 400 <= answer.status_code < 500, told
    assert answer.headers["content-type"] == "application/problem+json", told
    problem = answer.json()
    assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "code"}, told
    assert problem["status"] == answer.status_code, told
    assert re.fullmatch("[a-z_]+", problem["code"]), told
    assert len(answer.content) < 20_000, told
    if codes:
        assert problem["code"] in codes, told


@pytest.fixture
def operations(app: FastAPI) -> dict[str, Json]:
    """The operations of the OpenAPI document by method and path; test_avatars.py has those that are anybody's."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
        if not path.startswith(f"{API}/avatars/")
    }


def resolved(app: FastAPI, schema: Json) -> Json:
    """A schema without its reference."""
    while "$ref" in schema:
        schema = app.openapi()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def body_fields(app: FastAPI, operation: Json) -> tuple[dict[str, Json], set[str]]:
    """The fields of a body with their schemas, and the names of those that it needs."""
    [content] = operation["requestBody"]["content"].values()
    schema = resolved(app, content["schema"])
    return schema["properties"], set(schema.get("required", ()))


def kinds(schema: Json) -> dict[str, Json]:
    """JSON types that a schema takes, each with the part that does."""
    parts = schema.get("anyOf", [schema])
    return {part.get("type", "string"): part for part in parts}


VALUES: dict[str, tuple[Any, ...]] = {
    "null": (None,),
    "boolean": (True, False),
    "integer": (7,),
    "number": (1.5,),
    "string": ("x", "", "7"),
    "array": ([], [None], [[]]),
    "object": ({}, {"a": 1}),
}
HUGE = ("9007199254740992", "9223372036854775808", "-9223372036854775809", "1" + "0" * 400, "-1", "1e400", "1.5")
CANNOT_BE = ("NaN", "Infinity", "-Infinity", r'"\ud83d"', r'"a\ude00b"', "[" * 100_000 + "]" * 100_000)


def spoilt_values(schema: Json) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Values that a field refuses, as JSON, with the codes of the refusal."""
    accepted = kinds(schema)
    semantic = ("invalid_request", "weak_password", "invalid_phone", "username_reserved", "message_empty")
    for kind, values in VALUES.items():
        if kind not in accepted:
            for value in values:
                yield json.dumps(value), ("invalid_request",)
    for text in CANNOT_BE:
        yield text, ("invalid_json",)
    if "integer" in accepted:
        for number in HUGE:
            yield number, ("invalid_request", "invalid_json")
    if "string" in accepted:
        if schema.get("title") != "Epoch":  # which is compared and forgotten
            yield r'"a\u0000b"', semantic
        yield json.dumps("x" * 20_000), (*semantic, "message_too_long", "invalid_refresh_token")
    if "array" in accepted:
        for item in ('"x"', "null", "0", *HUGE):
            yield f"[{item}]", ("invalid_request", "invalid_json")
        yield json.dumps([1] * 20_000), ("invalid_request",)
    if "object" in accepted:
        for key in ("x", "0", "01", "-1", "1.5", "9" * 16, "9" * 17, "\u0000", ""):
            yield json.dumps({key: 0}), ("invalid_request",)
        for item in ('"x"', "null", "true", *HUGE):
            yield f'{{"1": {item}}}', ("invalid_request", "invalid_json")


# --- bodies -----------------------------------------------------------------------------------------------------


async def test_every_route_is_used_well_here(
    client: httpx.AsyncClient, app: FastAPI, operations: dict[str, Json]
) -> None:
    assert set(ROUTES) == set(operations)
    for key, operation in operations.items():
        call = Call(client, key, await set_scene(client))
        if "session_id" in call.ids:
            call.ids["session_id"] = (await client.get(f"{API}/auth/sessions", headers=call.headers)).json()[0]["id"]
        answer = await call.send()
        assert answer.is_success or ROUTES[key].may.startswith("409"), (key, answer.text)
        sent = call.form if call.form is not None else {"file": ""} if call.upload else call.body
        if "requestBody" in operation:
            _, required = body_fields(app, operation)
            assert sent is not None, key
            assert required <= set(sent), key
        else:
            assert sent is None, key


async def test_bad_bodies(client: httpx.AsyncClient, app: FastAPI, operations: dict[str, Json]) -> None:
    scene = await set_scene(client)
    for key, operation in operations.items():
        call = Call(client, key, scene)
        if call.body is None:
            continue
        good = json.dumps(call.body)
        whole: list[tuple[str | bytes, tuple[str, ...]]] = [
            ("", ("invalid_request",)),
            ("null", ("invalid_request",)),
            ("[]", ("invalid_request",)),
            (f"[{good}]", ("invalid_request",)),
            ('"text"', ("invalid_request",)),
            ("5", ("invalid_request",)),
            (json.dumps({**call.body, "unknown": 1}), ("invalid_request",)),
            (json.dumps({**call.body, "\u202e" * 3000: 1}), ("invalid_request",)),
            (json.dumps({**call.body, "unknown": None}), ("invalid_request",)),
            (good[:-1], ("invalid_json",)),
            (good[:-1] + ",}", ("invalid_json",)),
            (good + good, ("invalid_json",)),
            (good.replace('"', "'"), ("invalid_json",)),
            ("{" + good, ("invalid_json",)),
            ("[" * 100_000, ("invalid_json",)),
            ("[" * 100_000 + "]" * 100_000, ("invalid_json",)),
            ('{"a":' * 100_000 + "1" + "}" * 100_000, ("invalid_json",)),
            (b"\xff\xfe" + good.encode("utf-16-le"), ("invalid_json",)),
            (b"\xef\xbb\xbf" + good.encode(), ("invalid_json",)),
            (good.encode()[:-1] + b', "\xff": 1}', ("invalid_json",)),
            (good.encode()[:-1] + b', "x": "\xed\xa0\x80"}', ("invalid_json",)),
            (good[:-1] + ', "x": "\x01"}', ("invalid_json",)),
            (good[:-1] + r', "\ud800": 1}', ("invalid_json",)),
            (good[:-1] + " " * 2**20 + "}", ("body_too_large",)),
        ]
        for content, codes in whole:
            assert_refused(await call.send(content=content), key, content[:200], codes=codes)
        fields, required = body_fields(app, operation)
        for name, field in fields.items():
            for value, codes in spoilt_values(field):
                rest = {other: item for other, item in call.body.items() if other != name}
                spoilt = f'{json.dumps(rest)[:-1]}{", " if rest else ""}"{name}": {value}}}'
                answer = await call.send(content=spoilt)
                assert_refused(answer, key, name, value, codes=codes)
                # Of two keys the last one counts, whichever parser reads it.
                if len(value) < 1000:
                    doubled = f'{good[:-1]}, "{name}": {value}}}'
                    assert_refused(await call.send(content=doubled), key, name, value, codes=codes)
            if name in required:
                rest = {other: item for other, item in call.body.items() if other != name}
                assert_refused(await call.send(content=json.dumps(rest)), key, name, codes=("invalid_request",))
        for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "nonsense", "image/png"):
            assert_refused(await call.send(type=kind), key, kind, codes=("unsupported_media_type",))
            assert_refused(await call.send(type=kind, content=""), key, kind, codes=("invalid_request",))
        # After all this nothing has happened, and the good request still works.
        assert (await call.send()).is_success or ROUTES[key].may.startswith("409"), key
        scene = scene if key.startswith("GET") else await set_scene(client)


async def test_bad_forms(client: httpx.AsyncClient, app: FastAPI, operations: dict[str, Json]) -> None:
    scene = await set_scene(client)
    for key, operation in operations.items():
        call = Call(client, key, scene)
        if call.form is None:
            continue
        fields, required = body_fields(app, operation)
        for name in fields:
            rest = str(httpx.QueryParams({other: item for other, item in call.form.items() if other != name}))
            for value in ("%00", "a%00b", "x" * 20_000, "%ff", "%ED%A0%80", "%F0%9F", "%", "%zz"):
                answer = await call.send(content=f"{rest}&{name}={value}")
                if name in ("device_name", "platform") and len(value) < 100:
                    assert answer.status_code < 500, (key, name, value)  # any text will do for them
                else:
                    assert_refused(answer, key, name, value)
            if name in required:
                assert_refused(await call.send(content=rest), key, name, codes=("invalid_request",))
        for content in ("", "&", "=", "a" * 9000, "&".join(["a=b"] * 9000), json.dumps(call.form)):
            assert_refused(await call.send(content=content), key, content[:50])
        good = str(httpx.QueryParams(call.form))
        assert_refused(await call.send(content=good + "&x=" + "a" * 2**20), key, codes=("body_too_large",))
        for kind in ("application/json", "text/plain", "nonsense"):
            assert_refused(await call.send(type=kind), key, kind, codes=("unsupported_media_type",))
            assert_refused(await call.send(type=kind, content=""), key, kind, codes=("invalid_request",))
        for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
            assert_refused(await call.send(type=kind), key, kind, codes=("invalid_request", "bad_request"))
        assert (await call.send(content=good + "&unknown=1")).status_code == 200, "RFC 6749 has them ignored"


async def test_a_body_where_none_is_asked_for_changes_nothing(
    client: httpx.AsyncClient, operations: dict[str, Json]
) -> None:
    scene = await set_scene(client)
    for key in operations:
        call = Call(client, key, scene)
        if (
            call.body is None
            and call.form is None
            and not call.upload
            and not key.endswith(("/logout", "DELETE /sessions"))
        ):
            if "session_id" in call.ids:
                continue  # it has none to end but its own
            status = None
            for content in (b"{", b"\xff", b"[" * 100_000, b'"' + b"x" * (2**20 + 1) + b'"'):
                answer = await call.send(content=content, type="application/json")
                assert answer.status_code < 500, (key, content[:20], answer.text)
                status = status or answer.status_code
            if not key.startswith("GET"):
                scene = await set_scene(client)


# --- URLs -------------------------------------------------------------------------------------------------------

BAD_TEXT = ("%00", "a%00b", "%ff", "%ED%A0%80", "%F0%9F", "%", "%zz", "%0d%0aX: y", "x" * 5000, "%F3%A0%81%81" * 900)
BAD_NUMBERS = (
    *(
        "",
        "x",
        "-1",
        "1.5",
        "1e3",
        "0x1",
        "+1",
        "%201",
        "1%20",
        "1_0",
        "%D9%A3",
        "%EF%BC%91",
        "NaN",
        "Infinity",
        "true",
    ),
    *(
        "null",
        "[]",
        "1,2",
        "9007199254740992",
        "9223372036854775808",
        "18446744073709551616",
        "1" + "0" * 400,
        "9" * 5000,
    ),
    *BAD_TEXT,
)
MAY_MEAN_ONE = ("+1", "%201", "1%20", "1_0", "1.0")
"""Lenient readers take them for numbers: no error of the server's, whatever comes of them."""


async def test_bad_paths(client: httpx.AsyncClient, operations: dict[str, Json]) -> None:
    scene = await set_scene(client)
    for key, operation in operations.items():
        declared = {item["name"] for item in operation.get("parameters", ()) if item["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", key)), key
        assert declared <= IDS, "a new kind of id needs its own bad values, and foreign ones"
        call = Call(client, key, scene)
        for name in declared:
            for value in ("0", "../../etc/passwd", "%2e%2e%2f", "1%2f2", ";", *BAD_NUMBERS):
                path = call.template.replace(f"{{{name}}}", value).format(**call.ids)
                assert_refused(await call.send(path=path), key, name, value)
    call = Call(client, f"GET {API}/chats", scene)
    for path in ("/%00", "/api/v1/%ff", "/%ED%A0%80", "/" + "x" * 9000, "//", "/api/v1/chats/", "/api/v1/users/me/"):
        assert_refused(await call.send(path=path), path)
    assert (await call.send()).status_code == 200


async def test_bad_queries(client: httpx.AsyncClient, operations: dict[str, Json]) -> None:
    scene = await set_scene(client)
    for key, operation in operations.items():
        for parameter in operation.get("parameters", ()):
            if parameter["in"] != "query":
                assert parameter["in"] in ("path", "header"), (key, parameter)
                continue
            call, name, schema = Call(client, key, scene), parameter["name"], parameter["schema"]
            rest = str(httpx.QueryParams({other: item for other, item in call.query.items() if other != name}))
            if parameter.get("required"):
                assert_refused(await call.send(query=rest), key, name, codes=("invalid_request",))
            if {"integer", "boolean"} & set(kinds(schema)):
                for value in BAD_NUMBERS:
                    answer = await call.send(query=f"{rest}&{name}={value}")
                    if value in MAY_MEAN_ONE or ("boolean" in kinds(schema) and value == "true"):
                        assert answer.status_code < 500, (key, name, value)
                    else:
                        assert_refused(answer, key, name, value, codes=("invalid_request",))
                if maximum := next((part["maximum"] for part in kinds(schema).values() if "maximum" in part), None):
                    answer = await call.send(query=f"{rest}&{name}={maximum + 1}")
                    assert_refused(answer, key, name, codes=("invalid_request",))
            else:
                for value in BAD_TEXT:
                    answer = await call.send(query=f"{rest}&{name}={value}")
                    if value not in ("%ff", "%ED%A0%80", "%F0%9F", "%", "%zz"):  # read as U+FFFD, or as they stand
                        assert_refused(answer, key, name, value)
                    assert answer.status_code < 500, (key, name, value)
        call = Call(client, key, scene)
        if key.startswith("GET") and not call.ids:
            good = str(httpx.QueryParams(call.query))
            for addition in ("unknown=1", "&&&", "=", "[]=1", "x" * 9000, good + "&" + good):
                assert (await call.send(query=f"{good}&{addition}")).status_code == 200, (key, addition[:50])


# --- who is calling ---------------------------------------------------------------------------------------------


async def test_no_route_believes_a_bad_token(client: httpx.AsyncClient, operations: dict[str, Json]) -> None:
    scene = await set_scene(client)
    [session] = (await client.get(f"{API}/auth/sessions", headers=scene.owner.account.headers)).json()
    forged = forgeries(scene.owner.id, session["id"], SECRET_KEY)
    for blank in ("a space behind", "a tab before"):  # no part of the credentials (RFC 9110 section 11.4)
        del forged[blank]
    secured = [key for key, operation in operations.items() if "security" in operation]
    assert len(secured) > 30
    answers = set()
    for number, key in enumerate(secured):
        call = Call(client, key, scene)
        tokens = {"none": None, "garbage": "garbage", "of a refresh": scene.owner.account.refresh_token}
        # Each kind of forgery at one of the routes; all of them at one route is a matter of the accounts' tests.
        tokens |= {name: token for place, (name, token) in enumerate(forged.items()) if place % len(secured) == number}
        assert len(tokens) > 3
        for name, token in tokens.items():
            headers = {} if token is None else {b"Authorization": f"Bearer {token}".encode()}
            answer = await call.send(headers=headers)
            assert_refused(answer, key, name, codes=("invalid_token",))
            assert answer.headers["www-authenticate"] == 'Bearer realm="dialect"'
            answers.add((answer.status_code, answer.content))
    assert len(answers) == 1
    assert (await Call(client, f"GET {API}/chats/{{chat_id}}", scene).send()).status_code == 200


ROLES = ("no token", "ended session", "stranger", "ex-member", "member", "owner")
"""From those who may least: what is refused changes nothing for the next."""


async def test_everybody_may_do_exactly_what_they_may(client: httpx.AsyncClient, operations: dict[str, Json]) -> None:
    for key, operation in operations.items():
        scene = await set_scene(client)
        public = "security" not in operation
        may = dict(zip(("owner", "member", "ex-member", "stranger"), ROUTES[key].may.split(), strict=True))
        may |= {"no token": "ok" if public else "401", "ended session": "ok" if public else "401"}
        [ended, nobody] = await people(client, 2)
        await ended.do("POST", "/auth/logout")
        callers = {
            "owner": scene.owner,
            "member": scene.member,
            "ex-member": scene.ex_member,
            "stranger": scene.stranger,
            "ended session": ended,
            "no token": nobody,
        }
        if key.endswith("/auth/refresh"):
            may["ended session"] = "401"  # its refresh token has ended with it
        for role in ROLES:
            scene.caller = callers[role]
            call = Call(client, key, scene)
            if "session_id" in call.ids and not may[role].isdecimal():
                rows = (await client.get(f"{API}/auth/sessions", headers=call.headers)).json()
                call.ids["session_id"] = rows[0]["id"]
            answer = await call.send(headers={} if role == "no token" else call.headers)
            got = "ok" if answer.is_success else str(answer.status_code)
            assert got == may[role], (key, role, answer.text)
            if not answer.is_success:
                assert_refused(answer, key, role)


# --- ids of others ----------------------------------------------------------------------------------------------


async def test_what_is_foreign_and_what_is_missing_look_the_same_to_the_byte(
    client: httpx.AsyncClient, operations: dict[str, Json]
) -> None:
    def seen(answer: httpx.Response) -> Any:
        headers = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
        return answer.status_code, headers, answer.content

    scene = await set_scene(client)
    await scene.stranger.block(scene.owner)
    [foreign_session] = (await client.get(f"{API}/auth/sessions", headers=scene.bystander.account.headers)).json()
    # Not the caller's, by the name of the parameter. Those who block are as good as missing.
    foreign = {
        "chat_id": [scene.other_chat],
        "message_id": [scene.other_message],
        "session_id": [foreign_session["id"]],
        "user_id": [scene.stranger.id],
        "file_id": [scene.other_file],
    }
    in_chats = {"user_id": [scene.ex_member.id, scene.stranger.id, scene.bystander.id]}
    compared = set()
    for key in operations:
        for name in Call(client, key, scene).ids:
            missing = await Call(client, key, scene, **{name: MISSING}).send()
            assert_refused(missing, key, name)
            assert missing.status_code == 404, (key, name, missing.text)
            if key.endswith("/users/block/{user_id}"):
                continue  # one may always block back: whoever exists is found here
            values = in_chats.get(name, foreign[name]) if "/chats/" in key else foreign[name]
            for value in values:
                answer = await Call(client, key, scene, **{name: value}).send()
                assert seen(answer) == seen(missing), (key, name, value)
            compared.add((key, name))
        # Both strange at once: a message, or a person, of the chat of others.
        call = Call(client, key, scene)
        if len(call.ids) == 2:
            [second] = set(call.ids) - {"chat_id"}
            ids = {"chat_id": scene.other_chat, second: foreign[second][0]}
            answer = await Call(client, key, scene, **ids).send()
            missing = await Call(client, key, scene, chat_id=MISSING, **{second: MISSING}).send()
            assert seen(answer) == seen(missing), key
    assert {name for _, name in compared} == IDS
    assert len(compared) >= 20

    # Ids in bodies.
    send, personal = f"/chats/{scene.chat}/messages", "/chats/personal"
    bodies: list[tuple[str, str, Callable[[int], Json], int]] = [
        ("POST", send, lambda value: {"content": "x", "reply_to": value}, scene.other_message),
        ("PUT", f"/chats/{scene.chat}/draft", lambda value: {"content": "x", "reply_to": value}, scene.other_message),
        ("POST", "/messages/resume", lambda value: {"chats": {str(value): 0}}, scene.other_chat),
        ("POST", "/messages/resume", lambda value: {"chats": {str(value): 10**6}}, scene.other_chat),
    ]
    for method, path, body, value in bodies:
        one = await scene.owner.request(method, path, body(value))
        other = await scene.owner.request(method, path, body(MISSING))
        same = one.content.replace(f'"chat_id":{value}'.encode(), f'"chat_id":{MISSING}'.encode())
        assert (one.status_code, same) == (other.status_code, other.content), (path, body(value))
    # Somebody who blocks the caller cannot be reached, which they are told; somebody missing is not found.
    assert await scene.owner.refused("POST", personal, {"user_id": scene.stranger.id}) in (
        (403, "peer_unavailable"),
        (404, "user_not_found"),
    )
    assert await scene.owner.refused("POST", personal, {"user_id": MISSING}) == (404, "user_not_found")
