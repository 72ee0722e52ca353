"""A reader and sender of .http files: as much of the syntax of VS Code's REST Client as ours use, and as strict.

What it does not know, or cannot find, fails: the extension would send it as it stands.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

DELIMITER = re.compile(r"^#{3,}\s*(.*)$")
COMMENT = re.compile(r"^\s*(?:#|//)\s?(.*)$")
VARIABLE = re.compile(r"^\s*@(\w+)\s*=\s*(.*?)\s*$")
NAME = re.compile(r"^@name\s+(\w+)$")
STATUS = re.compile(r"\b([1-5]\d\d)\b(?: (\w+_\w+))?")
STEP = re.compile(r"^\d+\. (\w+): (\w+)(?: (\w+_\w+))?")
REQUEST_LINE = re.compile(r"^(GET|POST|PUT|PATCH|DELETE|WEBSOCKET) (\S+)$")
INPUT_FILE = re.compile(r"^<\s+(.+?)\s*$")
REFERENCE = re.compile(r"{{(.+?)}}")
PART = re.compile(r"(\w+)\.response\.(?:body\.\$(.*)|headers\.([\w-]+))")
STEP_OF_PATH = re.compile(r"\.(\w+)|\[(\d+)]")

Expected = tuple[int, str | None]
"""A status, and the code of its problem."""


@dataclass
class HttpRequest:
    """A request of a file, its variables not yet replaced."""

    title: str
    line: int
    method: str = ""
    url: str = ""
    name: str | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    """What its comment says of the answer: of a first run, then what else may come later. Empty: 2xx."""
    steps: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Of a socket: (command, answer, code) for each frame."""

    def __str__(self) -> str:
        return f"line {self.line}, {self.title}: {self.method} {self.url}"


class HttpFile:
    """The requests of a file, and the variables it declares."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.variables: dict[str, str] = {}
        self.requests: list[HttpRequest] = []
        title, first, block = "", 1, list[str]()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := DELIMITER.match(line):
                self._read(HttpRequest(title, first), block)
                title, first, block = match[1], number, []
            else:
                block.append(line)
        self._read(HttpRequest(title, first), block)

    def _read(self, request: HttpRequest, block: list[str]) -> None:
        lines: list[str] = []
        for line in block:
            if comment := COMMENT.match(line):
                _note(request, comment[1])
            elif not lines and (variable := VARIABLE.match(line)):
                self.variables[variable[1]] = variable[2]
            elif lines or line.strip():
                lines.append(line)
        while lines and not lines[-1].strip():
            lines.pop()
        if not lines:
            return
        match = REQUEST_LINE.match(lines[0])
        assert match, f"line {request.line}: {lines[0]!r} is no request"
        request.method, request.url = match.groups()
        end = lines.index("") if "" in lines else len(lines)
        for line in lines[1:end]:
            name, colon, value = line.partition(":")
            assert colon, f"{request}: {line!r} is no header"
            request.headers.append((name, value.strip()))
        request.body = lines[end + 1 :]
        self.requests.append(request)


def _note(request: HttpRequest, comment: str) -> None:
    """Remember what a comment says: a name, the status to expect, or the answer to a frame."""
    if match := NAME.match(comment):
        request.name = match[1]
    elif match := STEP.match(comment):
        request.steps.append((match[1], match[2], match[3]))
    elif STATUS.match(comment):
        request.expected = [(int(status), code or None) for status, code in STATUS.findall(comment)]


class Sender:
    """Sends the requests of a file to a server, wherever the file says that it is."""

    def __init__(self, file: HttpFile, client: httpx.AsyncClient) -> None:
        self.file = file
        self.client = client
        self.answers: dict[str, httpx.Response] = {}
        server = str(client.base_url).removeprefix("http://").rstrip("/")
        self._server = server

    def fill(self, text: str) -> str:
        """A text with its variables replaced."""
        return REFERENCE.sub(lambda match: self._value(match[1].strip()), text)

    def url(self, request: HttpRequest) -> str:
        """Where a request goes, here."""
        return self.fill(request.url).replace("localhost:8000", self._server)

    def _value(self, reference: str) -> str:
        if reference == "$guid":
            return str(uuid.uuid4())
        if reference in self.file.variables:
            return self.fill(self.file.variables[reference])
        match = PART.fullmatch(reference)
        assert match, f"{{{{{reference}}}}} is no variable"
        name, path, header = match.groups()
        assert name in self.answers, f"{{{{{reference}}}}}: no request before is called {name}"
        answer = self.answers[name]
        if header is not None:
            return answer.headers[header]
        value: Any = answer.json()
        for key, index in STEP_OF_PATH.findall(path):
            value = value[key] if key else value[int(index)]
        return value if isinstance(value, str) else json.dumps(value)

    async def send(self, request: HttpRequest) -> httpx.Response:
        """Send a request and keep its answer under its name."""
        headers = [(name, self.fill(value)) for name, value in request.headers]
        answer = await self.client.request(
            request.method, self.url(request), headers=headers, content=self._body(request)
        )
        if request.name:
            self.answers[request.name] = answer
        return answer

    def _body(self, request: HttpRequest) -> bytes:
        kind = next((value for name, value in request.headers if name.lower() == "content-type"), "")
        # Parts are delimited by CRLF; everything else goes as it is written.
        end = b"\r\n" if kind.startswith("multipart/form-data") else b"\n"
        return end.join(self._lines(request))

    def _lines(self, request: HttpRequest) -> Iterator[bytes]:
        for line in request.body:
            if match := INPUT_FILE.match(line):
                yield (self.file.folder / match[1]).read_bytes()
            else:
                yield self.fill(line).encode()

    def frames(self, request: HttpRequest) -> list[str]:
        """The frames of a socket: they stand between lines of `===`."""
        return [self.fill(frame.strip()) for frame in "\n".join(request.body).split("\n===\n")]
