"""What `make schemathesis` must know that its configuration cannot say; loaded by Schemathesis itself."""

from __future__ import annotations

from email import message_from_bytes
from email.message import Message
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.core.transport import Response


def is_form_of_one_file(content_type: str, body: bytes) -> bool:
    """Whether these bytes are just what an upload asks for, and nothing beside it."""
    form = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    if form.get_content_type() != "multipart/form-data" or form.defects:
        return False
    parts = form.get_payload()
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(part := parts[0], Message):
        return False
    return part.get_param("name", header="content-disposition") == "file" and part.get_filename() is not None


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case[Any], response: Response
) -> bool:
    """Drop one kind: a body made to be wrong that is a good form by the time it is sent.

    What it adds to a form may be an empty list, of which nothing is sent.
    """
    if not isinstance(failure, AcceptedNegativeData) or "Invalid component: in body" not in failure.message:
        return True
    body = response.request.body
    content_type = str(response.request.headers.get("Content-Type", ""))
    return not is_form_of_one_file(content_type, body if isinstance(body, bytes) else b"")
