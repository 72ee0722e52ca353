"""Profiles, finding people, and blocks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query

from app.api.deps import BulkCallerDep, CallerDep, ClientIp, ServicesDep, UowDep, cursor_query
from app.api.problems import problems
from app.db.schemas import MAX_ID, Availability, Me, Profile, ProfileIn, SearchText, Username, UserPage
from app.services.block_service import BLOCKED_CURSOR
from app.services.user_service import SEARCH_CURSOR

router = APIRouter(prefix="/users", tags=["Users"])

UserId = Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a person.", examples=[42])]
SearchCursor = Annotated[str | None, cursor_query(*SEARCH_CURSOR)]
BlockedCursor = Annotated[str | None, cursor_query(*BLOCKED_CURSOR)]
PROFILE_EXAMPLES = {
    "name": {"summary": "Another name", "value": {"display_name": "John Doe"}},
    "all": {
        "summary": "Everything",
        "value": {"username": "john", "display_name": "John Doe", "bio": "Hello!"},
    },
}


@router.get("/me", summary="My profile")
async def get_me(services: ServicesDep, caller: CallerDep) -> Me:
    """One's own profile, with what only its owner sees."""
    return await services.users.me(caller.user_id)


@router.patch("/me", summary="Change my profile", responses=problems("username_taken", "username_reserved"))
async def update_me(
    body: Annotated[ProfileIn, Body(openapi_examples=PROFILE_EXAMPLES)],
    services: ServicesDep,
    caller: CallerDep,
    uow: UowDep,
) -> Me:
    """Change what is given; what is left out stays. 409 `username_taken`, 422 `username_reserved`."""
    return await services.users.update_profile(uow, caller.user_id, body)


@router.get("/search", summary="Find people", responses=problems("query_too_short", "overloaded"))
async def search_users(
    q: Annotated[
        SearchText,
        Query(description="At least 3 characters, not counting an @ before them.", examples=["john"]),
    ],
    services: ServicesDep,
    caller: BulkCallerDep,
    cursor: SearchCursor = None,
    limit: Annotated[int, Query(ge=1, le=20, description="People of a page, at most.")] = 20,
) -> UserPage:
    """People whose username, then those whose display name begins with `q`, whatever its case.

    Follow `next` until it is null: a page may be short although there is more. 422 `query_too_short`.
    """
    return await services.users.search(caller.user_id, q, cursor, limit)


@router.get(
    "/username-available", summary="Is a username free?", responses=problems("rate_limited", "database_unavailable")
)
async def check_username(username: Annotated[Username, Query()], services: ServicesDep, ip: ClientIp) -> Availability:
    """Whether a username can be taken now; open to those who are about to register. Only taking it decides."""
    return await services.users.username_available(username, ip)


@router.get("/blocked", summary="List the blocked", responses=problems("overloaded"))
async def list_blocked_users(
    services: ServicesDep,
    caller: BulkCallerDep,
    cursor: BlockedCursor = None,
    limit: Annotated[int, Query(ge=1, le=100, description="People of a page, at most.")] = 50,
) -> UserPage:
    """The people one has blocked."""
    return await services.blocks.list_blocked(caller.user_id, cursor, limit)


@router.get("/{user_id:int}", summary="Somebody's profile")
async def get_user(user_id: UserId, services: ServicesDep, caller: CallerDep) -> Profile:
    """A person, with their presence if there is a personal chat with them and no block.

    404 `user_not_found`, for people who do not exist and for those who blocked the caller.
    """
    return await services.users.profile(caller.user_id, user_id)


@router.post("/block/{user_id:int}", status_code=204, summary="Block", responses=problems("cannot_block_self"))
async def block_user(user_id: UserId, services: ServicesDep, caller: CallerDep, uow: UowDep) -> None:
    """Block somebody: no message, typing, presence or profile passes between the two. They are not told.

    In common groups both stay and hear each other. 404 `user_not_found`, 409 `cannot_block_self`.
    """
    await services.blocks.block(uow, caller.user_id, user_id)


@router.delete("/block/{user_id:int}", status_code=204, summary="Unblock")
async def unblock_user(user_id: UserId, services: ServicesDep, caller: CallerDep, uow: UowDep) -> None:
    """Unblock somebody. 404 `user_not_found`."""
    await services.blocks.unblock(uow, caller.user_id, user_id)
