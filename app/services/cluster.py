"""Makes several workers one server: tells the others what happened here, and does here what they tell.

Each worker runs the whole server; what another has to know crosses the bus (bus.py) as items, once per worker on which
anybody is online whom it concerns, or to everybody where it outdates what any of them may remember. The bus may lose
any of them. Chats are healed by the sweep; what was cached from the bus is asked of the database again when it has lost
something. Without Redis there are no others, and nothing here does anything.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Literal, TypedDict, cast

from app.core.clock import Clock
from app.core.tasks import supervise
from app.db.events import AccountEvent, ChatEvent
from app.services.bus import EVERYBODY, Bus, Item
from app.services.chat_log.changes import Appended
from app.services.chat_log.roster import Roster
from app.services.connection_manager import ConnectionManager
from app.services.online import Online

log = logging.getLogger(__name__)

RELOAD_SECONDS = 1.0
"""What the bus has lost is made up for no more often than this."""


class AnnounceItem(TypedDict):
    """What a commit added to a chat's log; the members are known by their version."""

    kind: Literal["announce"]
    chat_id: int
    prev: int
    version: int
    members_version: int
    events: list[ChatEvent]
    seqs: list[int]
    joined: list[int]
    left: list[int]


class RosterItem(TypedDict):
    """Who is in a chat, or a block in it, changed: an older roster is not to be believed."""

    kind: Literal["roster"]
    chat_id: int
    members_version: int


class AccountItem(TypedDict):
    """An event for all devices of a user."""

    kind: Literal["account"]
    user_id: int
    event: AccountEvent


class TypingItem(TypedDict):
    """Somebody types, or stopped."""

    kind: Literal["typing"]
    chat_id: int
    user_id: int
    active: bool


class SessionEndedItem(TypedDict):
    """A session was logged out."""

    kind: Literal["session_ended"]
    session_id: int


class SeparatedItem(TypedDict):
    """A block came between two."""

    kind: Literal["separated"]
    user_id: int
    other_id: int


class UsernameItem(TypedDict):
    """A username was taken."""

    kind: Literal["username"]
    username: str


class VisitItem(TypedDict):
    """A session did something without a socket."""

    kind: Literal["visit"]
    user_id: int
    session_id: int


class OnlineItem(TypedDict):
    """Sockets of users on a worker: of some, each change numbered, or of all, as of a number."""

    kind: Literal["online", "online_all"]
    number: int
    users: list[tuple[int, list[int]]]


class AskOnlineItem(TypedDict):
    """Somebody missed changes, and asks for all."""

    kind: Literal["ask_online"]


class BeatItem(TypedDict):
    """What a worker says every second."""

    online: int
    """The number of its last change of sockets."""
    pushes: bool
    """Whether it is the one that pushes."""


class PushItem(TypedDict):
    """Chats with new messages, for the worker that pushes."""

    kind: Literal["push"]
    chat_ids: list[int]


AnyItem = (
    AnnounceItem
    | RosterItem
    | AccountItem
    | TypingItem
    | SessionEndedItem
    | SeparatedItem
    | UsernameItem
    | VisitItem
    | OnlineItem
    | AskOnlineItem
    | PushItem
)


