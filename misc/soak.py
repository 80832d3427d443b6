#!/usr/bin/env python3
"""Honest and hostile clients together, for as many minutes as wanted, over workers that are restarted and killed.

    make soak MINUTES=30

What is checked: every honest transfer arrives whole, by the SHA-256 of both directions; every connection is on record
once, in the database and in the JSON lines; and the worker that lives through all of it has as many file descriptors,
greenlets and threads, and as much memory, at the end as after a short beginning; and no event loop was away from its
sockets for longer than 50 ms (tests/support/watched_relay.py), though the database is locked now and then. A worker
that is killed (SIGKILL) may take with it what it held, and the records of its last moment: those transfers are counted
apart. Exit status 1 when anything is wrong.

The load is a moderate one, a few MB/s: this is about things that go wrong rarely, not about speed (see misc/bench).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from relay.transfer.pipes import SPARE_PIPES
from tests.support.crowd import Caller, Crowd, Transfer
from tests.support.harness import Workers, new_side, new_token, own_memory, wait_until
from tests.support.intentions import GARBAGE, TINY_FRAMES, Hostile, new_hostile
from tests.support.watched_relay import Standstill, standstills
from tests.support.web import web_options, web_port

WORKERS = 4
WARM_UP_SECONDS = 45.0
LOCK_SECONDS = (3.0, 10.0)
"""How often somebody has the database locked, for `LOCKED_SECONDS`."""

LOCKED_SECONDS = 0.5
KILLS = 1 / 3
"""How many of the restarts are a SIGKILL."""

HONEST_AT_A_TIME = 30
HONEST_A_SECOND = 40
"""At the most, though many are over in no time: all come from one address, which has a bound, and two for each have to
be fewer than that, since one worker may have all newcomers of a second."""

HOSTILE_A_SECOND = 12.0
HANDSHAKE_TIMEOUT = 3.0
MOMENT = 1.5
"""Seconds before a kill in which what has ended may be without a record."""

OPTIONS = (
    *("--handshake-timeout", f"{HANDSHAKE_TIMEOUT:g}"),
    *("--wait-timeout", "30"),
    *("--max-handshakes", "60"),
    *("--max-waiting-per-token", "8"),
    *("--max-per-source", "300"),
    *("--max-new-per-source", "100"),
    *("--ping-interval", "1"),
)


@dataclass(frozen=True)
class Course:
    """How a soak goes.

    Whether it begins with a warm-up, after which the worker that lives through it all must not grow; how many seconds
    pass between two restarts; and of how many bytes the largest transfer is, as a power of ten.
    """

    warm_up: bool
    restart_seconds: tuple[float, float]
    largest: float


WHOLE = Course(True, (8.0, 25.0), 6.3)
SHORT = Course(False, (2.0, 4.0), 5.3)


# Honest clients


@dataclass
class Honest:
    """A transfer: the second side comes a while after the first; both end their streams by themselves."""

    left: int
    right: int
    token: str
    web: str
    second_at: float
    transfer: Transfer
    began: float = field(default_factory=time.monotonic)
    called: bool = False

    @property
    def size(self) -> int:
        """Bytes in both directions, when all goes well."""
        return self.left + self.right


SQLITE_CACHE = 2_048_000
"""What SQLite keeps of a database's pages (PRAGMA cache_size), once there are as many; bytes."""


