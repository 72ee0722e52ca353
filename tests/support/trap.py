"""A server that serves files as carelessly as can be, and counts the scripts that ran."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Exposed:
    """A file and the headers with which it is shown: no others."""

    data: bytes
    headers: dict[str, str]


@dataclass
class Trap:
    """What it shows, by path, and what it has been told."""

    url: str
    files: dict[str, Exposed] = field(default_factory=dict)
    told: list[dict[str, str]] = field(default_factory=list)
    """The queries of the requests to `/ran`, in the order in which they came."""


@contextlib.contextmanager
def trap() -> Iterator[Trap]:
    """A trap that is open meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/ran":
                found.told.append({name: values[0] for name, values in parse_qs(url.query).items()})
            # A script may hear the answer: it waits for it, and nothing else of the page goes on before.
            exposed = found.files.get(url.path, Exposed(b"", {"Access-Control-Allow-Origin": "*"}))
            self.send_response(200)
            for name, value in exposed.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(exposed.data)))
            self.end_headers()
            self.wfile.write(exposed.data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Trap(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
