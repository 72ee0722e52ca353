"""Logs: one line per event, with the request's id, and without anybody's secrets or words.

Everything goes through one handler on the root logger, uvicorn's own lines included, whichever way the server
was started. Line breaks in what may have come from outside are spelled out, so that nobody can forge a line.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal

import orjson
import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from app.core.config import Settings

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request or socket this code runs for; empty outside of one."""

REDACTED = "[redacted]"
SECRET_KEYS = (
    "authorization",
    "token",
    "ticket",
    "password_hash",
    "password",
    "secret_key",
    "secret_access_key",
    "secret",
    "cookie",
)
"""Whatever stands before them (`new_password`). A `code` is secret by itself only: there are codes of errors, too."""
_NAMES = rf"(?:{'|'.join(SECRET_KEYS)}|(?<!\w)code)"
_SECRET_KEY = re.compile(rf"(?i)[\w-]*{_NAMES}")

# An access token, a bearer header, a name with its value (in a URL, a form, JSON or a repr), a phone.
_JWT = re.compile(r"\beyJ[\w-]{5,}\.[\w-]+\.[\w-]*")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"',]+")
_STRING = r"""b?(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?)"""
_ASSIGNED = re.compile(rf"(?i)({_NAMES})\s?=\s?(?:{_STRING}|[^&\s\"']+)")
_QUOTED = re.compile(rf"""(?i)({_NAMES}["']\s*:\s*){_STRING}""")
_PHONE = re.compile(r"(\+|%2[Bb])\d[\d().\u00a0\u2010-\u2015 -]{5,18}(\d{2})(?!\d)")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_CONTROLS |= {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# uvicorn logs a WebSocket's path with its query, where even the token's name may be spelled with % signs.
_START_UP = ("Started server process", "Waiting for application startup", "Application startup failed")
_UVICORN_QUERY = re.compile(r"\?[^\s\"]*")


def redact(text: str) -> str:
    """`text` without tokens, passwords and phones."""
    text = _JWT.sub(REDACTED, text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    text = _ASSIGNED.sub(rf"\1={REDACTED}", text)
    text = _QUOTED.sub(rf'\1"{REDACTED}"', text)
    return _PHONE.sub(r"\1***\2", text)


def one_line(text: str) -> str:
    """`text` with its control characters spelled out."""
    return text.translate(_CONTROLS)


def _clean(value: object) -> object:
    """A logged value, fit to be printed."""
    if isinstance(value, str):
        return one_line(redact(value))
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _clean_field(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(item) for item in value]
    return one_line(redact(repr(value)))


def _clean_field(key: str, value: object) -> object:
    if _SECRET_KEY.fullmatch(key):
        return REDACTED
    if key.lower() == "phone":
        return f"***{str(value)[-2:]}"
    return _clean(value)


def _add_request_id(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    if current := request_id.get():
        event["request_id"] = current
    return event


def _hide_parameters(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Keep people's words out of tracebacks: a database error prints the parameters of its statement."""
    info = event.get("exc_info")
    error = info[1] if isinstance(info, tuple) else info
    seen: set[int] = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        if hasattr(error, "hide_parameters"):
            error.hide_parameters = True
        error = error.__cause__ or error.__context__
    return event


def _clean_event(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    for name in ("message", "asctime"):  # left on the record by other people's handlers
        event.pop(name, None)
    for key, value in event.items():
        if key == "exception" and isinstance(value, str):
            # Tracebacks keep their lines, each indented, so that none can pass for a line of the log.
            event[key] = "\n".join(f"    {one_line(line)}" for line in redact(value).splitlines())
        else:
            event[key] = _clean_field(key, value)
    return event


def _to_json(event: EventDict, **_: Any) -> str:
    return orjson.dumps(event, option=orjson.OPT_NON_STR_KEYS, default=repr).decode()


def _to_console(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    stamp, level, text = event.pop("timestamp"), event.pop("level"), event.pop("event")
    source, exception = event.pop("logger", ""), event.pop("exception", None)
    fields = "".join(f" {key}={_plain(value)}" for key, value in event.items())
    line = f"{stamp} {level.upper():<7} {source}: {text}{fields}"
    return f"{line}\n{exception}" if exception else line


def _plain(value: object) -> str:
    text = str(value)
    return f'"{text}"' if " " in text or not text else text


class _Handler(logging.Handler):
    """Writes to whatever stderr is at the time. Ours, so that configuring twice replaces no one else's."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


class _UvicornFilter(logging.Filter):
    """Makes uvicorn's lines fit: no queries, and no traceback where a client sent nonsense."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message == "ASGI callable returned without completing handshake.":
            return False  # what uvicorn 0.54 thinks of every handshake that was refused with an answer
        if message.startswith(_START_UP):
            return False  # around the one sentence of a start that fails; one that succeeds has a line of ours
        if message.startswith("Invalid UTF-8 sequence"):
            record.exc_info = None
            record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = _UVICORN_QUERY.sub(f"?{REDACTED}", message).strip(), ()
        record.__dict__.pop("color_message", None)  # the same line again, for terminals
        record.name = "uvicorn"  # its errors are only the smallest part of what it logs as `uvicorn.error`
        return True


_SHARED: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _add_request_id,
]


def log_formatter(log_format: Literal["json", "console"]) -> logging.Formatter:
    """Makes a line of a record, redacted."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_SHARED, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _hide_parameters,
            structlog.processors.format_exc_info,
            _clean_event,
            structlog.processors.JSONRenderer(_to_json) if log_format == "json" else _to_console,
        ],
    )


def configure_logging(settings: Settings) -> None:
    """Send all logs of this process to stderr, in the format and from the level that the settings name."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = _Handler()
    handler.setFormatter(log_formatter(settings.log_format))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)

    # Libraries at DEBUG print statements, headers and frames with all that is in them: only our own code may.
    level = logging.getLevelNamesMapping()[settings.log_level]
    quiet = max(level, logging.INFO)
    root.setLevel(quiet)
    logging.getLogger("app").setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(quiet)
    error_log = logging.getLogger("uvicorn.error")
    for known in [known for known in error_log.filters if isinstance(known, _UvicornFilter)]:
        error_log.removeFilter(known)
    error_log.addFilter(_UvicornFilter())
    # Requests are logged by our own middleware.
    access_log = logging.getLogger("uvicorn.access")
    access_log.handlers.clear()
    access_log.propagate = False
    logging.getLogger("alembic").setLevel(logging.WARNING)
