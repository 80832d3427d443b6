"""What the workers tell while they run: fresh, and not at all while nothing happens."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.report.counters import read_counters
from relay.status.source import Source
from relay.usage import told
from relay.usage.schema import TABLES, open_database
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    fill_the_way,
    handshake,
    met,
    new_side,
    new_token,
    query,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.status import status_of
from tests.support.usage_records import holding_the_lock
from tests.support.usage_worker import UsageWorker


def told_by(service: Service, what: str) -> Counter[str]:
    """The gauges or the counters of all workers, added up; with the counters, those of workers that are gone."""
    rows = list(service.query(f"SELECT {what} FROM worker_status"))
    if what == "counters":
        rows += service.query("SELECT counters FROM service")
    total: Counter[str] = Counter()
    for row in rows:
        total.update(json.loads(row[what]))
    return total


@contextlib.contextmanager
def flowing(port: int, pause: float = 0.05, size: int = 20_000) -> Iterator[None]:
    """A transfer that goes on all the while, in small steps."""
    left, right = met(port)
    ended = threading.Event()

    def flow() -> None:
        while not ended.wait(pause):
            left.sendall(bytes(size))
            read_exactly(right, size)

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)
        left.close()
        right.close()


def test_partal_bytes_of_a_transfer_are_never_older_than_six_seconds(any_relay: Service) -> None:
    with flowing(any_relay.port):
        wait_until(lambda: any_relay.row("current")[2])
        seen = any_relay.row("current")[2]
        changed = time.monotonic()
        oldest, changes = 0.0, 0
        while changes < 3:
            now = any_relay.row("current")[2]
            if now != seen:
                seen, changes = now, changes + 1
                changed = time.monotonic()
            oldest = max(oldest, time.monotonic() - changed)
            assert oldest < 9, "six seconds, on a machine that has time"
            time.sleep(0.05)


def test_an_idle_relay_writes_nothing(tmp_path: Path) -> None:
    with Workers(tmp_path) as workers, contextlib.ExitStack() as stack:
        left, right = met(workers.port, stack=stack)
        waits = stack.enter_context(connect(workers.port))
        waits.sendall(handshake(new_token(), new_side()))
        left.sendall(b"x")
        read_exactly(right, 1)
        wait_until(lambda: workers.row("current")[:2] == (1, 1))
        log = Path(f"{workers.usage_db}-wal")
        written, since = log.read_bytes(), time.monotonic()

        def quiet() -> bool:
            nonlocal written, since
            if log.read_bytes() != written:
                written, since = log.read_bytes(), time.monotonic()
            return time.monotonic() - since > 8

        # There is a pair, and one who waits, and nothing moves: told, told once more, and no more.
        wait_until(quiet, 40, "nothing is written for longer than it takes to tell again what has changed")


def test_checks_that_leave_no_record_are_counted_nowhere_and_leave_an_idle_relay_idle(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay:
        log = Path(f"{relay.usage_db}-wal")
        written, since = log.read_bytes(), time.monotonic()

        def quiet() -> bool:
            nonlocal written, since
            connect(relay.port).close()
            if log.read_bytes() != written:
                written, since = log.read_bytes(), time.monotonic()
            return time.monotonic() - since > 8

        wait_until(quiet, 40, "nothing is written for longer than it takes to tell what has changed")
        with connect(relay.port) as client:
            client.sendall(b"nonsense\n")
        wait_until(lambda: told_by(relay, "counters")["refused.bad_handshake"] == 1, 20)
        assert told_by(relay, "counters")["refused.left_before_handshake"] == 0


def test_the_rows_say_what_an_operator_acts_on(tmp_path: Path) -> None:
    with Relay(tmp_path, "--max-waiting", "2", "--max-connections", "50", recording=True) as relay:
        silent = connect(relay.port)
        for word in (b"GET nothing of the kind\n", handshake(new_token()) + b"too early"):
            with connect(relay.port) as client:
                client.sendall(word)
                read_to_end(client)
        left, right = met(relay.port)
        waiting = [connect(relay.port) for _ in range(3)]
        for client in waiting:
            client.sendall(handshake(new_token(), new_side()))
        fill_the_way(left)
        wait_until(lambda: told_by(relay, "gauges")["handshakes"] == 1, 20)
        wait_until(lambda: told_by(relay, "gauges")["connections"] == 5, 20)
        wait_until(lambda: told_by(relay, "counters")["refused.bad_handshake"] == 1, 20)
        wait_until(lambda: told_by(relay, "gauges")["held_bytes"] > 0, 20)
        gauges, counters = told_by(relay, "gauges"), told_by(relay, "counters")
        assert gauges["connections_limit"] == 50
        assert gauges["kept_records"] == 0
        assert counters["refused.impatient"] == 1
        assert counters["bound.waiting"] == counters["refused.no_partner"] == 1
        assert 0 <= gauges["load"] < 3
        for client in (silent, left, right, *waiting):
            client.close()


@pytest.mark.parametrize("blur", [(), ("--blur-usage", "600")], ids=["exact", "blurred"])
def test_bytes_are_counted_once_wherever_a_transfer_moves_to(tmp_path: Path, blur: tuple[str, ...]) -> None:
    with Workers(tmp_path, *blur, count=2) as workers:
        left, right = met(workers.port)
        moved = 0
        for number in (0, 1):
            left.sendall(bytes(1_234_567))
            read_exactly(right, 1_234_567)
            moved += 1_234_567
            counted = told_by(workers, "counters")["bytes"]
            workers.start_one()
            workers.stop_one(number)
            assert told_by(workers, "counters")["bytes"] >= counted
        left.close()
        right.close()
        (row,) = workers.wait_for_rows("usage", 1)
        wait_until(lambda: told_by(workers, "counters")["bytes"] == row["bytes"], 20)
        wait_until(lambda: told_by(workers, "counters")["size.sum"] == row["bytes"], 20)
        counters = told_by(workers, "counters")
        assert row["bytes"] == moved if not blur else moved < row["bytes"] < moved + 1_000_000
        assert counters["size.10000000"] == counters["waiting.0.1"] == 1
        assert sum(count for name, count in counters.items() if name.startswith("total.") and name[6:] != "sum") == 1
        workers.kill_one(2)
        with connect(workers.port) as client:
            client.sendall(b"nonsense\n")
        workers.wait_for_rows("usage", 2)
        wait_until(lambda: len(workers.rows("worker_status")) == 1, 20)
        assert told_by(workers, "counters")["bytes"] == row["bytes"], "those of the dead are kept"


def test_a_service_that_starts_anew_counts_from_zero_and_says_since_when(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with Relay(tmp_path, recording=True, name=name) as relay:
            assert abs(relay.rows("service")[0]["began"] - time.time()) < 60
            assert told_by(relay, "counters")["size.sum"] == 0
            left, right = met(relay.port)
            left.sendall(b"x" * 1000)
            left.close()
            read_to_end(right)
            right.close()
            wait_until(lambda: told_by(relay, "counters")["size.sum"] == 1000, 20)
    assert json.loads(query(tmp_path / "usage.sqlite", "SELECT counters FROM service")[0][0])["size.sum"] == 1000
    assert query(tmp_path / "usage.sqlite", "SELECT * FROM worker_status") == []


def test_a_database_of_an_earlier_version_gets_what_it_lacks_and_its_workers_go_on_beside_new_ones(
    tmp_path: Path,
) -> None:
    path = tmp_path / "usage.sqlite"
    with contextlib.closing(open_database(str(path))) as database:
        for table in ("worker_status", "service"):
            database.execute(f"DROP TABLE {table}")
    with Workers(tmp_path, count=1) as workers:
        wait_until(lambda: told_by(workers, "gauges")["connections_limit"] > 0)
        # A worker of the earlier version drops the share of a dead one, and not its row here.
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as earlier, earlier:
            earlier.execute(
                "INSERT INTO worker_status VALUES (7, 'gone', '{}', ?)", (json.dumps({"bytes": 7, "odd": 1.5}),)
            )
        with flowing(workers.port):
            wait_until(lambda: len(workers.rows("worker_status")) == 1, 20, "that of the dead is settled")
            assert json.loads(workers.rows("service")[0]["counters"]) == {"bytes": 7, "odd": 1.5}


def test_what_others_have_written_there_ends_no_worker(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay:
        with contextlib.closing(sqlite3.connect(relay.usage_db, timeout=10)) as other, other:
            other.execute("UPDATE service SET counters = '[7'")
            for pid, nonsense in enumerate(("[]", "{", '{"bytes": "x"}', "", "7", b"{}", None)):
                other.execute("REPLACE INTO worker_status VALUES (?, 'gone', NULL, ?)", (pid, nonsense))
        with connect(relay.port) as client:
            client.sendall(b"nonsense\n")
        wait_until(lambda: len(relay.rows("worker_status")) == 1, 20)
        assert "cannot" not in relay.log_text()


def test_the_tables_that_others_read_are_as_they_were() -> None:
    sums = "bytes INTEGER, connections INTEGER, mood_happy INTEGER, mood_lonely INTEGER, mood_errory INTEGER"
    assert TABLES["current"] == "connected INTEGER, waiting INTEGER, partal_bytes INTEGER"
    assert TABLES["since_reboot"] == TABLES["all_time"] == sums
    assert TABLES["usage"] == "started INTEGER, total_time REAL, waiting_time REAL, bytes INTEGER, result TEXT"


def test_a_bucket_holds_what_is_not_above_its_bound() -> None:
    histograms = told.Histograms()
    histograms.note([(0, 0.1, None, 10_000, "happy"), (0, 99_999.0, 3.0, 10_001, "happy"), (0, 1.0, None, 0, "errory")])
    counted = {name: count for name, count in histograms.counters().items() if count}
    assert counted == {
        "mood.happy": 2,
        "mood.errory": 1,
        "size.10000": 1,
        "size.100000": 1,
        "size.sum": 20_001,
        "waiting.3": 1,
        "waiting.sum": 3.0,
        "total.0.1": 1,
        "total.inf": 1,
        "total.sum": 99_999 + 102 / 1024,
    }


class Told:
    """The rows of three workers, and what is read of them together."""

    def __init__(self) -> None:
        self.database = sqlite3.connect(":memory:")
        for table in ("worker_status", "service", "worker_share"):
            self.database.execute(f"CREATE TABLE {table} ({TABLES[table]})")
        told.begin_anew(self.database)
        self.draw = random.Random(7)
        self.seen = 0.0

    def tell(self, pid: int, counters: dict[str, float]) -> None:
        told.tell(self.database, (pid, "x"), told.Description({}, counters))

    def read(self) -> float:
        """The sum of all times; it has not become less."""
        total = read_counters(self.database)["total.sum"]
        assert total >= self.seen
        self.seen = total
        return total


def test_sums_of_times_never_go_back_by_a_last_digit_in_whatever_order_workers_tell_of_them_and_leave() -> None:
    rows = Told()
    histograms = [told.Histograms() for _ in range(3)]
    for _ in range(300):
        for one in histograms:
            one.note([(0, rows.draw.random() * 30, None, 0, "happy")])
        for pid in rows.draw.sample(range(3), 3):
            rows.tell(pid, histograms[pid].counters())
        before = rows.read()
        for pid in rows.draw.sample(range(3), 3):
            rows.tell(pid, histograms[pid].counters())
        gone = rows.draw.randrange(3)
        told.settle(rows.database, (gone, "x"))
        histograms[gone] = told.Histograms()
        rows.tell(gone, histograms[gone].counters())
        assert rows.read() == before


def test_workers_that_take_the_places_of_an_earlier_release_make_no_sum_of_times_less_nor_jump() -> None:
    rows = Told()
    sums = [1000 * rows.draw.random() for _ in range(50)]
    for pid, seconds in enumerate(sums):
        rows.tell(pid, {"total.sum": seconds})
    as_before = rows.seen = sum(sums)  # what relay-status of that release said
    for pid in rows.draw.sample(range(50), 50):
        told.settle(rows.database, (pid, "x"))
        rows.tell(pid, told.Histograms().counters())
        rows.read()
    assert rows.read() < as_before + 0.1


def test_a_worker_that_began_while_the_database_was_locked_is_not_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with UsageWorker("--usage-db", str(path)) as before:
        assert before.ask("close 30") == "0"
    with status_of(path, folder=tmp_path) as status:
        with holding_the_lock(path), UsageWorker("--usage-db", str(path)) as worker:
            worker.ask("record 1 10 happy")
            wait_until(lambda: "A worker lives, and could not write into the database" in status.health()[1], 10)
            assert "does not run" not in status.health()[1]
        wait_until(lambda: "The relay does not run" in status.health()[1], 10)


@pytest.mark.parametrize("options", [(), ("--blur-usage", "600")])
def test_records_that_a_lock_holds_back_are_told_of_while_it_lasts_also_where_the_log_does_not_tell_yet(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    with (
        Relay(tmp_path, *options, recording=True) as relay,
        status_of(relay.usage_db, folder=tmp_path) as status,
    ):
        status.wait_for_health(200, "1 worker")
        with holding_the_lock(relay.usage_db):
            with connect(relay.port) as client:
                client.sendall(b"good morning\n")
                read_to_end(client)
            status.wait_for_health(503, "Records are held back, they cannot be written into the database")
            assert status.sample("complaint", kind="kept") == 1
        status.wait_for_health(200, "1 worker")
        assert status.sample("complaint", kind="kept") == 0


def test_workers_that_began_while_the_database_was_locked_are_counted_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"

    def counted() -> tuple[int, int]:
        reading = Source(path).read()
        return len(reading.living), reading.unwritten

    with UsageWorker("--usage-db", str(path)) as worker, contextlib.ExitStack() as others:
        worker.ask("record 1 10 happy")
        wait_until(lambda: counted() == (1, 0))
        with holding_the_lock(path):
            for _ in range(3):
                others.enter_context(UsageWorker("--usage-db", str(path))).ask("record 1 10 happy")
            wait_until(lambda: counted() == (1, 3))
        wait_until(lambda: counted() == (4, 0))
