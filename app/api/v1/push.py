"""Where push notifications go: one Firebase token per session."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.deps import CallerDep, ServicesDep
from app.db.schemas import PushDeviceIn

router = APIRouter(prefix="/push", tags=["Push"])


@router.put("/device", status_code=204, summary="Register this device for push")
async def register_push_device(body: PushDeviceIn, services: ServicesDep, caller: CallerDep) -> None:
    """Push messages to this device while it has no open socket.

    Repeat it whenever Firebase gives the app a new token. A session has one; a token that another session had
    registered moves here. It is forgotten when the session ends.
    """
    await services.notifications.register_device(caller, body)


@router.delete("/device", status_code=204, summary="Stop push to this device")
async def forget_push_device(services: ServicesDep, caller: CallerDep) -> None:
    """Push nothing to this device any more."""
    await services.notifications.forget_device(caller)
