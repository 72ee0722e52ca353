"""How uvicorn runs this application: the tuned configuration, in one place for the product and for what measures it."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import threading

import uvicorn
from starlette.applications import Starlette

from app.api.graceful_stop import requests_seconds
from app.api.http_protocol import DialectHttpProtocol, Patience
from app.api.websocket_protocol import DialectWebSocketProtocol
from app.core.config import Settings


class TunedConfig(uvicorn.Config):
    """uvicorn's configuration, and what is done once in the process that loads the application."""

    def load(self) -> None:
        """Import the application, in the process that will serve it."""
        super().load()
        # What is imported and built by now lives as long as the process, and what a message leaves dies by itself:
        # looking through all of it after every few hundred messages took a tenth of the loop's time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        if (parent := multiprocessing.parent_process()) is not None:
            # Workers that outlive a parent killed with -9 would keep its port, and nobody would restart them.
            threading.Thread(target=_follow, args=(parent,), name="parent", daemon=True).start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def server_config(app: Starlette | str, settings: Settings, host: str, port: int, workers: int = 1) -> TunedConfig:
    """The server of `python -m app`, around any application; several workers import it by its name."""
    patience = Patience(
        head_seconds=settings.request_head_seconds,
        body_seconds=settings.request_body_seconds,
        reading_seconds=settings.response_idle_seconds,
    )
    return TunedConfig(
        app,
        host=host,
        port=port,
        workers=workers,
        loop="auto",  # uvloop where it is installed
        http=functools.partial(DialectHttpProtocol, patience=patience),  # type: ignore[arg-type]
        ws=DialectWebSocketProtocol,
        ws_max_size=settings.socket_max_frame_bytes,
        ws_per_message_deflate=False,  # memory per socket, and bombs, for messages too short to shrink
        ws_ping_interval=settings.socket_heartbeat_seconds,
        ws_ping_timeout=settings.socket_timeout_seconds,
        timeout_graceful_shutdown=requests_seconds(settings),
        timeout_worker_healthcheck=round(settings.worker_timeout_seconds),
        proxy_headers=True,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        backlog=2048,
        server_header=False,
        access_log=False,  # the middleware writes it
        log_config=None,  # building the application has seen to it
    )