class Cluster:
    """This worker among the others. Set the callbacks, then `start`."""

    def __init__(self, *, clock: Clock, connections: ConnectionManager, online: Online, bus: Bus | None) -> None:
        self._clock = clock
        self._connections = connections
        self._online = online
        self.bus = bus
        self._alone = secrets.token_hex(6)
        self.on_announce: Callable[[AnnounceItem], None]
        self.on_roster: Callable[[int, int], None]
        self.on_account: Callable[[int, AccountEvent], None]
        self.on_typing: Callable[[int, int, bool], None]
        self.on_session_ended: Callable[[int], None]
        self.on_separated: Callable[[int, int], None]
        self.on_username: Callable[[str], None]
        self.on_push: Callable[[int], None]
        """Called with what other workers tell: the arguments are the items' fields, in order."""
        self.on_lost: Callable[[], None]
        """Called, not too often, after the bus lost something that is not healed otherwise."""
        self.pushes: Callable[[], bool] = lambda: False
        """Whether this worker is the one that pushes."""
        self._number = 0
        self._dirty: set[int] = set()
        self._known: dict[str, int] = {}
        """The number of the last change of sockets known of each other worker; -1 when some were missed."""
        self._pusher: str | None = None
        self._lost = asyncio.Event()
        self._making_up: asyncio.Task[None] | None = None
        if bus is not None:
            bus.on_item, bus.on_peer, bus.on_lost = self._on_item, self._on_peer, self._lost.set
            bus.beat = self._beat
            online.here_listeners.append(self._on_here)
            online.visit_listeners.append(self._on_visit)

    @property
    def worker_id(self) -> str:
        """What this worker is called among the others, in logs and in traces. Each process has another name."""
        return self.bus.worker_id if self.bus is not None else self._alone

    @property
    def reliable(self) -> bool:
        """Whether what others say is likely to be heard here. Always, when there are no others."""
        return self.bus is None or self.bus.healthy

    def start(self, namespace: str) -> None:
        """Join the workers that serve the same database."""
        if self.bus is not None:
            self._making_up = supervise("bus-make-up", self._make_up)
            self.bus.start(namespace)

    async def stop(self) -> None:
        """Leave them."""
        if self._making_up is not None:
            self._making_up.cancel()
            await asyncio.gather(self._making_up, return_exceptions=True)
        if self.bus is not None:
            await self.bus.stop()

    def _post(self, item: AnyItem, to: str = EVERYBODY) -> None:
        if self.bus is not None:
            self.bus.post(cast(Item, item), to)

    # --- what happened here ---

    def announce(self, appended: Appended) -> None:
        """Tell the others what was committed here."""
        if self.bus is None:
            return
        for roster in appended.moved_rosters:
            # To everybody, heard or not: who has been in the chat may come back to any worker that still knows its
            # roster, and a word that is lost on the way leaves a hole in the numbers of what everybody is told.
            self._post({"kind": "roster", "chat_id": roster.chat_id, "members_version": roster.members_version})
        if not self.bus.peers:
            return
        for user_id, event in appended.account_events:
            for worker in self._online.workers_with({user_id}):
                self._post({"kind": "account", "user_id": user_id, "event": event}, worker)
        for announcement in appended.announcements:
            roster = announcement.roster
            workers = self._online.workers_with(roster.members.keys(), announcement.left)
            if not workers:
                continue
            item: AnnounceItem = {
                "kind": "announce",
                "chat_id": announcement.chat_id,
                "prev": announcement.prev,
                "version": announcement.version,
                "members_version": roster.members_version,
                "events": announcement.events,
                "seqs": announcement.seqs,
                "joined": list(announcement.joined),
                "left": list(announcement.left),
            }
            for worker in workers:
                self._post(item, worker)
        if self._pusher is not None:
            self._hint_pusher(self._pusher, appended)

    def _hint_pusher(self, pusher: str, appended: Appended) -> None:
        chats = [
            announcement.chat_id
            for announcement in appended.announcements
            if any(event["type"] == "new_message" for event in announcement.events)
        ]
        if chats:
            self._post({"kind": "push", "chat_ids": chats}, pusher)

    def type(self, roster: Roster, user_id: int, *, active: bool) -> None:
        """Tell the others that somebody types."""
        if self.bus is not None:
            for worker in self._online.workers_with(roster.members.keys()):
                self._post({"kind": "typing", "chat_id": roster.chat_id, "user_id": user_id, "active": active}, worker)

    def end_session(self, session_id: int) -> None:
        """Tell the others that a session ended."""
        self._post({"kind": "session_ended", "session_id": session_id})

    def separate(self, user_id: int, other_id: int) -> None:
        """Tell the others that a block came between two."""
        self._post({"kind": "separated", "user_id": user_id, "other_id": other_id})

    def take_username(self, username: str) -> None:
        """Tell the others that a username is taken."""
        self._post({"kind": "username", "username": username})

    def _on_here(self, user_id: int) -> None:
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._tell_dirty)  # with whoever else comes and goes in this turn
        self._dirty.add(user_id)

    def _on_visit(self, user_id: int, session_id: int) -> None:
        if self._pusher is not None:  # nobody else asks
            self._post({"kind": "visit", "user_id": user_id, "session_id": session_id}, self._pusher)

    def _tell_dirty(self) -> None:
        dirty, self._dirty = self._dirty, set()
        self._number += 1
        users = [(user_id, sorted(self._connections.live_sessions(user_id))) for user_id in dirty]
        self._post({"kind": "online", "number": self._number, "users": users})

    def _beat(self) -> Item:
        beat: BeatItem = {"online": self._number, "pushes": self.pushes()}
        return cast(Item, beat)

    # --- what happened elsewhere ---

    def _on_peer(self, worker: str, came: bool) -> None:
        if came:
            self._known[worker] = -1
            self._post({"kind": "ask_online"}, worker)
        else:
            self._known.pop(worker, None)
            self._online.forget(worker)
            if self._pusher == worker:
                self._pusher = None

    def _on_item(self, worker: str, raw: Item) -> None:
        if raw["kind"] == "beat":
            self._on_beat(worker, cast(BeatItem, raw))
            return
        item = cast(AnyItem, raw)
        match item["kind"]:
            case "announce":
                self.on_announce(item)
            case "roster":
                self.on_roster(item["chat_id"], item["members_version"])
            case "account":
                self.on_account(item["user_id"], item["event"])
            case "typing":
                self.on_typing(item["chat_id"], item["user_id"], item["active"])
            case "session_ended":
                self.on_session_ended(item["session_id"])
            case "separated":
                self.on_separated(item["user_id"], item["other_id"])
            case "username":
                self.on_username(item["username"])
            case "visit":
                self._online.note_gone(item["user_id"], item["session_id"])
            case "push":
                for chat_id in item["chat_ids"]:
                    self.on_push(chat_id)
            case "online" | "online_all":
                self._on_online(worker, item)
            case "ask_online":
                users = [(user_id, sorted(sessions)) for user_id, sessions in self._online.here.items()]
                self._post({"kind": "online_all", "number": self._number, "users": users}, worker)

    def _on_online(self, worker: str, item: OnlineItem) -> None:
        known = self._known.get(worker, -1)
        users = {user_id: frozenset(sessions) for user_id, sessions in item["users"]}
        if item["kind"] == "online_all":
            if item["number"] >= known:
                self._known[worker] = item["number"]
                self._online.replace(worker, users)
        else:
            self._online.update(worker, users.items())
            # After a hole the number stays where it was: the next heartbeat is ahead of it, and all is asked for.
            if item["number"] == known + 1 and known >= 0:
                self._known[worker] = item["number"]

    def _on_beat(self, worker: str, beat: BeatItem) -> None:
        if beat["online"] != self._known.get(worker):
            self._post({"kind": "ask_online"}, worker)
        if beat["pushes"]:
            self._pusher = worker
        elif self._pusher == worker:
            self._pusher = None

    async def _make_up(self) -> None:
        while True:
            await self._lost.wait()
            self._lost.clear()
            self.on_lost()
            await asyncio.sleep(RELOAD_SECONDS)
