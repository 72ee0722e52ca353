"""The systemd unit: systemd reads it without a complaint, and it names what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.config import Settings
from tests.support.servers import PATIENCE, ROOT
from tests.support.tools import require_tools

UNIT = ROOT / "deploy/dialect.service"
TEXT = UNIT.read_text()
PYTHON = "/opt/dialect/.venv/bin/python"


def test_the_unit_sets_settings_that_exist() -> None:
    names = re.findall(r"(\w+)=\S+", " ".join(re.findall(r"^Environment=(.+)$", TEXT, re.MULTILINE)))
    assert "SQLITE_PATH" in names
    assert {name.lower() for name in names} - {"pythondontwritebytecode"} <= Settings.model_fields.keys()


def test_the_unit_gives_a_stop_more_time_than_it_takes() -> None:
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", TEXT, re.MULTILINE)
    assert int(seconds) > Settings.model_fields["shutdown_seconds"].default * 1.5


def test_commands_by_hand_name_the_python_that_systemd_can_find() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    [command] = re.findall(r"`systemd-run (.+?) -m app check`", page)
    assert command.split()[-1] == PYTHON


@pytest.mark.deployment
def test_systemd_understands_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    require_tools(["systemd-analyze"], "systemd")
    unit = tmp_path / UNIT.name
    assert TEXT.count(PYTHON) == 2
    unit.write_text(TEXT.replace(PYTHON, sys.executable))

    def analyze(*arguments: str) -> str:
        done = subprocess.run(
            ["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert analyze("verify", "--man=no", "--recursive-errors=no") == ""
    analyze("security", "--offline=true", "--threshold=20")
