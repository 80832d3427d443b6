"""What can keep usage from being written, in words for the operator."""

from __future__ import annotations

from typing import Final

LOCKED_PATIENCE: Final = 2.0
"""Seconds for which a lock, or a log whose reader is slow, is nothing to speak of."""


class UsageError(Exception):
    """`--usage-db PATH` or `--log-fd N` cannot be used; the text is one line that says why and what to do."""


class Trouble(Exception):
    """A destination cannot be written at the moment.

    Args:
        line: what the operator is told, without the destination's name; it says what to do unless that is waiting.
        kind: troubles of one kind are told once; by default `line` is the kind.
        passing: it may well be over in a moment, so a relay that starts goes on in spite of it.
        patience: seconds that it may last before the operator is told.
        waited: trying took some time already, so the next attempt may follow at once.
    """

    def __init__(
        self,
        line: str,
        *,
        kind: str | None = None,
        passing: bool = False,
        patience: float = 0.0,
        waited: bool = False,
    ) -> None:
        super().__init__(line)
        self.line = " ".join(line.split())
        self.kind = kind or self.line
        self.passing = passing
        self.patience = patience
        self.waited = waited
