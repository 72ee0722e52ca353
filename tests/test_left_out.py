"""The suite without what requirements-dev.txt brings: what needs it is skipped and says so, and in CI nothing is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection

import pytest

from tests.support.libraries import LIBRARIES, SIGNS, require_library
from tests.support.servers import PATIENCE, ROOT, environment

WITHOUT = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
LEFT_OUT = {
    "tests/api/test_fuzz.py": "hypothesis",
    "tests/api/test_transport.py": "hypothesis",
    "tests/deployment/test_compose.py": "yaml",
    "tests/law/test_resume_law.py": "hypothesis",
    "tests/services/test_storage.py": "moto",
    "tests/test_observability.py": "promql_parser",
}
"""Modules of which nothing runs. One that is not here must be able to do without."""


def collect(*paths: str, hidden: Collection[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """What pytest finds where some libraries are not installed."""
    env = {**environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    for name in ("CI", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        env.pop(name, None)
    program = WITHOUT.format(hidden=set(hidden))
    options = ["-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider", "--collect-only", "-q"]
    return subprocess.run(
        [sys.executable, "-c", program, *options, *paths],
        cwd=ROOT,
        env=env | variables,
        text=True,
        capture_output=True,
        timeout=PATIENCE * 2,
    )


@pytest.mark.timeout(120)
def test_with_pytest_and_pytest_asyncio_alone_what_needs_more_is_skipped_and_says_so() -> None:
    done = collect("tests/", hidden={*LIBRARIES, *SIGNS})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    skipped = re.findall(r"^SKIPPED \[1\] (\S+?):\d+: (\w+) is not installed: pip install", done.stdout, re.MULTILINE)
    assert dict(skipped) == LEFT_OUT
    found = re.search(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout[-3000:]
    assert int(found[1]) > 1000


@pytest.mark.parametrize("missing", LIBRARIES)
def test_in_ci_a_library_that_is_missing_ends_the_run(missing: str) -> None:
    for name in LIBRARIES:
        require_library(name)  # of itself, not of another that is missing, too
    done = collect("tests/core", hidden={missing}, CI="true")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert f"not installed: {missing}; pip install -r requirements-dev.txt" in done.stderr


@pytest.mark.parametrize("sign", SIGNS)
def test_where_somebody_has_set_up_to_develop_a_library_that_is_missing_ends_the_run(sign: str) -> None:
    require_library(sign)
    done = collect("tests/core", hidden={*LIBRARIES, *SIGNS} - {sign})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert "not installed: hypothesis, " in done.stderr
