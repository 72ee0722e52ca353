"""The least that takes a file in and hands it out: an ASGI app under uvicorn that looks at nothing, a reference."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

CHUNK = 256 * 1024
FLUSH = 512 * 1024

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """PUT writes the body to a file and syncs it; GET streams it."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    path = Path("files") / Path(scope["path"]).name
    if scope["method"] == "PUT":
        await _take(path, receive)
        await _answer(send, 204, 0)
    elif scope["path"] == "/":
        await _answer(send, 200, 0)
        await send({"type": "http.response.body", "body": b""})
        return
    else:
        await _give(path, send)
        return
    await send({"type": "http.response.body", "body": b""})


async def _answer(send: Send, status: int, length: int) -> None:
    headers = [(b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _take(path: Path, receive: Receive) -> None:
    path.parent.mkdir(exist_ok=True)
    with await asyncio.to_thread(path.open, "wb", 0) as file:
        waiting = bytearray()
        more = True
        while more:
            message = await receive()
            waiting += message.get("body", b"")
            more = message.get("more_body", False)
            if len(waiting) >= FLUSH or not more:
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(os.fsync, file.fileno())


async def _give(path: Path, send: Send) -> None:
    await _answer(send, 200, await asyncio.to_thread(os.path.getsize, path))
    with await asyncio.to_thread(path.open, "rb", 0) as file:
        while data := await asyncio.to_thread(file.read, CHUNK):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
