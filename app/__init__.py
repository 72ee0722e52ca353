"""Dialect: a self-hosted messenger server."""

import sys
from importlib.util import find_spec

__version__ = "1.0.0"

DEPENDENCIES = (
    "aiosqlite", "alembic", "argon2", "asyncmy", "blurhash", "dotenv", "fastapi", "fastapi_offline", "firebase_admin",
    "google", "httptools", "jwt", "limits", "obstore", "orjson", "phonenumbers", "PIL", "prometheus_client",
    "puremagic", "pybloom_live", "pydantic", "pydantic_settings", "pymysql", "python_multipart", "redis", "requests",
    "sqlalchemy", "starlette", "structlog", "typing_extensions", "uvicorn", "websockets", "zxcvbn",
)  # fmt: skip
"""What the code imports that Python does not bring."""


def require_python() -> None:
    """Exits with a sentence in a Python that cannot run the rest. Older ones must be able to read this file."""
    if sys.version_info < (3, 11):  # noqa: UP036 - that is what it is for
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"Dialect needs Python 3.11 or newer, and this is {version}: "
            "name a newer one, for example python3.11, or: make run PYTHON=python3.11"
        )
    for name in DEPENDENCIES:
        if find_spec(name) is None:
            sys.exit(
                f"The dependencies are not installed in this Python ({name} is missing): "
                "source venv/bin/activate, or pip install -r requirements.txt, or make run"
            )


require_python()
