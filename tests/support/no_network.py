"""A socket without a network."""

from __future__ import annotations

from app.services.transport import Frames


class Wire:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Frames] = []

    @property
    def unsent_bytes(self) -> int:
        return 0

    def send(self, frames: Frames) -> None:
        self.sent.append(frames)

    def close(self, code: int, reason: str = "") -> None:
        """Stay open: what the server does then is not looked at here."""

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""
