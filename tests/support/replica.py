"""A client's state, built from events by the rules of docs/protocol.md, and the same state fetched afresh.

The law of catching up: whatever was dropped on the way, once a client has resumed the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx

Event = dict[str, Any]
MARKS_PUBLIC_MAX = 50
DEFAULT_SETTINGS = {"notify_personal": True, "notify_groups": True, "account_version": 0}


@dataclass
class ChatState:
    """One chat as a client holds it."""

    version: int
    info: dict[str, Any] = field(default_factory=dict)
    messages: dict[int, dict[str, Any]] = field(default_factory=dict)
    members: dict[int, dict[str, Any]] = field(default_factory=dict)
    complete_from: int = 1
    """Messages below this seq are not held: a reset brings the newest page only."""
    read_seq: int = 0
    """The user's own read mark."""
    unread_count: int | None = None
    """As the server counted; None where the client counts for itself."""
    settings: dict[str, Any] = field(default_factory=dict)
    draft: dict[str, Any] = field(default_factory=dict)

    def unread(self, user_id: int) -> int:
        """The number on the chat's badge."""
        if self.unread_count is not None:
            return self.unread_count
        return sum(
            message["seq"] > self.read_seq
            and message["sender_id"] != user_id
            and not message["deleted"]
            and not message["hidden"]
            for message in self.messages.values()
        )

    def apply_message(self, message: dict[str, Any]) -> None:
        """Take a message if it is newer than the one held; what was hidden stays hidden."""
        held = self.messages.get(message["id"])
        if held is None and message["seq"] < self.complete_from:
            return  # a live event does not tell whether the user hid it: the history will
        if held is not None and held["version"] >= message["version"]:
            return
        if held is not None and held["hidden"]:
            message = {**message, "hidden": True, "content": ""}
        self.messages[message["id"]] = message
        self._mark_sender(message)

    def _mark_sender(self, message: dict[str, Any]) -> None:
        # Sending moves one's own marks: no event says so.
        member = self.members.get(message["sender_id"])
        if member is not None and member["active"]:
            member["read_seq"] = max(member["read_seq"], message["seq"])
            member["delivered_seq"] = max(member["delivered_seq"], message["seq"])

    def apply_member(self, member: dict[str, Any]) -> None:
        """Take a membership if it is newer than the one held."""
        held = self.members.get(member["user_id"])
        if held is None or held["version"] < member["version"]:
            self.members[member["user_id"]] = dict(member)

    def raise_mark(self, user_id: int, name: str, seq: int) -> None:
        """Move a mark forward; reading is receiving too."""
        member = self.members.get(user_id)
        if member is not None:
            member[name] = max(member[name], seq)
            if name == "read_seq":
                member["delivered_seq"] = max(member["delivered_seq"], seq)


