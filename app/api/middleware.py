"""What happens around every request, as plain ASGI: ids, the access log, headers, body limits, the last resort.

From the outside in: StartupGuard, RequestLog, SecurityHeaders, SocketDoor, CORS, LastResort, BodyGuard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import sys
from collections.abc import Iterable

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from app.api.problems import DETAILS, BodyRefused, error_response, internal_error
from app.api.socket_door import SocketDoor
from app.core import metrics
from app.core.clock import Clock
from app.core.config import Settings
from app.core.errors import (
    BadInput,
    DialectError,
    NotFound,
    StartupError,
    TooLarge,
    TooSlow,
    file_too_large,
    shutting_down,
)
from app.core.logging import request_id
from app.services.admission import Admission

log = logging.getLogger(__name__)
access_log = logging.getLogger("app.access")

REQUEST_ID = "X-Request-ID"
API = "/api/v1"
ASKED_WITH = ("Authorization", "Content-Type", "If-Match", "If-None-Match", "If-Range", "Range", REQUEST_ID)
ANSWERED_WITH = (
    *("Accept-Ranges", "Content-Disposition", "Content-Length", "Content-Range", "ETag"),
    *("Retry-After", "WWW-Authenticate", REQUEST_ID),
)
"""Headers that pages of other origins may send, and those that they may read."""
SANE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
QUIET_PATHS = ("/health/", "/metrics")
"""Asked every few seconds by machines: logged only when they fail."""


def middleware(settings: Settings, clock: Clock, admission: Admission) -> list[Middleware]:
    """The stack, outermost first."""
    stack = [
        Middleware(StartupGuard),
        Middleware(RequestLog, clock=clock),
        Middleware(SecurityHeaders, hsts_seconds=settings.hsts_seconds),
        Middleware(SocketDoor, admission=admission),
    ]
    if settings.allowed_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_credentials=False,  # we use no cookies, and so no page can borrow a visitor's
                allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
                allow_headers=ASKED_WITH,
                expose_headers=ANSWERED_WITH,
                max_age=600,
            )
        )
    return [*stack, Middleware(LastResort), Middleware(BodyGuard, settings=settings)]


class StartupGuard:
    """Turns a failed start into one sentence: Starlette would send its traceback to uvicorn's log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        failed = ""

        async def hold_back(message: Message) -> None:
            nonlocal failed
            if message["type"] in ("lifespan.startup.failed", "lifespan.shutdown.failed"):
                failed = message["type"]
            else:
                await send(message)

        try:
            await self.app(scope, receive, hold_back)
        except StartupError as error:
            # As every other sentence that ends a start. uvicorn would make a line of the log of it.
            sys.stderr.write(f"{error}\n")
            await send({"type": failed or "lifespan.startup.failed", "message": ""})
        except Exception as error:
            log.exception("lifespan_failed")
            await send(
                {
                    "type": failed or "lifespan.startup.failed",
                    "message": f"{type(error).__name__}, see above.",
                }
            )


class RequestLog:
    """Gives every request an id, and its line in the log once it is answered."""

    def __init__(self, app: ASGIApp, clock: Clock) -> None:
        self.app = app
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        current = given if SANE_ID.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(current)
        began = answered = self.clock.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, answered
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status, answered = message["status"], self.clock.monotonic()
                MutableHeaders(scope=message)[REQUEST_ID] = current
            elif message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close" and not status:
                status = 403  # closing before accepting refuses the handshake
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if scope["type"] == "http" and status:
                metrics.count_request(scope["method"], _template(scope), status, answered - began)
            if status >= 400 or not scope["path"].startswith(QUIET_PATHS):
                access_log.info(
                    "request" if scope["type"] == "http" else "socket",
                    extra={
                        "method": scope.get("method", "GET"),
                        # Without the query: it may hold a token.
                        "path": scope["path"],
                        "status": status or 499,  # nobody waited for the answer
                        "duration_ms": round((self.clock.monotonic() - began) * 1000, 1),
                        "client": scope["client"][0] if scope.get("client") else "",
                    },
                )
            request_id.reset(token)


def _template(scope: Scope) -> str:
    """The path of the route that answered, as its code names it; empty when none did."""
    path: str = getattr(scope.get("route"), "path_format", "")
    return API + path if path and scope["path"].startswith(API) else path


MAX_PATH = 1024
"""No route has a longer path. Python refuses to read numbers of more than 4300 digits, with an error of ours."""
API_POLICY = "default-src 'none'; frame-ancestors 'none'"


