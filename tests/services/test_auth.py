"""Registering, logging in, and sessions, by the requests that clients make."""

from __future__ import annotations

import asyncio
import ipaddress
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import argon2
import httpx
import pytest
from fastapi import FastAPI

from app.core.config import Settings
from app.core.errors import Unauthenticated
from app.db.database import Database
from app.db.repositories import sessions as session_repository
from app.db.repositories import users as user_repository
from app.main import create_app
from app.services.auth_service import AuthService
from app.services.container import Services
from app.services.ticket_store import TICKETS_PER_SESSION
from tests.support.accounts import Account, new_person, register
from tests.support.clock import ManualClock
from tests.support.databases import SECRET_KEY
from tests.support.secrets import plant
from tests.support.tokens import forgeries

API = "/api/v1"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def timed(settings: Settings, clock: ManualClock) -> AsyncIterator[FastAPI]:
    """The application with a clock that the test moves."""
    app = create_app(settings, clock)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def timed_client(timed: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_from(timed, "127.0.0.1") as client:
        yield client


def client_from(app: FastAPI, ip: str) -> httpx.AsyncClient:
    """A client at an address of its own."""
    transport = httpx.ASGITransport(app=app, client=(ip, 1234))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def log_in(client: httpx.AsyncClient, phone: str, password: str, **fields: str) -> httpx.Response:
    return await client.post(f"{API}/auth/token", data={"username": phone, "password": password, **fields})


async def log_in_account(client: httpx.AsyncClient, account: Account) -> Account:
    """Another session of somebody."""
    response = await log_in(client, account.phone, account.password)
    assert response.status_code == 200, response.text
    tokens = response.json()
    plant(tokens["access_token"], tokens["refresh_token"])
    return Account(
        account.id,
        account.phone,
        account.username,
        account.password,
        tokens["access_token"],
        tokens["refresh_token"],
    )


async def refresh(client: httpx.AsyncClient, token: str) -> httpx.Response:
    response = await client.post(f"{API}/auth/refresh", json={"refresh_token": token})
    if response.status_code == 200:
        plant(response.json()["refresh_token"], response.json()["access_token"])
    return response


async def works(client: httpx.AsyncClient, account: Account) -> bool:
    """Whether somebody's access token opens the API."""
    response = await client.get(f"{API}/users/me", headers=account.headers)
    assert response.status_code in (200, 401)
    return response.status_code == 200


# --- the brief, to the letter ---


async def test_the_requests_of_the_brief_work_byte_for_byte(client: httpx.AsyncClient) -> None:
    body = '{\n  "phone": "+79991234567",\n  "password": "SecurePass123!",\n  "username": "john_doe"\n}'
    registered = await client.post(f"{API}/auth/register", content=body, headers=JSON)
    assert registered.status_code == 201
    assert registered.json() | {"access_token": "", "refresh_token": "", "created_at": ""} == {
        "id": registered.json()["id"],
        "username": "john_doe",
        "display_name": "john_doe",
        "bio": "",
        "avatar_url": None,
        "profile_version": 1,
        "phone": "+79991234567",
        "account_version": 0,
        "created_at": "",
        "access_token": "",
        "token_type": "bearer",
        "expires_in": 3600,
        "refresh_token": "",
    }
    form = "username=+79991234567&password=SecurePass123!"
    logged_in = await client.post(f"{API}/auth/token", content=form, headers=FORM)
    assert logged_in.status_code == 200
    assert set(logged_in.json()) == {"access_token", "token_type", "expires_in", "refresh_token"}
    for answer in (registered, logged_in):
        me = await client.get(f"{API}/users/me", headers={"Authorization": f"Bearer {answer.json()['access_token']}"})
        assert me.json()["phone"] == "+79991234567"


async def test_swagger_can_log_in(client: httpx.AsyncClient) -> None:
    account = await register(client)
    response = await client.post(
        f"{API}/auth/token",
        data={
            "grant_type": "password",
            "username": account.phone,
            "password": account.password,
            "scope": "",
            "client_id": "",
            "client_secret": "",
        },
    )
    assert response.status_code == 200


# --- registering ---


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"phone": "12345"}, "invalid_phone"),
        ({"username": "Admin"}, "username_reserved"),
        ({"username": "dialect"}, "username_reserved"),
        ({"password": "password1"}, "weak_password"),
        ({"password": "Short7!"}, "weak_password"),
        ({"username": "ab"}, "invalid_request"),
        ({"username": "1abc"}, "invalid_request"),
        ({"username": "a" * 33}, "invalid_request"),
        ({"username": "имя"}, "invalid_request"),
        ({"username": "john doe"}, "invalid_request"),
        ({"username": "john\n"}, "invalid_request"),
        ({"password": "x" * 257}, "invalid_request"),
        ({"password": "NUL\x00NUL\x00NUL"}, "invalid_request"),
        ({"phone": 79991234567}, "invalid_request"),
        ({"display_name": "\u202eevil"}, "invalid_request"),
        ({"display_name": ""}, "invalid_request"),
        ({"id": 1}, "invalid_request"),
        ({"is_admin": True}, "invalid_request"),
        ({"created_at": "2020-01-01T00:00:00Z"}, "invalid_request"),
    ],
)
async def test_what_cannot_be_an_account_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], code: str
) -> None:
    response = await client.post(f"{API}/auth/register", json=new_person() | fields)
    assert (response.status_code, response.json()["code"]) == (422, code)