def _fds(pid: int) -> int:
    """How many descriptors a worker has, but for the pipes that it may keep for the next transfers."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    ends = sum(link.startswith("pipe:") for link in links)
    return len(links) - min(ends, 2 * SPARE_PIPES)


def may_be_hostile(size: int) -> bool:
    """Whether hostile pairs often move so many bytes: what one says, it says over and over."""
    return any(size % once == 0 for once in (TINY_FRAMES, len(GARBAGE)))


@dataclass(frozen=True)
class Row:
    """What the database has of one connection or pair.

    Two transfers of one size are told apart by when they began and how long the first side waited for the second, which
    is exact, and goes with them to whatever worker they are handed on to.
    """

    mood: str
    size: int
    started: int
    waiting_time: float | None


# What one soak is made of


@dataclass
class Measure:
    """What a quiet worker uses."""

    fds: int
    memory: int
    greenlets: int
    threads: int

    def __str__(self) -> str:
        return f"{self.fds} fds, {self.memory / 1e6:.2f} MB, {self.greenlets} greenlets, {self.threads} threads"


class Soak:
    """The load, the restarts and the books; `folder` takes what the relay writes."""

    def __init__(self, folder: Path, seconds: float, course: Course = WHOLE) -> None:
        self.folder = folder
        self.course = course
        self.seconds = seconds
        self.workers = Workers(
            folder,
            *OPTIONS,
            *web_options(),
            count=WORKERS,
            program="tests.support.watched_relay",
            env={"WATCH_FOLDER": str(folder), "MALLOC_ARENA_MAX": "2"},
        )
        self.honest: list[Honest] = []
        self.hostile: list[Hostile] = []
        self.whole: dict[int, float] = {}  # by the bytes they moved, which no two share: when each ended
        self.cut = self.with_web = 0
        self._lately: list[tuple[float, Hostile]] = []
        self.wrong: list[str] = []
        self.kills: list[float] = []
        self.restarts = 0
        self.sure_records = self.doubtful_records = 0
        self.sure_pairs = self.doubtful_pairs = 0
        self.intentions: Counter[str] = Counter()
        self._sizes: set[int] = set()
        self._next_hostile = self._next_honest = 0.0
        self._lock: sqlite3.Connection | None = None
        self._lock_changes = 0.0  # when it is to be taken, or given back
        self._beside = ThreadPoolExecutor(1)
        self._restarting: Future[None] | None = None
        self.apart = self.other_pairs = self.others = self.lost_to_kills = 0
        self.lost: list[int] = []
        self.doubled: list[Row] = []
        self.warnings: Counter[str] = Counter()
        self.standstills: list[Standstill] = []

    def run(self) -> bool:
        """Do it all; returns whether all was well."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.workers)
            self.web_port = web_port(self.workers)
            self.crowd = crowd = stack.enter_context(Crowd(self.workers.port, self.web_port))
            crowd.every_tick = self._tick_hostile
            before = self._warm_up() if self.course.warm_up else None
            self._load(self.seconds, restarting=True)
            self._drain()
            after = None if before is None else self._measure()
            rows = [
                Row(row["result"], row["bytes"], row["started"], row["waiting_time"])
                for row in self.workers.rows("usage")
            ]
            lines = [(record["mood"], record["total_bytes"]) for record in self.workers.records()]
            sums = tuple(self.workers.rows("all_time")[0])
            self._check_records(rows, lines, sums)
            if before is not None and after is not None:
                self._check_measures(before, after)
        self._check_log()
        self._check_loops()
        self._tell(before, after, len(rows))
        return not self.wrong

    # The load

    def _warm_up(self) -> Measure:
        self._load(WARM_UP_SECONDS, restarting=False)
        self._drain()
        return self._measure()

    def _load(self, seconds: float, *, restarting: bool) -> None:
        until = time.monotonic() + seconds
        next_restart = time.monotonic() + random.uniform(*self.course.restart_seconds)
        told = time.monotonic()
        while (now := time.monotonic()) < until:
            self.crowd.step()
            self._tick_honest(now, more=True)
            self._make_hostile(now)
            self._lock_the_database(now)
            if restarting and now > next_restart and (self._restarting is None or self._restarting.done()):
                self._restart()
                next_restart = now + random.uniform(*self.course.restart_seconds)
            if now - told > 60:
                told = now
                print(f"{len(self.whole)} whole, {self.cut} cut, {self.restarts} restarts, {self.wrong[:3]}")
        self._lock_the_database(math.inf)
        if self._restarting is not None:
            self.crowd.run_until(self._restarting.done, 30, "the restart ends")
            self._restarting.result()

    def _tick_honest(self, now: float, *, more: bool) -> None:
        while more and len(self.honest) < HONEST_AT_A_TIME and now >= self._next_honest:
            self._next_honest = max(self._next_honest, now - 0.1) + 1 / HONEST_A_SECOND
            new = self._new_honest()
            if new is None:
                break
            self.honest.append(new)
        for one in list(self.honest):
            transfer = one.transfer
            if not one.called and now > one.second_at and not transfer.left.closed:
                self._call_the_second(one)
            if transfer.left.closed and (transfer.right.closed or not one.called):
                self._honest_over(one, now)
            elif now - one.began > 90:
                where = one.web or "nowhere"
                self.wrong.append(f"a transfer hangs: WebSocket {where}, {transfer.left}, {transfer.right}")
                self._let_go(one)

    def _new_honest(self) -> Honest | None:
        left = int(10 ** random.uniform(0, self.course.largest))
        right = int(10 ** random.uniform(0, 5)) if random.random() < 0.5 else 0
        while left + right in self._sizes or may_be_hostile(left + right):
            left += 1
        self._sizes.add(left + right)
        token, web = new_token(), random.choice(["", "", "left", "right", "both"])
        caller = self._call(token, random.uniform(50_000, 1_500_000), left, right, web, "left")
        if caller is None:
            return None
        wait = random.choice([0, 0, 0.5, 3])
        return Honest(left, right, token, web, time.monotonic() + wait, Transfer(caller, caller))

    def _call_the_second(self, one: Honest) -> None:
        caller = self._call(one.token, random.uniform(20_000, 500_000), one.right, one.left, one.web, "right")
        if caller is not None:
            one.called = True
            one.transfer.right = caller

    def _call(self, token: str, rate: float, quota: int, other: int, web: str, which: str) -> Caller | None:
        """Call as one side; None when a worker was killed in the middle of it.

        A Close is the end of both directions, so where one speaks WebSocket both end only when they have everything.
        """
        expects = other if web else None
        try:
            return self.crowd.call(
                token, new_side(), rate=rate, quota=quota, expects=expects, web=web in (which, "both")
            )
        except OSError as error:
            self.doubtful_records += 1
            if not self._was_killed(time.monotonic(), time.monotonic()):
                self.wrong.append(f"an honest client could not connect: {error}")
            return None

    def _honest_over(self, one: Honest, now: float) -> None:
        transfer = one.transfer
        try:
            assert one.called
            assert transfer.met
            transfer.assert_intact()
            assert transfer.moved == one.size
        except AssertionError as error:
            self.cut += 1
            if not self._was_killed(one.began, now):
                answers = f"{transfer.left.answer!r} {transfer.right.answer!r}"
                self.wrong.append(f"no worker was killed, but: {answers} {error}")
        else:
            self.whole[one.size] = now
            self.with_web += bool(one.web)
        self._let_go(one)

    def _let_go(self, one: Honest) -> None:
        self.honest.remove(one)
        for caller in {one.transfer.left, one.transfer.right}:
            caller.hang_up()
            self.crowd.callers.remove(caller)

    def _make_hostile(self, now: float) -> None:
        if now > self._next_hostile:
            self._next_hostile = now + random.expovariate(HOSTILE_A_SECOND)
            try:
                one = new_hostile(self.workers.port, self.web_port)
            except OSError as error:
                self.wrong.append(f"a hostile client could not connect: {error}")
                return
            self.intentions[type(one).__name__] += 1
            self.hostile.append(one)

    def _lock_the_database(self, now: float) -> None:
        """Have it locked now and then, as by somebody's query or a backup: nothing but records waits for it."""
        if self._lock is not None and now > self._lock_changes:
            self._lock.close()
            self._lock = None
            self._lock_changes = now + random.uniform(*LOCK_SECONDS)
        elif self._lock is None and self._lock_changes < now < math.inf:
            self._lock = sqlite3.connect(self.workers.usage_db, timeout=0)
            with contextlib.suppress(sqlite3.OperationalError):  # it is locked, though not by us
                self._lock.execute("BEGIN IMMEDIATE")
            self._lock_changes = now + LOCKED_SECONDS

    def _tick_hostile(self) -> None:
        now = time.monotonic()
        for one in list(self.hostile):
            one.step()
            if not one.over:
                continue
            self.hostile.remove(one)
            if not one.is_sure or self._was_killed(one.began, now):
                self.doubtful_records += one.records
                self.doubtful_pairs += one.pairs
            else:
                self.sure_records += one.records
                self.sure_pairs += one.pairs
                self._count_again_if_killed(one, now)

    def _count_again_if_killed(self, one: Hostile, now: float) -> None:
        """What ended a moment before a kill turns doubtful then."""
        self._lately = [entry for entry in self._lately if now - entry[0] < 2 * MOMENT]
        self._lately.append((now, one))

    def _was_killed(self, since: float, until: float) -> bool:
        return any(since - MOMENT <= kill <= until + MOMENT for kill in self.kills)

    def _restart(self) -> None:
        victims = [number for number, worker in enumerate(self.workers.workers) if worker.pids and number > 0]
        victim = random.choice(victims)
        self.restarts += 1
        if random.random() < KILLS:
            now = time.monotonic()
            self.kills.append(now)
            for when, one in self._lately:
                if now - when <= MOMENT:
                    self.sure_records -= one.records
                    self.doubtful_records += one.records
                    self.sure_pairs -= one.pairs
                    self.doubtful_pairs += one.pairs
            self._lately = []
            self.workers.kill_one(victim)
            self._restarting = self._beside.submit(self._start_one)
        else:
            self._restarting = self._beside.submit(self._replace, victim)

    def _replace(self, number: int) -> None:
        started_first = random.random() < 0.5
        if started_first:
            self._start_one()
        status = self.workers.stop_one(number, 30)
        if status != 0:
            self.wrong.append(f"a worker ended with {status}")
        if not started_first:
            self._start_one()

    def _start_one(self) -> None:
        self.workers.start_one()

    def _drain(self) -> None:
        """Let everybody come to an end, and the relay be quiet."""
        until = time.monotonic() + 100
        while (self.honest or self.hostile) and time.monotonic() < until:
            self.crowd.step()
            self._tick_honest(time.monotonic(), more=False)
        if self.honest or self.hostile:
            self.wrong.append(f"{len(self.honest)} honest and {len(self.hostile)} hostile clients do not end")
        wait_until(lambda: tuple(self.workers.rows("current")[0]) == (0, 0, 0), 30, "the relay is quiet")
        self.crowd.run_for(3)

    # The books

    def _check_records(self, rows: list[Row], lines: list[tuple[str, int]], sums: tuple[int, ...]) -> None:
        apart = Counter((row.mood, row.size) for row in rows)
        apart.subtract(Counter(lines))
        self.apart = sum(map(abs, apart.values()))
        if self.apart > 30 * len(self.kills):
            self.wrong.append(f"{self.apart} records are in the database only, or in the lines only")
        moods = Counter(row.mood for row in rows)
        total = sum(row.size for row in rows)
        if sums != (total, len(rows), moods["happy"], moods["lonely"], moods["errory"]):
            self.wrong.append(f"all_time says {sums}, its rows {total, len(rows), moods}")
        transfers = Counter(row for row in rows if row.mood == "happy")
        happy = Counter(row.size for row in transfers.elements())
        honest = self.whole
        self.lost = [size for size, ended in honest.items() if not happy[size] and not self._was_killed(ended, ended)]
        self.lost_to_kills = sum(not happy[size] for size in honest) - len(self.lost)
        self.doubled = [row for row, count in transfers.items() if count > 1]
        if self.lost:
            self.wrong.append(f"{len(self.lost)} whole transfers are not on record")
        if self.doubled:
            self.wrong.append(f"on record more than once: {self.doubled[:10]}")
        self.other_pairs = happy.total() - sum(happy[size] > 0 for size in honest)
        most = self.sure_pairs + self.doubtful_pairs + self.cut
        if not self.sure_pairs <= self.other_pairs <= most:
            self.wrong.append(f"{self.other_pairs} other transfers on record, expected {self.sure_pairs} to {most}")
        self.others = moods["lonely"] + moods["errory"]
        most = self.sure_records + self.doubtful_records + 2 * self.cut
        if not self.sure_records <= self.others <= most:
            self.wrong.append(f"{self.others} lonely or errory on record, expected {self.sure_records} to {most}")

    def _measure(self) -> Measure:
        """What worker 0 uses, which is never restarted."""
        pid = self.workers.workers[0].pid
        told = self.folder / f"inside-{pid}"
        told.unlink(missing_ok=True)
        self.workers.workers[0].process.send_signal(signal.SIGUSR1)
        wait_until(told.exists, 10, "the worker tells of its greenlets")
        greenlets, threads = map(int, told.read_text().split())
        return Measure(_fds(pid), own_memory(pid), greenlets, threads)

    def _check_measures(self, before: Measure, after: Measure) -> None:
        for name in ("fds", "memory", "greenlets", "threads"):
            was, now = getattr(before, name), getattr(after, name)
            if now > was * 1.05 + (SQLITE_CACHE if name == "memory" else 0):
                self.wrong.append(f"{name}: {was} before, {now} after")

    def _check_log(self) -> None:
        log = self.workers.log_text()
        if "Traceback" in log:
            self.wrong.append("there is a traceback in the log")
        said = (line.partition("] ")[2] for line in log.splitlines())
        self.warnings = Counter(words.partition(":")[0] for words in said if words.startswith("--"))

    def _check_loops(self) -> None:
        """Nothing that an event loop does may keep it from its sockets."""
        self.standstills = standstills(self.folder)
        if self.standstills:
            worst = max(self.standstills, key=lambda one: one.own)
            self.wrong.append(f"an event loop stood still for {worst.own:.3f} s:\n{worst.seen}{worst.by_gevent}")

    def _tell(self, before: Measure | None, after: Measure | None, rows: int) -> None:
        print(
            json.dumps(
                {
                    "minutes": round(self.seconds / 60, 1),
                    "workers": WORKERS,
                    "restarts": self.restarts - len(self.kills),
                    "kills": len(self.kills),
                    "honest transfers whole": len(self.whole),
                    "of these with a WebSocket client": self.with_web,
                    "their bytes": sum(self.whole),
                    "cut by a kill": self.cut,
                    "hostile": dict(self.intentions),
                    "records": rows,
                    "lost": len(self.lost),
                    "doubled": len(self.doubled),
                    "whole, but killed within a moment, and not on record": self.lost_to_kills,
                    "hostile transfers on record, of": [
                        self.other_pairs,
                        self.sure_pairs,
                        self.sure_pairs + self.doubtful_pairs,
                    ],
                    "lonely and errory on record, of": [
                        self.others,
                        self.sure_records,
                        self.sure_records + self.doubtful_records,
                    ],
                    "in database or lines only": self.apart,
                    "bounds in the log": dict(self.warnings),
                    "worker 0 before": str(before),
                    "worker 0 after": str(after),
                    "standstills of an event loop": len(self.standstills),
                    "wrong": self.wrong,
                },
                indent=2,
            )
        )


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--short", action="store_true", help="no warm-up, small transfers and many restarts")
    parser.add_argument("--seed", type=int, default=None, help="of what the clients do")
    parser.add_argument("--folder", type=Path, default=None, help="keep what the relay writes here")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if Soak(folder, arguments.minutes * 60, SHORT if arguments.short else WHOLE).run() else 1


if __name__ == "__main__":
    sys.exit(main())
