"""Chats as this process last left them: what lets the writer number a message without asking the database first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from app.db.repositories.chat_log import ChatRow

KNOWN_CHATS_MAX = 20_000
"""A row takes about 300 bytes, and what the group's description has."""


class KnownChats:
    """The newest rows this process has committed. A hint: whoever writes by one lets the database compare its versions
    (`repositories.chat_log.require_unchanged`)."""

    def __init__(self) -> None:
        self._rows: OrderedDict[int, ChatRow] = OrderedDict()

    def get(self, chat_id: int) -> ChatRow | None:
        """A chat as it was, perhaps outdated."""
        row = self._rows.get(chat_id)
        if row is not None:
            self._rows.move_to_end(chat_id)
        return row

    def put(self, rows: Iterable[ChatRow]) -> None:
        """Remember committed rows; an older one never replaces a newer."""
        for row in rows:
            known = self._rows.get(row.id)
            if known is None or (row.version, row.members_version) > (known.version, known.members_version):
                self._rows[row.id] = row
                self._rows.move_to_end(row.id)
        while len(self._rows) > KNOWN_CHATS_MAX:
            self._rows.popitem(last=False)

    def drop(self, chat_ids: Iterable[int]) -> None:
        """Forget chats that somebody else has changed."""
        for chat_id in chat_ids:
            self._rows.pop(chat_id, None)
