"""The application: `create_app` wires the parts, `app` is what `uvicorn app.main:app` serves. No logic."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import __version__
from app.api import docs_pages, examples, metrics, problems, webhooks
from app.api.graceful_stop import graceful_stop
from app.api.middleware import middleware
from app.api.socket_door import ADMISSION
from app.api.v1 import (
    auth,
    avatars,
    chat_settings,
    chats,
    drafts,
    files,
    health,
    messages,
    push,
    socket,
    user_settings,
    users,
)
from app.core.clock import Clock
from app.core.config import Settings, get_settings, tell_unknown_names
from app.core.errors import StartupError
from app.core.logging import configure_logging
from app.services.container import Services, build_services

DESCRIPTION = """
A self-hosted messenger: accounts, personal and group chats, live messages over a WebSocket.

Register, press **Authorize** and log in with phone and password, and try the requests here. Errors are
`application/problem+json` (RFC 9457); act on their `code`.
"""

TAGS = [
    {"name": "Authentication", "description": "Accounts, tokens, and the devices that are logged in."},
    {"name": "Users", "description": "Profiles, finding people, blocks, and settings for all chats."},
    {"name": "Chats", "description": "Personal chats and groups, who is in them, and what is written there."},
    {"name": "Messages", "description": "History, catching up, and uploading the files of messages."},
    {"name": "Files", "description": "The bytes of files in messages, for those who see the message."},
    {"name": "Avatars", "description": "Pictures of people and groups."},
    {"name": "Push", "description": "Notifications through Firebase."},
    {"name": "Health", "description": "For load balancers."},
    {"name": webhooks.TAG, "description": "Frames that the server sends over the WebSocket; see docs/protocol.md."},
]


def create_app(settings: Settings | None = None, clock: Clock | None = None) -> FastAPI:
    """The application with these settings, or those of the environment.

    Raises StartupError when the settings cannot be used.
    """
    settings = settings or get_settings()
    configure_logging(settings)
    services = build_services(settings, clock)
    app = FastAPI(
        title="Dialect",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        middleware=middleware(settings, services.clock, services.admission),
        docs_url=None,  # FastAPI's own pages load their scripts from another site
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs_enabled else None,
        openapi_tags=TAGS,
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their functions
        redirect_slashes=False,  # a redirect drops the body of a POST in half of the clients
    )
    app.state.services = services
    problems.install(app)
    for module in (
        auth, users, user_settings, chats, chat_settings, drafts, messages, files, avatars, push, socket,
    ):  # fmt: skip
        app.include_router(module.router, prefix="/api/v1", responses=problems.problems("invalid_request"))
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.add_api_route("/", root_of(settings), include_in_schema=False)
    if settings.docs_enabled:
        docs_pages.install(app)
    build_routes(app)
    generate = app.openapi
    # FastAPI's way to extend it. Once: FastAPI hands out the same document every time.
    app.openapi = functools.cache(  # type: ignore[method-assign]
        lambda: examples.describe(webhooks.describe(problems.describe(generate())))
    )
    return app


def build_routes(app: FastAPI) -> None:
    """Let every route build what it validates with. FastAPI would do it while the first request waits."""
    nowhere = {"type": "http", "method": "GET", "path": "/nowhere", "headers": []}
    for route in app.routes:
        route.matches(nowhere)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    """Start the parts before the first request, drain them at the signal to stop, stop them after the last."""
    services: Services = app.state.services
    try:
        await services.start()
        with graceful_stop(services.drain, services.settings):
            yield {ADMISSION: services.admission}
    finally:
        await services.stop()


def root_of(settings: Settings) -> Callable[[], Any]:
    """The route `/`, where a newcomer's browser lands."""

    async def root() -> Response:
        if settings.docs_enabled:
            return RedirectResponse("/docs")
        return JSONResponse({"name": "Dialect", "version": __version__})

    return root


def app_of_this_process() -> FastAPI:
    """For servers that import `app`: settings that cannot be used end the process with a sentence."""
    try:
        settings = get_settings()
        tell_unknown_names()
        return create_app(settings)
    except StartupError as error:
        sys.exit(str(error))


app = app_of_this_process()
