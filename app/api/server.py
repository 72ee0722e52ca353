"""How uvicorn runs this application: the tuned configuration, in one place for the product and for what measures it."""

from __future__ import annotations

import uvicorn
from starlette.applications import Starlette

from app.api.websocket_protocol import DialectWebSocketProtocol
from app.core.config import Settings


def server_config(app: Starlette, settings: Settings, host: str, port: int) -> uvicorn.Config:
    """The server of `python -m app`, around any application."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="auto",  # uvloop where it is installed
        http="httptools",
        ws=DialectWebSocketProtocol,
        ws_max_size=settings.socket_max_frame_bytes,
        ws_per_message_deflate=False,  # memory per socket, and bombs, for messages too short to shrink
        ws_ping_interval=settings.socket_heartbeat_seconds,
        ws_ping_timeout=settings.socket_timeout_seconds,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds / 4)),
        proxy_headers=True,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        backlog=2048,
        server_header=False,
        access_log=False,  # the middleware writes it
        log_config=None,  # building the application has seen to it
    )
