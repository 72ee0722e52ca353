"""Health, for load balancers and orchestrators: is the process alive, and can it serve."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from typing_extensions import TypedDict

from app.api.deps import ServicesDep
from app.api.problems import problem, problems

router = APIRouter(prefix="/health", tags=["Health"])


class Health(TypedDict):
    """All is well."""

    status: Literal["ok"]


class Readiness(Health):
    """All is well, and here is what was asked."""

    checks: dict[str, Literal["ok", "down"]]


@router.get("/live", summary="Whether the process runs")
async def live() -> Health:
    """Answers as long as the event loop turns; asks nobody else."""
    return {"status": "ok"}


@router.get("/ready", summary="Whether requests can be served", response_model=Readiness, responses=problems(503))
async def ready(services: ServicesDep) -> Readiness | Response:
    """Asks every dependency. 503 while one of them does not answer: send requests elsewhere."""
    checks = await services.check()
    if all(state == "ok" for state in checks.values()):
        return {"status": "ok", "checks": checks}
    return problem(503, "not_ready", "A dependency does not answer.", headers={"Retry-After": "2"}, checks=checks)
