"""Our HTTP protocol class for uvicorn: `python -m app` runs with it. It adds what uvicorn leaves to a proxy.

That is: bounds on how many connections there are and how long each of them may be waited for. A connection is a file
descriptor, and when those run out nobody is served, so whoever keeps one must make progress.

Written against uvicorn 0.54, which requirements.txt pins.
"""

from __future__ import annotations

import array
import asyncio
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.middleware import UPLOAD_PATH
from app.api.problems import error_response
from app.api.socket_door import ADMISSION
from app.core import metrics
from app.core.errors import DialectError
from app.services.admission import Admission, Place

if sys.platform != "win32":
    import fcntl
    from termios import TIOCOUTQ

if TYPE_CHECKING:
    from uvicorn.config import Config
    from uvicorn.server import ServerState

log = logging.getLogger(__name__)

BODY_SPARE_SECONDS = 2.0
"""So much later than the application, which can say so, a connection whose body does not come is cut here."""
LOOKS = 4
"""So often within the time that a client has to take something of its answer, it is looked whether it did."""

Debt = Literal["idle", "head", "body", "reading"]
"""What a client is waited for to do: to ask again, to send a head, to send a body, to read its answer."""


class Waiting:
    """Connections whose client owes the same thing and has the same time for it, who waits longest first.

    All share one timer. To begin and to end costs two operations on a dictionary, for most requests come at once.
    """

    def __init__(self, seconds: float, late: Callable[[DialectHttpProtocol], None]) -> None:
        self._seconds = seconds
        self._late = late
        self._until: OrderedDict[DialectHttpProtocol, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, connection: DialectHttpProtocol) -> None:
        """Wait for a client from now on."""
        until = self._until[connection] = connection.loop.time() + self._seconds
        self._until.move_to_end(connection)
        if self._timer is None:
            self._timer = connection.loop.call_at(until, self._look, connection.loop)

    def end(self, connection: DialectHttpProtocol) -> None:
        """Wait no more, if it was waited for."""
        self._until.pop(connection, None)

    def first(self) -> tuple[float, DialectHttpProtocol] | None:
        """Who is waited for longest, and since when."""
        for connection, until in self._until.items():
            return until - self._seconds, connection
        return None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        while self._until:
            connection, until = next(iter(self._until.items()))
            if until > now:
                self._timer = loop.call_at(until, self._look, loop)
                return
            del self._until[connection]
            self._late(connection)


class Patience:
    """How long a process waits for the clients of its HTTP connections, and for whom it does. Goes through a pickle."""

    def __init__(self, *, head_seconds: float, body_seconds: float, reading_seconds: float) -> None:
        self.reading_seconds = reading_seconds
        self.of: dict[Debt, Waiting] = {
            "idle": Waiting(head_seconds, _cut_for_head),  # uvicorn ends it earlier, unless line ends come
            "head": Waiting(head_seconds, _cut_for_head),
            "body": Waiting(body_seconds + BODY_SPARE_SECONDS, _cut_for_body),
            "reading": Waiting(reading_seconds / LOOKS, _look_whether_it_reads),
        }

    def make_room(self) -> bool:
        """Cut the connection whose client is waited for longest to send something; False if there is none."""
        firsts = (self.of["idle"].first(), self.of["head"].first(), self.of["body"].first())
        waiting = [first for first in firsts if first is not None]
        if not waiting:
            return False
        min(waiting, key=lambda first: first[0])[1].cut("crowded")
        return True


def _cut_for_head(connection: DialectHttpProtocol) -> None:
    connection.cut("head")


def _cut_for_body(connection: DialectHttpProtocol) -> None:
    connection.cut("body")


def _look_whether_it_reads(connection: DialectHttpProtocol) -> None:
    connection.look_whether_it_reads()


class DialectHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP connection, which keeps its place only while its client gets on with things.

    Who connects and says nothing, announces a body and does not send it, or asks and does not read the answer, would
    otherwise hold a descriptor for ever, and a file with it.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        patience: Patience,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._patience = patience
        self._debt: Debt | None = None
        self._asked = self._in_head = self._in_body = False
        self._over = False
        """Whether nothing is waited for any more."""
        self._place: Place | None = None
        self._unread = 0
        self._read_at = 0.0

    # --- coming and going ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        admission = self.app_state.get(ADMISSION)
        if isinstance(admission, Admission):
            try:
                self._place = admission.connect(self._address(), self._patience.make_room)
            except DialectError as error:
                self._refuse(error)
                return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        if self.scope["http_version"] != "1.1":
            self.send_400_response("A WebSocket handshake is HTTP/1.1.")
            return
        self._leave()
        super().handle_websocket_upgrade()

    def cut(self, reason: str) -> None:
        """End it now, whatever was under way."""
        metrics.http_cut.labels(reason).inc()
        log.debug("connection_cut", extra={"reason": reason})
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        self._over = True
        self._owe(None)
        self._patience.of["reading"].end(self)
        if self._place is not None:
            self._place.leave()
            self._place = None

    def _address(self) -> str:
        """Whose connection it is; empty when a proxy's, who has many people behind it."""
        if self.client is None:
            return ""
        app = self.config.loaded_app
        if isinstance(app, ProxyHeadersMiddleware) and self.client[0] in app.trusted_hosts:
            return ""
        return self.client[0]

    def _refuse(self, error: DialectError) -> None:
        metrics.http_refused.labels(error.code).inc()
        self._over = True
        answer = error_response(error)
        head = [f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}".encode()]
        head += [name + b": " + value for name, value in answer.raw_headers]
        self.transport.write(b"\r\n".join([*head, b"connection: close", b"", bytes(answer.body)]))
        self.transport.close()

    # --- what the client sends ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._asked, self._in_head, self._in_body = True, False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size() and not self._over:
            self._expect_reading()
        self._look()

    def _look(self) -> None:
        """Wait for what the client must do next; from now on, unless it is waited for already."""
        if not self._over and (debt := self._next()) != self._debt:
            self._owe(debt)

    def _next(self) -> Debt | None:
        if self.transport.is_closing():
            return None
        answered = not self._asked or self.cycle.response_complete
        if answered and self.transport.get_write_buffer_size():
            return None  # there is an answer to read first
        if self._in_body:
            # As long as an upload is read, its reader has an eye on its pace.
            theirs = answered or not (self.pipeline or UPLOAD_PATH.fullmatch(self.scope["path"]))
            return "body" if theirs else None
        if not answered:
            return None
        return "head" if self._in_head or not self._asked else "idle"

    def _owe(self, debt: Debt | None) -> None:
        if self._debt is not None:
            self._patience.of[self._debt].end(self)
        self._debt = debt
        if debt is not None:
            self._patience.of[debt].begin(self)

    # --- what the client reads ----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._patience.of["reading"].end(self)

    def _expect_reading(self) -> None:
        self._unread, self._read_at = self._count_unread(), self.loop.time()
        self._patience.of["reading"].begin(self)

    def look_whether_it_reads(self) -> None:
        """Cut the connection if its client has taken nothing for too long; however little it takes is enough."""
        unread = self._count_unread()
        if not self.transport.get_write_buffer_size():
            self._look()
            return
        if unread < self._unread:
            self._unread, self._read_at = unread, self.loop.time()
        elif self.loop.time() - self._read_at >= self._patience.reading_seconds:
            self.cut("reading")
            return
        self._patience.of["reading"].begin(self)

    def _count_unread(self) -> int:
        """Bytes of ours that the peer has not acknowledged.

        Those in the kernel count: it holds megabytes, and while a slow client takes them our buffer stays as it is.
        """
        unread = self.transport.get_write_buffer_size()
        connection = self.transport.get_extra_info("socket")
        if sys.platform != "win32" and connection is not None:
            queued = array.array("i", [0])
            try:
                fcntl.ioctl(connection.fileno(), TIOCOUTQ, queued)
            except (OSError, ValueError):
                return unread
            unread += queued[0]
        return unread
