"""Errors as REST tells them: RFC 9457 `application/problem+json` with a stable `code`, never echoing input.

A problem names neither the request nor its id (that is in `X-Request-ID`): what is missing and what is
somebody else's must look the same to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, NotRequired

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import Field, TypeAdapter
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path
from typing_extensions import TypedDict

from app.api.problem_examples import PROBLEM_EXAMPLES
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
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
FORMS = (FORM, "multipart/form-data")
"""What is read as a form."""
SCHEMA_REF = "#/components/schemas/Problem"
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait first.", "schema": {"type": "integer", "minimum": 1}}}
HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "`Bearer`.", "schema": {"type": "string"}}},
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}


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
    body = _body(status, code, detail, errors, **members)
    return Response(orjson.dumps(body), status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def _body(status: int, code: str, detail: str, errors: Sequence[FieldError], **members: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": _title(status),
        "status": status,
        "detail": detail,
        "code": code,
        **members,
    }
    if errors:
        body["errors"] = list(errors)
    return body


def _title(status: int) -> str:
    return TITLES.get(status) or HTTPStatus(status).phrase


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


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """For `responses=`: these codes answer with a problem. What `describe` concludes by itself need not be named."""
    responses: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        _add_code(responses, PROBLEM_EXAMPLES[code].status, code)
    return responses


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Complete an OpenAPI document: the schema of problems, and the errors that follow from what an operation takes."""
    schema = TypeAdapter(Problem).json_schema(ref_template="#/components/schemas/{model}")
    schemas = document["components"]["schemas"]
    schemas |= {**schema.pop("$defs"), "Problem": schema}
    document["components"]["examples"] = {
        code: _example(code) for code in PROBLEM_EXAMPLES if code != "invalid_request"
    }
    for path in document["paths"].values():
        for method, operation in path.items():
            _complete(operation, method, schemas)
    return document


PATH_CODES = {
    "chat_id": "chat_not_found",
    "message_id": "message_not_found",
    "user_id": "user_not_found",
    "session_id": "session_not_found",
    "file_id": "file_not_found",
    "avatar": "file_not_found",
}
"""What is not found, by the name of the parameter that names it."""


def _complete(operation: dict[str, Any], method: str, schemas: dict[str, Any]) -> None:
    """Add the codes that every operation of its kind gives, and describe each status by its codes."""
    responses = operation["responses"]
    wrong = _first_mistake(operation, schemas)
    if wrong is None:
        responses.pop("422", None)  # put there by main, lest FastAPI documents an error of its own
    for code in _implied(operation, method, takes_input=wrong is not None):
        _add_code(responses, str(PROBLEM_EXAMPLES[code].status), code)
    for status, response in responses.items():
        examples = response.get("content", {}).get(MEDIA_TYPE, {}).get("examples")
        if examples is None:
            continue
        if "invalid_request" in examples and wrong is not None:
            examples["invalid_request"] = _example("invalid_request", wrong=wrong)
        if "unsupported_media_type" in examples and FORM in operation["requestBody"]["content"]:
            examples["unsupported_media_type"] = _example("unsupported_media_type", detail=_send_as(FORM))
        response["description"] = f"{_title(int(status))}: {', '.join(f'`{code}`' for code in examples)}."
    operation["responses"] = dict(sorted(responses.items()))


def _implied(operation: dict[str, Any], method: str, *, takes_input: bool) -> Iterator[str]:
    parameters = operation.get("parameters", ())
    body = operation.get("requestBody", {}).get("content", {})
    if "security" in operation:
        yield from ("invalid_token", "rate_limited", "database_unavailable")
        if method != "get":
            yield "busy"
    for parameter in parameters:
        if parameter["in"] == "path":
            yield PATH_CODES[parameter["name"]]
        elif parameter["name"] == "cursor":
            yield "invalid_cursor"
    if takes_input:
        yield "invalid_request"
    if body:
        yield "body_too_large"
    if body and "multipart/form-data" not in body:  # uploads have bounds of their own
        yield "body_too_slow"
    if JSON in body:
        yield from ("invalid_json", "unsupported_media_type")
    if FORM in body:
        yield from ("bad_request", "unsupported_media_type")


def _add_code(responses: dict[Any, dict[str, Any]], status: int | str, code: str) -> None:
    example = PROBLEM_EXAMPLES[code]
    response = responses.setdefault(
        status,
        {
            "description": _title(example.status),
            "content": {MEDIA_TYPE: {"schema": {"$ref": SCHEMA_REF}, "examples": {}}},
        },
    )
    if example.status in HEADERS:
        response["headers"] = HEADERS[example.status]
    response["content"][MEDIA_TYPE]["examples"][code] = {"$ref": f"#/components/examples/{code}"}


def _example(code: str, *, wrong: FieldError | None = None, detail: str | None = None) -> dict[str, Any]:
    status, usual, field = PROBLEM_EXAMPLES[code]
    detail = detail or usual
    if field is not None:
        wrong = {"loc": ["body", field], "msg": detail}
    return {"summary": detail, "value": _body(status, code, detail, [wrong] if wrong else [])}


def _first_mistake(operation: dict[str, Any], schemas: dict[str, Any]) -> FieldError | None:
    """A mistake to make in a request; None where there is nothing to be mistaken in."""
    places = [
        (parameter["in"], parameter["name"], parameter["schema"]) for parameter in operation.get("parameters", ())
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = content["schema"]
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        required = schema.get("required", ())
        places += [("body", name, {} if name in required else one) for name, one in schema["properties"].items()]
    if not places:
        return None
    place, name, schema = places[-1] if places[-1][0] == "body" else places[0]
    if "minimum" in schema:
        message = f"Input should be greater than or equal to {schema['minimum']}"
    elif "pattern" in schema and place != "query":
        message = f"String should match pattern '{schema['pattern']}'"
    else:
        message = "Field required"
    return {"loc": [place, name], "msg": message}


def install(app: FastAPI) -> None:
    """Answer every error of `app` with a problem."""
    app.add_exception_handler(DialectError, _on_dialect_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_dialect_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, DialectError)  # noqa: S101 - registered for it alone
    return error_response(error)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return problem(422, "invalid_json", "The body is not valid JSON.")
    if (wanted := _wanted_type(request, error.body)) is not None:
        detail = _send_as(wanted)
        return problem(415, "unsupported_media_type", detail)
    # pydantic's messages name limits and types, never the value; `input` and `ctx` would show it.
    errors: list[FieldError] = [
        {"loc": [_printable(part) for part in item["loc"]], "msg": str(item["msg"])} for item in found[:50]
    ]
    return problem(422, "invalid_request", "The request is not acceptable; see `errors`.", errors=errors)


def _wanted_type(request: Request, body: Any) -> str | None:
    """The type that a body was read as in vain, because it says that it is another one."""
    if isinstance(body, bytes):  # FastAPI leaves what is not said to be JSON as it came
        return JSON
    if isinstance(body, FormData) and _has_body(request.headers):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        return None if kind in FORMS else FORM
    return None


def _has_body(headers: Mapping[str, str]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _send_as(media_type: str) -> str:
    return f"Send {'JSON' if media_type == JSON else 'a form'} with Content-Type: {media_type}."


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
    return sorted(
        {
            method
            for route in iter_route_contexts(request.app.routes)
            if route.path is not None and compile_path(route.path)[0].match(request.url.path)
            for method in route.methods or ()
        }
    )