async def test_a_lone_surrogate_is_refused_not_stored(client: httpx.AsyncClient) -> None:
    body = '{"phone": "+79991234567", "password": "Orchid \\ud800 lantern", "username": "john_doe"}'
    response = await client.post(f"{API}/auth/register", content=body, headers=JSON)
    assert response.status_code == 422


async def test_a_phone_and_a_username_are_taken_once_whatever_their_spelling(client: httpx.AsyncClient) -> None:
    await register(client, phone="+79991234567", username="John_Doe")
    same_phone = await client.post(f"{API}/auth/register", json=new_person(phone="＋7 (999) 123-45-67"))
    assert (same_phone.status_code, same_phone.json()["code"]) == (409, "phone_taken")
    same_name = await client.post(f"{API}/auth/register", json=new_person(username="jOHN_dOE"))
    assert (same_name.status_code, same_name.json()["code"]) == (409, "username_taken")


@pytest.mark.parametrize("shared", ["phone", "username", "both"])
async def test_of_fifty_who_register_the_same_at_once_one_wins(client: httpx.AsyncClient, shared: str) -> None:
    one = new_person()
    fields = {"phone", "username"} if shared == "both" else {shared}
    bodies = [new_person(**{name: one[name] for name in fields}) for _ in range(50)]
    answers = await asyncio.gather(*(client.post(f"{API}/auth/register", json=body) for body in bodies))
    assert sorted({answer.status_code for answer in answers}) == [201, 409]
    assert sum(answer.status_code == 201 for answer in answers) == 1
    codes = {answer.json()["code"] for answer in answers if answer.status_code == 409}
    assert codes <= {f"{name}_taken" for name in fields}
    # The losers left nothing behind: their other name is free.
    if shared == "phone":
        loser = bodies[next(i for i, answer in enumerate(answers) if answer.status_code == 409)]
        assert (await client.post(f"{API}/auth/register", json=new_person(username=loser["username"]))).is_success


async def test_a_password_is_the_same_in_either_unicode_form(client: httpx.AsyncClient) -> None:
    account = await register(client, password="Cafe\u0301 de Flore 77")
    assert (await log_in(client, account.phone, "Caf\u00e9 de Flore 77")).status_code == 200


# --- logging in ---


async def test_a_wrong_phone_and_a_wrong_password_look_the_same(client: httpx.AsyncClient) -> None:
    account = await register(client)
    wrong_password = await log_in(client, account.phone, "Another-Lantern-1")
    wrong_phone = await log_in(client, "+79990000000", account.password)
    assert wrong_password.status_code == wrong_phone.status_code == 401
    assert wrong_password.content == wrong_phone.content
    assert wrong_password.json()["code"] == "invalid_credentials"
    assert wrong_password.headers["www-authenticate"] == wrong_phone.headers["www-authenticate"]


@pytest.mark.settings(argon2_memory_kib=8192, argon2_time_cost=2)
async def test_a_wrong_phone_and_a_wrong_password_take_as_long(client: httpx.AsyncClient) -> None:
    account = await register(client)
    times: dict[str, list[float]] = {account.phone: [], "+79990000000": []}
    for _ in range(30):
        for phone, taken in times.items():
            before = time.perf_counter()
            assert (await log_in(client, phone, "Another-Lantern-1")).status_code == 401
            taken.append(time.perf_counter() - before)
    known, unknown = (statistics.median(taken) for taken in times.values())
    assert 0.6 < known / unknown < 1.6