class SecurityHeaders:
    """Tells browsers to run, frame, guess and keep nothing. A route's own header of the same name wins."""

    def __init__(self, app: ASGIApp, hsts_seconds: int) -> None:
        self.app = app
        self.common = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        if hsts_seconds:
            self.common["Strict-Transport-Security"] = f"max-age={hsts_seconds}; includeSubDomains"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in self.common.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", API_POLICY)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class LastResort:
    """Logs what nobody caught, once, with its traceback; the client gets a neutral answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] in ("http.response.start", "websocket.accept")
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except WebSocketDisconnect:
            pass  # the peer has gone, as peers do
        except asyncio.CancelledError:
            # The server stops and has waited long enough. Let through, it would be a traceback in uvicorn's log.
            if scope["type"] != "http":
                raise
            log.warning("request_cut_short")
            if not started:
                await error_response(shutting_down())(scope, receive, send)
        except Exception:
            log.exception("unhandled_error")
            if scope["type"] == "websocket":
                # Before the handshake is answered, closing refuses it. Afterwards it may be closed already.
                with contextlib.suppress(RuntimeError):
                    await send({"type": "websocket.close", "code": 1011})
            elif not started:
                await internal_error()(scope, receive, send)


MULTIPART_BYTES = 16 * 1024
"""What may stand around a file in a body."""
LINGER_BYTES = 64 * 1024
"""A body up to this size has come with its request, or will fit the buffers on the way."""
LINGER_SECONDS = 10.0
LINGER_IDLE_SECONDS = 2.0


class BodyGuard:
    """Stops bodies above the limit as they stream in, those that do not come, and JSON that no later room could store.

    Who is refused in the middle of an upload may still be sending: closing on them would reset the connection, and
    most clients would never see the answer. So the rest is read for a while, and thrown away.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.seconds = settings.request_body_seconds
        self.max_bytes = settings.max_body_bytes
        self.max_upload_bytes = settings.max_upload_bytes
        self.max_avatar_bytes = settings.max_avatar_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if b"\x00" in scope["path"].encode("utf-8", "replace") or b"%00" in scope["query_string"]:
            error = BadInput("invalid_request", "A URL cannot contain the NUL character.")
            await error_response(error)(scope, receive, send)
            return
        if len(scope["path"]) > MAX_PATH:
            await error_response(NotFound("not_found", DETAILS[404]))(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        is_json = "json" in headers.get("content-type", "").lower()
        max_bytes, too_large = self._limit(scope["path"])
        is_long = "transfer-encoding" in headers or (declared.isdecimal() and int(declared) > LINGER_BYTES)
        is_upload = UPLOAD_PATH.fullmatch(scope["path"]) is not None  # its reader has an eye on the pace
        seen, ended, late = 0, False, False
        complete_at = math.inf if is_upload else asyncio.get_running_loop().time() + self.seconds
        chunks: list[bytes] = []

        async def take() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def take_in_time() -> Message:
            nonlocal late
            if ended or is_upload:
                return await take()
            try:
                async with asyncio.timeout_at(complete_at):
                    return await take()
            except TimeoutError:
                late = True
                metrics.http_cut.labels("body").inc()
                raise _refused(
                    TooSlow("body_too_slow", f"The body did not come within {self.seconds:g} seconds.")
                ) from None

        async def linger() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while not ended:
                        async with asyncio.timeout(LINGER_IDLE_SECONDS):
                            await take()

        async def answer(message: Message) -> None:
            lingers = is_upload and is_long and not ended
            if (lingers or late) and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            elif lingers and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await linger()
                message = {"type": "http.response.body"}
            await send(message)

        async def guarded() -> Message:
            nonlocal seen
            if declared.isdecimal() and int(declared) > max_bytes:
                raise _refused(too_large)
            message = await take_in_time()
            if message["type"] == "http.request":
                chunk = message.get("body", b"")
                seen += len(chunk)
                if seen > max_bytes:
                    raise _refused(too_large)
                if is_json:
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        check_json(chunks)
            return message

        # The body of a GET is nobody's: a response that streams looks there only for the client's leaving.
        if scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
        else:
            await self.app(scope, guarded, answer)

    def _limit(self, path: str) -> tuple[int, TooLarge]:
        match = UPLOAD_PATH.fullmatch(path)
        if match is None:
            return self.max_bytes, TooLarge("body_too_large", f"A body may have {self.max_bytes} bytes.")
        limit = self.max_avatar_bytes if match["avatar"] else self.max_upload_bytes
        return limit + MULTIPART_BYTES, file_too_large(limit)


UPLOAD_PATH = re.compile(r"/api/v1/(messages/upload|(?P<avatar>(users/me|chats/\d+)/avatar))")


def check_json(chunks: Iterable[bytes]) -> None:
    """Refuse what Python's parser lets through but databases and strict parsers do not.

    That is: bad UTF-8, lone surrogates, NaN, and nesting deep enough to break a recursive reader.
    """
    body = b"".join(chunks)
    if not body:
        return
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _refused(BadInput("invalid_json", "The body is not valid JSON.")) from None


def _refused(error: DialectError) -> BodyRefused:
    return BodyRefused(error)
