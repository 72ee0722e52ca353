"""What stands around every request: ids, logs, headers, limits, errors. Hostile input gets a precise 4xx."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pydantic
import pytest
import websockets
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import text
from websockets.asyncio.client import connect

from app.core.config import Settings
from app.core.errors import TooManyRequests
from app.core.logging import REDACTED, _clean_field, log_formatter, one_line, redact
from app.main import create_app
from app.services.container import Services
from tests.conftest import StartServer
from tests.support.accounts import new_person, register
from tests.support.people import people
from tests.support.secrets import check_log, plant
from tests.support.servers import ROOT, Door, Server

REGISTER = "/api/v1/auth/register"
TOKEN = "/api/v1/auth/token"
FORM = "application/x-www-form-urlencoded"
DOORS: list[Door] = ["tuned", "plain"]


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The response is a problem document of this kind, and nothing else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body.keys() - {"errors", "checks"} == {"type", "title", "status", "detail", "code"}
    return body


class Log:
    """What this process logs during a test, as its formatter writes it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.console: list[str] = []

    def events(self, name: str) -> list[dict[str, Any]]:
        """All events of this name."""
        return [event for line in self.lines if (event := json.loads(line))["event"] == name]


@pytest.fixture
def log() -> Iterator[Log]:
    """The log of this process."""
    log, json_format, console_format = Log(), log_formatter("json"), log_formatter("console")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.lines.append(json_format.format(record))
            log.console.append(console_format.format(record))

    handler = Handler()
    logging.getLogger().addHandler(handler)
    yield log
    logging.getLogger().removeHandler(handler)


@pytest.fixture
async def crash(app: FastAPI) -> Callable[[Callable[[], Any]], None]:
    """Makes `GET /crash` run something."""
    actions: list[Callable[[], Any]] = []

    async def route() -> None:
        result = actions[-1]()
        if asyncio.iscoroutine(result):
            await result

    app.add_api_route("/crash", route)
    return actions.append


# --- ids and the access log -------------------------------------------------------------------------------------


async def test_every_answer_carries_a_request_id_and_every_one_is_different(client: httpx.AsyncClient) -> None:
    ids = [(await client.get(path)).headers["x-request-id"] for path in ("/health/live", "/nowhere", "/docs")]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{16}", value) for value in ids)


async def test_a_sane_request_id_of_the_client_is_kept_and_logged(client: httpx.AsyncClient, log: Log) -> None:
    response = await client.get("/nowhere", headers={"X-Request-ID": "phone-7_Az"})
    assert response.headers["x-request-id"] == "phone-7_Az"
    [event] = log.events("request")
    assert event["request_id"] == "phone-7_Az"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "<script>", "a;b", "é"])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    response = await client.get("/health/live", headers=[(b"X-Request-ID", given.encode("latin-1"))])
    assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])


async def test_a_request_is_logged_once_with_status_and_duration_and_without_its_query(
    client: httpx.AsyncClient, log: Log
) -> None:
    await client.get("/api/v1/users/me?token=orchid-lantern-in-a-query")
    [event] = log.events("request")
    assert (event["method"], event["path"], event["status"]) == ("GET", "/api/v1/users/me", 401)
    assert event["duration_ms"] >= 0
    assert not any("orchid-lantern" in line for line in log.lines if '"app.' in line)


async def test_nobody_can_forge_a_line_of_the_log(client: httpx.AsyncClient, log: Log) -> None:
    await client.get("/x%0d%0a2026-01-01T00:00:00Z%20INFO%20forged%E2%80%A8line%1b[31m")
    index = next(i for i, line in enumerate(log.lines) if '"app.access"' in line)
    for line in (log.lines[index], log.console[index]):
        assert "forged" in line
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line)


async def test_health_checks_do_not_fill_the_log(client: httpx.AsyncClient, log: Log) -> None:
    await client.get("/health/live")
    await client.get("/health/ready")
    assert log.events("request") == []


