"""Swagger UI and ReDoc in a real browser that reaches this machine alone: they load, complain of nothing, and work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.chromium import Tab, new_tab
from tests.support.contract import document
from tests.support.databases import ENGINES
from tests.support.images import image
from tests.support.people import people
from tests.support.servers import Server

# One database will do: no other would show other pages.
pytestmark = [pytest.mark.browser, pytest.mark.parametrize("shared_server", ENGINES[:1], indirect=True)]

OPERATIONS = [operation for methods in document()["paths"].values() for operation in methods.values()]
ANSWER = ".live-responses-table"
LOGO = "https://cdn.redoc.ly/redoc/logo-mini.svg"
"""ReDoc has no setting for the image of its makers, which it would fetch from them. Our policy keeps it from that."""


@pytest.fixture
async def window(devtools: str, tmp_path: Path) -> AsyncIterator[Tab]:
    """A tab that somebody could see."""
    async with new_tab(devtools, tmp_path, window=True) as tab:
        yield tab


async def execute(page: Tab, operation: str, **parameters: object) -> None:
    """Try an operation out, as a reader of Swagger UI does, and wait for a 200."""
    block = f"#operations-{operation}"
    await page.click(f"{block} .opblock-summary-control")
    await page.click(f"{block} .try-out__btn")
    for name, value in parameters.items():
        await page.fill(f"{block} tr[data-param-name={name}] input", str(value))
    await page.click(f"{block} .execute")
    await page.until(
        f"document.querySelector('{block} {ANSWER} tbody .response-col_status')?.innerText.startsWith('200')"
    )


async def test_swagger_ui_shows_the_operations_logs_in_and_tries_them_out(window: Tab, shared_server: Server) -> None:
    await window.open(f"{shared_server.url}/docs")
    await window.until("document.querySelector('.opblock')")
    shown = await window.evaluate("[...document.querySelectorAll('.opblock')].map(block => block.id)")
    assert {f"operations-{each['tags'][0]}-{each['operationId']}" for each in OPERATIONS} <= set(shown)

    async with shared_server.client() as client:
        [person] = await people(client, 1)
        file = await person.upload(image(size=(64, 48)), "a.png", "image/png")
    await window.click(".btn.authorize")
    await window.fill("#oauth_username", person.account.phone)
    await window.fill("#oauth_password", person.account.password)
    await window.click(".modal-btn.authorize")
    await window.until("document.querySelector('.auth-container')?.innerText.includes('Logout')")
    await window.click(".btn-done")

    await execute(window, "Users-get_me")
    answer = await window.evaluate(f"document.querySelector('#operations-Users-get_me {ANSWER}').innerText")
    assert person.account.username in answer
    await execute(window, "Files-fetch_file", file_id=file["file_id"])
    await window.until(f"document.querySelector('#operations-Files-fetch_file {ANSWER} img')?.naturalWidth == 64")
    assert window.complaints() == []


async def test_redoc_shows_the_operations_and_finds_them(window: Tab, shared_server: Server) -> None:
    await window.open(f"{shared_server.url}/redoc")
    await window.until("document.querySelector('[data-section-id]')")
    shown = await window.evaluate(
        "[...document.querySelectorAll('[data-section-id]')].map(section => section.dataset.sectionId)"
    )
    assert {f"tag/{each['tags'][0]}/operation/{each['operationId']}" for each in OPERATIONS} <= set(shown)
    await window.fill("input[role=search], .search-input, input[placeholder='Search...']", "Log in")
    await window.until("document.querySelector('[data-role=\"search:results\"]')?.innerText.includes('Log in')")
    assert [one for one in window.complaints() if LOGO not in one] == []
