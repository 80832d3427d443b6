"""Usage cannot be written for a while, and no transfer notices: the database is locked, the log's reader stands still.

Both last 5 seconds here; RELAY_TESTS_TROUBLE_SECONDS=30 makes it as long as the relay promises at least.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.harness import (
    Relay,
    met,
    read_exactly,
    wait_until,
    whole_lines,
)
from tests.support.usage_records import holding_the_lock

TROUBLE_SECONDS = float(os.environ.get("RELAY_TESTS_TROUBLE_SECONDS", "5"))
BEFORE_SECONDS = 1.0
F_SETPIPE_SZ = 1031
BULK = bytes(range(256)) * 4096  # 1 MiB


class SlowReader:
    """Whoever reads the relay's JSON lines from a named pipe, as rsyslog does, and stands still when told to."""

    def __init__(self, fifo: Path) -> None:
        os.mkfifo(fifo)
        self.fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self.fd, F_SETPIPE_SZ, 4 * 4096)  # some 120 lines: soon full
        self.text = b""
        self._may_read = threading.Event()
        self._may_read.set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def stand_still(self) -> None:
        """Read nothing from now on."""
        self._may_read.clear()

    def go_on(self) -> None:
        """Read again."""
        self._may_read.set()

    def _read(self) -> None:
        while not self._over.wait(0.005):
            if self._may_read.is_set():
                with contextlib.suppress(BlockingIOError):
                    self.text += os.read(self.fd, 65536)

    def close(self) -> None:
        """End the thread, close the pipe."""
        self._over.set()
        self._thread.join()
        os.close(self.fd)

    def sizes(self) -> list[int]:
        """`total_bytes` of each whole line that came."""
        return [json.loads(line)["total_bytes"] for line in whole_lines(self.text.decode())]


class Transfers:
    """Small transfers one after another, each of one byte more than the last, so that each record tells which it is of;
    and a large one that never ends, beside them."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.done = 0
        self.bulk_bytes = 0
        self._over = threading.Event()
        self._bulk = threading.Thread(target=self._pour)
        self._bulk.start()

    def one(self) -> float:
        """Make the next small transfer; return the seconds that it took."""
        began = time.perf_counter()
        size = self.done + 1
        sender, receiver = met(self.port)
        with sender, receiver:
            sender.sendall(bytes(size))
            assert read_exactly(receiver, size) == bytes(size)
        self.done = size
        return time.perf_counter() - began

    def during(self, seconds: float, at_least: int = 0) -> tuple[list[float], float]:
        """Make transfers for so long, and at least so many; return what each took, and the bytes a second of the large
        one meanwhile. AssertionError when they take a minute."""
        began, poured = time.monotonic(), self.bulk_bytes
        took: list[float] = []
        while (passed := time.monotonic() - began) < seconds or len(took) < at_least:
            assert passed < 60, f"{len(took)} transfers in a minute"
            took.append(self.one())
            time.sleep(0.002)
        return took, (self.bulk_bytes - poured) / (time.monotonic() - began)

    def _pour(self) -> None:
        sender, receiver = met(self.port)
        with sender, receiver:
            while not self._over.is_set():
                sender.sendall(BULK)
                assert read_exactly(receiver, len(BULK)) == BULK
                self.bulk_bytes += len(BULK)

    def close(self) -> None:
        """End the large one."""
        self._over.set()
        self._bulk.join()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[SlowReader]:
    """The reader of the relay's fd 3."""
    with contextlib.closing(SlowReader(tmp_path / "fd3")) as started:
        yield started


@pytest.fixture
def relay(tmp_path: Path, reader: SlowReader) -> Iterator[Relay]:
    """A relay that writes JSON lines to a pipe on fd 3, and the database."""
    with_fd3 = ["/bin/sh", "-c", 'exec "$@" 3>"$0"', str(tmp_path / "fd3")]
    database = str(tmp_path / "usage.sqlite")
    with Relay(tmp_path, "--usage-db", database, "--log-fd", "3", inside=with_fd3) as started:
        yield started


def test_transfers_go_on_while_nothing_can_be_recorded_and_then_each_is_recorded_once(
    relay: Relay, reader: SlowReader, record_property: Callable[[str, object], None]
) -> None:
    with contextlib.closing(Transfers(relay.port)) as transfers:
        before, poured_before = transfers.during(BEFORE_SECONDS)
        reader.stand_still()
        with holding_the_lock(relay.usage_db):
            unrecorded = transfers.done
            meanwhile, poured_meanwhile = transfers.during(TROUBLE_SECONDS, at_least=400)
            assert len(relay.rows("usage")) <= unrecorded + 1, "the lock held"
            assert len(reader.sizes()) < transfers.done - 200, "the pipe was full"
        reader.go_on()
        after, _ = transfers.during(0.2)
    count = transfers.done + 1  # the large one
    wait_until(lambda: len(reader.sizes()) >= count, 15, "every JSON line")
    rows = relay.wait_for_rows("usage", count, 15)
    expected = sorted([*range(1, transfers.done + 1), transfers.bulk_bytes])
    assert sorted(reader.sizes()) == expected
    assert sorted(row["bytes"] for row in rows) == expected
    for table in ("since_reboot", "all_time"):
        (sums,) = relay.rows(table)
        assert tuple(sums) == (sum(expected), count, count, 0, 0)
    for name, figure in {
        "median ms before": statistics.median(before) * 1000,
        "median ms meanwhile": statistics.median(meanwhile) * 1000,
        "longest ms before": max(before) * 1000,
        "longest ms meanwhile": max(meanwhile) * 1000,
        "longest ms after": max(after) * 1000,
        "MB/s before": poured_before / 1e6,
        "MB/s meanwhile": poured_meanwhile / 1e6,
        "transfers meanwhile": len(meanwhile),
    }.items():
        record_property(name, round(figure, 2))
        print(f"{name}: {figure:.2f}")
    assert max(meanwhile) < TROUBLE_SECONDS / 2, "none has waited until it was over"
    assert poured_meanwhile > 0


def test_the_log_tells_of_each_trouble_once_and_when_it_is_over(relay: Relay, reader: SlowReader) -> None:
    with contextlib.closing(Transfers(relay.port)) as transfers:
        reader.stand_still()
        with holding_the_lock(relay.usage_db):
            for _ in range(250):
                transfers.one()
            wait_until(lambda: relay.log_text().count("records are kept") == 2, what="both troubles in the log")
            transfers.one()
        reader.go_on()
        wait_until(lambda: relay.log_text().count("works again after") == 2, what="both are over in the log")
    log = relay.log_text()
    assert log.count("records are kept") == 2
    assert log.count("works again after") == 2
