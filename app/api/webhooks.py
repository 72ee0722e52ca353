"""The socket's events in the OpenAPI document: REST cannot show a socket, `webhooks` shows what the server sends."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from app.db.events import AnyEvent

TAG = "Events of the socket"


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Add a webhook for every event, and its schema, to an OpenAPI document."""
    if "webhooks" not in document:
        document["webhooks"] = {type_of(kind): {"post": _operation(kind)} for kind in get_args(AnyEvent)}
        schemas = {**document["components"]["schemas"], **event_schemas()}
        document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document


def event_schemas() -> dict[str, Any]:
    """By name, the schemas of all events and of what is in them."""
    adapter: TypeAdapter[Any] = TypeAdapter(AnyEvent)
    schemas: dict[str, Any] = adapter.json_schema(ref_template="#/components/schemas/{model}")["$defs"]
    return schemas


def type_of(kind: type) -> str:
    """The `type` of an event or a command."""
    [name] = get_args(get_type_hints(kind)["type"])
    return str(name)


def summary_of(kind: type) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]


def _operation(kind: type) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "tags": [TAG],
        "summary": summary_of(kind),
        "description": inspect.getdoc(kind),
        "operationId": f"event_{type_of(kind)}",
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"default": {"description": "None: this is a frame of the WebSocket."}},
    }
