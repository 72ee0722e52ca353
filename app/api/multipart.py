"""One file of a `multipart/form-data` body (RFC 7578), piece by piece as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from app.core.config import Settings
from app.core.errors import BadInput

FIELD = "file"

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {FIELD: {"type": "string", "format": "binary", "description": "One file."}},
                    "required": [FIELD],
                    "additionalProperties": False,
                },
                "example": {FIELD: "the bytes of holiday.jpg"},
            }
        },
    }
}
"""The body for OpenAPI: routes read it from the request themselves, so FastAPI cannot know it."""
UPLOAD_CODES = (
    "file_too_large",
    "file_empty",
    "invalid_upload",
    "invalid_image",
    "image_too_large",
    "overloaded",
    "storage_unavailable",
)
"""How an upload can fail."""


@dataclass(slots=True)
class FilePart:
    """What the sender says of a file."""

    name: str = ""
    content_type: str = ""


class _Reader:
    def __init__(self) -> None:
        self.part = FilePart()
        self.data: list[memoryview] = []
        self.complete = False
        self._parts = 0
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise _invalid(f"The body has more parts than the one called {FIELD}.")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if options.get(b"name") != FIELD.encode() or b"filename" not in options:
            raise _invalid(f"The body must have one part, a file, called {FIELD}.")
        self.part.name = options[b"filename"].decode("utf-8", "replace")
        self.part.content_type = self._headers.get(b"content-type", b"").decode("latin-1")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.data.append(memoryview(data)[start:end])

    def on_end(self) -> None:
        self.complete = self._parts == 1


def _invalid(detail: str) -> BadInput:
    return BadInput("invalid_upload", detail, field=FIELD)


async def receive_file(
    request: Request, settings: Settings, write: Callable[[memoryview], Awaitable[None]]
) -> FilePart:
    """Read a body to its end and give the file in it to `write`. The pace is the slower one's of sender and `write`.

    Raises BadInput (`invalid_upload`; so ends, too, who sends nothing or next to nothing), and what `write` raises.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:  # RFC 2046 section 5.1.1
        raise _invalid("The body must be multipart/form-data with a boundary.")
    reader = _Reader()
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": reader.on_part_begin,
            "on_header_field": reader.on_header_field,
            "on_header_value": reader.on_header_value,
            "on_header_end": reader.on_header_end,
            "on_headers_finished": reader.on_headers_finished,
            "on_part_data": reader.on_part_data,
            "on_end": reader.on_end,
        },
    )
    chunks = request.stream()
    clock = asyncio.get_running_loop().time
    waited, received = 0.0, 0  # our own waiting for the disk is not the sender's fault
    try:
        while True:
            begun = clock()
            async with asyncio.timeout(settings.upload_idle_seconds):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            waited += clock() - begun
            received += len(chunk)
            if waited > settings.upload_idle_seconds + received / settings.upload_min_bytes_per_second:
                raise _invalid("The body comes too slowly.")
            parser.write(chunk)
            data, reader.data = reader.data, []
            for piece in data:
                await write(piece)
    except FormParserError:
        raise _invalid("The body is not well-formed multipart/form-data.") from None
    except (ClientDisconnect, TimeoutError):
        raise _invalid("The body ended before it was complete.") from None
    if not reader.complete:
        raise _invalid("The body ended before it was complete.")
    return reader.part
