"""`GET /metrics`, for Prometheus. Whoever may not read it finds nothing here."""

from __future__ import annotations

import ipaddress
import secrets

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.deps import ServicesDep
from app.api.problems import DETAILS
from app.core.config import Settings
from app.core.errors import NotFound

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FORWARDED = ("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "forwarded", "via")
"""What a proxy says. A request that came through one is a stranger's, though the proxy runs on this machine."""

router = APIRouter()


@router.get(PATH, include_in_schema=False)
async def read_metrics(request: Request, services: ServicesDep) -> Response:
    """All metrics, in Prometheus' text format, of all workers of this machine."""
    if not _may_read(request, services.settings):
        raise NotFound("not_found", DETAILS[404])
    return Response(await services.telemetry.exposition(), headers={"Content-Type": CONTENT_TYPE})


def _may_read(request: Request, settings: Settings) -> bool:
    """With METRICS_TOKEN who shows it, from wherever; without, who is on this machine and came straight."""
    if not settings.metrics_enabled:
        return False
    if token := settings.metrics_token.get_secret_value():
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(shown.strip().encode(), token.encode())
    if any(name in request.headers for name in FORWARDED):
        return False
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
