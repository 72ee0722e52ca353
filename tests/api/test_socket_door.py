"""The door for sockets, on real servers: who is turned away, how cheaply, and what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import re
from contextlib import AsyncExitStack

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from app.api.v1.socket import SocketReceiver
from app.core.config import Settings
from app.services.container import Services
from app.services.transport import Frames
from tests.conftest import StartServer
from tests.support.people import Person, people
from tests.support.servers import Door, Server
from tests.support.socket_client import PATIENCE, SocketClient

DOORS: list[Door] = ["tuned", "plain"]


async def refusal(server: Server, token: str, **headers: str) -> tuple[int, str, int]:
    """(status, code, Retry-After or 0) of a handshake that is refused."""
    given = {"Authorization": f"Bearer {token}", **headers}
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.ws_url, additional_headers=given, compression=None)
    response = refused.value.response
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["X-Request-ID"]
    code = re.search(rb'"code":"(\w+)"', response.body or b"")
    return response.status_code, code[1].decode() if code else "", int(response.headers.get("Retry-After", "0"))


async def opens(server: Server, person: Person, **headers: str) -> SocketClient:
    """A socket, as soon as there is a place for it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await person.open(server, headers=headers)
            except InvalidStatus as error:
                if error.response.status_code not in (429, 503):
                    raise


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.settings(max_sockets=2)
async def test_a_full_server_turns_away_before_it_looks_at_the_token(
    settings: Settings, start_server: StartServer, door: Door
) -> None:
    server = start_server(settings, door=door)
    async with server.client() as client:
        ann, bo = await people(client, 2)
    first, second = await ann.open(server), await bo.open(server)
    for token in (ann.account.access_token, "nobody's"):
        status, code, wait = await refusal(server, token)
        assert (status, code) == (503, "overloaded")
        assert 10 <= wait <= 30
    first.abort()  # without a word
    third = await opens(server, ann)
    assert (await refusal(server, "nobody's"))[0] == 503
    await second.close()
    await (await opens(server, bo)).close()
    await third.close()


@pytest.mark.settings(max_sockets=1)
async def test_a_handshake_that_is_refused_for_another_reason_takes_no_place(server: Server) -> None:
    async with server.client() as client:
        [ann] = await people(client, 1)
    for _ in range(3):
        assert (await refusal(server, "nobody's"))[:2] == (401, "invalid_token")
        assert (await refusal(server, ann.account.access_token, Origin="https://evil.example"))[0] == 403
    await (await ann.open(server)).close()


@pytest.mark.settings(max_sockets_per_ip=1)
async def test_an_address_is_that_which_a_trusted_proxy_names(server: Server) -> None:
    async with server.client() as client:
        ann, bo, cy = await people(client, 3)
    one = await ann.open(server, headers={"X-Forwarded-For": "2001:db8:0:7::1"})
    status, code, wait = await refusal(server, bo.account.access_token, **{"X-Forwarded-For": "2001:db8:0:7::2"})
    assert (status, code) == (429, "too_many_sockets")
    assert wait >= 10
    other = await bo.open(server, headers={"X-Forwarded-For": "2001:db8:0:8::2"})
    await one.close()
    again = await opens(server, cy, **{"X-Forwarded-For": "2001:db8:0:7::3"})
    for socket in (other, again):
        await socket.close()
    assert "too_many_sockets_from_one_address" in server.log


@pytest.mark.settings(max_sockets_per_ip=1, forwarded_allow_ips="192.0.2.1")
async def test_what_nobody_trusted_says_of_an_address_is_not_believed(server: Server) -> None:
    async with server.client() as client:
        [ann] = await people(client, 1)
    async with await ann.open(server, headers={"X-Forwarded-For": "192.0.2.7"}):
        assert (await refusal(server, ann.account.access_token, **{"X-Forwarded-For": "192.0.2.8"}))[0] == 429


@pytest.mark.settings(limit_connects_per_ip_per_second=0.5, limit_connects_per_ip_burst=2)
async def test_who_opens_too_many_a_second_waits_as_long_as_they_are_told(server: Server) -> None:
    async with server.client() as client:
        [ann] = await people(client, 1)
    for _ in range(2):
        await (await ann.open(server)).close()
    status, code, wait = await refusal(server, ann.account.access_token)
    assert (status, code) == (429, "rate_limited")
    assert 1 <= wait <= 3


class Closed:
    """A transport that keeps the close."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.close_frame: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    def send(self, frames: Frames) -> None:
        raise AssertionError("nobody was greeted")

    def close(self, code: int, reason: str = "") -> None:
        self.close_frame.set_result((code, reason))

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.mark.settings(socket_greeting_seconds=0.1)
async def test_who_cannot_be_greeted_in_time_is_asked_to_come_back_and_gives_the_place_back(
    services: Services, client: httpx.AsyncClient
) -> None:
    [ann] = await people(client, 1)
    caller = await services.auth.authenticate(ann.account.access_token)
    transport = Closed()
    async with AsyncExitStack() as stack:
        for _ in range(services.database.readers // 2):  # everybody else is catching up
            await stack.enter_async_context(services.database.bulk_reads)
        receiver = SocketReceiver(services, caller, transport, services.admission.enter("192.0.2.1"))
        async with asyncio.timeout(PATIENCE):
            code, reason = await transport.close_frame
    assert code == 1013
    assert re.fullmatch(r"too many are coming; retry-after=\d+\.\d", reason)
    assert services.admission.open_sockets == 1
    receiver.on_closed(code)
    assert services.admission.open_sockets == 0


async def _close_of(connection: ClientConnection) -> tuple[int, str]:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await connection.recv()
    return connection.close_code or 0, connection.close_reason or ""


async def test_at_a_restart_everybody_hears_when_to_come_back(server: Server) -> None:
    async with server.client() as client:
        crowd = await people(client, 3)
    headers = [{"Authorization": f"Bearer {one.account.access_token}"} for one in crowd]
    sockets = [await connect(server.ws_url, additional_headers=one, compression=None) for one in headers]
    for socket in sockets:
        await socket.recv()
    await asyncio.to_thread(server.stop)
    for socket in sockets:
        code, reason = await _close_of(socket)
        assert code == 1012
        hint = re.fullmatch(r"server restarts; retry-after=(\d+\.\d)", reason)
        assert hint, reason
        assert 1 <= float(hint[1]) <= 30