def _newer(held: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Of two states of something private, the one that changed later."""
    return told if told["account_version"] > held["account_version"] else held


class Replica:
    """A client that keeps its chats by applying events."""

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.epoch: str | None = None
        self.account_version = 0
        self.chats: dict[int, ChatState] = {}
        self.blocked: set[int] = set()
        self.settings = dict(DEFAULT_SETTINGS)
        self.hidden: set[int] = set()
        """Ids of messages deleted for oneself: their rows may still be on the way."""
        self.holes: set[int] = set()
        """Chats of which something was missed: resume."""

    def resume_frame(self) -> Event:
        """What to send after a drop."""
        return {
            "type": "resume",
            "epoch": self.epoch,
            "account_version": self.account_version,
            "chats": {str(chat_id): chat.version for chat_id, chat in self.chats.items()},
        }

    def digest(self) -> int:
        """What a heartbeat carries when nothing is missing."""
        total = sum((chat_id % 65521 + 1) * chat.version for chat_id, chat in self.chats.items())
        return total % 2147483647

    def apply(self, event: Event) -> None:
        """Apply one event."""
        kind = event["type"]
        if kind == "hello":
            if self.epoch is not None and self.epoch != event["epoch"]:
                self.chats.clear()
                self.blocked.clear()
                self.hidden.clear()
                self.settings = dict(DEFAULT_SETTINGS)
                self.account_version = 0
            self.epoch = event["epoch"]
        elif kind == "reset":
            self._reset(event)
        elif kind == "chat_removed":
            self.chats.pop(event["chat_id"], None)
            self._account(event)
        elif kind == "resumed":
            self.account_version = event["account_version"]
            self.epoch = event["epoch"]
        elif kind == "message_hidden":
            self.hidden.add(event["message_id"])
            chat = self.chats.get(event["chat_id"])
            if chat is not None and (message := chat.messages.get(event["message_id"])) is not None:
                chat.messages[event["message_id"]] = {**message, "hidden": True, "content": ""}
            self._account(event)
        elif kind == "read_mark":
            if (chat := self.chats.get(event["chat_id"])) is not None:
                chat.read_seq = max(chat.read_seq, event["seq"])
            self._account(event)
        elif kind == "block_changed":
            (self.blocked.add if event["blocked"] else self.blocked.discard)(event["user_id"])
            self._account(event)
        elif kind == "chat_settings_changed":
            if (chat := self.chats.get(event["chat_id"])) is not None:
                chat.settings = _newer(chat.settings, event["settings"])
            self._account(event)
        elif kind == "draft_changed":
            if (chat := self.chats.get(event["chat_id"])) is not None:
                chat.draft = _newer(chat.draft, event["draft"])
            self._account(event)
        elif kind == "user_settings_changed":
            self.settings = _newer(self.settings, event["settings"])
            self._account(event)
        elif kind in ("chat_added", "profile_changed"):
            self._account(event)
        elif "version" in event and "prev" in event:
            self._apply_chat_event(event)

    def _as_mine(self, message: dict[str, Any]) -> dict[str, Any]:
        """A row as this user sees it: what they have hidden is hidden, whatever a row read before says."""
        return {**message, "hidden": True, "content": ""} if message["id"] in self.hidden else message

    def _account(self, event: Event) -> None:
        version = event["account_version"]
        if version is not None and version == self.account_version + 1:
            self.account_version = version

    def _reset(self, event: Event) -> None:
        chat = ChatState(event["version"])
        for member in event["members"]:
            chat.apply_member(member)
        for message in event["messages"]:
            chat.messages[message["id"]] = self._as_mine(message)
        chat.complete_from = min((message["seq"] for message in event["messages"]), default=1)
        chat.info = {
            key: event["chat"][key] for key in ("title", "description", "avatar_url", "history_visible", "member_count")
        }
        chat.read_seq = event["chat"]["read_seq"]
        chat.settings, chat.draft = event["chat"]["settings"], event["chat"]["draft"]
        self.chats[event["chat_id"]] = chat
        self.holes.discard(event["chat_id"])

    def _apply_chat_event(self, event: Event) -> None:
        chat = self.chats.get(event["chat_id"])
        if chat is None:
            return  # its reset is on the way, or it is gone
        if event["prev"] > chat.version:
            self.holes.add(event["chat_id"])
            return
        kind = event["type"]
        if kind in ("new_message", "message_edited", "message_deleted"):
            chat.apply_message(self._as_mine(event["message"]))
        elif kind in ("message_read", "message_delivered"):
            if event["version"] > chat.version:
                name = "read_seq" if kind == "message_read" else "delivered_seq"
                chat.raise_mark(event["user_id"], name, event["seq"])
                if (member := chat.members.get(event["user_id"])) is not None:
                    member["version"] = event["version"]
        elif kind == "members_changed":
            for member in event["members"]:
                chat.apply_member(member)
            if event["version"] > chat.version:
                chat.info["member_count"] = event["member_count"]
        elif kind == "chat_updated":
            if event["version"] > chat.version:
                chat.info.update(event["info"])
        elif kind == "chat_changes":
            for member in event["members"]:
                chat.apply_member(member)
            for message in event["messages"]:
                chat.apply_message(self._as_mine(message))
            if event["info"] is not None and event["version"] > chat.version:
                chat.info.update(event["info"])
        chat.version = max(chat.version, event["version"])
        # Sending has read, and so has another device of the user.
        if (mine := chat.members.get(self.user_id)) is not None:
            chat.read_seq = max(chat.read_seq, mine["read_seq"])

    def view(self) -> dict[str, Any]:
        """The state in a form that compares."""
        return {
            "chats": {
                chat_id: {
                    "version": chat.version,
                    "info": chat.info,
                    "read_seq": chat.read_seq,
                    "settings": chat.settings,
                    "draft": chat.draft,
                    "members": {
                        user_id: {key: member[key] for key in ("role", "read_seq", "delivered_seq")}
                        for user_id, member in sorted(chat.members.items())
                        if member["active"]
                    },
                    "messages": {
                        message["seq"]: {
                            key: message[key]
                            for key in ("id", "sender_id", "content", "deleted", "hidden", "client_id")
                        }
                        for message in sorted(chat.messages.values(), key=lambda message: message["seq"])
                    },
                }
                for chat_id, chat in sorted(self.chats.items())
            },
            "blocked": sorted(self.blocked),
            "settings": self.settings,
        }

    async def complete(self, client: httpx.AsyncClient, headers: dict[str, str]) -> None:
        """Fetch the older messages that a reset left out, as a client that scrolls up does."""
        for chat_id, chat in self.chats.items():
            while chat.complete_from > 1:
                page = await _get(
                    client, f"/api/v1/messages/history/{chat_id}?before={chat.complete_from}&limit=100", headers
                )
                for message in page["items"]:
                    chat.messages.setdefault(message["id"], message)
                if not page["has_before"]:
                    break
                chat.complete_from = page["items"][0]["seq"]


async def fetch(client: httpx.AsyncClient, headers: dict[str, str], user_id: int) -> Replica:
    """The same state, asked for over REST as if for the first time."""
    replica = Replica(user_id)
    cursor: str | None = None
    while True:
        page = await _get(client, "/api/v1/chats" + (f"?cursor={cursor}" if cursor else ""), headers)
        for item in page["items"]:
            chat = replica.chats[item["id"]] = ChatState(item["version"])
            chat.info = {
                key: item[key] for key in ("title", "description", "avatar_url", "history_visible", "member_count")
            }
            chat.read_seq, chat.unread_count = item["read_seq"], item["unread_count"]
            chat.settings, chat.draft = item["settings"], item["draft"]
        cursor = page["next"]
        if cursor is None:
            break
    for chat_id, chat in replica.chats.items():
        cursor = None
        while True:
            suffix = f"?cursor={cursor}" if cursor else ""
            page = await _get(client, f"/api/v1/chats/{chat_id}/members{suffix}", headers)
            for member in page["items"]:
                chat.apply_member(member)
            cursor = page["next"]
            if cursor is None:
                break
        after = 0
        while True:
            page = await _get(client, f"/api/v1/messages/history/{chat_id}?after={after}&limit=100", headers)
            for message in page["items"]:
                chat.messages[message["id"]] = message
            if not page["has_after"]:
                break
            after = page["items"][-1]["seq"]
    blocked = await _get(client, "/api/v1/users/blocked", headers)
    replica.blocked = {person["id"] for person in blocked["items"]}
    replica.settings = await _get(client, "/api/v1/users/me/settings", headers)
    return replica


async def _get(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> Any:
    answer = await client.get(path, headers=headers)
    assert answer.status_code == 200, (path, answer.status_code, answer.text)
    return answer.json()
