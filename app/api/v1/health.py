"""Health, for load balancers and orchestrators: is the process alive, and can it serve."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import Field
from typing_extensions import TypedDict

from app.api.deps import ServicesDep
from app.api.problems import problem, problems
from app.services.health_service import State

router = APIRouter(prefix="/health", tags=["Health"])


class Health(TypedDict):
    """All is well."""

    status: Literal["ok"]


class Readiness(Health):
    """All is well, and here is what was asked."""

    checks: Annotated[
        dict[str, State],
        Field(
            description="`off` is what the settings leave out. While `database` or `database_writes` is `down`, the "
            "answer is 503; without the others most requests can be served.",
            examples=[{"database": "ok", "database_writes": "ok", "storage": "ok", "push": "off", "redis": "off"}],
        ),
    ]


@router.head("/live", include_in_schema=False)
@router.get("/live", summary="Whether the process runs")
async def check_liveness() -> Health:
    """Answers as long as the event loop turns; asks nobody else."""
    return {"status": "ok"}


@router.head("/ready", response_model=Readiness, include_in_schema=False)
@router.get(
    "/ready", summary="Whether requests can be served", response_model=Readiness, responses=problems("not_ready")
)
async def check_readiness(services: ServicesDep) -> Readiness | Response:
    """Asks every dependency, four times a second at most. 503 while one that serving needs is down: go elsewhere."""
    health = await services.health.check()
    if health.ready:
        return {"status": "ok", "checks": health.checks}
    return problem(
        503, "not_ready", "A dependency does not answer.", headers={"Retry-After": "2"}, checks=health.checks
    )
