"""Swagger UI and ReDoc, the pages that show the API.

All that they load comes from this server: they work without the internet, and a page into which people put their
password runs no script of another site.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

# Relative, as all addresses here: they hold behind a proxy that serves this under a path of its own, too.
ASSETS = "docs/assets"
INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


class Assets(StaticFiles):
    """Files under names that stay when their package is raised: browsers keep them, and ask whether they still hold."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def install(app: FastAPI) -> None:
    """Serve `/docs` and `/redoc`."""
    openapi_url = (app.openapi_url or "").removeprefix("/")
    swagger_ui = get_swagger_ui_html(
        openapi_url=openapi_url,
        title=f"{app.title} - Swagger UI",
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
    redoc = get_redoc_html(
        openapi_url=openapi_url,
        title=f"{app.title} - ReDoc",
        redoc_js_url=f"{ASSETS}/redoc.standalone.js",
        redoc_favicon_url=f"{ASSETS}/favicon.png",
        with_google_fonts=False,
    )
    app.mount(f"/{ASSETS}", Assets(packages=[("fastapi_offline", "static")]))
    _add_page(app, "/docs", bytes(swagger_ui.body).decode())
    _add_page(app, "/redoc", bytes(redoc.body).decode())


def _add_page(app: FastAPI, path: str, html: str) -> None:
    headers = {"Content-Security-Policy": policy(html)}

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def redirect(request: Request) -> Response:
        return RedirectResponse(f"..{path}")

    app.add_route(path, page, include_in_schema=False)
    app.add_route(f"{path}/", redirect, include_in_schema=False)


def policy(html: str) -> str:
    """The Content-Security-Policy of a page: of the scripts within it, it allows those that stand there now."""
    hashes = [hashlib.sha256(script.encode()).digest() for script in INLINE_SCRIPT.findall(html)]
    scripts = " ".join(["'self'", *(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)])
    return (
        f"default-src 'none'; script-src {scripts}; worker-src blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
