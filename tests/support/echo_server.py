"""A server that sends every WebSocket message back, for conformance suites: the product's wire without the product.

    python -m tests.support.echo_server --port 9001 [--door tuned|asgi|plain] [--max-bytes N]

Text comes back as text, binary as binary, at any path and with no authentication. `tuned` runs the configuration and
the protocol class of `python -m app` with a receiver, as the product's socket does; `asgi` the same with an ordinary
ASGI route; `plain` the product's ASGI transport on uvicorn's own class, as under `uvicorn app.main:app`. Only the
limit of a frame differs from the product's, because suites send messages of 16 MiB.
"""

from __future__ import annotations

import argparse
from typing import Literal

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from app.api.asgi_transport import AsgiSocket, serve_socket
from app.api.server import server_config
from app.core.config import Settings
from app.services.transport import BinaryFrames, Frames, Transport

EchoDoor = Literal["tuned", "asgi", "plain"]
MAX_BYTES = 32 * 1024 * 1024


class Binary(bytes):
    """A payload that is not text."""


class EchoAsgiSocket(AsgiSocket):
    """The product's ASGI transport, which can send binary too."""

    async def _send_message(self, payload: bytes) -> None:
        if isinstance(payload, Binary):
            await self._websocket.send({"type": "websocket.send", "bytes": payload})
        else:
            await super()._send_message(payload)


class Echo:
    """A receiver that sends back what it gets."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def on_text(self, data: bytes) -> None:
        self._transport.send(Frames([data]))

    def on_binary(self, data: bytes) -> None:
        self._transport.send(BinaryFrames([Binary(data)]))

    def on_drained(self) -> None: ...

    def on_shutdown(self) -> None:
        self._transport.close(1012)

    def on_closed(self, code: int) -> None: ...


def echo_config(port: int, door: EchoDoor = "tuned", max_bytes: int = MAX_BYTES) -> uvicorn.Config:
    """The configuration of such a server."""

    async def echo(websocket: WebSocket) -> None:
        if door == "tuned":
            await serve_socket(websocket, Echo, max_bytes)
            return
        await websocket.accept()
        if door == "plain":
            await EchoAsgiSocket(websocket, max_bytes).run(Echo)
            return
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await websocket.send({**message, "type": "websocket.send"})

    app = Starlette(routes=[WebSocketRoute("/{path:path}", echo)])
    settings = Settings(_env_file=None, socket_max_frame_bytes=max_bytes)
    if door != "plain":
        return server_config(app, settings, "127.0.0.1", port)
    return uvicorn.Config(
        app, host="127.0.0.1", port=port, ws_max_size=max_bytes, access_log=False, log_config=None, lifespan="off"
    )


def main() -> None:
    """Serve until a signal says stop."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.echo_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--door", choices=("tuned", "asgi", "plain"), default="tuned")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="the longest message")
    given = parser.parse_args()
    uvicorn.Server(echo_config(given.port, given.door, given.max_bytes)).run()


if __name__ == "__main__":
    main()
