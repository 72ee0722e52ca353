"""Programs that tests need and pip does not bring."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest


def require_tools(commands: Sequence[str], packages: str, *, everywhere: bool = True) -> None:
    """Fail, with what to do, when a program is missing. Without `everywhere` only CI fails, and others skip."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [command for command in commands if not shutil.which(command, path=path)]:
        message = f"{', '.join(missing)} not found; on Debian: apt-get install {packages}"
        if everywhere or os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
