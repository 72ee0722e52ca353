"""People for tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.secrets import plant

_numbers = itertools.count(1)


@dataclass
class Account:
    """Somebody who is registered and logged in."""

    id: int
    phone: str
    username: str
    password: str
    access_token: str
    refresh_token: str

    @property
    def headers(self) -> dict[str, str]:
        """What a request of theirs carries."""
        return {"Authorization": f"Bearer {self.access_token}"}


def new_person(**fields: Any) -> dict[str, Any]:
    """The body of a registration that will succeed, with a phone and a username of its own."""
    number = next(_numbers)
    body = {
        "phone": f"+7999{number:07d}",
        "password": f"Orchid-lantern-{number:05d}!",
        "username": f"person_{number}",
        **fields,
    }
    plant(body["phone"], body["password"])
    return body


async def register(client: httpx.AsyncClient, **fields: Any) -> Account:
    """Register somebody new; `fields` replace those of the body."""
    body = new_person(**fields)
    response = await client.post("/api/v1/auth/register", json=body)
    assert response.status_code == 201, response.text
    answer = response.json()
    plant(answer["access_token"], answer["refresh_token"])
    return Account(
        id=answer["id"],
        phone=body["phone"],
        username=body["username"],
        password=body["password"],
        access_token=answer["access_token"],
        refresh_token=answer["refresh_token"],
    )
