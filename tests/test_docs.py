"""The documentation says what the code says: settings, error codes, commands and events, links."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from app.api.problems import CODES, DETAILS
from app.api.webhooks import event_schemas
from app.core import errors
from app.core.config import Settings
from app.db import events
from scripts import api_documents, settings_table
from tests.support.libraries import require_library

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "README.ru.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
ERROR_CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.DialectError)
}


def test_settings_table_is_fresh() -> None:
    page = settings_table.PAGE.read_text(encoding="utf-8")
    assert page == settings_table.replace_table(page), "run: python scripts/settings_table.py --write"


def test_the_protocol_tells_how_long_searches_wait() -> None:
    [(queue, seconds)] = re.findall(
        r"^\| Searches, .+? that wait for the database \| (\d+), for (\d+) s \|", PROTOCOL, re.M
    )
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert (int(queue), float(seconds)) == (defaults["bulk_queue"], defaults["bulk_wait_seconds"])


def test_operators_read_of_every_limit_that_each_worker_counts_for_itself() -> None:
    section = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("\n## Several workers\n")[2]
    told = set(re.findall(r"`(LIMIT_\w+)`", section.partition("\nCounted by each worker for itself")[2]))
    # Those that are written as `N/period` are counted in Redis.
    own = {
        name.upper()
        for name, field in Settings.model_fields.items()
        if name.startswith("limit_") and not isinstance(field.default, str)
    }
    assert told == own


# --- error codes ---


def _raised(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(code, status, retryable) of every error that a module makes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute)):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        literals = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if name in ERROR_CLASSES and literals and isinstance(literals[0], str):
            kind = ERROR_CLASSES[name]
            yield literals[0], kind.status, kind.retryable
        elif name == "problem" and len(literals) > 1:
            status, code = literals[:2]
            assert isinstance(status, int), ast.unparse(node)
            assert isinstance(code, str), ast.unparse(node)
            yield code, status, status in (429, 503)


def texts_in_app() -> dict[str, list[str]]:
    """The details that go with each code, as patterns."""
    found: dict[str, list[str]] = {CODES[status]: [re.escape(text)] for status, text in DETAILS.items()}
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Call, ast.arguments)):
                continue
            # A call with a code and its detail, or a default of such a pair.
            values = node.args if isinstance(node, ast.Call) else node.defaults
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ProblemExample":
                continue
            for first, second in itertools.pairwise(values):
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and (text := _pattern(second)):
                    found.setdefault(first.value, []).append(text)
    return found


def _pattern(node: ast.expr) -> str:
    """A pattern of the texts that an expression can make; empty when it makes none."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(_pattern(part) or ".+" for part in parts)
        case ast.Name():
            return ".+"
        case _:
            return ""


def codes_in_app() -> dict[str, tuple[int, bool]]:
    """(status, retryable) of every code that the application gives."""
    found = {code: (status, False) for status, code in CODES.items()}
    for path in (ROOT / "app").rglob("*.py"):
        for code, status, retryable in _raised(ast.parse(path.read_text(encoding="utf-8"))):
            assert found.setdefault(code, (status, retryable)) == (status, retryable), f"{path}: {code}"
    return found


def _codes_in_protocol() -> dict[str, tuple[str, bool]]:
    section = PROTOCOL.partition("\n## Errors\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .+ \| (yes|no) \|$", section, re.MULTILINE)
    assert [row[0] for row in rows] == sorted({row[0] for row in rows}), "sorted, each once"
    return {code: (status, retryable == "yes") for code, status, retryable in rows}


