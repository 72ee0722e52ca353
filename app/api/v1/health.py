"""Health, for load balancers and orchestrators: is the process alive, and can it serve."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import Field
from typing_extensions import TypedDict

from app.api.deps import ServicesDep
from app.api.problems import problem, problems

router = APIRouter(prefix="/health", tags=["Health"])


class Health(TypedDict):
    """All is well."""

    status: Literal["ok"]


class Readiness(Health):
    """All is well, and here is what was asked."""

    checks: Annotated[dict[str, Literal["ok", "down"]], Field(examples=[{"database": "ok"}])]


@router.get("/live", summary="Whether the process runs")
async def check_liveness() -> Health:
    """Answers as long as the event loop turns; asks nobody else."""
    return {"status": "ok"}


@router.get(
    "/ready", summary="Whether requests can be served", response_model=Readiness, responses=problems("not_ready")
)
async def check_readiness(services: ServicesDep) -> Readiness | Response:
    """Asks every dependency. 503 while one of them does not answer: send requests elsewhere."""
    checks = await services.check()
    if all(state == "ok" for state in checks.values()):
        return {"status": "ok", "checks": checks}
    return problem(503, "not_ready", "A dependency does not answer.", headers={"Retry-After": "2"}, checks=checks)
