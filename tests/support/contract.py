"""The OpenAPI document as a judge: what any test gets from a server must be what the document tells of."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx

from scripts import api_documents
from tests.support.libraries import installed, require_library

if TYPE_CHECKING:
    import jsonschema_rs

PROBLEM = "application/problem+json"
ELSEWHERE = {
    (404, "not_found"),  # the address names no operation: a word where its path has a number
    (500, "internal_error"),  # a bug, which tests provoke
}
"""What no operation documents, though a request that looks like one may get it."""


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document, as the code makes it."""
    loaded: dict[str, Any] = json.loads(api_documents.openapi())
    return loaded


@cache
def _validator(path: tuple[str, ...]) -> jsonschema_rs.Draft202012Validator:
    import jsonschema_rs

    node = document()
    for part in path:
        node = node[part]
    # Beside the schema, so that its references resolve.
    return jsonschema_rs.Draft202012Validator({**node, "components": document()["components"]}, validate_formats=True)


def check_value(value: Any, *path: str) -> None:
    """Fail unless the schema at this place of the document accepts a value."""
    require_library("jsonschema_rs")
    errors = [f"{error.instance_path}: {error.message}" for error in _validator(path).iter_errors(value)]
    assert not errors, f"{'/'.join(path)}: {errors}"


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    # The more literal an address, the earlier: /users/me is no {user_id}.
    paths = sorted(document()["paths"], key=lambda path: path.count("{"))
    return [(re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path) for path in paths]


def operation_of(request: httpx.Request) -> tuple[str, str] | None:
    """(path, method) of the operation that a request asks for; None where the document knows none."""
    method = request.method.lower()
    path = next((path for pattern, path in _patterns() if pattern.fullmatch(request.url.path)), "")
    return (path, method) if method in document()["paths"].get(path, {}) else None


async def judge(response: httpx.Response) -> None:
    """Fail unless the document tells of this answer. A response hook of httpx clients."""
    found = operation_of(response.request)
    if found is None:
        return
    path, method = found
    operation = document()["paths"][path][method]
    status = str(response.status_code)
    media_type = response.headers.get("content-type", "").partition(";")[0]
    what = f"{method.upper()} {path} answered {status}"
    if response.status_code == 204 or media_type not in (PROBLEM, "application/json"):
        assert status in operation["responses"], f"{what}, which its documentation does not tell of"
        content = operation["responses"][status].get("content", {})
        assert not content or media_type in content, f"{what} with {media_type}"
        return
    body = json.loads(await response.aread())
    if media_type == PROBLEM:
        if (response.status_code, body["code"]) in ELSEWHERE:
            return
        known = operation["responses"].get(status, {}).get("content", {}).get(PROBLEM, {}).get("examples", {})
        assert body["code"] in known, f"{what} {body['code']}, which its documentation does not tell of"
    assert media_type in operation["responses"].get(status, {}).get("content", {}), f"{what} with {media_type}"
    if installed("jsonschema_rs"):
        check_value(body, "paths", path, method, "responses", status, "content", media_type, "schema")
