"""Firebase Cloud Messaging through firebase-admin, which is synchronous: each call in a thread of its own, on a
leash.

The threads are daemons, and one that outlives its deadline is left behind: a server that hangs must not keep ours
from pushing to others, nor from stopping. How many are under way at once is the caller's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.core.errors import StartupError

if TYPE_CHECKING:
    from firebase_admin.messaging import Message

log = logging.getLogger(__name__)

QUOTA_SECONDS = 60.0
"""Google's word for a 429 without a Retry-After: the quota of a minute is used up."""
LEFT_BEHIND_MAX = 64
"""Threads that may hang at once beyond their deadlines; then nothing is sent until one comes back."""


@dataclass(frozen=True, slots=True)
class Push:
    """A push message: who gets it, what it replaces (`collapse_key`), and its data."""

    kind: str
    token: str
    collapse_key: str
    data: dict[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What Firebase said. `dead`: it does not know the device (any more); `retry`: it may take it later."""

    kind: Literal["sent", "dead", "retry", "refused"]
    reason: str = ""
    retry_after: float | None = None


class Firebase:
    """One project of Firebase, by its service account."""

    def __init__(self, credentials_path: Path, *, timeout_seconds: float) -> None:
        """Read the service account; nothing is asked of Firebase. Raises StartupError."""
        # Only who pushes pays for it: it takes 30 MB and a quarter of a second.
        import firebase_admin
        from firebase_admin import credentials, messaging
        from requests.adapters import HTTPAdapter

        problem = f"The Firebase service account {credentials_path} (FIREBASE_CREDENTIALS_PATH) cannot be used"
        remedy = "download it from the Firebase console, or leave the setting empty to do without push."
        try:
            credential = credentials.Certificate(str(credentials_path))
            project = credential.project_id
        except OSError as error:
            raise StartupError(f"{problem} ({error.strerror}); {remedy}") from error
        except (ValueError, TypeError, AttributeError) as error:  # whatever else the JSON may hold
            raise StartupError(f"{problem} (it is no service account); {remedy}") from error
        if not project:
            raise StartupError(f"{problem} (it names no project); {remedy}")
        self._deadline = timeout_seconds * 2
        """For a token and a message. The library's own timeouts are per read: a server that drips outlives them."""
        self._messaging = messaging
        self._delete_app = firebase_admin.delete_app
        self._app = firebase_admin.initialize_app(
            credential, {"httpTimeout": timeout_seconds}, name=f"dialect-{id(self)}"
        )
        # The library's session would itself try again, asleep in the thread for as long as a Retry-After says (by
        # default up to hours), and would hide that answer from us. One place decides what is repeated, and when.
        service = messaging._get_messaging_service(self._app)
        service._client.session.mount("https://", HTTPAdapter(pool_maxsize=64))
        service._client.session.mount("https://fcm.googleapis.com", HTTPAdapter(pool_maxsize=64))
        self._left_behind = 0
        self._closed = False

    async def close(self) -> None:
        """Forget the project; does nothing the second time. Threads that still hang end with the process."""
        if self._closed:
            return
        self._closed = True
        # In a thread, for it runs a loop of its own to close a client that we never used.
        await asyncio.to_thread(self._delete_app, self._app)

    async def send(self, push: Push) -> Outcome:
        """Send a message; says what came of it, and raises nothing."""
        if self._left_behind >= LEFT_BEHIND_MAX:
            return Outcome("retry", "too many requests to Firebase hang")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        message = self._message(push)

        def settle(outcome: Outcome) -> None:
            if future.done():
                self._left_behind -= 1
            else:
                future.set_result(outcome)

        def run() -> None:
            outcome = self._send(message)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, outcome)

        try:
            threading.Thread(target=run, name="push", daemon=True).start()
        except RuntimeError as error:  # the system gives us no more threads for now
            return Outcome("retry", str(error))
        try:
            async with asyncio.timeout(self._deadline):
                return await future
        except TimeoutError:
            return Outcome("retry", "Firebase does not answer")
        finally:
            if future.cancelled():  # whoever waited went, and the thread has not come back
                self._left_behind += 1

    def _message(self, push: Push) -> Message:
        messaging = self._messaging
        message = messaging.Message(
            data=push.data,
            android=messaging.AndroidConfig(collapse_key=push.collapse_key, priority="high"),
            apns=messaging.APNSConfig(
                # Without text for people Apple takes a message only as one for the app, and at this priority.
                headers={
                    "apns-collapse-id": push.collapse_key,
                    "apns-push-type": "background",
                    "apns-priority": "5",
                },
                payload=messaging.APNSPayload(messaging.Aps(content_available=True)),
            ),
        )
        # Not through the constructor: there a `token` warns that it is to give way to `fid`.
        setattr(message, push.kind, push.token)
        return message

    def _send(self, message: Message) -> Outcome:
        """In a thread: send and translate."""
        from firebase_admin.exceptions import FirebaseError
        from google.auth.exceptions import GoogleAuthError

        try:
            self._messaging.send(message, app=self._app)
        except (self._messaging.UnregisteredError, self._messaging.SenderIdMismatchError) as error:
            return Outcome("dead", type(error).__name__)
        except FirebaseError as error:
            status = getattr(error.http_response, "status_code", 0)
            kind: Literal["retry", "refused"] = "retry" if status in (0, 408, 429) or status >= 500 else "refused"
            retry_after = _retry_after(error.http_response)
            if retry_after is None and status == 429:
                retry_after = QUOTA_SECONDS
            return Outcome(kind, f"{type(error).__name__} {status}", retry_after)
        except GoogleAuthError as error:
            # No token for ourselves: of the account's endpoint, not of this message.
            return Outcome("retry", type(error).__name__)
        except ValueError as error:  # the library will not even ask, whatever time it is
            log.exception("push_failed")
            return Outcome("refused", type(error).__name__)
        except Exception as error:
            log.exception("push_failed")
            return Outcome("retry", type(error).__name__)
        return Outcome("sent")


def _retry_after(response: Any) -> float | None:
    """The seconds of a Retry-After, which may be a date."""
    text = response.headers.get("Retry-After") if response is not None else None
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
