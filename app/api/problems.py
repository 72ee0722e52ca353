"""Errors as REST tells them: RFC 9457 `application/problem+json` with a stable `code`, never echoing input.

A problem names neither the request nor its id (that is in `X-Request-ID`): what is missing and what is
somebody else's must look the same to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, NotRequired

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path
from typing_extensions import TypedDict

from app.core.errors import DialectError, Unauthenticated

MEDIA_TYPE = "application/problem+json"


class FieldError(TypedDict):
    """Where a request is wrong, and how."""

    loc: Annotated[list[str | int], Field(description="Path to the value: `body`, `query`, `path`, then names.")]
    msg: str


class Problem(TypedDict):
    """An error (RFC 9457). Act on `code`: it is stable; the texts are for people."""

    type: Annotated[str, Field(examples=["about:blank"])]
    title: Annotated[str, Field(examples=["Not found"])]
    status: Annotated[int, Field(examples=[404])]
    detail: Annotated[str, Field(examples=["There is no such chat."])]
    code: Annotated[str, Field(examples=["chat_not_found"])]
    errors: NotRequired[list[FieldError]]


TITLES = {error.status: error.title for error in DialectError.__subclasses__()}
CODES = {
    400: "bad_request",
    401: "invalid_token",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    426: "upgrade_required",
}
DETAILS = {
    400: "The body cannot be read.",
    404: "There is nothing here.",
    405: "This method is not allowed here.",
    413: "The body is too large.",
}
SCHEMA_REF = "#/components/schemas/Problem"


class BodyRefused(HTTPException):
    """A DialectError found while the body streams in: FastAPI's reader lets only HTTPExceptions through."""

    def __init__(self, error: DialectError) -> None:
        super().__init__(error.status, error.detail)
        self.error = error


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response:
    """A problem as a response; `members` are extra fields of it."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(status) or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        **members,
    }
    if errors:
        body["errors"] = list(errors)
    return Response(orjson.dumps(body), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def error_response(error: DialectError) -> Response:
    """What a client is told of an error."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="dialect"'
    errors: list[FieldError] = [{"loc": ["body", error.field], "msg": error.detail}] if error.field else []
    return problem(error.status, error.code, error.detail, errors=errors, headers=headers)


def internal_error() -> Response:
    """What a client is told of a bug: nothing."""
    return problem(500, "internal_error", "Something went wrong here; the server's log knows more.")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=`: these statuses answer with a problem."""
    return {
        status: {
            "description": TITLES.get(status) or HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": SCHEMA_REF}}},
        }
        for status in statuses
    }


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Complete an OpenAPI document: the schemas `problems` refers to, and 401 where a token is asked for."""
    schema = TypeAdapter(Problem).json_schema(ref_template="#/components/schemas/{model}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {**schema.pop("$defs"), "Problem": schema}
    for path in document["paths"].values():
        for operation in path.values():
            if "security" in operation:
                operation["responses"].setdefault("401", problems(401)[401])
    return document


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem."""
    app.add_exception_handler(DialectError, _on_dialect_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_dialect_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, DialectError)  # noqa: S101 - registered for it alone
    return error_response(error)


async def _on_invalid_request(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return problem(422, "invalid_json", "The body is not valid JSON.")
    # pydantic's messages name limits and types, never the value; `input` and `ctx` would show it.
    errors: list[FieldError] = [
        {"loc": [_printable(part) for part in item["loc"]], "msg": str(item["msg"])} for item in found[:50]
    ]
    return problem(422, "invalid_request", "The request is not acceptable; see `errors`.", errors=errors)


def _printable(part: str | int) -> str | int:
    # The name of an unknown field comes from the client: it may be a novel.
    return part if isinstance(part, int) else part[:64].encode("utf-8", "replace").decode()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    if isinstance(error, BodyRefused):
        return error_response(error.error)
    status, headers = error.status_code, dict(error.headers or {})
    if status < 400:
        return Response(status_code=status, headers=headers)
    if status == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request) or [headers.get("Allow", "GET")])
    return problem(
        status,
        CODES.get(status, "http_error"),
        DETAILS.get(status) or HTTPStatus(status).phrase + ".",
        headers=headers,
    )


def _allowed_methods(request: Request) -> list[str]:
    """All methods of a path; Starlette names those of the first route with this path only."""
    allowed: set[str] = set()
    for template, operations in request.app.openapi()["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and parameter["schema"].get("type") == "integer":
                    template = template.replace(f"{{{parameter['name']}}}", f"{{{parameter['name']}:int}}")
        if compile_path(template)[0].match(request.url.path):
            allowed.update(method.upper() for method in operations)
    return sorted(allowed)