# --- redaction --------------------------------------------------------------------------------------------------

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"
SECRET_SETTINGS = [
    name
    for name, field in Settings.model_fields.items()
    if field.annotation is SecretStr  # REDIS_URL is an address with a password in it
]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"GET /ws?token={JWT} HTTP/1.1", JWT),
        ("GET /ws?ticket=abc-DEF_123&x=1", "abc-DEF_123"),
        (f"Authorization: Bearer {JWT}", JWT),
        ("authorization: bearer opaque.value/here==", "opaque.value"),
        ('{"password": "SecurePass123!", "username": "ann"}', "SecurePass123!"),
        ("{'refresh_token': 'ro-ta-ted', 'x': 1}", "ro-ta-ted"),
        ('{"password": "with \\" quote"}', "quote"),
        ("Login(password='with quotes', x=1)", "with quotes"),
        ("password = SecurePass123!", "SecurePass123!"),
        ("username=%2B79991234567&password=SecurePass123!", "SecurePass123!"),
        ("username=%2B79991234567&password=SecurePass123!", "79991234567"),
        ("Duplicate entry '+79991234567' for key 'users.uq_users_phone'", "79991234567"),
        ("phone +7 (999) 123-45-67 called", "123-45"),
        (f"loose {JWT} somewhere", JWT),
        ("PasswordIn(old_password='SecurePass123!', new_password='Secure-Lantern-1')", "Secure"),
        ("{'new_password': 'SecurePass123!'}", "SecurePass123!"),
        ('{"newPassword": "SecurePass123!"}', "SecurePass123!"),
        ("password=b'SecurePass123!'", "SecurePass123!"),
        ("code=123456", "123456"),
        ("phone +7.999.123.45.67 called", "123.45"),
        ("phone +7\u00a0999\u2011123\u201145\u201167 called", "123\u201145"),
        *((f"Settings({name}='orchid-lantern')", "orchid-lantern") for name in SECRET_SETTINGS),
    ],
)
def test_secrets_are_taken_out_of_any_text(text: str, secret: str) -> None:
    assert secret not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "chat 9007199254740991 version 12",
        "2026-01-31T12:00:00.000Z",
        "no token here",
        "took 1.5 + 2.5 ms",
        "barcode=4",
        "error_code=busy",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_line_breaks_and_escapes_are_spelled_out() -> None:
    assert one_line("a\r\nb\tc\x1b[0m\u2028d\x85") == "a\\r\\nb\\tc\\x1b[0m\\u2028d\\x85"


def test_fields_with_telling_names_are_redacted_whatever_they_hold(log: Log) -> None:
    logging.getLogger("app.test").warning(
        "spoke",
        extra={
            "token": "short",
            "phone": "+79991234567",
            "deep": {"password": ["a", "b"], "new_password": "c", "metrics_token": "d"},
            "count": 3,
            "status_code": 404,
        },
    )
    [event] = log.events("spoke")
    assert (event["token"], event["phone"], event["count"]) == ("[redacted]", "***67", 3)
    assert event["deep"] == dict.fromkeys(("password", "new_password", "metrics_token"), "[redacted]")
    assert event["status_code"] == 404


def test_the_longest_word_is_looked_through_quickly() -> None:
    word = "secret-token_" * 100_000
    began = time.process_time()
    redact(word)
    assert time.process_time() - began < 5


def test_nothing_logs_an_error_by_a_name_that_is_redacted() -> None:
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "extra" and isinstance(node.value, ast.Dict):
                names = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
                assert REDACTED not in [_clean_field(str(name), 1) for name in names], (path, names)


