"""The Chromium of these tests. Whoever chooses them (`make browser`) wants them run: nothing is skipped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.chromium import Tab, chromium, new_tab


@pytest.fixture(scope="session")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a Chromium takes commands."""
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def tab(devtools: str, tmp_path: Path) -> AsyncIterator[Tab]:
    """A tab in a profile of its own."""
    async with new_tab(devtools, tmp_path) as tab:
        yield tab
