"""The door for sockets: who cannot come in is told so before anything is read of who they are."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.problems import error_response
from app.core.errors import DialectError
from app.services.admission import Admission

ADMISSION = "admission"
"""Under this name the lifespan hands the server's protocol classes the `Admission`: they see connections first."""
PLACE = "dialect.place"
"""Where the scope of a socket holds its `Place`."""


class SocketDoor:
    """Takes a place for each handshake, and gives it back unless the socket keeps it."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self.app = app
        self.admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        try:
            place = self.admission.enter(scope["client"][0] if scope.get("client") else "")
        except DialectError as error:
            await error_response(error)(scope, receive, send)
            return
        scope[PLACE] = place
        try:
            await self.app(scope, receive, send)
        finally:
            if not place.kept:
                place.leave()
