"""Where usage is recorded breaks under a relay of two workers that transfers go through all the while.

What the recorder does by itself in each of these troubles, and in more, is in tests/usage/test_database.py and
tests/usage/test_json_log.py; a locked database and a log that is not read, in tests/usage/test_trouble.py.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.harness import Relay, Workers, wait_until
from tests.support.hostile import beside
from tests.support.load import Load, in_database, in_lines
from tests.support.usage_disk import fill
from tests.support.usage_records import delete_database


def test_transfers_go_on_while_the_disk_is_full_and_then_each_is_on_record_once(small_disk: Path) -> None:
    with Workers(small_disk, count=2) as workers:
        load = Load(workers.port)
        with beside(load.run):
            load.wait_for_more()
            fill(small_disk / "filler")
            wait_until(lambda: "records are kept" in workers.log_text() or len(load.sizes) > 300, 20, "it is full")
            load.wait_for_more()
            (small_disk / "filler").unlink()
            load.wait_for_more()
        everything = Counter(load.sizes)
        wait_until(lambda: in_database(workers.usage_db) == everything, 15, "each is in the database once")
        wait_until(lambda: in_lines(workers.json_lines.read_text()) == everything, 15, "each has a line")
    assert workers.json_lines.read_text().endswith("}\n"), "and nothing else is there"


@pytest.mark.parametrize("trouble", ["deleted", "replaced by another", "damaged"])
def test_a_database_that_is_no_longer_what_it_was_costs_what_it_held_and_the_log_says_so_once(
    tmp_path: Path, trouble: str
) -> None:
    with Workers(tmp_path, count=2) as workers:
        load = Load(workers.port)
        with beside(load.run):
            load.wait_for_more()
            if trouble == "deleted":
                delete_database(workers.usage_db)
            elif trouble == "replaced by another":
                with Relay(tmp_path, "--usage-db", str(tmp_path / "other.sqlite"), name="other"):
                    pass
                os.replace(tmp_path / "other.sqlite", workers.usage_db)
            else:
                damage(workers.usage_db)
                wait_until(lambda: "records are kept" in workers.log_text(), 20, "the log says that it is damaged")
                delete_database(workers.usage_db)  # as the log asked for
            since = len(load.sizes) + 2  # one may be under way, and its record just written
            load.wait_for_more()
        everything, later = Counter(load.sizes), Counter(load.sizes[since:])
        wait_until(lambda: in_lines(workers.json_lines.read_text()) == everything, 15, "each has a line")
        wait_until(lambda: in_database(workers.usage_db) >= later, 15, "all that came later is in the new database")
        assert in_database(workers.usage_db) <= everything, "once"
        (sums,) = workers.query(
            "SELECT bytes, connections, (SELECT sum(bytes) FROM usage), (SELECT count(*) FROM usage) FROM all_time"
        )
        assert tuple(sums[:2]) == tuple(sums[2:])
        for worker in workers.workers:
            log = worker.log_text()
            lost = [line for line in log.splitlines() if re.search(r"what it held|begun anew", line)]
            assert len(lost) <= 1, log
        said = "".join(worker.log_text() for worker in workers.workers)
        assert re.search(r"what it held .*(lost|stays|kept|gone)", said) or trouble == "damaged", said


def damage(path: Path) -> None:
    """Overwrite the file from its beginning, as a disk or another program may."""
    with path.open("r+b") as file:
        file.write(os.urandom(os.fstat(file.fileno()).st_size))


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A named pipe for the JSON lines."""
    path = tmp_path / "lines"
    os.mkfifo(path)
    return path


def test_a_log_reader_that_goes_and_comes_back_gets_each_line_once(tmp_path: Path, fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with_fd3 = ["/bin/sh", "-c", 'exec "$@" 3>"$0"', str(fifo)]
    with Relay(tmp_path, "--log-fd", "3", inside=with_fd3) as relay:
        load = Load(relay.port)
        text = b""

        def read() -> bool:
            nonlocal text
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(reader, 65536):
                    text += chunk
            return False

        with beside(load.run):
            load.wait_for_more()
            wait_until(lambda: read() or text.count(b"\n") > 5, what="lines come")
            began = len(load.sizes)
            read()  # what a pipe holds when its last reader closes it is gone with it
            os.close(reader)
            made = len(load.sizes) - began
            lost_from = text.count(b"\n")
            wait_until(lambda: "its reader is gone" in relay.log_text(), 10, "the log says so")
            load.wait_for_more()
            reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
            load.wait_for_more()
        last = load.sizes[-1]
        wait_until(lambda: read() or in_lines(text.decode())[last], 10, "the last line")
        relay.stop()
        read()
        os.close(reader)
        found = in_lines(text.decode())
        missing = Counter(load.sizes) - found
        assert not found - Counter(load.sizes), "no line comes twice"
        assert missing.total() <= made + 3, f"only what the pipe held when it closed, after {lost_from}: {missing}"
        assert relay.log_text().count("its reader is gone") == 1
        assert relay.log_text().count("works again after") == 1
