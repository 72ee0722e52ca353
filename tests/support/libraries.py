"""What tests need beyond requirements.txt, pytest and pytest-asyncio; and what becomes of them without it.

With those alone, as the README has them, a test that needs more is skipped and says so. CI, and whoever has what
requirements-dev.txt brings, want everything run: there a library that is missing ends the run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache

import pytest

LIBRARIES = (
    *("hypothesis", "jsonschema_rs", "moto", "openapi_python_client", "promql_parser", "schemathesis"),
    *("pytest_timeout", "xdist", "yaml"),
)
SIGNS = ("importlinter", "pytest_timeout", "xdist")
"""Whoever has one of these has set up to develop."""
REMEDY = "pip install -r requirements-dev.txt"


@cache
def installed(name: str) -> bool:
    """Whether a library can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def missing() -> list[str]:
    """What is not installed."""
    return [name for name in LIBRARIES if not installed(name)]


def all_wanted() -> bool:
    """Whether nothing may be left out."""
    return bool(os.environ.get("CI")) or any(map(installed, SIGNS))


def require_library(name: str) -> None:
    """Leave a test out for want of a library, and say so."""
    if not installed(name):
        pytest.skip(reason(name))


def reason(name: str) -> str:
    """Why a test is left out."""
    return f"{name} is not installed: {REMEDY}"


def wanted_by(error: str) -> str | None:
    """The library of ours for want of which a module could not be imported, by what pytest says of it."""
    found = re.search(r"^E\s+ModuleNotFoundError: No module named '(\w+)", error, re.MULTILINE)
    return found[1] if found is not None and found[1] in LIBRARIES else None
