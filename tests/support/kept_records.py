"""What a relay in the test's own process records."""

from __future__ import annotations

from relay.usage.record import Record


class Records:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.recorded: list[Record] = []

    def record(self, record: Record) -> None:
        """Keep it."""
        self.recorded.append(record)

    def kept(self) -> int:
        """Nothing waits to be written."""
        return 0

    def refresh_current(self, *, tick: bool = False) -> None:
        """There is no such table here."""
