"""`python -m app`: the tuned server, and the operator's commands `migrate`, `check` and `trace`.

Every failure is one sentence and a non-zero exit status.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from app.core.config import MAX_WORKERS, Settings, get_settings, tell_unknown_names
from app.core.errors import StartupError
from app.db.database import database_name, migrate
from app.db.schemas import MAX_ID
from app.services.bus import BUS_ERRORS, check_redis, redis_client
from app.services.container import check_start
from app.trace import trace
from app.workers import serve


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `serve` when none is named."""
    options = _parser().parse_args(arguments)
    try:
        settings = get_settings()
        tell_unknown_names()
        workers = settings.workers if options.workers is None else options.workers
        if options.command == "migrate":
            migrate(settings)
            print(f"The database is up to date: {database_name(settings)}.")
        elif options.command == "check":
            settings.check_workers(workers)
            asyncio.run(check(settings))
        elif options.command == "trace":
            print(asyncio.run(trace(settings, options.message_id, as_json=options.json)))
        else:
            settings.check_workers(workers)
            serve(
                settings,
                options.host or settings.host,
                settings.port if options.port is None else options.port,
                workers,
            )
    except StartupError as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description="Dialect, a self-hosted messenger server.")
    parser.add_argument("--host", help="address to listen on, instead of the setting HOST")
    parser.add_argument("--port", type=_port, help="port to listen on, instead of the setting PORT")
    parser.add_argument("--workers", type=_workers, help="processes to start, instead of the setting WORKERS")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    commands.add_parser("serve", help="start the server (the default)")
    commands.add_parser("migrate", help="create the database where it is missing and bring it up to date")
    commands.add_parser("check", help="say whether the settings and the database are fit to start")
    traced = commands.add_parser("trace", help="say how far a message has come to each of its recipients, and why")
    traced.add_argument("message_id", type=_id, help="id of the message")
    traced.add_argument("--json", action="store_true", help="as JSON instead of tables")
    return parser


def _id(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_ID:
        raise argparse.ArgumentTypeError("an id is a number from 1 on")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"workers are 1 to {MAX_WORKERS}")
    return int(text)


async def check(settings: Settings) -> None:
    """Say what would keep the server from starting. Raises StartupError at the first such thing."""
    print(f"settings: ok ({settings.environment})")
    if settings.redis_url is not None:
        redis = redis_client(settings.redis_url.get_secret_value())
        try:
            await check_redis(redis)
        except BUS_ERRORS as error:
            raise StartupError(f"Redis does not answer ({type(error).__name__}); check REDIS_URL.") from error
        finally:
            await redis.aclose()
        print("redis: ok")
    async for line in check_start(settings):
        print(line)


if __name__ == "__main__":
    main()
