"""Accounts and sessions: who may come in, by what proof, and for how long.

A session is one device logged in. Its access token proves who calls for an hour; its refresh token, which works
once, fetches the next pair. Passwords are hashed outside any transaction.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import NamedTuple

from app.core import security
from app.core.bloom_filter import UsernameFilter
from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from app.core.ids import IdAllocator
from app.core.passwords import check_password, prepare_password
from app.core.phone import parse_phone
from app.core.security import AccessTokens, PasswordHasher
from app.core.tasks import supervise
from app.db.database import Database
from app.db.repositories import push as push_repository
from app.db.repositories import sessions as session_repository
from app.db.repositories import trace as trace_repository
from app.db.repositories import users as user_repository
from app.db.repositories.sessions import SessionRow
from app.db.repositories.users import UserRow
from app.db.schemas import Device, Registered, RegisterIn, Ticket, Tokens
from app.services.caller import Caller
from app.services.coalescer import Coalescer
from app.services.rate_limiter import RateLimiter, address_key
from app.services.ticket_store import TicketStore
from app.services.unit_of_work import UnitOfWork, UnitOfWorkFactory
from app.services.user_service import check_username, me_view, name_key

log = logging.getLogger(__name__)

CACHE_SECONDS = 60.0
"""For so long a session is believed alive without asking; what ends here is forgotten at once."""
CACHED_SESSIONS = 50_000
SESSIONS_AT_ONCE = 500
"""Sessions checked by one statement, when many come together."""
SEEN_DELAY_SECONDS = 1.0
SEEN_BATCH = 5_000
"""So many uses of sessions are stored by one statement."""


class _Alive(NamedTuple):
    user_id: int
    expires_at: datetime
    checked_at: float


class AuthService:
    """Registers, logs in, and says who is calling."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        unit_of_work: UnitOfWorkFactory,
        ids: IdAllocator,
        hasher: PasswordHasher,
        usernames: UsernameFilter,
        limiter: RateLimiter,
        tickets: TicketStore,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.database = database
        self.unit_of_work = unit_of_work
        self.ids = ids
        self.hasher = hasher
        self.usernames = usernames
        self.limiter = limiter
        self.tickets = tickets
        self.tokens = AccessTokens(settings, clock)
        self.on_session_ended: list[Callable[[int], None]] = []
        """Called with the id of a session once its end is committed."""
        self._secret_key = settings.secret_key.get_secret_value().encode()
        self._alive: OrderedDict[int, _Alive] = OrderedDict()
        self._endings = 0
        self._sessions: Coalescer[int, SessionRow] = Coalescer(self._read_sessions, most=SESSIONS_AT_ONCE)
        self._seen: dict[int, datetime] = {}
        """When sessions were last used, as long as it is not stored."""
        self._storing = asyncio.Lock()
        self._later: asyncio.Task[None] | None = None

    # --- coming in ---

    async def register(self, body: RegisterIn, ip: str, user_agent: str = "") -> Registered:
        """A new account with its first session.

        Raises BadInput for what cannot be a phone, a username or a password, Conflict when one of the first two is
        taken, TooManyRequests and Unavailable.
        """
        phone = parse_phone(body.phone, validation=self.settings.phone_validation)
        check_username(body.username)
        password = prepare_password(body.password)
        check_password(password, min_length=self.settings.password_min_length, phone=phone, username=body.username)
        await self.limiter.hit("limit_register_per_ip", address_key(ip))
        password_hash = await self.hasher.hash(password)
        [user_id] = await self.ids.reserve("user")
        [session_id] = await self.ids.reserve("session")
        now = self._now()
        user = UserRow(
            id=user_id,
            phone=phone,
            username=body.username,
            display_name=body.display_name or body.username,
            bio="",
            avatar=None,
            profile_version=1,
            account_version=0,
            created_at=now,
            last_seen_at=None,
        )
        session = self._new_session(session_id, user_id, ip, body.device_name or user_agent, body.platform)
        async with self.unit_of_work() as uow:
            # The constraints decide: whoever looked first and inserted then would let twins through.
            await user_repository.insert_user(
                uow.session, user, display_name_key=name_key(user.display_name), password_hash=password_hash
            )
            refresh_token = await self._insert_session(uow, session)
            uow.after_commit(lambda: self.usernames.take(user.username))
        return {**me_view(user), **self._tokens(user_id, session_id, refresh_token)}

    async def login(
        self, phone: str, password: str, ip: str, *, device_name: str = "", platform: str = "", user_agent: str = ""
    ) -> Tokens:
        """A new session of an account.

        Raises Unauthenticated, the same and as late for an unknown phone and for a wrong password, BadInput for
        what is no phone, TooManyRequests and Unavailable.
        """
        phone = parse_phone(phone, validation=self.settings.phone_validation, field="username")
        address = address_key(ip)
        await self.limiter.hit("limit_login_per_ip", address)
        await self.limiter.hit("limit_login_per_account_and_ip", phone, address)
        async with self.database.reading() as reading:
            found = await user_repository.find_credentials(reading, phone)
            user_id, stored = found or (0, None)
            alive = await session_repository.list_alive(reading, user_id, self._now())
        failures = self._failure_key(phone, address, alive)
        await self.limiter.hit("limit_login_failures_per_account", *failures)
        password = prepare_password(password)
        if not await self.hasher.verify(stored, password) or stored is None:
            raise _invalid_credentials()
        await self.limiter.clear("limit_login_failures_per_account", *failures)
        new_hash = await self.hasher.hash(password) if self.hasher.needs_rehash(stored) else None
        [session_id] = await self.ids.reserve("session")
        session = self._new_session(session_id, user_id, ip, device_name or user_agent, platform)
        async with self.unit_of_work() as uow:
            # Under the lock: a password changed meanwhile must not open a session that outlives the change.
            if await user_repository.lock_password_hash(uow.session, user_id) != stored:
                raise _invalid_credentials()
            if new_hash is not None:
                await user_repository.update_password(uow.session, user_id, new_hash)
            expired, alive = await session_repository.prune_and_list_alive(uow.session, user_id, self._now())
            if expired:
                await push_repository.delete_devices(uow.session, expired)
                await trace_repository.delete_pushed(uow.session, expired)
            if surplus := self._with_seen(alive)[self.settings.max_sessions_per_user - 1 :]:
                await self._end(uow, [row.id for row in surplus], "too_many")
            refresh_token = await self._insert_session(uow, session)
        return self._tokens(user_id, session_id, refresh_token)

    def _failure_key(self, phone: str, address: str, alive: Sequence[SessionRow]) -> tuple[str, ...]:
        """Strangers share one count per account; an address the account is used from has its own.

        So nobody can lock the owner out by guessing.
        """
        known = any(address_key(row.ip) == address for row in alive)
        return (phone, address) if known else (phone,)

    def _new_session(self, session_id: int, user_id: int, ip: str, device_name: str, platform: str) -> SessionRow:
        now = self._now()
        return SessionRow(
            id=session_id,
            user_id=user_id,
            device_name=_one_line(device_name, 64),
            platform=_one_line(platform, 16),
            ip=_address(ip),
            created_at=now,
            last_seen_at=now,
            expires_at=now + self._idle_limit(),
            ended_at=None,
        )

    async def _insert_session(self, uow: UnitOfWork, session: SessionRow) -> str:
        refresh_token = security.new_secret()
        await session_repository.insert_session(uow.session, session, security.token_hash(refresh_token))
        return refresh_token

    def _tokens(self, user_id: int, session_id: int, refresh_token: str) -> Tokens:
        return {
            "access_token": self.tokens.issue(user_id, session_id),
            "token_type": "bearer",
            "expires_in": self.tokens.lifetime_seconds,
            "refresh_token": refresh_token,
        }

    # --- staying in ---

    async def refresh(self, refresh_token: str, ip: str) -> Tokens:
        """The next pair of tokens.

        The token works once; repeated within the grace it brings the same successor, for the client that lost the
        answer. Later it betrays that two hold it: the session ends. Raises Unauthenticated and TooManyRequests.
        """
        await self.limiter.hit("limit_refresh_per_ip", address_key(ip))
        used = security.token_hash(refresh_token)
        successor = security.successor(self._secret_key, refresh_token)
        now = self._now()
        async with self.unit_of_work() as uow:
            token = await session_repository.find_token(uow.session, used)
            session = await session_repository.lock_session(uow.session, token.session_id) if token else None
            # Again, under the lock: twins of this request may have waited for it, too.
            token = await session_repository.find_token(uow.session, used)
            if token is None or session is None or not session.is_alive(now):
                raise _invalid_refresh_token()
            if token.used_at is None:
                await session_repository.rotate_token(
                    uow.session,
                    session._replace(ip=_address(ip), last_seen_at=now, expires_at=now + self._idle_limit()),
                    used=used,
                    successor=security.token_hash(successor),
                    at=now,
                    forget_before=now - self._idle_limit(),
                )
                reused = False
            else:
                reused = now - token.used_at > timedelta(seconds=self.settings.refresh_grace_seconds)
            if reused:
                await self._end(uow, [session.id], "token_reused")
        if reused:  # only now: raising inside would undo the end of the session
            log.warning("refresh_token_reused", extra={"user_id": session.user_id, "session_id": session.id})
            raise _invalid_refresh_token()
        return self._tokens(session.user_id, session.id, successor)

    async def authenticate(self, token: str) -> Caller:
        """Who calls with this access token. Raises Unauthenticated, the same for every fault."""
        claims = self.tokens.read(token)
        caller = Caller(claims.user_id, claims.session_id, claims.expires_at)
        if not await self.is_alive(caller):
            raise Unauthenticated
        return caller

    async def is_alive(self, caller: Caller) -> bool:
        """Whether the session still stands; on other workers an end shows within CACHE_SECONDS."""
        now = self._now()
        known = self._alive.get(caller.session_id)
        if (
            known is None
            or self.clock.monotonic() - known.checked_at > CACHE_SECONDS
            or known.expires_at <= now  # a refresh may have moved it since
        ):
            known = await self._check_session(caller.session_id, now)
        return known is not None and known.user_id == caller.user_id and known.expires_at > now

    async def _check_session(self, session_id: int, now: datetime) -> _Alive | None:
        endings = self._endings
        checked_at = self.clock.monotonic()
        row = await self._sessions.get(session_id)
        if row is None or not row.is_alive(now):
            self._alive.pop(session_id, None)
            return None
        alive = _Alive(row.user_id, row.expires_at, checked_at)
        if endings == self._endings:  # else what was read may be older than an end
            self._alive[session_id] = alive
            self._alive.move_to_end(session_id)
            while len(self._alive) > CACHED_SESSIONS:
                self._alive.popitem(last=False)
        if now - row.last_seen_at >= timedelta(seconds=CACHE_SECONDS):
            self._saw(session_id, now)
        return alive

    async def _read_sessions(self, session_ids: Sequence[int]) -> dict[int, SessionRow]:
        async with self.database.reading() as reading:
            return {row.id: row for row in await session_repository.find_sessions(reading, session_ids)}

    # --- when sessions were last used ---

    def _saw(self, session_id: int, now: datetime) -> None:
        """A session was used: stored soon, with others, for nobody waits for a time stamp."""
        if len(self._seen) < CACHED_SESSIONS:
            self._seen[session_id] = now
        if self._later is None or self._later.done():
            self._later = supervise("sessions-seen", self._store_later, until=lambda: not self._seen)

    async def _store_later(self) -> None:
        while self._seen:
            await asyncio.sleep(SEEN_DELAY_SECONDS)
            await self._store_seen()

    async def _store_seen(self) -> None:
        """Store what is not yet, and wait for what is being stored already. What fails is left to the next use."""
        async with self._storing:
            while batch := dict(islice(self._seen.items(), SEEN_BATCH)):
                try:
                    async with self.unit_of_work() as uow:
                        await session_repository.touch_sessions(uow.session, sorted(batch), max(batch.values()))
                except Exception as error:
                    if isinstance(error, Unavailable):
                        log.info("sessions_seen_not_stored", extra={"sessions": len(self._seen)})
                    else:
                        log.exception("sessions_seen_not_stored", extra={"sessions": len(self._seen)})
                    self._seen.clear()
                for session_id, at in batch.items():
                    if self._seen.get(session_id) == at:
                        del self._seen[session_id]

    def _with_seen(self, rows: Sequence[SessionRow]) -> list[SessionRow]:
        """Sessions with the uses that are not stored yet, the last used first."""
        fresh = [
            row._replace(last_seen_at=max(row.last_seen_at, self._seen.get(row.id, row.last_seen_at))) for row in rows
        ]
        return sorted(fresh, key=lambda row: (row.last_seen_at, row.id), reverse=True)

    async def close(self) -> None:
        """Store what is not yet; before the database closes."""
        if self._later is not None:
            self._later.cancel()
            await asyncio.gather(self._later, return_exceptions=True)
        await self._store_seen()

    # --- going out ---

    async def logout(self, caller: Caller) -> None:
        """End the caller's session."""
        async with self.unit_of_work() as uow:
            await self._end(uow, [caller.session_id], "logout")

    async def list_sessions(self, caller: Caller) -> list[Device]:
        """The devices of the caller's account, the last used first."""
        async with self.database.reading() as reading:
            rows = self._with_seen(await session_repository.list_alive(reading, caller.user_id, self._now()))
        return [
            {
                "id": row.id,
                "device_name": row.device_name,
                "platform": row.platform,
                "ip": row.ip,
                "created_at": timestamp(row.created_at),
                "last_seen_at": timestamp(row.last_seen_at),
                "current": row.id == caller.session_id,
            }
            for row in rows
        ]

    async def end_session(self, caller: Caller, session_id: int) -> None:
        """Log one of the caller's devices out. Raises NotFound when it is none of theirs, or gone."""
        async with self.unit_of_work.of(caller.user_id) as uow:
            row = await session_repository.lock_session(uow.session, session_id)
            if row is None or row.user_id != caller.user_id or not row.is_alive(self._now()):
                raise NotFound("session_not_found", "There is no such session.")
            await self._end(uow, [session_id], "logout")

    async def end_other_sessions(self, caller: Caller) -> None:
        """Log all of the caller's devices out but this one."""
        async with self.unit_of_work.of(caller.user_id) as uow:
            await user_repository.lock_password_hash(uow.session, caller.user_id)  # no login slips in between
            await self._end_others(uow, caller)

    async def change_password(self, caller: Caller, old: str, new: str) -> None:
        """Change the password and log all other devices out.

        Raises Forbidden when the old one is wrong, BadInput for a weak new one, TooManyRequests and Unavailable.
        """
        async with self.database.reading() as reading:
            found = await user_repository.find_password(reading, caller.user_id)
        if found is None:
            raise Unauthenticated
        user, stored = found
        new = prepare_password(new)
        check_password(new, min_length=self.settings.password_min_length, phone=user.phone, username=user.username)
        # A stolen token must not be a way to guess without limit. Its guesses have a count of their own, so that
        # they do not keep the owner from logging in.
        failures = (user.phone, f"session {caller.session_id}")
        await self.limiter.hit("limit_login_failures_per_account", *failures)
        if not await self.hasher.verify(stored, prepare_password(old)):
            raise _wrong_password()
        await self.limiter.clear("limit_login_failures_per_account", *failures)
        new_hash = await self.hasher.hash(new)
        async with self.unit_of_work.of(caller.user_id) as uow:
            if await user_repository.lock_password_hash(uow.session, caller.user_id) != stored:
                raise _wrong_password()
            await user_repository.update_password(uow.session, caller.user_id, new_hash)
            await self._end_others(uow, caller)

    async def _end_others(self, uow: UnitOfWork, caller: Caller) -> None:
        alive = await session_repository.list_alive(uow.session, caller.user_id, self._now())
        if others := [row.id for row in alive if row.id != caller.session_id]:
            await self._end(uow, others, "logout")

    async def _end(self, uow: UnitOfWork, session_ids: list[int], reason: str) -> None:
        await session_repository.end_sessions(uow.session, session_ids, self._now(), reason)
        await push_repository.delete_devices(uow.session, session_ids)
        uow.after_commit(lambda: self._forget(session_ids))
        for session_id in session_ids:
            for callback in self.on_session_ended:
                uow.after_commit(partial(callback, session_id))

    def forget_session(self, session_id: int) -> None:
        """A session ended, on this worker or another: it is not believed alive any more."""
        self._forget([session_id])

    def forget_sessions(self) -> None:
        """Ends may have been missed: ask the database again before any session is believed alive."""
        self._endings += 1
        self._alive.clear()

    def _forget(self, session_ids: list[int]) -> None:
        self._endings += 1
        for session_id in session_ids:
            self._alive.pop(session_id, None)

    # --- socket tickets ---

    async def issue_ticket(self, caller: Caller) -> Ticket:
        """A key that opens one socket within seconds, so that no token stands in a URL.

        Raises Unavailable when too many are waiting to be used.
        """
        seconds = self.settings.socket_ticket_seconds
        return {"ticket": await self.tickets.issue(caller, seconds), "expires_in": int(seconds)}

    async def redeem_ticket(self, ticket: str) -> Caller:
        """Who was given this ticket; it works once. Raises Unauthenticated, the same for every fault."""
        caller = await self.tickets.redeem(ticket)
        if caller is None or caller.expires_at <= self.clock.now() or not await self.is_alive(caller):
            raise Unauthenticated
        return caller

    # --- small things ---

    def _now(self) -> datetime:
        return self.clock.now().astimezone(UTC).replace(tzinfo=None)

    def _idle_limit(self) -> timedelta:
        return timedelta(days=self.settings.refresh_token_expire_days)


def _address(ip: str) -> str:
    """An address as stored, 45 characters at most; what a proxy made up is not, nor the zone of an IPv6 address (what
    stands behind its %): it is any text."""
    try:
        return str(ipaddress.ip_address(ip.partition("%")[0]))
    except ValueError:
        return ""


def _one_line(text: str, length: int) -> str:
    """Text of a client for a list of devices: printable, on one line, and short."""
    kept = "".join(character for character in text if character.isprintable())
    return unicodedata.normalize("NFC", kept).strip()[:length]


def _invalid_credentials() -> Unauthenticated:
    return Unauthenticated("invalid_credentials", "The phone or the password is wrong.")


def _invalid_refresh_token() -> Unauthenticated:
    return Unauthenticated("invalid_refresh_token", "The session has ended or expired; log in again.")


def _wrong_password() -> Forbidden:
    return Forbidden("wrong_password", "The old password is wrong.", field="old_password")