async def test_what_is_no_phone_is_said_to_be_none(client: httpx.AsyncClient) -> None:
    response = await log_in(client, "john_doe", "whatever")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_phone")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "username=%2B79991234567",
        "password=x",
        "username=&password=",
        "username=%00&password=%00",
        "%ff=%ff",
        "\x00",
    ],
)
async def test_a_form_that_is_no_login_is_refused(client: httpx.AsyncClient, content: str) -> None:
    response = await client.post(f"{API}/auth/token", content=content, headers=FORM)
    assert response.status_code == 422


async def test_a_hash_with_old_parameters_is_renewed_at_login(services: Services, client: httpx.AsyncClient) -> None:
    account = await register(client)
    stored = argon2.PasswordHasher(time_cost=2, memory_cost=16, parallelism=1).hash(account.password)
    async with services.database.writing() as session:
        await user_repository.update_password(session, account.id, stored)
    assert (await log_in(client, account.phone, account.password)).status_code == 200
    async with services.database.reading() as session:
        found = await user_repository.find_password(session, account.id)
    assert found is not None
    assert found[1].startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert (await log_in(client, account.phone, account.password)).status_code == 200


@pytest.mark.settings(limit_login_per_ip="5/minute")
async def test_an_address_may_log_in_only_so_often(timed: FastAPI, clock: ManualClock) -> None:
    async with client_from(timed, "192.0.2.1") as one, client_from(timed, "192.0.2.2") as other:
        for _ in range(5):
            assert (await log_in(one, "+79990000000", "Another-Lantern-1")).status_code == 401
        refused = await log_in(one, "+79990000001", "Another-Lantern-1")
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await log_in(other, "+79990000000", "Another-Lantern-1")).status_code == 401
        clock.advance(61)
        assert (await log_in(one, "+79990000000", "Another-Lantern-1")).status_code == 401


@pytest.mark.settings(limit_login_per_ip="5/minute")
async def test_a_whole_ipv6_network_counts_as_one_address(timed: FastAPI) -> None:
    codes = []
    for number in range(7):
        async with client_from(timed, f"2001:db8::{number + 1}") as client:
            codes.append((await log_in(client, "+79990000000", "Another-Lantern-1")).status_code)
    assert codes == [401] * 5 + [429] * 2


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ("fe80::1%\u00e9", "fe80::1"),
        ("fe80::1%" + "x" * 300, "fe80::1"),
        ("::ffff:192.0.2.1%eth0", str(ipaddress.ip_address("::ffff:192.0.2.1"))),
        ("192.0.2.1", "192.0.2.1"),
        ("\u00e9", ""),
        ("%", ""),
    ],
)
async def test_whatever_a_proxy_says_of_an_address_one_can_come_in_and_only_addresses_are_kept(
    timed: FastAPI, named: str, shown: str
) -> None:
    async with client_from(timed, named) as client:
        account = await register(client)
        assert (await log_in(client, account.phone, account.password)).status_code == 200
        refreshed = await client.post("/api/v1/auth/refresh", json={"refresh_token": account.refresh_token})
        assert refreshed.status_code == 200
        devices = (await client.get("/api/v1/auth/sessions", headers=account.headers)).json()
    assert [device["ip"] for device in devices] == [shown] * 2


@pytest.mark.settings(limit_login_per_account_and_ip="3/minute")
async def test_an_address_may_try_one_account_only_so_often(client: httpx.AsyncClient) -> None:
    account = await register(client)
    codes = [(await log_in(client, account.phone, "Another-Lantern-1")).status_code for _ in range(4)]
    assert codes == [401, 401, 401, 429]
    assert (await log_in(client, "+79990000000", "Another-Lantern-1")).status_code == 401


