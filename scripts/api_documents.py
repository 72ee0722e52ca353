#!/usr/bin/env python3
"""Prints the machine-readable documents of the protocol, made from the code. Run it from the project's root:

python scripts/api_documents.py            print both
python scripts/api_documents.py --write    refresh docs/openapi.json and docs/asyncapi.yaml
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from app import __version__  # noqa: E402
from app.api.examples import example_of  # noqa: E402
from app.api.webhooks import event_schemas, summary_of, type_of  # noqa: E402
from app.db.events import COMMANDS, AnyCommand, AnyEvent  # noqa: E402

OPENAPI = ROOT / "docs" / "openapi.json"
ASYNCAPI = ROOT / "docs" / "asyncapi.yaml"

DESCRIPTION = """\
The WebSocket of Dialect: commands that clients send, events that the server sends.

Every frame is one JSON object in one text message, told apart by `type`. Commands are exact: unknown fields are
refused. Events may gain fields, and new types may appear: ignore what you do not know. The rules by which a client
keeps its copy of the chats complete, the limits, the close codes and the errors are in docs/protocol.md.
"""
SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "For phones, servers, tools: the access token in the handshake's `Authorization` header.",
    },
    "ticket": {
        "type": "httpApiKey",
        "name": "ticket",
        "in": "query",
        "description": "For browsers: a ticket of `POST /api/v1/auth/ws-ticket`. It works once, and not for long.",
    },
    "token": {
        "type": "httpApiKey",
        "name": "token",
        "in": "query",
        "description": "For quick tries: the access token. Proxies write query strings to their logs.",
    },
}


def openapi() -> str:
    """The REST API, with the events of the socket as webhooks: what the server shows at /openapi.json."""
    from app.main import app  # the import makes an application; the socket's document needs none

    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


def asyncapi() -> str:
    """The socket, as AsyncAPI 3.0."""
    import yaml  # here, for tests that need only the other document do without it

    class Dumper(yaml.SafeDumper):
        """Plain YAML: no anchors, texts of several lines as blocks."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, block)
    text: str = yaml.dump(_asyncapi(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def documents() -> dict[Path, str]:
    """What belongs into each file."""
    return {OPENAPI: openapi(), ASYNCAPI: asyncapi()}


def _asyncapi() -> dict[str, Any]:
    commands, events = get_args(AnyCommand), get_args(AnyEvent)
    command_schemas = COMMANDS.json_schema(ref_template="#/components/schemas/{model}")["$defs"]
    schemas = dict(sorted({**command_schemas, **event_schemas()}.items()))
    kinds = {kind.__name__: kind for kind in (*commands, *events)}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Dialect", "version": __version__, "description": DESCRIPTION},
        "defaultContentType": "application/json",
        "servers": {
            "dialect": {
                "host": "{host}",
                "protocol": "ws",
                "description": "Behind a proxy with TLS: `wss`.",
                "variables": {"host": {"default": "localhost:8000"}},
                "security": [_ref("components", "securitySchemes", name) for name in SECURITY],
            }
        },
        "channels": {
            "socket": {
                "address": "/api/v1/messages/ws",
                "description": "A client's live connection. The first frame from the server is `hello`.",
                "messages": {name: _ref("components", "messages", name) for name in kinds},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
            }
        },
        "operations": {
            "receiveCommand": _operation("receive", "What clients send.", commands),
            "sendEvent": _operation("send", "What the server sends.", events),
        },
        "components": {
            "messages": {
                name: {
                    "name": type_of(kind),
                    "summary": summary_of(kind),
                    "description": inspect.getdoc(kind),
                    "payload": _ref("components", "schemas", name),
                    "examples": [{"payload": example_of(schemas[name], schemas)}],
                }
                for name, kind in kinds.items()
            },
            "schemas": schemas,
            "securitySchemes": SECURITY,
        },
    }


def _operation(action: str, summary: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    return {
        "action": action,
        "channel": _ref("channels", "socket"),
        "summary": summary,
        "messages": [_ref("channels", "socket", "messages", kind.__name__) for kind in kinds],
    }


def _ref(*path: str) -> dict[str, str]:
    return {"$ref": "/".join(("#", *path))}


if __name__ == "__main__":
    for file, text in documents().items():
        if sys.argv[1:] == ["--write"]:
            file.write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
