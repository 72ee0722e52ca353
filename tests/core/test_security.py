"""Tokens and hashes by themselves; what they open is tested in tests/services/test_auth.py."""

from __future__ import annotations

import asyncio
import time

import jwt
import pytest

from app.core import security
from app.core.errors import StartupError, Unauthenticated, Unavailable
from app.core.security import AccessTokens, PasswordHasher
from tests.support.clock import ManualClock
from tests.support.databases import SECRET_KEY, make_settings
from tests.support.tokens import HEADER, forgeries, good_claims, sign


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tokens(clock: ManualClock) -> AccessTokens:
    return AccessTokens(make_settings(), clock)


def test_a_token_says_who_calls_by_which_session_and_until_when(tokens: AccessTokens, clock: ManualClock) -> None:
    claims = tokens.read(tokens.issue(7, 42))
    assert (claims.user_id, claims.session_id) == (7, 42)
    assert 3598 < (claims.expires_at - clock.now()).total_seconds() <= 3600


def test_the_claims_of_a_token_are_those_promised(tokens: AccessTokens) -> None:
    token = tokens.issue(7, 42)
    assert jwt.get_unverified_header(token) == HEADER
    claims = jwt.decode(token, SECRET_KEY, ["HS256"])
    assert set(claims) == {"sub", "iat", "exp", "jti", "sid", "typ"}
    assert (claims["sub"], claims["sid"], claims["typ"]) == ("7", "42", "access")


def test_no_two_tokens_are_the_same(tokens: AccessTokens) -> None:
    assert tokens.issue(7, 42) != tokens.issue(7, 42)


def test_the_tool_that_forges_tokens_can_also_make_a_good_one(tokens: AccessTokens, clock: ManualClock) -> None:
    assert tokens.read(sign(HEADER, good_claims(7, 42, clock.now().timestamp()), SECRET_KEY)).user_id == 7


# Two of them are only wrong to one who knows the sessions: see tests/services/test_auth.py.
READABLE = {"sub of somebody else", "sid of no session"}


@pytest.mark.parametrize("fault", sorted(set(forgeries(7, 42, SECRET_KEY)) - READABLE))
def test_a_forged_token_is_refused_like_any_other(tokens: AccessTokens, clock: ManualClock, fault: str) -> None:
    forged = forgeries(7, 42, SECRET_KEY, clock.now().timestamp())[fault]
    with pytest.raises(Unauthenticated) as caught:
        tokens.read(forged)
    assert (caught.value.code, caught.value.detail) == (Unauthenticated().code, Unauthenticated().detail)
    assert caught.value.__cause__ is None


def test_a_token_ends_when_it_says(tokens: AccessTokens, clock: ManualClock) -> None:
    token = tokens.issue(7, 42)
    clock.advance(3598)
    tokens.read(token)
    clock.advance(3)
    with pytest.raises(Unauthenticated):
        tokens.read(token)


def test_a_clock_set_back_locks_nobody_out(tokens: AccessTokens, clock: ManualClock) -> None:
    token = tokens.issue(7, 42)
    clock.set_back(86400)
    assert tokens.read(token).user_id == 7


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_every_algorithm_that_can_be_set_works(clock: ManualClock, algorithm: str) -> None:
    tokens = AccessTokens(make_settings(algorithm=algorithm, secret_key="k" * 64), clock)
    assert tokens.read(tokens.issue(7, 42)).user_id == 7


def test_a_key_too_short_for_its_algorithm_stops_the_start(clock: ManualClock) -> None:
    with pytest.raises(StartupError, match="HS512 needs 64"):
        AccessTokens(make_settings(algorithm="HS512", secret_key="k" * 40), clock)


def test_a_refresh_token_has_one_successor_that_only_the_server_can_tell() -> None:
    token = security.new_secret()
    first = security.successor(b"key", token)
    assert first == security.successor(b"key", token)
    assert len(first) == len(token) == 43
    assert first not in {security.successor(b"other", token), security.successor(b"key", token + "x"), token}


# --- passwords ---


async def test_a_password_fits_its_own_hash_only() -> None:
    hasher = PasswordHasher(make_settings())
    stored = await hasher.hash("correct horse")
    assert stored.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert await hasher.verify(stored, "correct horse")
    assert not await hasher.verify(stored, "correct horsE")
    assert not await hasher.verify("not a hash", "correct horse")
    assert await hasher.hash("correct horse") != stored
    hasher.close()


async def test_without_an_account_no_password_fits() -> None:
    hasher = PasswordHasher(make_settings())
    assert not await hasher.verify(None, "anything")
    hasher.close()


async def test_the_parameters_are_those_of_the_settings_and_old_hashes_are_noticed() -> None:
    weak, strong = PasswordHasher(make_settings()), PasswordHasher(make_settings(argon2_time_cost=2))
    stored = await weak.hash("correct horse")
    assert not weak.needs_rehash(stored)
    assert strong.needs_rehash(stored)
    assert await strong.verify(stored, "correct horse")
    weak.close()
    strong.close()


def test_the_defaults_are_19_mib_and_two_passes() -> None:
    settings = make_settings(argon2_memory_kib=19456, argon2_time_cost=2)
    fields = type(settings).model_fields
    assert (fields["argon2_memory_kib"].default, fields["argon2_time_cost"].default) == (19456, 2)


async def test_hashing_leaves_the_loop_free() -> None:
    hasher = PasswordHasher(make_settings(argon2_memory_kib=19456, argon2_time_cost=4))
    work = asyncio.gather(*(hasher.hash("correct horse") for _ in range(6)))
    longest = 0.0
    while not work.done():
        before = time.perf_counter()
        await asyncio.sleep(0)
        longest = max(longest, time.perf_counter() - before)
    assert longest < 0.25
    hasher.close()


async def test_beyond_the_queue_passwords_are_refused_at_once_and_the_queue_drains() -> None:
    hasher = PasswordHasher(make_settings(argon2_threads=1, argon2_queue=3))
    answers = await asyncio.gather(*(hasher.hash("correct horse") for _ in range(20)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Unavailable)]
    assert len(refused) == 16
    assert {(error.code, error.retry_after) for error in refused} == {("overloaded", 1)}
    await hasher.hash("correct horse")
    hasher.close()


async def test_callers_who_went_away_leave_no_trace_in_the_queue() -> None:
    hasher = PasswordHasher(make_settings(argon2_threads=1, argon2_queue=3))
    for _ in range(5):
        waiting = [asyncio.ensure_future(hasher.hash("correct horse")) for _ in range(4)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert await hasher.verify(await hasher.hash("correct horse"), "correct horse")
    hasher.close()
