"""What `make schemathesis` must know that its configuration cannot say; loaded by Schemathesis itself."""

from __future__ import annotations

import json
import os
import re
from email import message_from_bytes
from email.message import Message
from typing import Any

import httpx
import schemathesis
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.core.transport import Response
from schemathesis.openapi.checks import ObjectLevelAuthorizationViolation, RejectedPositiveData


def is_form_of_one_file(content_type: str, body: bytes) -> bool:
    """Whether these bytes are just what an upload asks for, and nothing beside it."""
    form = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    if form.get_content_type() != "multipart/form-data" or form.defects:
        return False
    parts = form.get_payload()
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(part := parts[0], Message):
        return False
    return part.get_param("name", header="content-disposition") == "file" and part.get_filename() is not None


def as_sender(response: Response, url: str) -> httpx.Response:
    """Look something up as the one who sent the request that got this response."""
    return httpx.get(url, headers={"Authorization": str(response.request.headers["Authorization"])})


def shares_the_chat(peer: str, response: Response) -> bool:
    """Whether the one who also got this is a member of its chat, by the list that the owner sees."""
    chat = re.match(r"https?://[^/]+/api/v1/chats/\d+(?=/|\?|$)", str(response.request.url))
    if chat is None:
        return False
    members = as_sender(response, f"{chat[0]}/members?limit=100")
    user_id = json.loads(os.environ["DIALECT_SCHEMATHESIS_USER_IDS"])[peer]
    return members.is_success and user_id in {member["user_id"] for member in members.json()["items"]}


def names_files_of_another_kind(response: Response) -> bool:
    """Whether this is the refusal of pictures, films or songs that are none, by what the server hands out."""
    sent = re.match(r"(https?://[^/]+/api/v1)/chats/\d+/messages$", str(response.request.url))
    if sent is None or response.status_code != 422 or response.json()["code"] != "attachment_mismatch":
        return False
    body = response.request.body
    assert isinstance(body, bytes)
    message = json.loads(body)
    # An integer may be written as 4.0, in JSON Schema as in JSON; a path is no JSON.
    files = [as_sender(response, f"{sent[1]}/files/{int(file_id)}") for file_id in message["attachments"]]
    if message["message_type"] == "image":
        return any(file.is_success and not file.headers["content-type"].startswith("image/") for file in files)
    # Films and songs are handed out as plain bytes, like any file: there it is the code alone that tells.
    return message["message_type"] in {"video", "audio"} and any(file.is_success for file in files)


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case[Any], response: Response
) -> bool:
    """Drop what is no failure, by what was really sent and what is really there.

    - A body made to be wrong that is a good form by the time it is sent: what it adds may be an empty list.
    - A message that fits the schema, with files that exist and are of another kind than its type says.
    - A chat that one person read and the other too, who had been made a member on the way.
    """
    if isinstance(failure, AcceptedNegativeData) and "Invalid component: in body" in failure.message:
        body = response.request.body
        content_type = str(response.request.headers.get("Content-Type", ""))
        return not is_form_of_one_file(content_type, body if isinstance(body, bytes) else b"")
    if isinstance(failure, RejectedPositiveData):
        return not names_files_of_another_kind(response)
    if isinstance(failure, ObjectLevelAuthorizationViolation):
        return not shares_the_chat(failure.peer, response)
    return True
