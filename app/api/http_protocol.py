"""Our HTTP protocol class for uvicorn: `python -m app` runs with it. It adds what uvicorn leaves to a proxy.

Written against uvicorn 0.54, which requirements.txt pins.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState


class DialectHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP connection, which gives a client `head_seconds` to send the whole head of a request.

    Who connects and says nothing, or says it a byte at a time, would otherwise hold a descriptor for ever.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        head_seconds: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:  # not the first request of this connection
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        if self.scope["http_version"] != "1.1":
            self.send_400_response("A WebSocket handshake is HTTP/1.1.")
            return
        super().handle_websocket_upgrade()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_seconds, self._too_late)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_late(self) -> None:
        self._head_timer = None
        self.transport.close()
