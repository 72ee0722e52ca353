"""Settings, read once from the environment and `.env`. The names in the brief are kept to the letter."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import secrets
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from dotenv import dotenv_values
from limits import parse
from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.core.errors import StartupError
from app.core.metrics_folder import FOLDER_NAME

PLACEHOLDER_SECRETS = frozenset({"", "your_super_secret_key_here_min_32_chars", "changeme", "secret"})
MIN_SECRET_BYTES = 32
"""HS256 needs a key at least as long as its output (RFC 7518 section 3.2)."""

MAX_WORKERS = 64

BYTES_OF_CHARACTER = 12
r"""What a character takes at most in JSON: \ud83d\ude00."""
BYTES_OF_FILE_ID = 20
BYTES_BESIDE = 1280
"""The rest of a message to send, with a `ref` of 64 characters."""

_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}|[a-z][a-z0-9_]{0,63}")
COMPOSE_NAMES = frozenset(
    {"DIALECT_SERVER_NAME", "DIALECT_TAG", "EDGE_SUBNET", "MYSQL_ROOT_PASSWORD", "SERVER_PORT", "TLS_FOLDER"}
)
"""Names in `.env` that are compose.yaml's and no settings of the server."""


def _rate(text: str) -> str:
    if text.strip():
        try:
            parse(text)
        except ValueError:
            raise ValueError("write it like 10/minute, or leave it empty") from None
    return text


Rate = Annotated[str, AfterValidator(_rate)]
CommaList = Annotated[list[str], NoDecode]


