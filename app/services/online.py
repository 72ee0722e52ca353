"""Who is online, on this worker and on the others.

What is known of others comes over the bus and may be a moment old; without a bus there are no others. It decides where
announcements go, whom presence is told of, and which devices need no push. Nothing that must be right rests on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Set
from typing import Protocol

from app.core.clock import Clock
from app.services.connection_manager import ConnectionManager

OnlineListener = Callable[[int, bool], None]


class OnlineHere(Protocol):
    """What the cluster hears of this worker's own sockets."""

    def __call__(self, user_id: int) -> None:
        """Somebody's sockets here are others than before."""
        ...


class Online:
    """The sockets of all workers, by user."""

    def __init__(self, connections: ConnectionManager, clock: Clock, *, lately_seconds: float) -> None:
        """For `lately_seconds` it is remembered who had a socket."""
        self._connections = connections
        self._clock = clock
        self._lately_seconds = lately_seconds
        self._here: set[int] = set()
        self._elsewhere: dict[str, dict[int, frozenset[int]]] = {}
        self._gone: dict[int, dict[int, float]] = {}
        """When sessions lost a socket, by user; who did last, comes last."""
        self.listeners: list[OnlineListener] = []
        """Called with a user, and whether they have a socket anywhere now."""
        self.here_listeners: list[OnlineHere] = []
        self.visit_listeners: list[Callable[[int, int], None]] = []
        """Called with the user and the session of somebody who was here without a socket."""
        connections.listeners.append(self._on_sockets)

    def is_online(self, user_id: int) -> bool:
        """Whether the user has an open socket anywhere."""
        return self._connections.is_online(user_id) or self.is_elsewhere(user_id)

    def is_elsewhere(self, user_id: int) -> bool:
        """Whether the user has an open socket on another worker."""
        return any(user_id in users for users in self._elsewhere.values())

    def live_sessions(self, user_id: int) -> set[int]:
        """The user's sessions that have an open socket anywhere."""
        sessions = self._connections.live_sessions(user_id)
        for users in self._elsewhere.values():
            sessions |= users.get(user_id, frozenset())
        return sessions

    def recent_sessions(self, user_id: int) -> set[int]:
        """The user's sessions that have an open socket anywhere, or had one lately."""
        live = self.live_sessions(user_id) | self._connections.closing_sessions(user_id)
        return live | self._gone_lately(user_id).keys()

    def visit(self, user_id: int, session_id: int) -> None:
        """A session did something without a socket here: it had one lately, as far as `recent_sessions` goes."""
        self.note_gone(user_id, session_id)
        for listener in self.visit_listeners:
            listener(user_id, session_id)

    def _gone_lately(self, user_id: int) -> dict[int, float]:
        since = self._clock.monotonic() - self._lately_seconds
        return {session_id: at for session_id, at in self._gone.get(user_id, {}).items() if at > since}

    def note_gone(self, user_id: int, session_id: int) -> None:
        """A session has no socket, but had one lately, here or on another worker."""
        now, of_user = self._clock.monotonic(), self._gone_lately(user_id)
        self._gone.pop(user_id, None)
        self._gone[user_id] = {**of_user, session_id: now}
        for first in list(itertools.islice(self._gone, 2)):  # two for each that comes: it stays as small as it can be
            if max(self._gone[first].values()) <= now - self._lately_seconds:
                del self._gone[first]

    def workers_with(self, *groups: Set[int]) -> list[str]:
        """The other workers on which anybody of these is online."""
        return [
            worker
            for worker, users in self._elsewhere.items()
            if not all(users.keys().isdisjoint(group) for group in groups)
        ]

    @property
    def here(self) -> dict[int, set[int]]:
        """The sessions with an open socket on this worker, by user."""
        return {user_id: self._connections.live_sessions(user_id) for user_id in self._connections.users}

    # --- what changes ---

    def _on_sockets(self, user_id: int, gone: int | None) -> None:
        if gone is not None:
            self.note_gone(user_id, gone)
        online = self._connections.is_online(user_id)
        if online != (user_id in self._here):
            (self._here.add if online else self._here.discard)(user_id)
            if not self.is_elsewhere(user_id):
                self._tell(user_id, online)
        for listener in self.here_listeners:
            listener(user_id)

    def update(self, worker: str, users: Iterable[tuple[int, frozenset[int]]]) -> None:
        """Another worker's sockets of some users; no session means no socket."""
        known = self._elsewhere.setdefault(worker, {})
        for user_id, sessions in users:
            before = self.is_online(user_id)
            for session_id in known.get(user_id, frozenset()) - sessions:
                self.note_gone(user_id, session_id)
            if sessions:
                known[user_id] = sessions
            else:
                known.pop(user_id, None)
            if (online := self.is_online(user_id)) != before:
                self._tell(user_id, online)

    def replace(self, worker: str, users: dict[int, frozenset[int]]) -> None:
        """All of another worker's sockets."""
        gone = self._elsewhere.get(worker, {}).keys() - users.keys()
        self.update(worker, [*users.items(), *((user_id, frozenset()) for user_id in gone)])

    def forget(self, worker: str) -> None:
        """Another worker is gone, and all its sockets with it."""
        self.replace(worker, {})
        self._elsewhere.pop(worker, None)

    def _tell(self, user_id: int, online: bool) -> None:
        for listener in self.listeners:
            listener(user_id, online)
