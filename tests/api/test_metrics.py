"""/metrics: who may read it, that it shows what happened, and that it shows nothing of anybody."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import websockets
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from websockets.asyncio.client import connect

from app.core import metrics
from app.core.config import Settings
from app.core.metrics_folder import metrics_folder
from app.services.connection_manager import CloseCode
from app.services.container import Services
from tests.conftest import StartServer
from tests.support.metrics import risen, value
from tests.support.people import people
from tests.support.secrets import PLANTED, plant
from tests.support.servers import Server
from tests.test_docs import codes_in_app

OSLO = (Path(__file__).resolve().parents[1] / "files/oslo.png").read_bytes()
ERROR_CODES = set(codes_in_app())
CLOSE_CODES = {"other", *map(str, metrics.CLOSE_CODES), *(str(int(code)) for code in CloseCode)}
ROUTES = re.compile(r"other|/|/metrics|/health/(live|ready)|(/api/v1)?(/[a-z-]+|/\{[a-z_]+\})+")
# What each label may say. Whoever adds a label adds it here, and thinks about how many values it can have.
VALUES: dict[str, Callable[[str], object]] = {
    "action": lambda text: text in ("put", "read", "delete"),
    "code": lambda text: text in ERROR_CODES | CLOSE_CODES,
    "door": lambda text: text in ("socket", "rest"),
    "kind": lambda text: text in ("image", "video", "audio", "file", "avatar"),
    "le": lambda text: float(text) >= 0,
    "limit": lambda text: text in Settings.model_fields,
    "method": lambda text: text in metrics.METHODS | {"other"},
    "outcome": lambda text: text in ("sent", "dead", "retry", "refused", "given_up"),
    "pool": lambda text: text in ("read", "write"),
    "reason": lambda text: text in ("head", "body", "reading", "crowded"),
    "route": ROUTES.fullmatch,
    "status": lambda text: re.fullmatch("[1-5]xx", text),
    "task": lambda text: re.fullmatch("[a-z-]+", text),
}


async def scrape(server: Server) -> str:
    async with httpx.AsyncClient(base_url=server.url) as client:
        response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return response.text


async def scrape_until(server: Server, name: str, expected: float) -> str:
    """What a server shows once a sample has this value: workers that share a folder write there every second."""
    async with asyncio.timeout(20):
        while True:
            text = await scrape(server)
            if value(text, name) == expected:
                return text
            await asyncio.sleep(0.05)


def check_labels(text: str) -> set[str]:
    """Fail on a label or value that is not in VALUES; the labels that were seen."""
    seen: set[str] = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith("dialect_")
            for label, shown in sample.labels.items():
                assert VALUES[label](shown), (sample.name, label, shown)
                seen.add(label)
    return seen


@pytest.mark.settings(limit_search_per_user="1/minute")
@pytest.mark.settings(sweep_seconds=0.05)
async def test_after_traffic_it_shows_what_happened_and_nothing_of_anybody(server: Server) -> None:
    before = await scrape(server)
    async with server.client() as client:
        ann, bo = await people(client, 2)
        said, named = "a word that no operator reads", f"file-{uuid.uuid4().hex}.txt"
        plant(said, named)
        chat_id = await ann.personal(bo)
        socket = await bo.open(server)
        for number in range(5):
            await ann.say(chat_id, f"{said} {number}")
        for _ in range(5):
            await socket.wait(type="new_message")
        await socket.send(type="new_message", chat_id=987654321987, content=said)
        await socket.wait(type="error")
        await socket.send(type="resume", account_version=0, chats={})
        await socket.wait(type="resumed")
        await bo.resume()
        await ann.upload(said.encode(), named)
        await ann.upload(OSLO, "oslo.png", "image/png")
        for _ in range(2):
            await ann.request("GET", "/users/search", q=named[:20])
        async with httpx.AsyncClient(base_url=server.url) as stranger:
            await stranger.get("/what-is-nowhere")
            await stranger.request("PROPFIND", "/")
        with pytest.raises(websockets.InvalidStatus):
            await connect(f"{server.ws_url}?token={named}")
        async with connect(f"{server.ws_url}?token={bo.account.access_token}") as bad:
            await bad.close(4242, said)  # a code of the peer's own choosing
        await socket.close()
    text = await scrape_until(server, "dialect_sockets_open", 0)
    seen = check_labels(text)
    assert {"code", "door", "kind", "le", "limit", "method", "pool", "route", "status"} <= seen
    assert not [secret for secret in PLANTED if secret in text]
    assert not [word for word in ("987654321987", "what-is-nowhere", "PROPFIND") if word in text]
    up = risen(before, text)
    assert up["dialect_messages_acknowledged_total"] == 5
    assert up["dialect_socket_connects_total"] == 2
    assert up["dialect_socket_refusals_total invalid_token"] == 1
    assert up["dialect_socket_closes_total other"] == 1
    assert up["dialect_commands_refused_total chat_not_found"] == 1
    assert up["dialect_frames_received_total"] == 2
    assert up["dialect_frames_sent_total"] >= 5 + 2 + 1
    assert up["dialect_deliveries_total"] >= 5
    assert up["dialect_resumes_total socket"] == up["dialect_resumes_total rest"] == 1
    assert up["dialect_catch_up_resets_total"] >= 1
    assert up["dialect_commit_seconds_count"] == up["dialect_commit_changes_count"] >= 1
    assert up["dialect_commit_changes_sum"] >= 5
    assert up["dialect_uploads_total file"] == up["dialect_uploads_total image"] == 1
    assert up["dialect_upload_bytes_total"] == len(said) + len(OSLO)
    assert up["dialect_rate_limited_total limit_search_per_user"] == 1
    assert up["dialect_http_requests_total GET /api/v1/users/search 2xx"] == 1
    assert up["dialect_http_requests_total GET /api/v1/users/search 4xx"] == 1
    assert up["dialect_http_requests_total GET other 4xx"] == 1
    assert up["dialect_http_requests_total other / 4xx"] == 1
    assert up["dialect_http_requests_total POST /api/v1/chats/{chat_id}/messages 2xx"] == 5
    assert up["dialect_sweeps_total"] >= 1
    assert value(text, "dialect_workers") == 1
    assert value(text, "dialect_process_resident_bytes") > 20e6
    assert 5 < value(text, "dialect_process_open_fds") < value(text, "dialect_process_max_fds")
    assert value(text, "dialect_asyncio_tasks") > 5
    assert value(text, "dialect_database_connections_max", pool="read") >= 2


async def test_states_are_those_of_the_moment(server: Server) -> None:
    async with server.client() as client:
        [ann] = await people(client, 1)
        sockets = [await ann.open(server) for _ in range(3)]
        text = await scrape_until(server, "dialect_sockets_open", 3)
        assert value(text, "dialect_users_online") == 1
        for socket in sockets:
            await socket.close()
    await scrape_until(server, "dialect_sockets_open", 0)


# --- who may read it ---


async def read(
    app: FastAPI, peer: str, path: str = "/metrics", headers: dict[str, str] | None = None
) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, client=(peer, 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize(("peer", "allowed"), [("127.0.0.1", True), ("::1", True), ("192.0.2.7", False), ("", False)])
async def test_without_a_token_only_this_machine_reads_it(app: FastAPI, peer: str, allowed: bool) -> None:
    assert ((await read(app, peer)).status_code == 200) is allowed


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "Via", "X-Forwarded-Proto"])
async def test_a_proxy_on_this_machine_does_not_read_it_for_a_stranger(app: FastAPI, header: str) -> None:
    assert (await read(app, "127.0.0.1", headers={header: "127.0.0.1"})).status_code == 404


@pytest.mark.settings(metrics_token=SecretStr("orchid-lantern-metrics"))
async def test_with_a_token_who_shows_it_reads_it_from_anywhere_and_nobody_else(app: FastAPI) -> None:
    plant("orchid-lantern-metrics")
    for peer in ("127.0.0.1", "192.0.2.7"):
        for shown in (
            "",
            "Bearer",
            "Bearer ",
            "Bearer orchid",
            "Basic orchid-lantern-metrics",
            "Bearer orchid-lantern-metricsx",
        ):
            assert (await read(app, peer, headers={"Authorization": shown})).status_code == 404, shown
        assert (await read(app, peer, headers={"Authorization": "Bearer orchid-lantern-metrics"})).status_code == 200


@pytest.mark.settings(metrics_enabled=False)
async def test_switched_off_nobody_reads_it(app: FastAPI) -> None:
    assert (await read(app, "127.0.0.1")).status_code == 404


async def test_who_may_not_read_it_sees_what_is_not_there(app: FastAPI) -> None:
    refused, missing = await read(app, "192.0.2.7"), await read(app, "192.0.2.7", "/nowhere")
    assert refused.content == missing.content
    assert {k: v for k, v in refused.headers.items() if k != "x-request-id"} == {
        k: v for k, v in missing.headers.items() if k != "x-request-id"
    }


# --- the declarations ---


async def test_every_metric_is_shown_and_described(services: Services) -> None:
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    assert families.keys() == {described.name.removesuffix("_total") for described in metrics.CATALOG}
    for described in metrics.CATALOG:
        family = families[described.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (described.kind, described.help)
        assert described.help.endswith(".")
        assert described.labels == tuple(sorted(described.labels))
        assert set(described.labels) <= VALUES.keys()
        assert (described.kind == "counter") == described.name.endswith("_total")


# --- several workers ---


async def test_several_workers_show_one_view_and_a_dead_one_leaves_only_what_it_counted(
    settings: Settings, start_server: StartServer, tmp_path: Path
) -> None:
    if settings.uses_mysql:
        pytest.skip("the database plays no part")
    other_file = tmp_path / "other.db"
    with sqlite3.connect(settings.sqlite_path) as source, sqlite3.connect(other_file) as target:
        source.backup(target)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(metrics_folder())
        assert folder.path.stat().st_mode & 0o077 == 0
        one = start_server(settings, **folder.environment)
        two = start_server(settings.model_copy(update={"sqlite_path": other_file}), **folder.environment)
        for server, sockets in ((one, 2), (two, 3)):
            async with server.client() as client:
                [ann] = await people(client, 1)
                for _ in range(sockets):
                    await stack.enter_async_context(await ann.open(server))
        for server in (one, two):
            text = await scrape_until(server, "dialect_sockets_open", 5)
            assert value(text, "dialect_socket_connects_total") == 5
            assert value(text, "dialect_workers") == 2
            assert value(text, "dialect_database_connections_max", pool="read") == 8
            check_labels(text)
        two.kill()
        folder.forget(two.pid)
        text = await scrape(one)
        assert value(text, "dialect_sockets_open") == 2
        assert value(text, "dialect_workers") == 1
        assert value(text, "dialect_socket_connects_total") == 5
    assert not folder.path.exists()