class Settings(BaseSettings):
    """Every knob of the server. A limit of 0 switches that rate limit off."""

    model_config = SettingsConfigDict(env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True)

    environment: Literal["development", "production"] = Field(
        "development", description="`production` refuses a missing or placeholder SECRET_KEY."
    )

    # Database: MySQL when DB_NAME or DB_HOST or DB_USER is set, otherwise one SQLite file.
    db_user: str | None = Field(None, description="MySQL user; `root` where another DB_* name is set.")
    db_password: SecretStr = Field(SecretStr(""), description="MySQL password.")
    db_host: str | None = Field(None, description="MySQL host; `localhost` where another DB_* name is set.")
    db_port: int = Field(3306, ge=1, le=65535, description="MySQL port.")
    db_name: str | None = Field(
        None,
        description="MySQL database; `dialect_db` where another DB_* name is set. `python -m app migrate` creates it.",
    )
    sqlite_path: Path = Field(Path("dialect.db"), description="The SQLite file, when no DB_* name is set.")
    db_pool_size: int = Field(10, ge=2, le=500, description="Connections kept to MySQL.")
    db_timeout_seconds: float = Field(
        4.0, gt=0, description="A database that is silent for so long is down; no more than WRITE_TIMEOUT_SECONDS."
    )

    # Several workers
    redis_url: SecretStr | None = Field(
        None, description="Joins several workers into one server: redis://[:password@]host:port/db. Needs MySQL."
    )
    redis_pool_size: int = Field(
        20,
        ge=1,
        le=1000,
        description="Connections of a worker to Redis for limits and tickets; one request more waits up to 1 s.",
    )
    workers: int = Field(
        1, ge=1, le=MAX_WORKERS, description="Processes of `python -m app`; several need REDIS_URL and MySQL."
    )
    worker_timeout_seconds: float = Field(
        30, ge=1, description="A worker whose event loop does not answer its parent for so long is replaced."
    )

    # Tokens
    secret_key: SecretStr = Field(SecretStr(""), description="Signs access tokens; at least 32 bytes.")
    secret_key_file: Path = Field(
        Path(".secret_key"), description="Where development keeps its random key when SECRET_KEY is not set."
    )
    algorithm: Literal["HS256", "HS384", "HS512"] = Field("HS256", description="HMAC of the access tokens.")
    access_token_expire_minutes: float = Field(60, gt=0, le=1440, description="Life of an access token.")
    refresh_token_expire_days: float = Field(30, gt=0, description="An unused session ends after this.")
    refresh_grace_seconds: float = Field(
        30, ge=0, description="A refresh whose answer was lost may be repeated for so long."
    )
    socket_ticket_seconds: float = Field(30, gt=0, le=300, description="Life of a one-use socket ticket.")

    # Push
    firebase_credentials_path: Path | None = Field(
        None, description="The service account of Firebase (a JSON file); without it, push is off."
    )
    push_grace_seconds: float = Field(
        5.0, ge=0, description="A device with an open socket may take so long to mark a message delivered; then: push."
    )
    push_timeout_seconds: float = Field(10.0, gt=0, description="Firebase that is silent for so long has failed.")
    push_give_up_seconds: float = Field(
        7200.0, gt=0, description="A push that has failed for so long since its first try is given up."
    )
    push_retry_after_max_seconds: float = Field(
        3600.0, ge=0, description="Firebase's Retry-After is waited for, but no longer than this."
    )
    push_threads: int = Field(8, ge=1, le=64, description="Pushes under way to Firebase at once.")

    # Files
    upload_path: Path = Field(Path("uploads"), description="Where files are kept, and where they come in.")
    max_upload_bytes: int = Field(50 * 1024 * 1024, ge=1024, description="Largest file.")
    upload_idle_seconds: float = Field(60, gt=0, description="An upload that brings nothing for so long is given up.")
    upload_min_bytes_per_second: int = Field(
        1024, ge=1, description="An upload that stays slower than this is given up."
    )
    max_uploads_at_once: int = Field(10, ge=1, description="Uploads of one account under way at the same time.")
    max_avatar_bytes: int = Field(10 * 1024 * 1024, ge=1024, description="Largest picture for an avatar.")
    max_stored_bytes_per_user: int = Field(
        10 * 1024**3, ge=0, description="All files of one account together; 0 for no bound."
    )
    max_attachments: int = Field(10, ge=1, le=50, description="Files in one message.")
    max_image_pixels: int = Field(25_000_000, ge=1_000_000, description="Pixels of an image.")
    max_image_frames: int = Field(100, ge=1, description="Pictures of an animation.")
    image_processes: int = Field(1, ge=1, le=32, description="Images decoded at the same time, each in its process.")
    image_queue: int = Field(
        64, ge=1, description="Accounts that wait for an image, each for one at a time; beyond: 503 `overloaded`."
    )
    image_cpu_seconds: int = Field(
        10, ge=1, description="Processor time to decode one image and encode it afresh; beyond: `invalid_image`."
    )
    image_memory_bytes: int = Field(
        1024**3, ge=128 * 1024**2, description="Address space to do so; beyond: `invalid_image`."
    )
    image_seconds: float = Field(
        20,
        gt=0,
        description="An image that a busy machine has not decoded by then is answered 503 `overloaded`; at least twice "
        "IMAGE_CPU_SECONDS.",
    )
    unattached_file_hours: float = Field(24, gt=0, description="A file that no message holds is deleted after this.")
    s3_bucket: str = Field("", description="Keeps files in this bucket of an S3-compatible store instead.")
    s3_endpoint_url: str = Field("", description="Of a store that is not Amazon's: http://… or https://…")
    s3_region: str = Field("us-east-1", description="Region of the bucket.")
    s3_access_key_id: str = Field("", description="Empty: as the environment of AWS says.")
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="Secret of that key.")

    # Edge
    host: str = Field("0.0.0.0", description="Address that `python -m app` listens on.")  # noqa: S104 - a server
    port: int = Field(8000, ge=0, le=65535, description="Port that `python -m app` listens on.")
    allowed_origins: CommaList = Field(
        default_factory=list,
        description="Browser origins, comma-separated, that may call the API and open sockets. "
        "Requests without an Origin (phones, servers) and same-host pages are always welcome.",
    )
    docs_enabled: bool = Field(True, description="Serve /docs, /redoc and /openapi.json.")
    hsts_seconds: int = Field(0, ge=0, description="Strict-Transport-Security max-age; 0 sends none.")
    forwarded_allow_ips: str = Field(
        "127.0.0.1", description="Proxies whose X-Forwarded-For is believed, comma-separated."
    )
    metrics_enabled: bool = Field(True, description="Serve /metrics, for Prometheus.")
    metrics_token: SecretStr = Field(
        SecretStr(""),
        description="Who reads /metrics shows this as `Authorization: Bearer`. Empty: only this machine itself may.",
    )
    max_body_bytes: int = Field(1024 * 1024, ge=1024, description="Largest request body, uploads aside.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level logged.")
    log_format: Literal["json", "console"] = Field("console", description="`json` for machines.")
    shutdown_seconds: float = Field(8.0, gt=0, le=60, description="Bound of a graceful stop, but for two seconds.")

    # Passwords
    argon2_memory_kib: int = Field(19456, ge=8, description="Argon2id memory (OWASP: 19 MiB, t=2, p=1).")
    argon2_time_cost: int = Field(2, ge=1, description="Argon2id passes.")
    argon2_threads: int = Field(
        1,
        ge=1,
        le=64,
        description="Threads that hash passwords, some 50 a second each; more delay chat, unless each has a processor.",
    )
    argon2_queue: int = Field(64, ge=1, description="Passwords that may wait for a thread; beyond: 503.")
    password_min_length: int = Field(8, ge=8, le=64, description="Characters.")

    # Accounts
    phone_validation: Literal["possible", "valid"] = Field(
        "possible",
        description="`possible` checks country code and length; `valid` also the ranges known to phonenumbers, "
        "which refuses ranges newer than the library.",
    )
    username_filter_capacity: int = Field(
        1_000_000, ge=1000, description="Usernames the bloom filter is sized for (1.2 bytes each at 1 % errors)."
    )
    max_sessions_per_user: int = Field(50, ge=1, description="Devices; the longest unused makes room.")

    # Chats and messages
    max_group_members: int = Field(2000, ge=2, description="Members of a group.")
    max_pinned_chats: int = Field(10, ge=0, description="Chats that one account may pin.")
    max_message_chars: int = Field(
        4096,
        ge=1,
        le=16384,
        description="Characters (code points) of a text message. Beyond some 5,300, SOCKET_MAX_FRAME_BYTES must be "
        "raised, too: JSON may spell each in 12 bytes.",
    )
    receipts_members_max: int = Field(
        50, ge=2, description="Chats above this size keep read and delivered marks out of the chat log."
    )
    resume_max_changes: int = Field(10_000, ge=1, description="A client further behind starts that chat afresh.")
    page_size_max: int = Field(
        100, ge=1, le=100, description="Largest page of any list; nobody may ask for more than 100."
    )

    # Sockets
    socket_max_frame_bytes: int = Field(64 * 1024, ge=1024, description="Largest frame from a client.")
    request_head_seconds: float = Field(
        10, gt=0, description="A connection that has not sent the head of its request, or its handshake, is closed."
    )
    request_body_seconds: float = Field(
        20, gt=0, description="A body, uploads aside, that is not complete by then is answered 408 `body_too_slow`."
    )
    response_idle_seconds: float = Field(
        60, gt=0, description="A client that takes nothing of its answer for so long is cut off; how slowly is its own."
    )
    max_http_connections: int = Field(
        0,
        ge=0,
        description="Connections of one process that are no sockets; 0: a quarter of the files that it may open, "
        "10,000 at most. Beyond, the one whose client is waited for longest makes room.",
    )
    max_http_connections_per_ip: int = Field(
        500, ge=0, description="Such connections from one address (of IPv6: from one /64), proxies aside; 0: no bound."
    )
    socket_max_early_frames: int = Field(
        64, ge=0, description="Frames that a socket may send before it is greeted; beyond, it is closed (4429)."
    )
    socket_max_refused_frames: int = Field(
        1000, ge=0, description="Frames in a row above its limit after which a socket is closed (4429)."
    )
    socket_max_pending: int = Field(
        128, ge=1, description="Commands of a socket under way; it is not read on until half of them are done."
    )
    socket_max_unsent_bytes: int = Field(1024 * 1024, ge=64 * 1024, description="A slower reader is closed (4408).")
    socket_heartbeat_seconds: float = Field(25, gt=0, description="Between heartbeats to a client.")
    socket_timeout_seconds: float = Field(20, gt=0, description="A peer that leaves a ping unanswered is dead.")
    socket_greeting_seconds: float = Field(
        10, gt=0, description="A socket that cannot be greeted by then is asked to come back later (1013)."
    )
    max_sockets: int = Field(
        0, ge=0, description="Open sockets of one process; 0: nine tenths of the files that it may open."
    )
    max_sockets_per_ip: int = Field(
        1000, ge=0, description="Open sockets from one address (of IPv6: from one /64); 0 for no bound."
    )
    max_sockets_per_user: int = Field(10, ge=1, description="Open sockets of one account; the oldest gives way.")
    catch_up_reads_per_user: int = Field(
        1, ge=1, description="Sockets of one account that read what they missed at the same time; the others wait."
    )
    last_seen_seconds: float = Field(
        300,
        gt=0,
        description="How often it is stored that somebody still is online; a crash leaves `last_seen_at` so early.",
    )
    changes_per_user: int = Field(
        1,
        ge=1,
        description="Changes by REST, and deletions for oneself, of one account that are in the database at the same "
        "time; the others wait, for DB_TIMEOUT_SECONDS at most.",
    )
    max_presence_subscriptions: int = Field(128, ge=0, le=1000, description="People one socket may watch.")

    # The writer
    writer_batch_max: int = Field(512, ge=1, description="Changes in one transaction.")
    writer_queue_max: int = Field(20_000, ge=1, description="Changes waiting; beyond: `overloaded`.")
    write_timeout_seconds: float = Field(
        4.0, gt=0, description="A change not committed by then is refused; no less than DB_TIMEOUT_SECONDS."
    )
    sweep_seconds: float = Field(1.5, gt=0, description="Between searches for changes that nobody announced.")

    # Shedding: what can wait is refused first
    bulk_queue: int = Field(
        100, ge=0, description="Searches, history and lists that may wait for a database connection; beyond: 503."
    )
    bulk_wait_seconds: float = Field(1.0, gt=0, description="And so long; then: 503.")
    max_loop_lag_seconds: float = Field(
        0.5,
        gt=0,
        description="A busier event loop serves no searches, history and lists; at 4 times this, no new socket.",
    )

    # Rate limits: `N/period` as the `limits` library reads them; empty switches one off.
    limit_register_per_ip: Rate = Field("30/hour", description="Registrations from one address.")
    limit_login_per_ip: Rate = Field("60/minute", description="Logins from one address.")
    limit_login_per_account_and_ip: Rate = Field("10/minute", description="Logins of one account from one address.")
    limit_login_failures_per_account: Rate = Field("100/day", description="Wrong passwords of one account.")
    limit_refresh_per_ip: Rate = Field("120/minute", description="Refreshes from one address.")
    limit_chats_created_per_user: Rate = Field("300/hour", description="Chats one account may create.")
    limit_uploads_per_user: Rate = Field("60/minute", description="Files one account may upload.")
    limit_search_per_user: Rate = Field("60/minute", description="Searches of one account.")
    limit_username_checks_per_ip: Rate = Field("100/minute", description="Availability look-ups from one address.")
    limit_requests_per_user: Rate = Field("50/second", description="REST requests of one account.")
    limit_connects_per_second: float = Field(1000, ge=0, description="Sockets opened a second, of one process.")
    limit_connects_burst: int = Field(2000, ge=1, description="Sockets opened at once, of one process.")
    limit_connects_per_ip_per_second: float = Field(20, ge=0, description="Sockets opened a second from one address.")
    limit_connects_per_ip_burst: int = Field(200, ge=1, description="Sockets opened at once from one address.")
    limit_frames_per_second: float = Field(50, ge=0, description="Frames a second from one socket.")
    limit_frames_burst: int = Field(200, ge=1, description="Frames a socket may send at once.")
    limit_small_frames_per_second: int = Field(
        1000, ge=0, description="Pings, pongs and fragments a second from one socket; beyond, it is closed (4429)."
    )
    limit_messages_per_second: float = Field(
        20, ge=0, description="Messages, edits, deletions and changes of groups a second from one account."
    )
    limit_messages_burst: int = Field(100, ge=1, description="So many of an account at once.")
    limit_presence_per_second: float = Field(
        2, ge=0, description="Lists of people to watch a second from one account (`subscribe_presence`)."
    )
    limit_presence_burst: int = Field(20, ge=1, description="So many of an account at once.")
    limit_resets_per_minute: float = Field(
        5, ge=0, description="Times a minute that one account is brought all its chats afresh; a part counts as such."
    )
    limit_resets_burst: int = Field(20, ge=1, description="Times at once.")
    limit_typing_repeat_seconds: float = Field(
        2, ge=0, description="The same of one account's typing in a chat is passed on once in so long."
    )
    limit_typing_per_second: float = Field(
        2, ge=0, description="What one account's typing tells a second, repetitions aside."
    )
    limit_typing_burst: int = Field(20, ge=1, description="What an account's typing may tell at once.")

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("db_user", "db_host", "db_name", "firebase_credentials_path", "redis_url", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("redis://", "rediss://")):
            raise ValueError("it starts with redis:// or rediss://")
        return value

    @field_validator("s3_endpoint_url")
    @classmethod
    def _endpoint_scheme(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("it starts with http:// or https://")
        return value

    @model_validator(mode="after")
    def _secret_key(self) -> Self:
        secret = self.secret_key.get_secret_value()
        if secret in PLACEHOLDER_SECRETS:
            if self.environment == "production":
                raise StartupError(
                    "SECRET_KEY is missing or still the placeholder; set it to a random value, for example the "
                    'output of: python -c "import secrets; print(secrets.token_urlsafe(48))"'
                )
            object.__setattr__(self, "secret_key", SecretStr(_development_key(self.secret_key_file)))
        elif len(secret.encode()) < MIN_SECRET_BYTES:
            raise StartupError(
                f"SECRET_KEY has {len(secret.encode())} bytes; it needs at least {MIN_SECRET_BYTES} random ones."
            )
        return self

    @model_validator(mode="after")
    def _room_for_messages(self) -> Self:
        # A frame above its limit closes the socket: nobody could send a text that is allowed.
        needed = BYTES_OF_CHARACTER * self.max_message_chars + BYTES_OF_FILE_ID * self.max_attachments + BYTES_BESIDE
        for name in ("socket_max_frame_bytes", "max_body_bytes"):
            if getattr(self, name) < needed:
                raise StartupError(
                    f"{name.upper()} is {getattr(self, name)}, but a message of MAX_MESSAGE_CHARS="
                    f"{self.max_message_chars} characters may take {needed} bytes as JSON; raise the one or lower the "
                    "other."
                )
        return self

    def check_workers(self, workers: int) -> None:
        """Raises StartupError when so many workers cannot be one server with these settings."""
        if workers > 1 and not self.uses_mysql:
            raise StartupError(f"{workers} workers need MySQL: SQLite serves one process. Set the DB_* names.")
        if workers > 1 and self.redis_url is None:
            raise StartupError(f"{workers} workers need REDIS_URL: they tell each other of messages through Redis.")

    @property
    def uses_mysql(self) -> bool:
        """True when any of the brief's DB_* names asks for MySQL."""
        return bool(self.db_name or self.db_host or self.db_user)


def _development_key(path: Path) -> str:
    """A random key kept in a file that only its owner reads, so that tokens outlive a restart."""
    try:
        if not path.exists():
            # Written aside and linked into place: a second process starting now must never read half a key.
            descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(48))
            with contextlib.suppress(FileExistsError):  # the other process was first; its key is as good
                os.link(aside, path)
            os.unlink(aside)
        key = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise StartupError(f"No SECRET_KEY is set and {path} cannot be used ({error.strerror}).") from error
    if len(key) < MIN_SECRET_BYTES or not key.isascii():
        raise StartupError(f"{path} holds no usable key; delete it and start again.")
    return key


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once.

    Raises StartupError with a sentence for the operator when they cannot be used.
    """
    from pydantic import ValidationError

    try:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StartupError(f"`{_env_file()}` cannot be read ({problem}).") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]).upper()
        problem = first["msg"].removeprefix("Value error, ")
        raise StartupError(f"The setting {name} cannot be used: {problem}.") from error


@lru_cache(maxsize=1)
def tell_unknown_names() -> None:
    """Say on stderr, once, which names in `.env` are no settings: one letter too many, and nobody hears of it."""
    if FOLDER_NAME in os.environ:
        return  # one of several workers: their parent has told
    if warning := _unknown_names():
        sys.stderr.write(f"Warning: {warning}\n")


def _unknown_names() -> str:
    known = {name.upper() for name in Settings.model_fields} | COMPOSE_NAMES
    path = _env_file()
    written = dotenv_values(path, encoding="utf-8") if path is not None and path.is_file() else {}
    unknown = []
    for name, value in written.items():
        # What looks like no name may be the rest of a secret that was broken in two.
        if value is not None and name.upper() not in known and _NAME.fullmatch(name):
            similar = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            unknown.append(f"{name} (is it {similar[0]}?)" if similar else name)
    return f"`{path}` has names that are no settings: {', '.join(unknown)}." if unknown else ""


def _env_file() -> Path | None:
    name = Settings.model_config.get("env_file")
    return Path(name) if isinstance(name, (str, Path)) else None