@pytest.mark.parametrize("door", DOORS)
async def test_no_log_of_a_server_shows_what_stands_in_a_sockets_query(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    secrets = ["orchid-lantern-token", "orchid-lantern-ticket", "orchid-lantern-hidden"]
    plant(*secrets)
    server = start_server(settings, door)
    async with server.client() as client:
        someone = await register(client)
    for query in (f"token={secrets[0]}", f"ticket={secrets[1]}", f"%74oken={secrets[2]}"):
        with pytest.raises(websockets.InvalidStatus):
            await connect(f"{server.ws_url}?{query}")
    async with connect(f"{server.ws_url}?token={someone.access_token}") as socket:
        await socket.recv()
    server.stop()
    assert "/api/v1/messages/ws" in server.log  # it was logged, and yet:
    check_log(server.log, "the server's log")


@pytest.mark.parametrize("door", DOORS)
async def test_bad_utf8_on_a_socket_leaves_no_traceback(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        someone = await register(client)
    async with connect(f"{server.ws_url}?token={someone.access_token}") as socket:
        await socket.send(b"\xff\xfe", text=True)
        await asyncio.wait_for(socket.wait_closed(), 10)
        assert socket.close_code == 1007
    server.stop()
    check_log(server.log, "the server's log")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.settings(log_level="DEBUG")
async def test_even_at_debug_no_library_logs_what_people_say(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door)
    async with server.client() as client:
        someone = await register(client, display_name="Orchid Lantern")
        form = {"username": someone.phone, "password": someone.password}
        assert (await client.post("/api/v1/auth/token", data=form)).status_code == 200
        await client.post("/api/v1/auth/token", data=form | {"password": "Orchid-lantern-wrong!"})
    server.stop()
    assert "Orchid" not in server.log


# --- errors -----------------------------------------------------------------------------------------------------


async def test_an_unknown_path_is_a_problem(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/api/v1/nowhere"), 404, "not_found")


async def test_a_wrong_method_is_told_which_are_right(client: httpx.AsyncClient) -> None:
    response = await client.put("/api/v1/users/me")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, PATCH"
    for path in ("/files/1", "/files/1/thumbnail", "/avatars/1-" + "0" * 32):
        answer = await client.put(f"/api/v1{path}")
        assert_problem(answer, 405, "method_not_allowed")
        assert {"GET", "HEAD"} <= set(answer.headers["allow"].split(", "))


async def test_no_token_is_a_problem_that_names_the_scheme(client: httpx.AsyncClient) -> None:
    response = await client.get("/api/v1/users/me")
    assert_problem(response, 401, "invalid_token")
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_what_is_missing_and_what_is_malformed_never_names_the_request(client: httpx.AsyncClient) -> None:
    someone = await register(client)
    answers = [await client.get(f"/api/v1/users/{number}", headers=someone.headers) for number in (999, 998)]
    assert answers[0].status_code == 404
    assert answers[0].content == answers[1].content


async def test_a_validation_error_says_where_and_never_what(client: httpx.AsyncClient) -> None:
    secret = "orchid-lantern-unaccepted"
    body = {"phone": 5, "password": [secret], "username": secret * 3, secret * 5: 1}
    response = await client.post(REGISTER, json=body)
    problem = assert_problem(response, 422, "invalid_request")
    assert secret not in response.text.replace((secret * 5)[:64], "")
    places = [error["loc"] for error in problem["errors"]]
    assert ["body", "phone"] in places
    assert ["body", "username"] in places
    assert all(error.keys() == {"loc", "msg"} for error in problem["errors"])


async def test_an_error_to_wait_for_says_how_long(client: httpx.AsyncClient, crash: Any) -> None:
    def refuse() -> None:
        raise TooManyRequests("rate_limited", "Too many.", retry_after=1.2)

    crash(refuse)
    response = await client.get("/crash")
    assert_problem(response, 429, "rate_limited")
    assert response.headers["retry-after"] == "2"


@pytest.mark.logs_errors
async def test_a_bug_is_logged_once_with_its_traceback_and_told_to_nobody(
    client: httpx.AsyncClient, crash: Any, log: Log
) -> None:
    person = new_person()

    def fail() -> None:
        raise RuntimeError(f"about {person['phone']}\r\n2026 forged password='{person['password']}'")

    crash(fail)
    response = await client.get("/crash")
    assert_problem(response, 500, "internal_error")
    assert response.headers["x-content-type-options"] == "nosniff"
    [event] = log.events("unhandled_error")
    assert "RuntimeError" in event["exception"]
    assert event["request_id"] == response.headers["x-request-id"]
    assert sum("RuntimeError" in line for line in log.lines) == 1
    check_log("\n".join(log.lines + log.console), "the log", tracebacks_allowed=True)
    assert all(line.startswith("    ") for entry in log.console for line in entry.splitlines()[1:])


@pytest.mark.logs_errors
async def test_a_database_error_does_not_log_the_words_in_its_statement(
    client: httpx.AsyncClient, services: Services, crash: Any, log: Log
) -> None:
    words = " ".join(["lantern", "said", "Ann"])  # not in one piece in any line of code that a traceback shows

    async def fail() -> None:
        async with services.database.writing() as session:
            await session.execute(text("INSERT INTO id_blocks VALUES (:words, NULL)"), {"words": words})

    crash(fail)
    response = await client.get("/crash")
    assert_problem(response, 500, "internal_error")
    assert "IntegrityError" in log.events("unhandled_error")[0]["exception"]
    assert words not in "\n".join(log.lines + log.console)


# --- bodies -----------------------------------------------------------------------------------------------------

BAD_JSON = {
    "cut short": b'{"phone": ',
    "empty object key": b"{,}",
    "a lone surrogate": b'{"phone": "\\ud800"}',
    "a lone surrogate as a key": b'{"\\udfff": 1}',
    "bad UTF-8": b'{"phone": "\xff\xfe"}',
    "UTF-16": '{"phone": "1"}'.encode("utf-16"),
    "a number that is none": b'{"phone": NaN}',
    "infinity": b'{"phone": -Infinity}',
    "deep nesting": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "two documents": b"{} {}",
    "a raw control character": b'{"phone": "a\x00b"}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
async def test_json_that_is_none_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(REGISTER, content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "invalid_json")


ODD_JSON = {
    "a list": b"[1, 2]",
    "null": b"null",
    "a string": b'"x"',
    "nothing": b"",
    "a huge integer": b'{"phone": 1' + b"0" * 5000 + b"}",
    "a huge float": b'{"phone": 1e999}',
    "NUL in a text": b'{"phone": "+79991234567", "username": "ann\\u0000", "password": "x\\u0000yyyyyyyy"}',
    "a double key": b'{"phone": 1, "phone": 2}',
}


@pytest.mark.parametrize("body", ODD_JSON.values(), ids=ODD_JSON)
async def test_json_of_another_shape_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(REGISTER, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["code"] in ("invalid_request", "invalid_json")


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "nonsense", ""])
async def test_another_kind_of_body_is_refused_and_not_guessed(client: httpx.AsyncClient, kind: str) -> None:
    response = await client.post(REGISTER, content=b"\xff\xfe{", headers={"Content-Type": kind})
    assert_problem(response, 415, "unsupported_media_type")


async def test_json_is_utf_8_whatever_its_type_says(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json; charset=utf-16"}
    assert_problem(await client.post(REGISTER, content=b"\xff\xfe{", headers=headers), 422, "invalid_json")


@pytest.mark.parametrize("door", DOORS)
async def test_who_forgets_the_type_of_a_body_is_told_which_one_to_send(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    async with start_server(settings, door).client() as client:
        someone = new_person()
        body = json.dumps(someone).encode()
        login = {"username": someone["phone"], "password": someone["password"]}
        of_curl = {"Content-Type": FORM}  # what `curl -d` says of whatever it sends
        refused: list[httpx.Response] = [
            await client.post(REGISTER, content=body),
            await client.post(REGISTER, content=body, headers=of_curl),
            await client.post(TOKEN, json=login),
            await client.post(TOKEN, content=json.dumps(login).encode()),
        ]
        for response in refused:
            assert_problem(response, 415, "unsupported_media_type")
        as_json, as_form = "Send JSON with Content-Type: application/json.", f"Send a form with Content-Type: {FORM}."
        assert [response.json()["detail"] for response in refused] == [as_json, as_json, as_form, as_form]
        for path in (REGISTER, TOKEN):  # nothing has no type
            assert_problem(await client.post(path), 422, "invalid_request")
        as_vendors_write_it = {"Content-Type": "application/vnd.example+json"}
        assert (await client.post(REGISTER, content=body, headers=as_vendors_write_it)).status_code == 201
        assert (await client.post(TOKEN, data=login)).status_code == 200
        form = f"username={login['username']}&password={login['password']}"
        assert (await client.post(TOKEN, content=form, headers={"Content-Type": FORM})).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"%ff%fe=%00", b"username=%00&password=%ff", b"=&=&=", b"a" * 5000, b"&".join([b"a=1"] * 5000), b"username=a"],
)
async def test_odd_forms_are_refused(client: httpx.AsyncClient, content: bytes) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = await client.post("/api/v1/auth/token", content=content, headers=headers)
    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/problem+json"


async def test_odd_multipart_is_refused(client: httpx.AsyncClient) -> None:
    for content in (
        b"",
        b"--x",
        b"--x\r\n\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"y" * 99,
    ):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        response = await client.post("/api/v1/auth/token", content=content, headers=headers)
        assert 400 <= response.status_code < 500, response.text


@pytest.mark.parametrize("path", ["/api/v1/users/search?q=a%00b", "/api/v1/users/1%00", "/%00"])
async def test_nul_in_a_url_is_refused(client: httpx.AsyncClient, path: str) -> None:
    someone = await register(client)
    assert_problem(await client.get(path, headers=someone.headers), 422, "invalid_request")


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/users/%ff",
        "/api/v1/users/search?q=%ff%fe",
        "/api/v1/users/search?q=%ED%A0%80",
        "/%ED%A0%80",
        "/api/v1/users/9" + "9" * 400,
    ],
)
async def test_nonsense_in_a_url_is_no_servers_error(client: httpx.AsyncClient, path: str) -> None:
    someone = await register(client)
    assert (await client.get(path, headers=someone.headers)).status_code < 500


@pytest.mark.settings(max_body_bytes=2048, max_message_chars=32)
async def test_a_body_at_the_limit_passes_and_one_byte_more_does_not(client: httpx.AsyncClient) -> None:
    def body(size: int) -> bytes:
        start = b'{"phone": "'
        return start + b"1" * (size - len(start) - 2) + b'"}'

    headers = {"Content-Type": "application/json"}
    at_limit = await client.post(REGISTER, content=body(2048), headers=headers)
    assert_problem(at_limit, 422, "invalid_request")
    assert_problem(await client.post(REGISTER, content=body(2049), headers=headers), 413, "body_too_large")


@pytest.mark.settings(max_body_bytes=2048, max_message_chars=32)
@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
async def test_an_endless_body_is_stopped_as_it_streams(client: httpx.AsyncClient, kind: str) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\n' if "multipart" in kind else b"a"
        while sent < 1_000_000:
            sent += 1000
            yield b"a" * 1000

    path = REGISTER if "json" in kind else "/api/v1/auth/token"
    response = await client.post(path, content=endless(), headers={"Content-Type": kind})
    assert_problem(response, 413, "body_too_large")
    assert sent < 10_000


@pytest.mark.settings(max_body_bytes=2048, max_message_chars=32)
async def test_a_real_client_with_too_large_a_body_gets_its_answer(server: Server) -> None:
    async with server.client() as client:
        response = await client.post(REGISTER, content=b"a" * 100_000, headers={"Content-Type": "application/json"})
        assert_problem(response, 413, "body_too_large")
        assert (await client.get("/health/live")).status_code == 200


# --- headers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health/live", "/nowhere", "/api/v1/users/me", "/openapi.json"])
async def test_browsers_are_told_to_trust_nothing(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "strict-transport-security" not in headers


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_pages_of_documentation_load_everything_from_here(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    addresses = re.findall(r"""(?:src|href|spec-url)=["']([^"']+)|url: '([^']+)'""", response.text)
    assert len(addresses) >= 3
    for address in map("".join, addresses):
        loaded = await client.get(str(response.url.join(address)))
        assert (loaded.status_code, loaded.url.host) == (200, response.url.host)
    policy = response.headers["content-security-policy"]
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    assert "http" not in policy
    assert not re.search("script-src[^;]*unsafe", policy)


async def test_a_browser_loads_the_files_of_these_pages_once(client: httpx.AsyncClient) -> None:
    first = await client.get("/docs/assets/swagger-ui-bundle.js")
    assert (first.status_code, first.headers["cache-control"]) == (200, "no-cache")
    again = await client.get(first.url, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert_problem(await client.get("/docs/assets/nothing.js"), 404, "not_found")
    assert_problem(await client.get("/docs/assets/%2e%2e/__init__.py"), 404, "not_found")


@pytest.mark.settings(hsts_seconds=31536000)
async def test_https_is_insisted_on_where_the_operator_says_so(client: httpx.AsyncClient) -> None:
    response = await client.get("/health/live")
    assert response.headers["strict-transport-security"] == "max-age=31536000; includeSubDomains"


@pytest.mark.settings(docs_enabled=False)
async def test_documentation_can_be_switched_off(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/assets/favicon.png"):
        assert_problem(await client.get(path), 404, "not_found")
    assert (await client.get("/")).json()["name"] == "Dialect"
    assert_problem(await client.put("/api/v1/users/me"), 405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_a_slash_at_the_end_of_a_page_of_documentation_leads_to_it(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"{path}/")
    assert response.status_code == 307
    assert response.url.join(response.headers["location"]).path == path
    assert not response.headers["location"].startswith("/")  # behind a proxy they may lie deeper


async def test_the_first_request_finds_every_route_built(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings)
    built: list[object] = []
    init = pydantic.TypeAdapter.__init__

    def counted(adapter: Any, *args: Any, **options: Any) -> None:
        built.append(args)
        init(adapter, *args, **options)

    monkeypatch.setattr(pydantic.TypeAdapter, "__init__", counted)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/api/v1/users/me")).status_code == 401
    assert built == []


async def test_the_root_leads_to_the_documentation(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/docs")


async def test_a_server_does_not_say_what_it_is_made_of(server: Server) -> None:
    async with server.client() as client:
        assert "server" not in (await client.get("/health/live")).headers


ORIGIN = "https://app.example.org"


@pytest.mark.settings(allowed_origins=[ORIGIN])
@pytest.mark.parametrize("path", ["/health/live", "/api/v1/users/me", "/nowhere"])
async def test_an_allowed_origin_may_read_answers_and_errors(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path, headers={"Origin": ORIGIN})).headers
    assert headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-credentials" not in headers
    assert "X-Request-ID" in headers["access-control-expose-headers"]


@pytest.mark.settings(allowed_origins=[ORIGIN])
async def test_an_allowed_origin_may_ask_first(client: httpx.AsyncClient) -> None:
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "PATCH",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = await client.options("/api/v1/users/me", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "PATCH" in response.headers["access-control-allow-methods"]


@pytest.mark.settings(allowed_origins=[ORIGIN])
async def test_an_allowed_origin_may_send_every_header_that_an_operation_takes(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    taken = {("head", "/api/v1/files/{file_id}"): ["If-Match", "If-None-Match"]}  # not in the document
    for key, operation in operations(app).items():
        headers = [one["name"] for one in operation.get("parameters", ()) if one["in"] == "header"]
        taken[key] = [*headers, "Authorization", "Content-Type", "X-Request-ID"]
    assert {"Range", "If-Range", "If-Match", "If-None-Match"} < set(taken["get", "/api/v1/files/{file_id}"])
    for (method, path), headers in taken.items():
        asked = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": method.upper(),
            "Access-Control-Request-Headers": ",".join(sorted(name.lower() for name in headers)),
        }
        answer = await client.options(re.sub(r"{\w+}", "1", path), headers=asked)
        assert (answer.status_code, answer.text) == (200, "OK"), (method, path)
        allowed = {name.lower() for name in answer.headers["access-control-allow-headers"].split(", ")}
        assert {name.lower() for name in headers} <= allowed


@pytest.mark.settings(allowed_origins=[ORIGIN])
async def test_an_allowed_origin_may_read_every_header_that_tells_something(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    [ann] = await people(client, 1)
    file = await ann.upload(b"data", "a.txt")
    answer = await ann.fetch(file["file_id"], Origin=ORIGIN, Range="bytes=0-1")
    assert answer.status_code == 206
    assert answer.headers["vary"].lower().split(", ") == ["authorization", "origin"]
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    documented = {
        name.lower()
        for operation in operations(app).values()
        for response in operation["responses"].values()
        for name in response.get("headers", ())
    }
    readable = {"cache-control", "content-type"}  # by every page (Fetch, "CORS-safelisted response-header name")
    for_browsers = {"content-security-policy", "cross-origin-resource-policy", "referrer-policy", "vary"}
    for_browsers |= {"strict-transport-security", "x-content-type-options"}
    sent = {name for name in answer.headers if not name.startswith("access-control-")} - for_browsers - readable
    assert {"etag", "content-range", "accept-ranges", "content-disposition", "content-length"} <= sent
    assert {"retry-after", "www-authenticate"} <= documented
    assert sent | documented <= exposed


@pytest.mark.settings(allowed_origins=[ORIGIN])
@pytest.mark.logs_errors
async def test_an_allowed_origin_may_read_even_a_bug(client: httpx.AsyncClient, crash: Any) -> None:
    def fail() -> None:
        raise RuntimeError

    crash(fail)
    response = await client.get("/crash", headers={"Origin": ORIGIN})
    assert_problem(response, 500, "internal_error")
    assert response.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", ORIGIN + ".evil.example", ORIGIN.replace("https", "http"), ORIGIN.upper()],
)
@pytest.mark.parametrize("allowed", [True, False])
async def test_no_other_origin_is_welcome(settings: Settings, origin: str, allowed: bool) -> None:
    app = create_app(settings.model_copy(update={"allowed_origins": [ORIGIN] if allowed else []}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        simple = await client.get("/health/live", headers={"Origin": origin})
        asked = await client.options(
            "/api/v1/users/me", headers={"Origin": origin, "Access-Control-Request-Method": "GET"}
        )
    assert "access-control-allow-origin" not in simple.headers
    assert "access-control-allow-origin" not in asked.headers
    assert asked.status_code >= 400


# --- the whole ---------------------------------------------------------------------------------------


PUBLIC = {
    ("get", "/api/v1/avatars/{avatar}"),  # the address is the key
    ("get", "/health/live"),
    ("get", "/health/ready"),
    ("post", "/api/v1/auth/register"),
    ("post", "/api/v1/auth/token"),
    ("post", "/api/v1/auth/refresh"),
    ("get", "/api/v1/users/username-available"),
    ("get", "/api/v1/messages/ws"),  # answers 426, whoever asks
}
"""Whoever adds a route for everybody adds it here, and knows why."""


def operations(app: FastAPI) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
    }


async def test_every_route_asks_who_is_calling_unless_it_is_known_to_be_public(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    for (method, path), operation in operations(app).items():
        if (method, path) in PUBLIC:
            continue
        assert operation.get("security"), (method, path)
        response = await client.request(method, re.sub(r"{\w+}", "1", path), json={})
        assert response.status_code in (401, 422), (method, path, response.status_code)
        if response.status_code == 422:  # FastAPI reads the body first
            assert method in ("post", "patch", "put"), (method, path)


async def test_all_rooms_of_the_api_are_open(app: FastAPI) -> None:
    paths = {path for _, path in operations(app)}
    assert {
        "/api/v1/auth/register",
        "/api/v1/auth/token",
        "/api/v1/users/me",
        "/api/v1/users/{user_id}",
        "/api/v1/users/search",
        "/api/v1/users/block/{user_id}",
        "/api/v1/chats",
        "/api/v1/messages/history/{chat_id}",
        "/health/live",
        "/health/ready",
    } <= paths


async def test_authorize_in_swagger_leads_to_the_briefs_login(app: FastAPI) -> None:
    schemes = app.openapi()["components"]["securitySchemes"]
    assert schemes["OAuth2PasswordBearer"]["flows"]["password"]["tokenUrl"] == "/api/v1/auth/token"
