"""The socket's own loop: the three doors, frames in, acks and errors out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter, Query, WebSocket
from pydantic import ValidationError
from starlette.responses import Response

from app.api import problems
from app.api.asgi_transport import serve_socket
from app.api.deps import ServicesDep
from app.api.socket_door import PLACE
from app.core import metrics
from app.core.clock import timestamp
from app.core.errors import (
    BadInput,
    DialectError,
    Forbidden,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    shutting_down,
)
from app.db.events import (
    COMMANDS,
    AckEvent,
    AnyCommand,
    DeleteMessageCommand,
    EditMessageCommand,
    ErrorEvent,
    MessageDeliveredCommand,
    MessageReadCommand,
    NewMessageCommand,
    PingCommand,
    ReauthCommand,
    ResumeCommand,
    SubscribePresenceCommand,
    TypingCommand,
)
from app.db.schemas import ResumeIn, canonical_uuid
from app.services.admission import Place
from app.services.caller import Caller
from app.services.chat_log.changes import Done
from app.services.connection_manager import CloseCode, Connection
from app.services.container import Services
from app.services.token_bucket import TokenBucket
from app.services.transport import Receiver, Transport

log = logging.getLogger(__name__)

router = APIRouter(prefix="/messages", tags=["Messages"])

SHOWN_NAME_CHARS = 64
"""So much of the name of an unknown field is repeated."""


@router.get(
    "/ws",
    summary="The socket",
    status_code=426,
    include_in_schema=False,
)
async def plain_request() -> Response:
    """Open this address as a WebSocket: with `Authorization: Bearer`, a one-use `?ticket=` of
    `POST /auth/ws-ticket`, or `?token=`. Frames are described in docs/protocol.md."""
    return problems.problem(
        426,
        "upgrade_required",
        "Open this address as a WebSocket: ws://.../api/v1/messages/ws",
        headers={"Upgrade": "websocket", "Connection": "Upgrade"},
    )


@router.websocket("/ws")
async def socket(
    websocket: WebSocket,
    services: ServicesDep,
    token: Annotated[str | None, Query()] = None,
    ticket: Annotated[str | None, Query()] = None,
) -> None:
    """A client's live connection."""
    try:
        _check_origin(websocket, services)
        caller = await _authenticate(websocket, services, token, ticket)
        if services.connections.draining:
            raise shutting_down()
    except DialectError as error:
        metrics.socket_refusals.labels(error.code).inc()
        # Before the handshake is accepted, a refusal is an ordinary HTTP answer.
        await websocket.send_denial_response(problems.error_response(error))
        return
    place: Place = websocket.scope[PLACE]
    await serve_socket(
        websocket,
        lambda transport: SocketReceiver(services, caller, transport, place),
        services.settings.socket_max_frame_bytes,
        services.settings.limit_small_frames_per_second,
    )


def _check_origin(websocket: WebSocket, services: Services) -> None:
    """Browsers send an Origin; a page of another site must not ride on a token it got hold of (CWE-1385)."""
    origin = websocket.headers.get("origin")
    if origin is None or origin in services.settings.allowed_origins:
        return
    with contextlib.suppress(ValueError):  # what is no address at all
        if origin != "null" and urlsplit(origin).netloc == websocket.headers.get("host"):
            return
    raise Forbidden("origin_not_allowed", "This origin may not open sockets; see ALLOWED_ORIGINS.")


async def _authenticate(websocket: WebSocket, services: Services, token: str | None, ticket: str | None) -> Caller:
    scheme, _, bearer = websocket.headers.get("authorization", "").partition(" ")
    if bearer and scheme.lower() == "bearer":
        return await services.auth.authenticate(bearer.strip())
    if ticket is not None:
        return await services.auth.redeem_ticket(ticket)
    if token is not None:
        return await services.auth.authenticate(token)
    raise Unauthenticated