def test_the_pages_say_how_soon_everything_is_answered() -> None:
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    silence, turn = defaults["db_timeout_seconds"], defaults["bulk_wait_seconds"]
    assert silence <= defaults["write_timeout_seconds"]
    assert f"that wait for the database | {defaults['bulk_queue']}, for {turn:g} s |" in PROTOCOL
    [told] = re.findall(
        r"^\*\*How soon everything.+?\n\n", settings_table.PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert f": {silence + turn:g} s. A database that is slow" in told
    assert f": {silence + turn + silence:g} s at the most" in told


def test_every_error_code_is_in_the_protocol() -> None:
    in_app = {code: (str(status), retryable) for code, (status, retryable) in codes_in_app().items()}
    assert len(in_app) > 40, "the search for codes finds nothing any more"
    # `http_error` is the name of whatever status has no code of its own.
    assert _codes_in_protocol() == {**in_app, "http_error": ("4xx", False)}


# --- commands and events ---


def _type(kind: type) -> str:
    [name] = get_args(get_type_hints(kind)["type"])
    assert isinstance(name, str)
    return name


def _types(union: object) -> list[str]:
    return [_type(kind) for kind in get_args(union)]


def test_every_command_is_in_the_protocol() -> None:
    commands = _types(events.AnyCommand)
    section = PROTOCOL.partition("\n### Commands\n")[2].partition("\n### ")[0]
    assert sorted(re.findall(r"^#### (\w+)$", section, re.MULTILINE)) == sorted(commands)
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", section, re.MULTILINE)) == sorted(commands)


def test_every_event_is_in_the_protocol() -> None:
    section = PROTOCOL.partition("\n### Answers\n")[2].partition("\n## ")[0]
    described = re.findall(r"^#### (\w+)(?: \(event\))?$", section, re.MULTILINE)
    assert sorted(described) == sorted(_types(events.AnyEvent))


def _examples(heading: str, end: str) -> list[str]:
    section = PROTOCOL.partition(f"\n### {heading}\n")[2].partition(end)[0]
    return re.findall(r"```json\n(.+?)```", section, re.DOTALL)


def test_commands_in_the_protocol_are_accepted() -> None:
    examples = _examples("Commands", "\n### ")
    assert examples
    for example in examples:
        events.COMMANDS.validate_json(example)


def _completed(shown: Any, whole: dict[str, Any]) -> Any:
    """An example with what it leaves out (`"...": "..."`) as the example that shows all of a message or a member."""
    if isinstance(shown, list):
        return [_completed(item, whole) for item in shown]
    if not isinstance(shown, dict):
        return shown
    if "..." in shown:
        left_out = whole["member" if "user_id" in shown else "message"]
        shown = left_out | {key: value for key, value in shown.items() if key != "..."}
    return {key: _completed(value, whole) for key, value in shown.items()}


def _exactly(schema: Any) -> Any:
    """A schema that allows no field it does not name, at any depth."""
    if isinstance(schema, list):
        return [_exactly(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    exact = {key: _exactly(value) for key, value in schema.items()}
    return exact | {"additionalProperties": False} if "properties" in schema else exact


def test_events_in_the_protocol_are_what_their_schemas_say() -> None:
    require_library("jsonschema_rs")
    from jsonschema_rs import Draft202012Validator

    examples = [json.loads(example) for example in _examples("Answers", "\n## ")]
    shown = {event["type"]: event for event in examples if "type" in event}
    assert list(shown) == [event["type"] for event in examples if "type" in event], "each once"
    names = {_type(kind): kind.__name__ for kind in get_args(events.AnyEvent)}
    assert set(shown) == set(names)
    whole = {"message": shown["new_message"]["message"], "member": shown["members_changed"]["members"][0]}
    components = {"schemas": _exactly(event_schemas())}
    for name, event in shown.items():
        schema = {"$ref": f"#/components/schemas/{names[name]}", "components": components}
        validator = Draft202012Validator(schema, validate_formats=True)
        assert not [str(error) for error in validator.iter_errors(_completed(event, whole))], name
    [service] = [example for example in examples if "type" not in example]
    schema = {"$ref": "#/components/schemas/Service", "components": components}
    Draft202012Validator(schema).validate(service)


def test_answers_in_the_protocol_are_what_their_schemas_say(openapi: Any) -> None:
    require_library("jsonschema_rs")
    from jsonschema_rs import Draft202012Validator

    components = {"schemas": _exactly(openapi["components"]["schemas"])}
    sections = {"Files": "UploadedFile", "Why did it not arrive?": "MessageTrace"}
    for heading, name in sections.items():
        section = PROTOCOL.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        answer = json.loads(re.findall(r"```json\n(.+?)```", section, re.DOTALL)[0])
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        Draft202012Validator(schema, validate_formats=True).validate(answer)


# --- the documents for machines ---


@pytest.fixture(scope="module")
def openapi() -> Any:
    return json.loads(api_documents.OPENAPI.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def asyncapi() -> Any:
    require_library("yaml")
    import yaml

    return yaml.safe_load(api_documents.ASYNCAPI.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [api_documents.OPENAPI, api_documents.ASYNCAPI], ids=lambda path: path.name)
def test_document_is_fresh(path: Path) -> None:
    require_library("yaml")
    fresh = path.read_text(encoding="utf-8") == api_documents.documents()[path]
    assert fresh, f"docs/{path.name} is not what the code says; run: make docs"  # their diff would fill the screen


def test_asyncapi_has_every_command_and_event(asyncapi: Any) -> None:
    assert asyncapi["asyncapi"] == "3.0.0"
    for operation, union in (("receiveCommand", events.AnyCommand), ("sendEvent", events.AnyEvent)):
        messages = [
            _resolve(asyncapi, _resolve(asyncapi, message["$ref"])["$ref"])
            for message in asyncapi["operations"][operation]["messages"]
        ]
        assert [message["name"] for message in messages] == _types(union)
        for message in messages:
            schema = _resolve(asyncapi, message["payload"]["$ref"])
            assert schema["properties"]["type"]["const"] == message["name"]


def test_asyncapi_has_an_example_of_every_frame_that_its_schema_accepts(asyncapi: Any) -> None:
    require_library("jsonschema_rs")
    from jsonschema_rs import Draft202012Validator

    components = asyncapi["components"]
    for name, message in components["messages"].items():
        schema = {**components["schemas"][name], "components": components}  # beside it, so that references resolve
        [example] = message["examples"]
        errors = [
            str(error) for error in Draft202012Validator(schema, validate_formats=True).iter_errors(example["payload"])
        ]
        assert not errors, (name, errors)
        if name.endswith("Command"):
            events.COMMANDS.validate_json(json.dumps(example["payload"]))


def test_openapi_has_every_event_as_a_webhook(openapi: Any) -> None:
    assert list(openapi["webhooks"]) == _types(events.AnyEvent)
    for name, webhook in openapi["webhooks"].items():
        content = webhook["post"]["requestBody"]["content"]["application/json"]
        assert _resolve(openapi, content["schema"]["$ref"])["properties"]["type"]["const"] == name


@pytest.mark.parametrize("name", ["openapi", "asyncapi"])
def test_references_resolve(name: str, request: pytest.FixtureRequest) -> None:
    document = request.getfixturevalue(name)
    references = set(_references(document))
    assert len(references) > 40
    for reference in references:
        _resolve(document, reference)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _resolve(document: Any, reference: str) -> Any:
    root, *path = reference.split("/")
    assert root == "#", reference
    for part in path:
        document = document[part]
    return document


# --- links ---


def _anchor(heading: str) -> str:
    """The id GitHub gives a heading."""
    text = re.sub(r"[`*]|\[([^]]*)]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["README.md", "README.ru.md"])
def test_the_roadmap_ticks_what_is_done_and_nothing_else(name: str) -> None:
    parts = re.findall(
        r"^\*\*(.+)\*\*\n((?:- \[[ x]\] .+\n)+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(parts) == 3
    for heading, items in parts:
        assert set(re.findall(r"- \[([ x])\]", items)) == ({"x"} if "v1.0" in heading else {" "}), heading


def test_both_readmes_show_the_same_commands() -> None:
    def code(name: str) -> list[str]:
        blocks = re.findall(r"```(?:bash|json)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]

    assert code("README.md") == code("README.ru.md")
