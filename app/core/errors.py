"""Every error a client can be told about, with a stable code; see the tree.

DialectError
├── BadInput          422  the request is well-formed but its content is not acceptable
├── Unauthenticated   401  no proof of who is calling, or a stale one
├── Forbidden         403  the caller is known and may not do this
├── NotFound          404  it does not exist, or it is not the caller's: the two look the same
├── TooSlow           408  what the client wanted to send did not come in time
├── Conflict          409  it clashes with what exists
├── TooLarge          413  a body or frame above its limit
├── TooManyRequests   429  a rate limit; carries `retry_after`
└── Unavailable       503  the server cannot do it now; carries `retry_after`; a retry may succeed

A code is a promise to clients: codes are added, never renamed. `docs/protocol.md` lists them.
"""

from __future__ import annotations

from typing import ClassVar


class DialectError(Exception):
    """Base of all errors that reach a client: a stable `code` and a sentence, the same over REST and socket."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`field` names the part of the request at fault; `retry_after` is in seconds."""
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field
        self.retry_after = retry_after


class BadInput(DialectError):
    status = 422
    title = "Unacceptable content"


class Unauthenticated(DialectError):
    status = 401
    title = "Not authenticated"

    def __init__(self, code: str = "invalid_token", detail: str = "The token is missing, invalid or expired."):
        super().__init__(code, detail)


class Forbidden(DialectError):
    status = 403
    title = "Not allowed"


class NotFound(DialectError):
    status = 404
    title = "Not found"


class TooSlow(DialectError):
    status = 408
    title = "Too slow"
    retryable = True


class Conflict(DialectError):
    status = 409
    title = "Conflict"


class TooLarge(DialectError):
    status = 413
    title = "Too large"


class TooManyRequests(DialectError):
    status = 429
    title = "Too many requests"
    retryable = True


class Unavailable(DialectError):
    status = 503
    title = "Temporarily unavailable"
    retryable = True

    def __init__(self, code: str, detail: str, *, retry_after: float = 1.0) -> None:
        super().__init__(code, detail, retry_after=retry_after)


class StartupError(Exception):
    """The server cannot start; its text is one sentence telling the operator what to do."""


def shutting_down() -> Unavailable:
    """What is not done any more; whoever takes this one's place will do it."""
    return Unavailable("shutting_down", "The server is restarting; try again.", retry_after=2)


def chat_not_found() -> NotFound:
    """The one answer for a chat that is missing or not the caller's."""
    return NotFound("chat_not_found", "There is no such chat.")


def message_not_found() -> NotFound:
    """The one answer for a message that is missing, or not visible to the caller."""
    return NotFound("message_not_found", "There is no such message.")


def file_not_found() -> NotFound:
    """The one answer for a file that is missing, or not for the caller."""
    return NotFound("file_not_found", "There is no such file.")


def file_too_large(limit: int) -> TooLarge:
    """The one answer for a file above the limit, whether its length says so or its bytes."""
    return TooLarge("file_too_large", f"A file may have {limit} bytes.")


def user_not_found() -> NotFound:
    """The one answer for a user who is missing, or hidden from the caller."""
    return NotFound("user_not_found", "There is no such user.")


def peer_unavailable() -> Forbidden:
    """The one answer for a person who cannot be reached: blocked the caller, gone, or private."""
    return Forbidden("peer_unavailable", "This person cannot be reached.")