class SocketReceiver(Receiver):
    """One client's frames: parsed, limited, handed to a service, answered."""

    def __init__(self, services: Services, caller: Caller, transport: Transport, place: Place) -> None:
        self._services = services
        self._settings = services.settings
        self._caller = caller
        self._transport = transport
        self._connections = services.connections
        self._pending = 0
        self._paused = False
        self._refused = 0
        self._ready = False
        self._early: list[bytes] = []
        self._bucket = (
            TokenBucket(self._settings.limit_frames_per_second, self._settings.limit_frames_burst, services.clock)
            if self._settings.limit_frames_per_second
            else None
        )
        self._connection: Connection = self._connections.add(
            transport, caller.user_id, caller.session_id, caller.expires_at
        )
        metrics.socket_connects.inc()
        self._place = place
        place.kept = True
        self._connections.spawn(self._greet(), "greet")

    async def _greet(self) -> None:
        """Subscribe to the user's chats, say hello, then look at what the client was too eager to hold back."""
        connection = self._connection
        try:
            async with asyncio.timeout(self._settings.socket_greeting_seconds):
                await self._connections.load_chats(connection.user)
                # A session that ended after the door was passed and before the socket was known would stay open.
                alive = await self._services.auth.is_alive(self._caller)
            if not alive:
                connection.close(CloseCode.UNAUTHENTICATED, "session ended")
                return
        except TimeoutError:
            hint = self._connections.retry_hint(self._connections.count)
            connection.close(CloseCode.TRY_LATER, f"too many are coming; {hint}")
            return
        except Unavailable:
            connection.close(CloseCode.RESTART, "the database does not answer")
            return
        except Exception:
            log.exception("greeting_failed")
            connection.close(CloseCode.RESTART, "the server failed")  # rather than stay open and mute
            return
        connection.ready = True
        connection.send_event(
            {
                "type": "hello",
                "user_id": self._caller.user_id,
                "session_id": self._caller.session_id,
                "epoch": self._services.catch_up.epoch,
                "account_version": connection.user.account_version,
                "server_time": timestamp(self._services.clock.now()),
                "heartbeat_seconds": self._settings.socket_heartbeat_seconds,
            }
        )
        if connection.closing or self._connections.draining:
            return  # what waits here was never taken; its sender will find no answer and try again
        self._ready = True
        early, self._early = self._early, []
        for data in early:
            self.on_text(data)

    # --- Receiver ---

    def on_text(self, data: bytes) -> None:
        if not self._ready:
            if len(self._early) < self._settings.socket_max_early_frames:
                self._early.append(data)
            else:
                self._connection.close(CloseCode.FLOODING, "too many frames before hello")
            return
        metrics.frames_received.n += 1
        if not self._within_rate(data):
            return
        try:
            command = COMMANDS.validate_json(data)
        except ValidationError as error:
            self._fail(_bad_frame(error), *_names_of(data))
            return
        try:
            self._dispatch(command)
        except DialectError as error:
            self._fail(error, command.ref, _client_id_of(command))

    def on_binary(self, data: bytes) -> None:
        metrics.frames_received.n += 1
        if self._within_rate(b""):
            self._fail(BadInput("binary_frame", "Frames are JSON text."), None, None)

    def _within_rate(self, data: bytes) -> bool:
        """Whether this frame may be looked at; tells its sender when it may not."""
        if self._bucket is None or not (wait := self._bucket.take()):
            self._refused = 0
            return True
        self._refused += 1
        metrics.rate_limited.labels("limit_frames_per_second").inc()
        if self._refused > self._settings.socket_max_refused_frames:
            self._connection.close(CloseCode.FLOODING, "too many frames")
        else:
            error = TooManyRequests("rate_limited", "Too many frames.", retry_after=wait)
            self._fail(error, *_names_of(data))
        return False

    def on_drained(self) -> None:
        self._connection.on_drained()

    def on_shutdown(self) -> None:
        # The drain is over by now: this one came in too late for it.
        self._connection.close(CloseCode.RESTART, "server restarts")

    def on_closed(self, code: int) -> None:
        metrics.count_close(code, ours=self._connection.closing)
        self._services.presence.forget(self._connection)
        self._connections.remove(self._connection)
        self._place.leave()

    # --- commands ---

    def _dispatch(self, command: AnyCommand) -> None:
        match command:
            case NewMessageCommand() | EditMessageCommand() | MessageReadCommand() | MessageDeliveredCommand():
                self._submit(command)
            case DeleteMessageCommand():
                if command.for_everyone:
                    self._submit(command)
                else:
                    self._run(command, self._services.messages.delete(self._caller.user_id, command))
            case TypingCommand():
                typing = self._services.typing.type(self._caller.user_id, command.chat_id, active=command.active)
                self._run(command, typing, quiet=True)
            case SubscribePresenceCommand():
                self._run(command, self._services.presence.subscribe(self._connection, command.user_ids))
            case ResumeCommand():
                state = ResumeIn(epoch=command.epoch, account_version=command.account_version, chats=command.chats)
                self._connection.resume(state, command.ref, lambda error: self._fail(error, command.ref, None))
            case ReauthCommand():
                self._run(command, self._reauth(command.token))
            case PingCommand():
                self._connection.send_event({"type": "pong", "ref": command.ref})

    def _submit(
        self,
        command: NewMessageCommand
        | EditMessageCommand
        | DeleteMessageCommand
        | MessageReadCommand
        | MessageDeliveredCommand,
    ) -> None:
        ref = command.ref
        client_id = str(command.client_id) if isinstance(command, NewMessageCommand) and command.client_id else None

        def on_done(outcome: Done | DialectError) -> None:
            self._finished()
            if isinstance(outcome, DialectError):
                self._fail(outcome, ref, client_id)
            else:
                message = outcome.message
                self._ack(
                    ref,
                    chat_id=command.chat_id,
                    client_id=message["client_id"] if message else None,
                    message_id=message["id"] if message else None,
                    seq=message["seq"] if message else None,
                    created_at=message["created_at"] if message else None,
                )

        self._services.messages.submit(self._caller.user_id, command, on_done)
        self._started()

    def _run(self, command: AnyCommand, work: Coroutine[Any, Any, None], *, quiet: bool = False) -> None:
        """Do what needs to wait beside the reading of further frames."""
        self._started()
        self._connections.spawn(self._finish(command, work, quiet=quiet), "command")

    async def _finish(self, command: AnyCommand, work: Coroutine[Any, Any, None], *, quiet: bool) -> None:
        try:
            await work
        except DialectError as error:
            self._fail(error, command.ref, None)
        except Exception:
            log.exception("command_failed", extra={"command": command.type})
            self._fail(DialectError("internal_error", "The server failed to do this."), command.ref, None)
        else:
            if not quiet:
                self._ack(command.ref)
        finally:
            self._finished()

    async def _reauth(self, token: str) -> None:
        caller = await self._services.auth.authenticate(token)
        if (caller.user_id, caller.session_id) != (self._caller.user_id, self._caller.session_id):
            raise Unauthenticated("wrong_session", "The token belongs to another session.")
        self._connection.expires_at = caller.expires_at
        self._connection.token_warned = False

    def _started(self) -> None:
        self._pending += 1
        if self._pending >= self._settings.socket_max_pending and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _finished(self) -> None:
        self._pending -= 1
        # Once the server drains, the pause is its own: what were read now could be stored and never acknowledged.
        half = self._settings.socket_max_pending // 2
        if self._paused and self._pending <= half and not self._connections.draining:
            self._paused = False
            self._transport.resume_reading()

    # --- answers ---

    def _ack(
        self,
        ref: str | None,
        *,
        chat_id: int | None = None,
        client_id: str | None = None,
        message_id: int | None = None,
        seq: int | None = None,
        created_at: str | None = None,
    ) -> None:
        ack: AckEvent = {
            "type": "ack",
            "ref": ref,
            "client_id": client_id,
            "chat_id": chat_id,
            "message_id": message_id,
            "seq": seq,
            "created_at": created_at,
        }
        self._connection.send_event(ack)

    def _fail(self, error: DialectError, ref: str | None, client_id: str | None) -> None:
        metrics.commands_refused.labels(error.code).inc()
        event: ErrorEvent = {
            "type": "error",
            "code": error.code,
            "detail": error.detail,
            "retryable": error.retryable,
            "retry_after": error.retry_after,
            "ref": ref,
            "client_id": client_id,
        }
        self._connection.send_event(event)