@pytest.mark.settings(limit_login_failures_per_account="10/day")
async def test_guesses_from_everywhere_are_bounded_and_the_owner_still_gets_in(
    timed: FastAPI, clock: ManualClock
) -> None:
    async with client_from(timed, "192.0.2.1") as home:
        account = await register(home)
        codes = []
        for number in range(30):
            async with client_from(timed, f"198.51.100.{number}") as stranger:
                codes.append((await log_in(stranger, account.phone, "Another-Lantern-1")).status_code)
        assert codes == [401] * 10 + [429] * 20
        # Not even the right password helps a stranger now, nor does the answer tell.
        async with client_from(timed, "198.51.100.99") as stranger:
            assert (await log_in(stranger, account.phone, account.password)).status_code == 429
        assert (await log_in(home, account.phone, account.password)).status_code == 200
        clock.advance(86401)
        async with client_from(timed, "198.51.100.99") as stranger:
            assert (await log_in(stranger, account.phone, account.password)).status_code == 200


@pytest.mark.settings(limit_login_failures_per_account="10/day")
async def test_guesses_made_at_once_are_bounded_too(app: FastAPI, client: httpx.AsyncClient) -> None:
    account = await register(client)
    async with client_from(app, "198.51.100.1") as stranger:
        answers = await asyncio.gather(*(log_in(stranger, account.phone, "Another-Lantern-1") for _ in range(40)))
    assert sum(answer.status_code == 401 for answer in answers) == 10


@pytest.mark.settings(limit_login_failures_per_account="3/day")
async def test_a_success_forgets_the_failures(client: httpx.AsyncClient) -> None:
    account = await register(client)
    for _ in range(4):
        assert (await log_in(client, account.phone, "Another-Lantern-1")).status_code == 401
        assert (await log_in(client, account.phone, account.password)).status_code == 200


@pytest.mark.settings(limit_login_failures_per_account="3/day")
async def test_an_unknown_phone_is_limited_just_as_a_known_one(app: FastAPI) -> None:
    async with client_from(app, "198.51.100.1") as stranger:
        codes = [(await log_in(stranger, "+79990000000", "Another-Lantern-1")).status_code for _ in range(5)]
    assert codes == [401, 401, 401, 429, 429]


@pytest.mark.settings(limit_register_per_ip="2/hour")
async def test_an_address_may_register_only_so_many(client: httpx.AsyncClient) -> None:
    await register(client)
    await register(client)
    # Slips of the pen are not counted, nor is what is over the limit told apart from what is taken.
    assert (await client.post(f"{API}/auth/register", json=new_person() | {"phone": "1"})).status_code == 422
    assert (await client.post(f"{API}/auth/register", json=new_person())).status_code == 429


@pytest.mark.settings(argon2_threads=1, argon2_queue=2, argon2_memory_kib=65536, argon2_time_cost=2)
async def test_too_many_logins_at_once_are_told_to_come_back(client: httpx.AsyncClient) -> None:
    account = await register(client)
    answers = await asyncio.gather(*(log_in(client, account.phone, account.password) for _ in range(30)))
    assert {answer.status_code for answer in answers} == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1"


# --- access tokens ---


async def test_every_forged_token_gets_the_same_401(client: httpx.AsyncClient) -> None:
    account = await register(client)
    await register(client)  # "sub of somebody else" is somebody
    [session_id] = [row["id"] for row in (await client.get(f"{API}/auth/sessions", headers=account.headers)).json()]
    tokens = forgeries(account.id, session_id, SECRET_KEY)
    assert len(tokens) >= 40
    bodies = set()
    for fault, token in tokens.items():
        response = await client.get(f"{API}/users/me", headers={b"Authorization": f"Bearer {token}".encode()})
        # Blanks around the credentials are no part of them (RFC 9110 section 11.4).
        if fault not in ("a space behind", "a tab before"):
            assert response.status_code == 401, fault
            assert response.headers["www-authenticate"] == 'Bearer realm="dialect"'
            bodies.add(response.content)
    assert len(bodies) == 1


@pytest.mark.parametrize("scheme", ["", "Basic ", "bearer", "Token ", "Bearer Bearer "])
async def test_a_token_in_another_wrapping_is_none(client: httpx.AsyncClient, scheme: str) -> None:
    account = await register(client)
    response = await client.get(f"{API}/users/me", headers={"Authorization": scheme + account.access_token})
    assert response.status_code == 401


async def test_a_refresh_token_opens_nothing_but_the_refresh(client: httpx.AsyncClient) -> None:
    account = await register(client)
    response = await client.get(f"{API}/users/me", headers={"Authorization": f"Bearer {account.refresh_token}"})
    assert response.status_code == 401
    assert (await refresh(client, account.access_token)).status_code == 401


