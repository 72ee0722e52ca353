"""People who do things over REST: what most tests begin with."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.accounts import Account, register
from tests.support.servers import Server
from tests.support.socket_client import SocketClient

Json = dict[str, Any]
OCTETS = "application/octet-stream"


class Person:
    """Somebody logged in, with the routes they use. Each method fails unless the server does as asked."""

    def __init__(self, client: httpx.AsyncClient, account: Account) -> None:
        self.client = client
        self.account = account
        self.id = account.id

    async def request(self, method: str, path: str, body: Any = None, **params: Any) -> httpx.Response:
        """Any request under /api/v1, whatever comes of it."""
        return await self.client.request(
            method, f"/api/v1{path}", json=body, params=params, headers=self.account.headers
        )

    async def do(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """A request that works; its answer."""
        answer = await self.request(method, path, body, **params)
        assert answer.is_success, (method, path, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    async def refused(self, method: str, path: str, body: Any = None, **params: Any) -> tuple[int, str]:
        """A request that is refused: (status, code)."""
        answer = await self.request(method, path, body, **params)
        assert answer.is_error, (method, path, answer.status_code, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == answer.status_code
        return answer.status_code, problem["code"]

    async def personal(self, peer: Person) -> int:
        """Id of the personal chat with somebody."""
        chat: Json = await self.do("POST", "/chats/personal", {"user_id": peer.id})
        return int(chat["id"])

    async def group(self, *members: Person, title: str = "Group", **fields: Any) -> int:
        """Id of a new group."""
        body = {"title": title, "member_ids": [member.id for member in members], **fields}
        chat: Json = await self.do("POST", "/chats/group", body)
        return int(chat["id"])

    async def add(self, chat_id: int, *people: Person) -> Json:
        """Let people into a group."""
        chat: Json = await self.do("POST", f"/chats/{chat_id}/members", {"user_ids": [one.id for one in people]})
        return chat

    async def remove(self, chat_id: int, person: Person) -> None:
        """Take somebody out of a group."""
        await self.do("DELETE", f"/chats/{chat_id}/members/{person.id}")

    async def set_role(self, chat_id: int, person: Person, role: str) -> Json:
        """Give somebody a role."""
        chat: Json = await self.do("PUT", f"/chats/{chat_id}/members/{person.id}/role", {"role": role})
        return chat

    async def leave(self, chat_id: int) -> None:
        """Leave a group."""
        await self.do("POST", f"/chats/{chat_id}/leave")

    async def chat(self, chat_id: int) -> Json:
        """A chat as this person sees it."""
        chat: Json = await self.do("GET", f"/chats/{chat_id}")
        return chat

    async def say(self, chat_id: int, content: str, **fields: Any) -> Json:
        """Send a message; the message."""
        sent: Json = await self.do("POST", f"/chats/{chat_id}/messages", {"content": content, **fields})
        message: Json = sent["message"]
        return message

    async def try_upload(
        self, data: bytes, name: str = "file.bin", content_type: str = OCTETS, path: str = "/messages/upload"
    ) -> httpx.Response:
        """Upload a file, whatever comes of it."""
        return await self.client.post(
            f"/api/v1{path}", files={"file": (name, data, content_type)}, headers=self.account.headers
        )

    async def upload(self, data: bytes, name: str = "file.bin", content_type: str = OCTETS) -> Json:
        """Upload a file; what the server says of it."""
        answer = await self.try_upload(data, name, content_type)
        assert answer.status_code == 201, answer.text
        uploaded: Json = answer.json()
        return uploaded

    async def fetch(self, file_id: int, suffix: str = "", **headers: str) -> httpx.Response:
        """Ask for a file."""
        path = f"/api/v1/files/{file_id}{suffix}"
        return await self.client.get(path, headers={**self.account.headers, **headers})

    async def delete_file(self, file: Json) -> httpx.Response:
        """Try to give a file up."""
        return await self.request("DELETE", f"/files/{file['file_id']}")

    async def send_files(self, chat_id: int, message_type: str, *files: Json, **fields: Any) -> Json:
        """Send a message with files; the message."""
        body = {"message_type": message_type, "attachments": [file["file_id"] for file in files], **fields}
        sent: Json = await self.do("POST", f"/chats/{chat_id}/messages", body)
        message: Json = sent["message"]
        return message

    async def edit(self, message: Json, content: str) -> Json:
        """Edit a message."""
        edited: Json = await self.do(
            "PATCH", f"/chats/{message['chat_id']}/messages/{message['id']}", {"content": content}
        )
        return edited

    async def delete(self, message: Json, *, for_everyone: bool = True) -> None:
        """Delete a message."""
        path = f"/chats/{message['chat_id']}/messages/{message['id']}"
        await self.do("DELETE", path, for_everyone=for_everyone)

    async def read(self, message: Json) -> None:
        """Mark a message as read."""
        await self.do("POST", f"/chats/{message['chat_id']}/messages/{message['id']}/read")

    async def readers(self, message: Json) -> tuple[set[int], set[int]]:
        """(who has read a message, whom it has reached)."""
        answer: Json = await self.do("GET", f"/chats/{message['chat_id']}/messages/{message['id']}/readers")
        return {reader["user_id"] for reader in answer["read_by"]}, set(answer["delivered_to"])

    async def history(self, chat_id: int, **params: Any) -> Json:
        """A page of a chat's history."""
        page: Json = await self.do("GET", f"/messages/history/{chat_id}", **params)
        return page

    async def members(self, chat_id: int) -> dict[int, str]:
        """Who is in a chat, with their roles."""
        page: Json = await self.do("GET", f"/chats/{chat_id}/members")
        return {member["user_id"]: member["role"] for member in page["items"]}

    async def resume(self, **state: Any) -> list[Json]:
        """What `resume` over REST brings."""
        events: list[Json] = await self.do("POST", "/messages/resume", state)
        return events

    async def block(self, person: Person) -> None:
        """Block somebody."""
        await self.do("POST", f"/users/block/{person.id}")

    async def unblock(self, person: Person) -> None:
        """Unblock somebody."""
        await self.do("DELETE", f"/users/block/{person.id}")

    async def open(self, server: Server, **options: Any) -> SocketClient:
        """A socket of theirs."""
        return await SocketClient.open(server.ws_url, self.account.access_token, **options)


async def people(client: httpx.AsyncClient, count: int, **fields: Any) -> list[Person]:
    """Some people, registered."""
    return [Person(client, await register(client, **fields)) for _ in range(count)]


def contents(page: Json) -> list[str]:
    """The texts of a page or of a `reset`, service messages left out."""
    items: list[Json] = page["items"] if "items" in page else page["messages"]
    return [message["content"] for message in items if message["message_type"] == "text"]
