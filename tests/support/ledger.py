"""What the relay must have recorded once some connections are over: the JSON lines and the rows of all four tables.

    ledger = Ledger(service, blur=600)
    ... clients come and go ...
    ledger.expect(Ended("happy", 12, blurred=10_000), Ended("lonely"))

Nothing else may have gone on at that relay since the ledger was opened. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.support.harness import Service, wait_until

KEYS = ["started", "total_time", "waiting_time", "total_bytes", "mood"]


@dataclass(frozen=True)
class Ended:
    """One finished connection as it should be on record: its mood, the bytes it moved, and those bytes blurred."""

    mood: str
    moved: int = 0
    blurred: int = 0


class Ledger:
    """Opened when nobody is connected; `expect` compares what came since.

    Args:
        service: a relay that records.
        blur: its --blur-usage, None without.
    """

    def __init__(self, service: Service, blur: int | None = None) -> None:
        self.service = service
        self.blur = blur
        wait_until(lambda: self._current() == (0, 0, 0), what="nobody is connected to the relay any more")
        self._records = len(service.records())
        self._rows = Counter(map(tuple, service.rows("usage")))  # those of a blurred database have no order
        self._sums = {table: self._sum(table) for table in ("since_reboot", "all_time")}
        self._opened = time.time()

    def wait_for_current(self, connected: int, waiting: int) -> None:
        """Return when the `current` table says that so many pairs and waiting clients are there."""
        wait_until(lambda: self._current()[:2] == (connected, waiting), what=f"{connected} pairs, {waiting} waiting")

    def wait_for_one_more(self) -> dict[str, Any]:
        """Return the first record that came since the ledger was opened, as soon as it is there and in the database."""
        self.service.wait_for_rows("usage", self._rows.total() + 1)
        return self.service.wait_for_records(self._records + 1)[self._records]

    def expect(self, *ended: Ended) -> None:
        """Wait for as many records, and compare them, and all tables, with what `ended`.

        Raises:
            AssertionError: something is missing, wrong, or too much.
        """
        self.service.wait_for_records(self._records + len(ended))
        self.service.wait_for_rows("usage", self._rows.total() + len(ended))
        wait_until(lambda: self._current() == (0, 0, 0), what="`current` is zero again")
        records = self._check_lines(ended)
        self._check_rows(records)
        self._check_sums(ended)

    def _check_lines(self, ended: tuple[Ended, ...]) -> list[dict[str, Any]]:
        lines = self.service.json_lines.read_bytes().splitlines(keepends=True)[self._records :]
        assert len(lines) == len(ended), lines
        records = []
        for line in lines:
            assert line.startswith(b"{")
            assert line.endswith(b"}\n")
            assert len(line) < 4096
            record = json.loads(line)
            assert list(record) == KEYS
            self._check_times(record)
            records.append(record)
        found = Counter((record["mood"], record["total_bytes"]) for record in records)
        assert found == Counter((one.mood, self._size(one)) for one in ended)
        return records

    def _size(self, one: Ended) -> int:
        return one.moved if self.blur is None else one.blurred

    def _check_times(self, record: dict[str, Any]) -> None:
        now, begun = time.time(), self._opened
        if self.blur is not None:
            assert isinstance(record["started"], int)
            assert record["started"] % self.blur == 0
            begun = begun // self.blur * self.blur
        assert begun <= record["started"] <= now
        assert 0 <= record["total_time"] <= now - self._opened + 0.1  # two clocks
        if record["mood"] == "happy":
            assert 0 <= record["waiting_time"] <= record["total_time"]
        else:
            assert record["waiting_time"] is None

    def _check_rows(self, records: list[dict[str, Any]]) -> None:
        """The table says exactly what the lines say."""
        rows = self.service.rows("usage")
        assert all(list(row.keys()) == ["started", "total_time", "waiting_time", "bytes", "result"] for row in rows)
        assert Counter(map(tuple, rows)) - self._rows == Counter(
            tuple(record[key] for key in KEYS) for record in records
        )

    def _check_sums(self, ended: tuple[Ended, ...]) -> None:
        moods = Counter(one.mood for one in ended)
        added = (sum(map(self._size, ended)), len(ended), moods["happy"], moods["lonely"], moods["errory"])
        for table, before in self._sums.items():
            assert self._sum(table) == tuple(old + new for old, new in zip(before, added, strict=True)), table

    def _sum(self, table: str) -> tuple[int, ...]:
        (row,) = self.service.rows(table)
        assert list(row.keys()) == ["bytes", "connections", "mood_happy", "mood_lonely", "mood_errory"]
        return tuple(row)

    def _current(self) -> tuple[int, ...]:
        (row,) = self.service.rows("current")
        assert list(row.keys()) == ["connected", "waiting", "partal_bytes"]
        return tuple(row)