async def test_an_access_token_ends_after_its_hour(timed_client: httpx.AsyncClient, clock: ManualClock) -> None:
    account = await register(timed_client)
    clock.advance(3590)
    assert await works(timed_client, account)
    clock.advance(20)
    assert not await works(timed_client, account)
    assert (await refresh(timed_client, account.refresh_token)).status_code == 200


# --- refresh tokens ---


async def test_a_refresh_brings_the_next_pair(client: httpx.AsyncClient) -> None:
    account = await register(client)
    first = (await refresh(client, account.refresh_token)).json()
    second = (await refresh(client, first["refresh_token"])).json()
    assert len({account.refresh_token, first["refresh_token"], second["refresh_token"]}) == 3
    headers = {"Authorization": f"Bearer {second['access_token']}"}
    assert (await client.get(f"{API}/users/me", headers=headers)).json()["id"] == account.id
    assert len((await client.get(f"{API}/auth/sessions", headers=headers)).json()) == 1


async def test_twenty_refreshes_of_one_token_at_once_bring_one_successor(client: httpx.AsyncClient) -> None:
    account = await register(client)
    answers = await asyncio.gather(*(refresh(client, account.refresh_token) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    [successor] = {answer.json()["refresh_token"] for answer in answers}
    assert (await refresh(client, successor)).status_code == 200


async def test_a_lost_answer_may_be_asked_for_again(timed_client: httpx.AsyncClient, clock: ManualClock) -> None:
    account = await register(timed_client)
    first = await refresh(timed_client, account.refresh_token)
    clock.advance(25)
    again = await refresh(timed_client, account.refresh_token)
    assert again.json()["refresh_token"] == first.json()["refresh_token"]


async def test_a_token_that_comes_back_late_ends_its_session(
    timed: FastAPI, timed_client: httpx.AsyncClient, clock: ManualClock
) -> None:
    ended: list[int] = []
    auth: AuthService = timed.state.services.auth
    auth.on_session_ended.append(ended.append)
    account = await register(timed_client)
    other = await log_in_account(timed_client, account)
    successor = (await refresh(timed_client, account.refresh_token)).json()["refresh_token"]
    assert await works(timed_client, account)
    clock.advance(31)
    replayed = await refresh(timed_client, account.refresh_token)
    assert (replayed.status_code, replayed.json()["code"]) == (401, "invalid_refresh_token")
    assert len(ended) == 1
    assert not await works(timed_client, account)
    assert (await refresh(timed_client, successor)).status_code == 401
    assert await works(timed_client, other)


async def test_only_hashes_of_refresh_tokens_are_stored(services: Services, client: httpx.AsyncClient) -> None:
    account = await register(client)
    successor = (await refresh(client, account.refresh_token)).json()["refresh_token"]
    async with services.database.reading() as session:
        rows = (await session.execute(session_repository.TOKEN.select())).all()
    assert len(rows) == 2
    assert account.refresh_token not in repr(rows)
    assert successor not in repr(rows)


@pytest.mark.parametrize("token", ["x", "x" * 256, "é" * 43, "A" * 43, " ", "\x01"])
async def test_what_was_never_a_refresh_token_is_refused(client: httpx.AsyncClient, token: str) -> None:
    assert (await refresh(client, token)).status_code == 401


async def test_a_session_unused_for_too_long_is_over(timed_client: httpx.AsyncClient, clock: ManualClock) -> None:
    account = await register(timed_client)
    clock.advance(29 * 86400)
    token = (await refresh(timed_client, account.refresh_token)).json()["refresh_token"]
    clock.advance(29 * 86400)
    token = (await refresh(timed_client, token)).json()["refresh_token"]
    clock.advance(31 * 86400)
    assert (await refresh(timed_client, token)).status_code == 401


async def test_what_has_expired_is_swept_when_its_owner_comes_back(
    timed: FastAPI, timed_client: httpx.AsyncClient, clock: ManualClock
) -> None:
    account = await register(timed_client)
    token = (await refresh(timed_client, account.refresh_token)).json()["refresh_token"]
    clock.advance(29 * 86400)
    await refresh(timed_client, token)
    clock.advance(2 * 86400)
    database: Database = timed.state.services.database

    async def count() -> tuple[int, int]:
        async with database.reading() as session:
            sessions = (await session.execute(session_repository.SESSION.select())).all()
            tokens = (await session.execute(session_repository.TOKEN.select())).all()
        return len(sessions), len(tokens)

    assert await count() == (1, 3)
    clock.advance(31 * 86400)
    await log_in_account(timed_client, account)
    assert await count() == (1, 1)


async def test_tokens_used_long_ago_are_forgotten_while_the_session_lives(
    timed: FastAPI, timed_client: httpx.AsyncClient, clock: ManualClock
) -> None:
    token = (await register(timed_client)).refresh_token
    for _ in range(6):
        token = (await refresh(timed_client, token)).json()["refresh_token"]
        clock.advance(20 * 86400)
    token = (await refresh(timed_client, token)).json()["refresh_token"]
    database: Database = timed.state.services.database
    async with database.reading() as session:
        tokens = (await session.execute(session_repository.TOKEN.select())).all()
    assert len(tokens) == 3  # the newest, and those used now and 20 days ago


@pytest.mark.settings(limit_refresh_per_ip="3/minute")
async def test_an_address_may_refresh_only_so_often(client: httpx.AsyncClient) -> None:
    assert [(await refresh(client, "x")).status_code for _ in range(4)] == [401, 401, 401, 429]


# --- sessions ---


async def test_a_logout_is_felt_at_once_by_both_tokens_and_by_sockets(
    services: Services, client: httpx.AsyncClient
) -> None:
    ended: list[int] = []
    services.auth.on_session_ended.append(ended.append)
    account = await register(client)
    other = await log_in_account(client, account)
    assert await works(client, account)
    response = await client.post(f"{API}/auth/logout", headers=account.headers)
    assert (response.status_code, response.content) == (204, b"")
    assert not await works(client, account)
    assert (await refresh(client, account.refresh_token)).status_code == 401
    assert len(ended) == 1
    assert await works(client, other)


async def test_a_failing_listener_does_not_undo_a_logout(
    services: Services, client: httpx.AsyncClient, request: pytest.FixtureRequest
) -> None:
    request.node.add_marker(pytest.mark.logs_errors)

    def fail(_session_id: int) -> None:
        raise RuntimeError("planted")

    heard: list[int] = []
    services.auth.on_session_ended[:] = [fail, heard.append]
    account = await register(client)
    assert (await client.post(f"{API}/auth/logout", headers=account.headers)).status_code == 204
    assert not await works(client, account)
    assert len(heard) == 1


async def test_an_end_on_another_worker_shows_within_a_minute(
    timed: FastAPI, timed_client: httpx.AsyncClient, clock: ManualClock
) -> None:
    account = await register(timed_client)
    assert await works(timed_client, account)
    services: Services = timed.state.services
    caller = await services.auth.authenticate(account.access_token)
    # As another worker does it: this process hears nothing.
    async with services.database.writing() as session:
        now = clock.now().replace(tzinfo=None)
        await session_repository.end_sessions(session, [caller.session_id], now, "logout")
    clock.advance(61)
    assert not await works(timed_client, account)


async def test_a_logout_while_a_request_looks_the_session_up_is_not_forgotten(
    services: Services, client: httpx.AsyncClient
) -> None:
    for _ in range(20):
        account = await register(client)
        answers = await asyncio.gather(
            *(works(client, account) for _ in range(3)),
            client.post(f"{API}/auth/logout", headers=account.headers),
            *(works(client, account) for _ in range(3)),
        )
        assert len(answers) == 7
        assert not await works(client, account)


async def test_devices_are_listed_and_ended_one_by_one(client: httpx.AsyncClient) -> None:
    account = await register(client, device_name="Ann's phone", platform="android")
    response = await client.post(
        f"{API}/auth/token",
        data={"username": account.phone, "password": account.password},
        headers={"User-Agent": "Browser/1.0 (line\tbreak) " + "x" * 200},
    )
    browser = {"Authorization": f"Bearer {response.json()['access_token']}"}
    devices = (await client.get(f"{API}/auth/sessions", headers=browser)).json()
    assert [(device["platform"], device["current"]) for device in devices] == [("", True), ("android", False)]
    assert devices[1]["device_name"] == "Ann's phone"
    assert devices[0]["device_name"].startswith("Browser/1.0 (linebreak) xxx")
    assert len(devices[0]["device_name"]) == 64
    assert devices[0]["ip"] == "127.0.0.1"
    assert set(devices[0]) == {"id", "device_name", "platform", "ip", "created_at", "last_seen_at", "current"}
    ended = await client.delete(f"{API}/auth/sessions/{devices[1]['id']}", headers=browser)
    assert ended.status_code == 204
    assert not await works(client, account)
    assert len((await client.get(f"{API}/auth/sessions", headers=browser)).json()) == 1


async def test_a_session_of_somebody_else_looks_like_none(client: httpx.AsyncClient) -> None:
    account, stranger = await register(client), await register(client)
    [session] = (await client.get(f"{API}/auth/sessions", headers=account.headers)).json()
    foreign = await client.delete(f"{API}/auth/sessions/{session['id']}", headers=stranger.headers)
    missing = await client.delete(f"{API}/auth/sessions/9007199254740991", headers=stranger.headers)
    assert foreign.status_code == missing.status_code == 404
    assert foreign.content == missing.content
    assert await works(client, account)
    for bad in ("0", "-1", "9007199254740992", "x"):
        assert (await client.delete(f"{API}/auth/sessions/{bad}", headers=account.headers)).status_code in (404, 422)


async def test_all_other_devices_can_be_logged_out(client: httpx.AsyncClient) -> None:
    account = await register(client)
    others = [await log_in_account(client, account) for _ in range(3)]
    response = await client.delete(f"{API}/auth/sessions", headers=others[1].headers)
    assert response.status_code == 204
    assert [await works(client, one) for one in (account, *others)] == [False, False, True, False]


@pytest.mark.settings(max_sessions_per_user=3)
async def test_the_device_unused_for_longest_makes_room(timed_client: httpx.AsyncClient, clock: ManualClock) -> None:
    account = await register(timed_client)
    second = await log_in_account(timed_client, account)
    clock.advance(120)
    assert await works(timed_client, account)  # used since
    third = await log_in_account(timed_client, account)
    fourth = await log_in_account(timed_client, account)
    assert [await works(timed_client, one) for one in (account, second, third, fourth)] == [
        True,
        False,
        True,
        True,
    ]


async def test_last_seen_moves_at_most_once_a_minute(timed_client: httpx.AsyncClient, clock: ManualClock) -> None:
    account = await register(timed_client)

    async def last_seen() -> str:
        [device] = (await timed_client.get(f"{API}/auth/sessions", headers=account.headers)).json()
        seen: str = device["last_seen_at"]
        return seen

    first = await last_seen()
    clock.advance(30)
    assert await last_seen() == first
    clock.advance(45)
    second = await last_seen()
    assert second > first
    clock.advance(30)
    assert await last_seen() == second


# --- changing the password ---


async def change_password(client: httpx.AsyncClient, account: Account, old: str, new: str) -> httpx.Response:
    body = {"old_password": old, "new_password": new}
    return await client.post(f"{API}/auth/password", json=body, headers=account.headers)


async def test_a_new_password_works_the_old_one_does_not_and_other_devices_are_out(client: httpx.AsyncClient) -> None:
    account = await register(client)
    other = await log_in_account(client, account)
    assert (await change_password(client, account, account.password, "Maple-harbour-99")).status_code == 204
    assert await works(client, account)
    assert not await works(client, other)
    assert (await refresh(client, other.refresh_token)).status_code == 401
    assert (await refresh(client, account.refresh_token)).status_code == 200
    assert (await log_in(client, account.phone, account.password)).status_code == 401
    assert (await log_in(client, account.phone, "Maple-harbour-99")).status_code == 200


async def test_a_password_changes_only_for_who_knows_the_old_one(client: httpx.AsyncClient) -> None:
    account = await register(client)
    wrong = await change_password(client, account, "Another-Lantern-1", "Maple-harbour-99")
    assert (wrong.status_code, wrong.json()["code"]) == (403, "wrong_password")
    weak = await change_password(client, account, account.password, "password")
    assert (weak.status_code, weak.json()["code"]) == (422, "weak_password")
    assert (await log_in(client, account.phone, account.password)).status_code == 200


@pytest.mark.settings(limit_login_failures_per_account="3/day")
async def test_a_stolen_token_cannot_guess_the_password_without_limit(client: httpx.AsyncClient) -> None:
    account = await register(client)
    codes = [
        (await change_password(client, account, "Another-Lantern-1", "Maple-harbour-99")).status_code for _ in range(5)
    ]
    assert codes == [403, 403, 403, 429, 429]
    assert (await log_in(client, account.phone, account.password)).status_code == 200


async def test_no_session_opened_by_the_old_password_outlives_the_change(client: httpx.AsyncClient) -> None:
    account = await register(client)
    changed, *logins = await asyncio.gather(
        change_password(client, account, account.password, "Maple-harbour-99"),
        *(log_in(client, account.phone, account.password) for _ in range(20)),
    )
    assert changed.status_code == 204
    assert {login.status_code for login in logins} <= {200, 401}
    alive = (await client.get(f"{API}/auth/sessions", headers=account.headers)).json()
    assert [device["current"] for device in alive] == [True]


# --- tickets ---


async def test_a_ticket_opens_one_socket_once(services: Services, client: httpx.AsyncClient) -> None:
    account = await register(client)
    answer = await client.post(f"{API}/auth/ws-ticket", headers=account.headers)
    assert answer.json()["expires_in"] == 30
    caller = await services.auth.redeem_ticket(answer.json()["ticket"])
    assert caller == await services.auth.authenticate(account.access_token)
    with pytest.raises(Unauthenticated):
        await services.auth.redeem_ticket(answer.json()["ticket"])


@pytest.mark.parametrize("seconds", [31, 4000])
async def test_a_ticket_ends_soon(
    timed: FastAPI, timed_client: httpx.AsyncClient, clock: ManualClock, seconds: int
) -> None:
    auth: AuthService = timed.state.services.auth
    caller = await auth.authenticate((await register(timed_client)).access_token)
    ticket = (await auth.issue_ticket(caller))["ticket"]
    clock.advance(seconds)
    with pytest.raises(Unauthenticated):
        await auth.redeem_ticket(ticket)


async def test_a_ticket_ends_with_its_session(services: Services, client: httpx.AsyncClient) -> None:
    caller = await services.auth.authenticate((await register(client)).access_token)
    ticket = (await services.auth.issue_ticket(caller))["ticket"]
    await services.auth.logout(caller)
    with pytest.raises(Unauthenticated):
        await services.auth.redeem_ticket(ticket)


@pytest.mark.parametrize("ticket", ["", "x", "x" * 5000, "é"])
async def test_what_was_never_a_ticket_opens_nothing(services: Services, ticket: str) -> None:
    with pytest.raises(Unauthenticated):
        await services.auth.redeem_ticket(ticket)


async def test_one_device_holds_few_tickets_and_takes_nobody_elses_place(
    services: Services, client: httpx.AsyncClient
) -> None:
    auth = services.auth
    quiet = await auth.authenticate((await register(client)).access_token)
    greedy = await auth.authenticate((await register(client)).access_token)
    kept = (await auth.issue_ticket(quiet))["ticket"]
    tickets = [(await auth.issue_ticket(greedy))["ticket"] for _ in range(TICKETS_PER_SESSION + 5)]
    assert await auth.redeem_ticket(kept) == quiet

    async def opens(ticket: str) -> bool:
        try:
            return await auth.redeem_ticket(ticket) == greedy
        except Unauthenticated:
            return False

    assert [await opens(ticket) for ticket in tickets] == [False] * 5 + [True] * TICKETS_PER_SESSION


# --- everything at once ---


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/users/me"),
        ("PATCH", "/users/me"),
        ("GET", "/users/search?q=ann"),
        ("GET", "/users/1"),
        ("GET", "/users/blocked"),
        ("POST", "/users/block/1"),
        ("DELETE", "/users/block/1"),
        ("POST", "/auth/logout"),
        ("POST", "/auth/ws-ticket"),
        ("GET", "/auth/sessions"),
        ("DELETE", "/auth/sessions"),
        ("DELETE", "/auth/sessions/1"),
        ("POST", "/auth/password"),
        ("PUT", "/push/device"),
        ("DELETE", "/push/device"),
    ],
)
async def test_without_a_token_nothing_is_told(client: httpx.AsyncClient, method: str, path: str) -> None:
    assert (await client.request(method, API + path)).status_code == 401
