"""What routes ask for: the services, who is calling, a unit of work. A signature reads like a policy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.security import OAuth2PasswordBearer
from starlette.requests import HTTPConnection

from app.core.cursors import Part, cursor_pattern
from app.core.errors import Unauthenticated
from app.services.caller import Caller
from app.services.container import Services
from app.services.unit_of_work import UnitOfWork

# The scheme makes Swagger's Authorize work. With `auto_error` FastAPI itself would answer, without a problem.
bearer = OAuth2PasswordBearer(
    tokenUrl="/api/v1/auth/token",
    auto_error=False,
    description="The access token of `POST /api/v1/auth/token`; log in with phone and password.",
)


# Not `def`: FastAPI would send each call to a thread and back.
async def get_services(connection: HTTPConnection) -> Services:
    """The parts of this process; of a request or of a socket."""
    services: Services = connection.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]


async def get_caller(services: ServicesDep, token: Annotated[str | None, Depends(bearer)]) -> Caller:
    """Who is calling. Raises Unauthenticated, and TooManyRequests for one who calls too often."""
    if not token:
        raise Unauthenticated
    caller = await services.auth.authenticate(token)
    await services.rate_limiter.hit("limit_requests_per_user", caller.user_id)
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]


async def take_turn(services: ServicesDep, caller: CallerDep) -> AsyncIterator[Caller]:
    """Who is calling, in the lane of what can wait: lists, searches, history. Raises Unavailable (`overloaded`)."""
    async with services.admission.bulk.turn():
        yield caller


# `function`: the next may have its turn while this answer is still being sent.
BulkCallerDep = Annotated[Caller, Depends(take_turn, scope="function")]
"""The caller of a route that is refused first when there is too much to do; see `problems("overloaded")`."""


async def get_uow(services: ServicesDep, caller: CallerDep) -> AsyncIterator[UnitOfWork]:
    """A unit of work of the caller's, in their turn, that commits before the answer leaves."""
    async with services.unit_of_work.of(caller.user_id) as uow:
        yield uow


# `function`: the default scope would commit after the response, too late to tell of a failed commit.
UowDep = Annotated[UnitOfWork, Depends(get_uow, scope="function")]


async def get_client_ip(request: Request) -> str:
    """Where the request comes from; the proxies that the settings trust are already seen through."""
    return request.client.host if request.client else ""


ClientIp = Annotated[str, Depends(get_client_ip)]


def cursor_query(*kinds: type[Part]) -> Any:
    """A query parameter for the `next` of a page before, described by what may be in it."""
    return Query(
        max_length=4096,
        json_schema_extra={"pattern": cursor_pattern(*kinds)},
        description="`next` of the page before.",
    )
