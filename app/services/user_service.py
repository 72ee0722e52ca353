"""Profiles: one's own, those of others, and finding people.

Whoever blocked the caller looks as if they did not exist. Phones never leave except to their owner.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.bloom_filter import UsernameFilter
from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.cursors import decode_cursor, encode_cursor
from app.core.errors import BadInput, user_not_found
from app.db.database import Database
from app.db.repositories import pairs as pair_repository
from app.db.repositories import users as user_repository
from app.db.repositories.users import UserRow
from app.db.schemas import Availability, Me, Profile, ProfileIn, User, UserPage, UserRelation
from app.services.chat_log.views import avatar_url
from app.services.rate_limiter import RateLimiter, address_key
from app.services.unit_of_work import UnitOfWork

MIN_QUERY = 3
SCAN_PAGE = 50
SCAN_PAGES = 6
"""A page of a search reads no more of the indexes than this; it may be short, even empty, and have a next."""
BY_USERNAME = "u"
BY_NAME = "n"

RESERVED_USERNAMES = frozenset(
    """
    about abuse account admin administrator all anonymous api app auth billing blocked bot bots channel channels chat
    chats contact contacts deleted dialect dialect_bot dialect_support everyone faq group groups help here home info
    login logout mail me message messages mod moderator moderators news noreply notification notifications null
    official owner password payments phone postmaster privacy profile register robot root saved search security
    self service settings signup staff status support system team telegram terms test undefined unknown update
    updates user username users verified webmaster whatsapp you
    """.split()  # noqa: SIM905 - a list of 80 quoted words reads worse
)


def check_username(username: str) -> None:
    """Refuse names that could pass for the service itself. Raises BadInput."""
    if username.lower() in RESERVED_USERNAMES:
        raise BadInput("username_reserved", "This username is reserved.", field="username")


SEARCH_CURSOR = (str, str, int)
"""The index being read, the last name seen in it, user id."""


def name_key(display_name: str) -> str:
    """A display name folded for search: the same whatever its case."""
    return unicodedata.normalize("NFC", display_name).casefold()[:192]


def user_view(row: UserRow) -> User:
    """A person as others see them."""
    return {
        "id": row.id,
        "username": row.username,
        "display_name": row.display_name,
        "bio": row.bio,
        "avatar_url": avatar_url(row.avatar),
        "profile_version": row.profile_version,
    }


async def users_seen_by(session: AsyncSession, viewer_id: int, user_ids: Sequence[int]) -> list[User]:
    """People whom somebody shares a chat with, as they may see them: across a block without the bio."""
    rows = await user_repository.list_users(session, user_ids)
    # The blocks last: what somebody writes after they blocked must not be read with the blocks from before.
    pairs = await pair_repository.find_pairs(session, viewer_id, [row.id for row in rows])
    apart = {user_id for user_id, pair in pairs.items() if pair.any_block}
    return [user_view(row._replace(bio="", avatar=None) if row.id in apart else row) for row in rows]


def me_view(row: UserRow) -> Me:
    """A person as they see themselves."""
    return {
        **user_view(row),
        "phone": row.phone,
        "account_version": row.account_version,
        "created_at": timestamp(row.created_at),
    }


class UserService:
    """Reads and changes profiles, and finds people."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        usernames: UsernameFilter,
        limiter: RateLimiter,
        is_online: Callable[[int], bool],
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.database = database
        self.usernames = usernames
        self.limiter = limiter
        self.is_online = is_online

    async def me(self, user_id: int) -> Me:
        """One's own profile."""
        async with self.database.reading() as session:
            row = await user_repository.find_user(session, user_id)
        if row is None:
            raise user_not_found()
        return me_view(row)

    async def update_profile(self, uow: UnitOfWork, user_id: int, changes: ProfileIn) -> Me:
        """Change one's own profile. Raises BadInput for a reserved username, Conflict for a taken one."""
        return me_view((await self._change(uow, user_id, changes.model_dump(exclude_none=True)))[1])

    async def set_avatar(self, uow: UnitOfWork, user_id: int, name: str | None) -> tuple[Me, str | None]:
        """Give oneself another picture, or none; returns the profile and the name of the picture before."""
        before, now = await self._change(uow, user_id, {"avatar": name})
        return me_view(now), before.avatar

    async def _change(self, uow: UnitOfWork, user_id: int, values: dict[str, Any]) -> tuple[UserRow, UserRow]:
        """Change columns of a profile; the row before and after. What changes nothing is not told."""
        row = await user_repository.find_user(uow.session, user_id)
        if row is not None and row._replace(**values) == row:
            return row, row
        version = await uow.next_account_version(user_id)  # locks the row: what is read now stays true
        row = await user_repository.find_user(uow.session, user_id)
        if row is None:
            raise user_not_found()
        new = row._replace(**values)
        if new.username.lower() != row.username.lower():
            check_username(new.username)
        new = new._replace(profile_version=row.profile_version + 1)
        await user_repository.update_profile(uow.session, new, display_name_key=name_key(new.display_name))
        uow.announce_account(
            user_id,
            {
                "type": "profile_changed",
                "account_version": version,
                "profile_version": new.profile_version,
            },
        )
        uow.after_commit(lambda: self.usernames.take(new.username))
        return row, new

    async def profile(self, viewer_id: int, user_id: int) -> Profile:
        """Somebody's profile, with as much as the viewer may know. Raises NotFound."""
        async with self.database.reading() as session:
            row = await user_repository.find_user(session, user_id)
            pairs = await pair_repository.find_pairs(session, viewer_id, [user_id])
        if row is None:
            raise user_not_found()
        if user_id == viewer_id:
            return self._profile(row, "self", shows_presence=True)
        pair = pairs.get(user_id)
        # One's own block first: what one sees of somebody one blocked does not tell whether they block back.
        if pair is not None and pair.blocks(viewer_id):
            return self._profile(row._replace(bio="", avatar=None), "blocked", shows_presence=False)
        if pair is not None and pair.blocked_by(viewer_id):
            raise user_not_found()
        return self._profile(row, "none", shows_presence=pair is not None and pair.chat_id is not None)

    def _profile(self, row: UserRow, relation: UserRelation, *, shows_presence: bool) -> Profile:
        online = shows_presence and self.is_online(row.id)
        seen = row.last_seen_at if shows_presence and not online else None
        return {
            **user_view(row),
            "relation": relation,
            "online": online,
            "last_seen_at": timestamp(seen) if seen else None,
        }

    async def username_available(self, username: str, ip: str) -> Availability:
        """Whether a username can be taken now; only registering or renaming takes it. Raises TooManyRequests."""
        await self.limiter.hit("limit_username_checks_per_ip", address_key(ip))
        if username.lower() in RESERVED_USERNAMES:
            return {"username": username, "available": False}
        if not self.usernames.may_be_taken(username):
            return {"username": username, "available": True}
        async with self.database.reading() as session:
            taken = await user_repository.username_exists(session, username)
        return {"username": username, "available": not taken}

    # --- finding people ---

    async def search(self, viewer_id: int, query: str, cursor: str | None, limit: int) -> UserPage:
        """People whose username, then those whose display name begins with `query`.

        Raises BadInput for a query that is too short or a cursor that is not ours, and TooManyRequests.
        """
        limit = min(limit, self.settings.page_size_max)
        query = query.strip().removeprefix("@")
        if len(query) < MIN_QUERY:
            raise BadInput("query_too_short", f"Search for at least {MIN_QUERY} characters.", field="q")
        prefix = name_key(query)
        place = _Place(BY_USERNAME, "", 0) if cursor is None else _Place(*decode_cursor(cursor, *SEARCH_CURSOR))
        if place.by == BY_USERNAME and not (prefix + place.name).isascii():
            place = _Place(BY_NAME, "", 0)  # MySQL does not even compare such text with a username
        await self.limiter.hit("limit_search_per_user", viewer_id)
        found: list[User] = []
        async with self.database.reading() as session:
            for _ in range(SCAN_PAGES):
                candidates = await _candidates(session, prefix, place)
                hidden = await _hidden_from(session, viewer_id, [row.id for _, row in candidates])
                for next_place, row in candidates:
                    if len(found) == limit:
                        return {"items": found, "next": encode_cursor(*place)}
                    place = next_place
                    # Who was found by the username is not shown again for the display name.
                    twice = place.by == BY_NAME and row.username.lower().startswith(prefix)
                    if row.id not in hidden and not twice:
                        found.append(user_view(row))
                if len(candidates) < SCAN_PAGE:
                    if place.by == BY_NAME:
                        return {"items": found, "next": None}
                    place = _Place(BY_NAME, "", 0)
        return {"items": found, "next": encode_cursor(*place)}


class _Place(NamedTuple):
    """Where a search stands: after which entry of which index."""

    by: str
    name: str
    user_id: int


async def _candidates(session: AsyncSession, prefix: str, place: _Place) -> list[tuple[_Place, UserRow]]:
    if place.by == BY_USERNAME:
        rows = await user_repository.search_usernames(session, prefix, after=place.name, limit=SCAN_PAGE)
        return [(_Place(BY_USERNAME, row.username, 0), row) for row in rows]
    named = await user_repository.search_display_names(
        session, prefix, after=(place.name, place.user_id), limit=SCAN_PAGE
    )
    return [(_Place(BY_NAME, key, row.id), row) for key, row in named]


async def _hidden_from(session: AsyncSession, viewer_id: int, user_ids: Sequence[int]) -> set[int]:
    """Those whom a search of the viewer must not show: the viewer, and both sides of every block."""
    pairs = await pair_repository.find_pairs(session, viewer_id, user_ids)
    return {viewer_id} | {user_id for user_id, pair in pairs.items() if pair.any_block}
