"""Passwords, access tokens and refresh tokens: the only room that holds secrets in its hands.

Passwords are hashed with Argon2id in threads of their own, never on the event loop. Access tokens are JWTs that
say who calls and by which session. Refresh tokens are random, opaque, and stored as hashes only.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

import argon2
import jwt

from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import StartupError, Unauthenticated, Unavailable

T = TypeVar("T")

# --- passwords ---

NICENESS = 10
"""Hashing yields to the event loop: a login may take longer, a message must not."""


class PasswordHasher:
    """Argon2id in a small pool of threads with a bounded queue."""

    def __init__(self, settings: Settings) -> None:
        self._argon2 = argon2.PasswordHasher(
            time_cost=settings.argon2_time_cost,
            memory_cost=settings.argon2_memory_kib,
            parallelism=1,
            hash_len=32,
            salt_len=16,
            type=argon2.Type.ID,
        )
        self._pool = ThreadPoolExecutor(settings.argon2_threads, "argon2", initializer=_lower_priority)
        self._pending = 0
        self._max_pending = settings.argon2_threads + settings.argon2_queue
        # Checked when there is no account, so that a login takes as long without one as with one.
        self._dummy = self._argon2.hash(secrets.token_urlsafe(16))

    async def hash(self, password: str) -> str:
        """A salted hash to store. Raises Unavailable when too many passwords are waiting."""
        return await self._run(lambda: self._argon2.hash(password))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether the password is the stored one; None, for no account, costs the same and is always false.

        Raises Unavailable when too many passwords are waiting.
        """
        return await self._run(lambda: self._verify(stored, password))

    def needs_rehash(self, stored: str) -> bool:
        """Whether a hash was made with other parameters than those set now."""
        return self._argon2.check_needs_rehash(stored)

    @property
    def waiting(self) -> int:
        """Passwords being hashed or waiting for it."""
        return self._pending

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _verify(self, stored: str | None, password: str) -> bool:
        try:
            matches = self._argon2.verify(self._dummy if stored is None else stored, password)
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False
        return stored is not None and matches

    async def _run(self, work: Callable[[], T]) -> T:
        if self._pending >= self._max_pending:
            metrics.argon2_refusals.inc()
            raise Unavailable("overloaded", "Too many people are logging in; try again in a moment.", retry_after=1)
        self._pending += 1
        try:
            # A caller that goes away cancels the work while it waits for a thread, so `_pending` stays true.
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._pending -= 1


def _lower_priority() -> None:
    # Only Linux has priorities per thread; elsewhere this would slow the whole process.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


# --- access tokens ---

MAX_TOKEN_CHARS = 4096
MAX_TOKEN_SECONDS = 24 * 3600
"""The longest life that the settings allow; a token that claims more is not ours."""
_CLAIMS = ["sub", "iat", "exp", "jti", "sid", "typ"]
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_DECIMAL = re.compile(r"[1-9][0-9]{0,15}")
_KEY_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}


class Claims(NamedTuple):
    """What an access token says."""

    user_id: int
    session_id: int
    expires_at: datetime


class AccessTokens:
    """Signs and reads access tokens. The algorithm is ours, never the token's choice."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._key = settings.secret_key.get_secret_value().encode()
        self._algorithm = settings.algorithm
        self._clock = clock
        self.lifetime_seconds = max(1, round(settings.access_token_expire_minutes * 60))
        if len(self._key) < _KEY_BYTES[self._algorithm]:
            raise StartupError(
                f"SECRET_KEY has {len(self._key)} bytes; {self._algorithm} needs {_KEY_BYTES[self._algorithm]}."
            )

    def issue(self, user_id: int, session_id: int) -> str:
        """A token of a session, valid from now on for the lifetime set."""
        now = int(self._clock.now().timestamp())
        claims = {
            "sub": str(user_id),
            "iat": now,
            "exp": now + self.lifetime_seconds,
            "jti": secrets.token_urlsafe(16),
            "sid": str(session_id),
            "typ": "access",
        }
        return jwt.encode(claims, self._key, algorithm=self._algorithm)

    def read(self, token: str) -> Claims:
        """What a token says, once it is proven to be ours. Raises Unauthenticated, the same for every fault."""
        try:
            return self._read(token)
        except (jwt.InvalidTokenError, ValueError, TypeError, OverflowError, OSError, RecursionError):
            raise Unauthenticated() from None  # the cause may quote the token

    def _read(self, token: str) -> Claims:
        if len(token) > MAX_TOKEN_CHARS or not _SHAPE.fullmatch(token):
            raise ValueError("not a token")
        decoded = jwt.decode_complete(
            token,
            self._key,
            algorithms=[self._algorithm],
            # `exp` is checked below by our own clock. `iat` is not: a clock set back would lock everybody out.
            options={"require": _CLAIMS, "verify_iat": False, "verify_exp": False},
        )
        header, claims = decoded["header"], decoded["payload"]
        if header != {"alg": self._algorithm, "typ": "JWT"}:
            raise ValueError("a header we do not write")
        # One token, one spelling: no stray bits behind the signature, no spaces or doubled names in the claims.
        _, payload, signature = token.split(".")
        if _decode_strictly(payload) != json.dumps(claims, separators=(",", ":")).encode():
            raise ValueError("not as we write it")
        _decode_strictly(signature)
        user_id, session_id = _decimal(claims["sub"]), _decimal(claims["sid"])
        issued, expires = _whole(claims["iat"]), _whole(claims["exp"])
        if claims["typ"] != "access" or not 0 < expires - issued <= MAX_TOKEN_SECONDS:
            raise ValueError("not an access token of ours")
        if expires <= self._clock.now().timestamp():
            raise ValueError("expired")
        return Claims(user_id, session_id, datetime.fromtimestamp(expires, UTC))


def _decode_strictly(segment: str) -> bytes:
    raw = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != segment:
        raise ValueError("not canonical base64url")
    return raw


def _decimal(value: Any) -> int:
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise ValueError("not a decimal string")
    return int(value)


def _whole(value: Any) -> int:
    if type(value) is not int:  # bool is an int, too
        raise ValueError("not a whole number")
    return value


# --- refresh tokens and tickets ---


def new_secret() -> str:
    """An opaque token of 256 random bits."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """What is stored of an opaque token. It has entropy enough to need no salt."""
    return hashlib.sha256(token.encode()).digest()


def successor(secret_key: bytes, refresh_token: str) -> str:
    """The refresh token that follows this one.

    Derived rather than drawn: a client that lost the answer and asks again gets the same one, although the server
    keeps nothing but hashes.
    """
    digest = hmac.new(secret_key, b"refresh:" + refresh_token.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
