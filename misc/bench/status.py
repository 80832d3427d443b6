"""Measures relay-status over a large database: what a scrape and the page take, and how much memory it has.

Usage:
  status.py [options]
  status.py --help

It makes a database of as many rows, at random numbers as a blurring relay does, starts relay-status over it, waits
until the days are counted, and asks for each URL again and again, each time after a pause, so that the database is read
for it. Goals: a scrape in 20 ms, the page in 50, 40 MB (PSS).

Options:
  --rows N    Rows of `usage` [default: 2000000].
  --rounds N  How often each URL is asked for [default: 10].
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from docopt import docopt

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

from relay.status.view import FRESH  # noqa: E402
from relay.usage.schema import open_database  # noqa: E402
from tests.support.harness import cpu_seconds, pss, wait_until  # noqa: E402
from tests.support.status import status_of  # noqa: E402

DAYS = 400
BLUR = 600
LARGEST = 10**9
TOGETHER = 100_000
PATHS = ("/metrics", "/", "/status.json", "/healthz")


def fill(path: Path, rows: int) -> None:
    """Make a database of so many transfers."""
    now = int(time.time())
    chance = random.Random(1)
    with contextlib.closing(open_database(str(path))) as database:
        database.execute("BEGIN IMMEDIATE")
        for begin in range(0, rows, TOGETHER):
            database.executemany(
                "INSERT INTO usage (rowid, started, total_time, waiting_time, bytes, result) "
                "VALUES (?, ?, 1.5, 0.5, ?, 'happy')",
                (
                    (
                        chance.getrandbits(63),
                        (now - chance.randrange(DAYS * 86_400)) // BLUR * BLUR,
                        chance.randrange(LARGEST),
                    )
                    for _ in range(min(TOGETHER, rows - begin))
                ),
            )
        database.execute("INSERT INTO all_time SELECT sum(bytes), count(*), count(*), 0, 0 FROM usage")
        database.execute("COMMIT")


def main() -> None:
    """Measure, and print a line for each URL."""
    given = docopt(__doc__)
    rows, rounds = int(given["--rows"]), int(given["--rounds"])
    with tempfile.TemporaryDirectory(prefix="relay-status-") as name:
        folder = Path(name)
        fill(folder / "usage.sqlite", rows)
        began = time.monotonic()
        with status_of(folder / "usage.sqlite", folder=folder) as status:
            days = wait_until(lambda: status.document()["days"], 300, "the days are counted")
            print(f"{rows} rows; days counted after {time.monotonic() - began:.1f} s: {len(days)}")
            print(f"CPU for that: {cpu_seconds(status.pid):.1f} s")
            for path in PATHS:
                times = []
                for _ in range(rounds):
                    time.sleep(FRESH + 0.1)
                    asked = time.monotonic()
                    status.get(path)
                    times.append((time.monotonic() - asked) * 1000)
                print(f"{path:<14} median {statistics.median(times):6.1f} ms   longest {max(times):6.1f} ms")
            print(f"memory (PSS)   {pss(status.pid) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
