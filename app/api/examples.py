"""Examples of bodies and frames, put together from what the schemas say of their parts: none can go stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Give every body of an OpenAPI document an example, where a route has none of its own."""
    schemas = document["components"]["schemas"]
    for content in _contents(document):
        for media in content.values():
            if not {"example", "examples"} & media.keys() and media["schema"].get("format") != "binary":
                media["example"] = example_of(media["schema"], schemas)
    return document


def _contents(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in (*document["paths"].values(), *document.get("webhooks", {}).values()):
        for operation in path.values():
            yield operation.get("requestBody", {}).get("content", {})
            for response in operation["responses"].values():
                yield response.get("content", {})


def example_of(schema: Schema, schemas: dict[str, Schema]) -> Any:
    """A value that a schema accepts: its own example, or one made of those of its parts.

    Of what may be left out only that is in it which has an example of its own; a list of several kinds has one of each.
    """
    if "examples" in schema:
        return schema["examples"][0]
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "properties" in schema:
        required = schema.get("required", ())
        return {
            name: example_of(part, schemas)
            for name, part in schema["properties"].items()
            if name in required or "examples" in part
        }
    if "anyOf" in schema:
        return example_of(schema["anyOf"][0], schemas)
    return _plain(schema, schemas)


def _plain(schema: Schema, schemas: dict[str, Schema]) -> Any:
    match schema.get("type"):
        case "array":
            items = schema["items"]
            kinds = items.get("oneOf") or items.get("anyOf") or [items]
            return [example_of(kind, schemas) for kind in kinds]
        case "boolean":
            return False
        case _:
            # A number or a text that nobody can guess is asked of whoever wrote the schema.
            raise LookupError(f"no example for {schema}")
