"""Registering, logging in, and the sessions of an account."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Body, Form, Header, Path
from pydantic import BaseModel, Field

from app.api.deps import CallerDep, ClientIp, ServicesDep
from app.api.problems import problems
from app.db.schemas import (
    MAX_ID,
    Device,
    In,
    NewPassword,
    Password,
    Phone,
    RefreshIn,
    Registered,
    RegisterIn,
    Ticket,
    Tokens,
)

router = APIRouter(prefix="/auth", tags=["Authentication"])

UserAgent = Annotated[str, Header(include_in_schema=False)]
SessionId = Annotated[int, Path(ge=1, le=MAX_ID, description="Id of a session.", examples=[7])]


class LoginForm(BaseModel):
    """A login as OAuth 2.0 writes it (RFC 6749 section 4.3.2); unknown fields are ignored, as it demands."""

    username: Annotated[Phone, Field(description="The phone, with its country code.")]
    password: Password
    grant_type: Literal["password"] = "password"
    device_name: Annotated[str, Field(max_length=64, description="Shown in the list of sessions.")] = ""
    platform: Annotated[str, Field(max_length=16, examples=["android"])] = ""


class PasswordIn(In):
    """The old password, as proof, and the new one."""

    old_password: Password
    new_password: Annotated[NewPassword, Field(examples=["Orchid-lantern-7!"])]


REGISTER_EXAMPLES = {
    "brief": {
        "summary": "The least that is needed",
        "value": {"phone": "+79991234567", "password": "SecurePass123!", "username": "john_doe"},
    },
    "full": {
        "summary": "With a name and a device",
        "value": {
            "phone": "+79991234567",
            "password": "SecurePass123!",
            "username": "john_doe",
            "display_name": "John Doe",
            "device_name": "John's phone",
            "platform": "android",
        },
    },
}


@router.post(
    "/register",
    status_code=201,
    summary="Register",
    responses=problems(
        "phone_taken",
        "username_taken",
        "invalid_phone",
        "username_reserved",
        "weak_password",
        "rate_limited",
        "database_unavailable",
        "busy",
        "overloaded",
    ),
)
async def register_account(
    body: Annotated[RegisterIn, Body(openapi_examples=REGISTER_EXAMPLES)],
    services: ServicesDep,
    ip: ClientIp,
    user_agent: UserAgent = "",
) -> Registered:
    """Open an account, and log its first device in.

    409 `phone_taken` or `username_taken`; 422 `invalid_phone`, `username_reserved` or `weak_password`.
    """
    return await services.auth.register(body, ip, user_agent)


@router.post(
    "/token",
    summary="Log in",
    responses=problems(
        "invalid_credentials", "invalid_phone", "rate_limited", "database_unavailable", "busy", "overloaded"
    ),
)
async def log_in(
    form: Annotated[LoginForm, Form()], services: ServicesDep, ip: ClientIp, user_agent: UserAgent = ""
) -> Tokens:
    """Log a device in with phone and password.

    401 `invalid_credentials`, whichever of the two is wrong. A `+` that a client left unescaped in the form, as in
    `username=+79991234567`, is understood.
    """
    return await services.auth.login(
        form.username,
        form.password,
        ip,
        device_name=form.device_name,
        platform=form.platform,
        user_agent=user_agent,
    )


@router.post(
    "/refresh",
    summary="Get the next tokens",
    responses=problems("invalid_refresh_token", "rate_limited", "database_unavailable", "busy"),
)
async def refresh_tokens(body: RefreshIn, services: ServicesDep, ip: ClientIp) -> Tokens:
    """Exchange a refresh token for the next pair. It works once.

    Repeated within seconds, because the answer was lost, it brings the same successor. Later it means that two hold
    it: the session ends. 401 `invalid_refresh_token`: log in again.
    """
    return await services.auth.refresh(body.refresh_token, ip)


@router.post("/logout", status_code=204, summary="Log out")
async def log_out(services: ServicesDep, caller: CallerDep) -> None:
    """End this session: its tokens stop working and its sockets are closed."""
    await services.auth.logout(caller)


@router.post("/ws-ticket", summary="Get a ticket for a socket", responses=problems("overloaded"))
async def create_ws_ticket(services: ServicesDep, caller: CallerDep) -> Ticket:
    """A key that opens one WebSocket within seconds: `/api/v1/messages/ws?ticket=...`.

    For browsers, which cannot set headers on a handshake: a token in a URL ends up in logs.
    """
    return await services.auth.issue_ticket(caller)


@router.get("/sessions", summary="List sessions")
async def list_sessions(services: ServicesDep, caller: CallerDep) -> list[Device]:
    """The devices that are logged in, the last used first."""
    return await services.auth.list_sessions(caller)


@router.delete("/sessions", status_code=204, summary="Log other devices out")
async def end_other_sessions(services: ServicesDep, caller: CallerDep) -> None:
    """End all sessions but this one."""
    await services.auth.end_other_sessions(caller)


@router.delete(
    "/sessions/{session_id:int}",
    status_code=204,
    summary="Log a device out",
)
async def end_session(session_id: SessionId, services: ServicesDep, caller: CallerDep) -> None:
    """End one of one's own sessions. 404 `session_not_found`."""
    await services.auth.end_session(caller, session_id)


@router.post(
    "/password",
    status_code=204,
    summary="Change the password",
    responses=problems("wrong_password", "weak_password", "overloaded"),
)
async def change_password(body: PasswordIn, services: ServicesDep, caller: CallerDep) -> None:
    """Change the password, and log all other devices out.

    403 `wrong_password` when the old one is wrong, 422 `weak_password` for the new one.
    """
    await services.auth.change_password(caller, body.old_password, body.new_password)
