"""A client of the socket for tests: real frames over a real connection, and every wait has a deadline."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import websockets
from websockets.asyncio.client import ClientConnection, connect

Event = dict[str, Any]
PATIENCE = 10.0
"""Seconds a test waits for a frame before it fails."""


class SocketClient:
    """One connection. `inbox` holds what came and nobody took; `closed` the close code."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.inbox: list[Event] = []
        self.seen: list[Event] = []
        """Every frame that ever came, in order."""
        self.close_code: int | None = None
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, ws_url: str, token: str, **options: Any) -> Self:
        """Connect to `Server.ws_url` by the Authorization header and wait for `hello`."""
        headers = {"Authorization": f"Bearer {token}", **options.pop("headers", {})}
        return await cls.connect(ws_url, additional_headers=headers, **options)

    @classmethod
    async def connect(cls, url: str, **options: Any) -> Self:
        """The same by any door."""
        connection = await connect(url, max_size=None, compression=None, **options)
        client = cls(connection)
        await client.wait(type="hello")
        return client

    async def _read(self) -> None:
        try:
            async for frame in self.connection:
                event = json.loads(frame)
                async with self._changed:
                    self.inbox.append(event)
                    self.seen.append(event)
                    self._changed.notify_all()
        except websockets.ConnectionClosed:
            pass
        finally:
            async with self._changed:
                self.close_code = self.connection.close_code
                self._changed.notify_all()

    async def send(self, **frame: Any) -> None:
        """Send a frame."""
        await self.connection.send(json.dumps(frame))

    async def wait(self, match: Callable[[Event], bool] | None = None, **fields: Any) -> Event:
        """Take the first event with these fields (and for which `match` holds), waiting for it if need be."""

        def found() -> Event | None:
            for event in self.inbox:
                if all(event.get(key) == value for key, value in fields.items()) and (match is None or match(event)):
                    return event
            return None

        try:
            async with asyncio.timeout(PATIENCE), self._changed:
                await self._changed.wait_for(lambda: found() is not None or self.close_code is not None)
        except TimeoutError:
            raise AssertionError(f"no {fields} came; inbox: {self.inbox}") from None
        event = found()
        if event is None:
            raise AssertionError(f"closed with {self.close_code} before {fields} came; inbox: {self.inbox}")
        self.inbox.remove(event)
        return event

    async def wait_closed(self) -> int:
        """The close code, once the server has closed the connection."""
        async with asyncio.timeout(PATIENCE), self._changed:
            await self._changed.wait_for(lambda: self.close_code is not None)
        assert self.close_code is not None
        return self.close_code

    async def barrier(self) -> None:
        """Return once the server has answered everything sent before: what is not here now was not sent."""
        ref = uuid.uuid4().hex
        await self.send(type="ping", ref=ref)
        await self.wait(type="pong", ref=ref)

    async def say(self, chat_id: int, content: str, **fields: Any) -> Event:
        """Send a message and return its `ack`; the copy of one's own event stays in the inbox."""
        ref = uuid.uuid4().hex
        await self.send(type="new_message", chat_id=chat_id, content=content, ref=ref, **fields)
        return await self.wait(lambda event: event["type"] in ("ack", "error"), ref=ref)

    async def close(self) -> None:
        """Say goodbye."""
        await self.connection.close()
        await asyncio.gather(self._reader, return_exceptions=True)

    def abort(self) -> None:
        """Vanish without a word."""
        self.connection.transport.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