def _client_id_of(command: AnyCommand) -> str | None:
    return str(command.client_id) if isinstance(command, NewMessageCommand) and command.client_id else None


def _bad_frame(error: ValidationError) -> BadInput:
    """What is wrong with a frame, in one sentence that repeats nothing of it but the name of a field."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    match first["type"]:
        case "json_invalid":
            return BadInput("invalid_json", "The frame is not valid JSON.")
        case "union_tag_invalid" | "union_tag_not_found":
            return BadInput("unknown_type", "The frame's `type` is missing or not a command.")
        case "extra_forbidden":
            return BadInput("invalid_frame", f"{_shown(str(first['loc'][-1]))}: unknown field")
        case _:
            # The first part of the location is the command itself, the second its field; what is deeper are the
            # client's own words.
            place = ".".join(map(str, first["loc"][1:2]))
            return BadInput("invalid_frame", f"{place}: {first['msg']}" if place else first["msg"])


def _shown(name: str) -> str:
    """A name that the client made up: it may be a novel, or turn the text around it upside down."""
    escaped = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in name[:SHOWN_NAME_CHARS]
    )
    return escaped[:SHOWN_NAME_CHARS]


def _names_of(data: bytes) -> tuple[str | None, str | None]:
    """`ref` and `client_id` of a frame that was refused, so that its sender can tell which one it was."""
    try:
        frame = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None, None
    if not isinstance(frame, dict):
        return None, None
    ref, client_id = frame.get("ref"), frame.get("client_id")
    return (
        ref if isinstance(ref, str) and len(ref) <= 64 else None,
        canonical_uuid(client_id) or client_id if isinstance(client_id, str) and len(client_id) <= 64 else None,
    )
