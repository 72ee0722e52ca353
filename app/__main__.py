"""`python -m app`: the tuned server, and the operator's commands `migrate` and `check`.

Every failure is one sentence and a non-zero exit status.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import sys
from collections.abc import Sequence

import uvicorn

from app.api.server import server_config
from app.core.config import Settings, get_settings
from app.core.errors import StartupError
from app.db.database import Database, migrate
from app.services.notification_service import open_firebase


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; `serve` when none is named."""
    options = _parser().parse_args(arguments)
    try:
        settings = get_settings()
        if options.command == "migrate":
            migrate(settings)
            print("The database is up to date.")
        elif options.command == "check":
            asyncio.run(check(settings))
        else:
            serve(
                settings,
                options.host or settings.host,
                settings.port if options.port is None else options.port,
            )
    except StartupError as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description="Dialect, a self-hosted messenger server.")
    parser.add_argument("--host", help="address to listen on, instead of the setting HOST")
    parser.add_argument("--port", type=_port, help="port to listen on, instead of the setting PORT")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    commands.add_parser("serve", help="start the server (the default)")
    commands.add_parser("migrate", help="create the database where it is missing and bring it up to date")
    commands.add_parser("check", help="say whether the settings and the database are fit to start")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return int(text)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until a signal says stop."""
    raise_descriptor_limit()
    from app.main import app  # importing it builds it, which the other commands need not wait for

    config = server_config(app, settings, host, port)
    # What is imported and built by now lives as long as the process, and what a message leaves dies by itself:
    # looking through all of it after every few hundred messages took a tenth of the loop's time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    # After a stop by Ctrl+C uvicorn lets the signal go on, once all is closed: nothing is left to interrupt.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


def raise_descriptor_limit() -> None:
    """Take all file descriptors that the system allows: each connection is one, and a shell's default is 1024."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS says "unlimited" and means less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def check(settings: Settings) -> None:
    """Say what would keep the server from starting. Raises StartupError at the first such thing."""
    print(f"settings: ok ({settings.environment})")
    firebase = open_firebase(settings)
    if firebase is not None:
        await firebase.close()
    print(f"push: {'off' if firebase is None else 'ok (the service account is read; Firebase was not asked)'}")
    database = Database(settings)
    try:
        await database.start()
    finally:
        await database.close()
    print(f"database: ok ({'MySQL' if settings.uses_mysql else 'SQLite'}, reachable and up to date)")


if __name__ == "__main__":
    main()
