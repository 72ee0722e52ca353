"""The lines by which the brief says that the tests are run, in an environment that holds requirements.txt alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import ROOT, environment

INSTALLED = "pip install -r requirements.txt"
LINES = ("pip install pytest pytest-asyncio", "pytest tests/ -v")


@pytest.mark.deployment
@pytest.mark.timeout(600)
def test_the_two_lines_of_the_brief_find_every_test_and_run_them(tmp_path: Path) -> None:
    bare = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", bare], check=True)
    env = environment(PATH=f"{bare / 'bin'}:{os.environ['PATH']}", PYTHONPATH="", PYTEST_ADDOPTS="-p no:cacheprovider")
    for name in ("CI", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)

    def obey(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=ROOT, env=env, text=True, capture_output=True)  # noqa: S602
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    obey(INSTALLED)
    install, run = LINES
    obey(install)
    found = re.search(r"(\d+)(?:/\d+)? tests collected", obey(f"{run} --collect-only"))
    assert found is not None
    assert int(found[1]) > 1000
    # All of them would take their time one after the other; these stand for them, one with an asynchronous client.
    passed = re.search(r"(\d+) passed", obey(f"{run} -k 'test_ids or test_a_block_is_listed_and_lifted'"))
    assert passed is not None
    assert int(passed[1]) > 1
