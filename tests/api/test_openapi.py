"""The OpenAPI document is all that a stranger needs: described, with examples, and complete in its errors.

That the server answers nothing else is watched by every test that asks it something (tests/support/contract.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from app.api.problem_examples import PROBLEM_EXAMPLES
from app.api.problems import PATH_CODES
from tests.support.contract import PROBLEM, check_value, document
from tests.test_docs import PROTOCOL, codes_in_app, texts_in_app

Json = dict[str, Any]
OPERATIONS = [(path, method) for path, methods in document()["paths"].items() for method in methods]
VERBS = {
    *("add", "block", "catch", "change", "check", "create", "delete", "edit", "end", "fetch", "forget", "get", "leave"),
    *("list", "log", "mark", "open", "refresh", "register", "remove", "save", "search", "send", "set", "unblock"),
    *("update", "upload"),
}
NOWHERE = {
    "forbidden",
    "http_error",
    "internal_error",
    "method_not_allowed",
    "not_found",
    "too_many_connections",
    "upgrade_required",
}
"""Codes of REST that belong to no operation: addresses and methods that do not exist, connections, bugs, the socket's
address."""

every_operation = pytest.mark.parametrize(
    ("path", "method"), OPERATIONS, ids=[f"{method.upper()} {path}" for path, method in OPERATIONS]
)


def _operation(path: str, method: str) -> Json:
    operation: Json = document()["paths"][path][method]
    return operation


def _examples(media: Json) -> list[Any]:
    """All examples of a body."""
    if "example" in media:
        return [media["example"]]
    return [_resolved(example)["value"] for example in media.get("examples", {}).values()]


def _resolved(example: Json) -> Json:
    if "$ref" in example:
        found: Json = document()["components"]["examples"][example["$ref"].removeprefix("#/components/examples/")]
        return found
    return example


def _codes(operation: Json, status: str) -> set[str]:
    """The codes that a status of an operation can have."""
    content = operation["responses"].get(status, {}).get("content", {})
    return set(content.get(PROBLEM, {}).get("examples", {}))


# --- words ---


@every_operation
def test_an_operation_says_what_it_is_for(path: str, method: str) -> None:
    operation = _operation(path, method)
    assert re.fullmatch(r"[A-Z].{3,60}", operation["summary"])
    assert not operation["summary"].endswith(".")
    assert operation["description"].strip().endswith(".")
    [tag] = operation["tags"]
    assert next(one for one in document()["tags"] if one["name"] == tag)["description"]
    for parameter in operation.get("parameters", ()):
        assert parameter.get("description", "").strip(), parameter["name"]
    for status, response in operation["responses"].items():
        assert len(response["description"]) > 3, status


@every_operation
def test_an_operation_has_a_name_for_generated_clients(path: str, method: str) -> None:
    name = _operation(path, method)["operationId"]
    assert re.fullmatch(r"[a-z]+(_[a-z]+)+", name)
    assert name.partition("_")[0] in VERBS, f"{name} should begin with a verb"
    assert len(name) <= 30


def test_no_two_operations_have_one_name() -> None:
    names = [_operation(path, method)["operationId"] for path, method in OPERATIONS]
    names += [one["post"]["operationId"] for one in document()["webhooks"].values()]
    assert len(names) > 70
    assert len(set(names)) == len(names)


# --- examples ---


def _bodies() -> Iterator[tuple[tuple[str, ...], Json]]:
    """(place, media type object) of every body in the document."""
    for section in ("paths", "webhooks"):
        for path, methods in document()[section].items():
            for method, operation in methods.items():
                at = (section, path, method)
                for kind, media in operation.get("requestBody", {}).get("content", {}).items():
                    yield (*at, "requestBody", "content", kind), media
                for status, response in operation["responses"].items():
                    for kind, media in response.get("content", {}).items():
                        yield (*at, "responses", status, "content", kind), media


def test_every_body_has_examples_that_its_schema_accepts() -> None:
    kinds: dict[str, int] = defaultdict(int)
    for place, media in _bodies():
        kinds[place[-1]] += 1
        if media["schema"].get("format") == "binary":
            continue
        examples = _examples(media)
        assert examples, place
        for example in examples:
            check_value(example, *place, "schema")
    assert set(kinds) >= {"application/json", "application/x-www-form-urlencoded", "multipart/form-data", PROBLEM}
    assert kinds["application/json"] > 80


def test_examples_and_defaults_of_parts_are_accepted_by_them() -> None:
    count = 0
    for name, schema in document()["components"]["schemas"].items():
        for field, part in schema.get("properties", {}).items():
            # A generated client may send the defaults.
            for example in (*part.get("examples", ()), *([part["default"]] if "default" in part else [])):
                check_value(example, "components", "schemas", name, "properties", field)
                count += 1
    assert count > 100


# --- errors ---


@every_operation
def test_an_operation_tells_of_the_errors_that_follow_from_what_it_takes(path: str, method: str) -> None:
    operation = _operation(path, method)
    in_path = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
    assert in_path == set(re.findall(r"{(\w+)}", path))
    for name in in_path:
        assert PATH_CODES[name] in _codes(operation, "404")
    if "security" in operation:
        assert "invalid_token" in _codes(operation, "401")
    if path.startswith("/api/"):
        assert _codes(operation, "503") & {"database_unavailable", "storage_unavailable"}
        assert "rate_limited" in _codes(operation, "429") or operation["operationId"] == "fetch_avatar"
    takes_input = bool(operation.get("parameters")) or "requestBody" in operation
    assert ("invalid_request" in _codes(operation, "422")) == takes_input
    assert ("body_too_large" in _codes(operation, "413")) == ("requestBody" in operation)
    kinds = set(operation.get("requestBody", {}).get("content", {}))
    assert ("unsupported_media_type" in _codes(operation, "415")) == bool(kinds - {"multipart/form-data"})
    is_upload = "multipart/form-data" in operation.get("requestBody", {}).get("content", ())
    assert ("body_too_slow" in _codes(operation, "408")) == ("requestBody" in operation and not is_upload)


@every_operation
def test_an_error_has_a_stable_code_for_each_of_its_examples(path: str, method: str) -> None:
    operation = _operation(path, method)
    known = codes_in_app()
    for status, response in operation["responses"].items():
        if int(status) < 400:
            assert PROBLEM not in response.get("content", {})
            continue
        assert list(response["content"]) == [PROBLEM], status
        examples = response["content"][PROBLEM]["examples"]
        for code, example in ((code, _resolved(example)) for code, example in examples.items()):
            assert example["summary"]
            assert (example["value"]["code"], example["value"]["status"]) == (code, int(status))
            assert known[code][0] == int(status)
            assert f"`{code}`" in response["description"]
        if int(status) in (429, 503):
            assert "Retry-After" in response["headers"]


@every_operation
def test_codes_that_the_description_names_are_among_the_errors(path: str, method: str) -> None:
    operation = _operation(path, method)
    named = {word for word in re.findall(r"`(\w+)`", operation["description"]) if word in PROBLEM_EXAMPLES}
    told = set().union(*(_codes(operation, status) for status in operation["responses"]))
    assert named <= told


def test_every_code_of_rest_is_an_error_of_some_operation() -> None:
    told = {
        code
        for path, method in OPERATIONS
        for status in _operation(path, method)["responses"]
        for code in _codes(_operation(path, method), status)
    }
    section = PROTOCOL.partition("\n## Errors\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| (.+?) \|", section, re.MULTILINE)
    of_the_socket = {code for code, meaning in rows if meaning.startswith(("socket:", "handshake:"))}
    assert told == {code for code, _ in rows} - of_the_socket - NOWHERE
    assert told == set(PROBLEM_EXAMPLES)


@pytest.mark.parametrize("code", PROBLEM_EXAMPLES)
def test_the_example_of_a_code_reads_as_the_server_says_it(code: str) -> None:
    # What is computed, such as a limit, stands in the pattern as anything.
    texts = texts_in_app()[code]
    assert any(re.fullmatch(text, PROBLEM_EXAMPLES[code].detail) for text in texts), texts


def test_no_error_is_described_by_the_framework() -> None:
    assert not {"HTTPValidationError", "ValidationError"} & document()["components"]["schemas"].keys()
