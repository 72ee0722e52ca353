"""Usernames that may be taken, in about a byte each: most look-ups of a free name need no database.

Only ever a negative cache. It cannot forget a name, it knows only what this process has seen, and it may take
a free name for a taken one; the unique constraint decides when a name is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pybloom_live import ScalableBloomFilter

ERROR_RATE = 0.008
"""Free names taken for taken ones; a little below the 1 % promised, for bad luck."""


class UsernameFilter:
    """The usernames of this server, without regard to case. Says nothing until it is warm."""

    def __init__(self, capacity: int) -> None:
        # Grows by whole filters once `capacity` is reached, at the same rate of errors.
        self._names = ScalableBloomFilter(capacity, ERROR_RATE, ScalableBloomFilter.SMALL_SET_GROWTH)
        self.warm = False
        self.cooled = 0
        """How often names may have been missed."""
        self.on_taken: list[Callable[[str], None]] = []
        """Called with each name that is taken here."""
        self.hears_others: Callable[[], bool] = lambda: True
        """Whether names that are taken elsewhere are heard of here."""

    def take(self, username: str) -> None:
        """Remember a name that has just been taken here."""
        self.add(username)
        for listener in self.on_taken:
            listener(username)

    def add(self, username: str) -> None:
        """Remember a name that is taken."""
        self._names.add(username.lower())

    def update(self, usernames: Iterable[str]) -> None:
        """Remember many."""
        for username in usernames:
            self._names.add(username.lower())

    def cool(self) -> None:
        """Names may have been missed: until all have been added again, none is known to be free."""
        self.warm = False
        self.cooled += 1

    def finish_warming(self) -> None:
        """All names of the database have been added: from now on an unknown name is a free one."""
        self.warm = True

    def may_be_taken(self, username: str) -> bool:
        """False only for a name that nobody this process knows of has."""
        return not self.warm or not self.hears_others() or username.lower() in self._names
