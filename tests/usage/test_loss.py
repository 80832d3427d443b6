"""Somebody spoils the database of a running relay: it is noticed, told, and mended where it can be.

What the relay does when the file is deleted, moved, emptied or damaged is in `test_database`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from relay.usage.schema import bytes_told
from tests.support.harness import wait_until
from tests.support.usage_records import assert_sums_agree, rows
from tests.support.usage_worker import UsageWorker

FRAME = 24 + 4096
"""Bytes of a frame in a -wal: a header and a page (https://www.sqlite.org/walformat.html)."""

OVERWRITTEN = "its -wal was overwritten or cut short while the relay ran; "

SUMS = ("since_reboot", "all_time")


class Service:
    """Some workers on one database; what they said is in `said` once they have ended."""

    def __init__(self, path: Path, workers: list[UsageWorker]) -> None:
        self.path = path
        self.workers = workers
        self.recorded = 0

    def record(self, count: int = 10) -> None:
        """Have each worker record so many, and wait until they are there."""
        for worker in self.workers:
            worker.ask(f"record {count} 10 happy")
        self.recorded += count * len(self.workers)

    def wait_for(self, count: int) -> None:
        wait_until(lambda: self.count() == count, what=f"{count} rows; there are {self.count()}")

    def count(self) -> int:
        (row,) = rows(self.path, "usage", "count(*)")
        return int(row[0])

    def record_later(self) -> int:
        """Record others, when something was spoiled, and wait for these; return how many."""
        for worker in self.workers:
            worker.ask("record 7 10 lonely")
        wait_until(lambda: lonely(self) == 7 * len(self.workers), what="the rows that came later")
        return 7 * len(self.workers)

    def spoil(self, sql: str) -> None:
        """Do as another program may."""
        with closing(sqlite3.connect(self.path, timeout=10)) as other, other:
            other.executescript(sql)

    def close(self) -> str:
        """Have all end in good order; return what they said, all together."""
        for worker in self.workers:
            assert worker.ask("close 30") == "0"
        for worker in self.workers:
            worker.kill()
        return "".join(worker.warnings for worker in self.workers)


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """A relay that has recorded a few connections."""
    path = tmp_path / "db"
    with ExitStack() as stack:
        workers = [stack.enter_context(UsageWorker("--usage-db", str(path))) for _ in range(request.param)]
        service = Service(path, workers)
        service.record()
        service.wait_for(service.recorded)
        yield service


def assert_is_whole(service: Service) -> None:
    assert_sums_agree(service.path)
    assert rows(service.path, "pragma_integrity_check") == [("ok",)]
    for table in ("current", *SUMS, "refreshed"):
        assert len(rows(service.path, table)) == 1


# The one-row tables


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        ("DELETE FROM all_time", "its table all_time had been emptied; it is made anew from the rows of usage"),
        ("UPDATE all_time SET bytes = NULL", "its table all_time held no number in bytes; it is made anew from"),
        ("UPDATE all_time SET mood_happy = 'many'", "its table all_time held no number in mood_happy"),
        ("INSERT INTO all_time VALUES (0, 0, 0, 0, 0)", "its table all_time had 2 rows; the first is kept"),
        ("DELETE FROM current", "its table current had been emptied; it is written anew, and nothing is lost"),
        ("INSERT INTO current VALUES (9, 9, 9)", "its table current had 2 rows; the first is kept"),
    ],
)
def test_a_one_row_table_is_put_right_from_what_there_is_and_the_log_says_so_once(
    service: Service, spoil: str, word: str
) -> None:
    service.spoil(spoil)
    service.record()
    service.wait_for(service.recorded)
    assert_is_whole(service)
    assert service.close().count(word) == 1


@pytest.mark.parametrize(
    ("spoil", "word", "left"),
    [
        ("DELETE FROM since_reboot", "its table since_reboot had been emptied; it counts from zero again", (0, 0)),
        ("UPDATE since_reboot SET bytes = NULL", "its table since_reboot held no number in bytes; it counts", (0, 1)),
        (
            "UPDATE since_reboot SET bytes = NULL, connections = NULL",
            "its table since_reboot held no number in bytes, connections; it counts from zero again",
            (0, 0),
        ),
    ],
)
def test_since_reboot_goes_on_from_what_is_left_of_it(
    service: Service, spoil: str, word: str, left: tuple[int, int]
) -> None:
    before = service.recorded
    service.spoil(spoil)
    service.record()
    service.wait_for(service.recorded)
    ((size, connections),) = rows(service.path, "since_reboot", "bytes, connections")
    new = service.recorded - before
    assert (size, connections) == (10 * (left[0] * before + new), left[1] * before + new)
    assert service.close().count(word) == 1


def test_what_no_record_touches_is_put_right_at_the_next_tick(service: Service) -> None:
    service.spoil("DELETE FROM refreshed; INSERT INTO since_reboot SELECT * FROM since_reboot")
    service.workers[0].ask("tick")
    wait_until(lambda: len(rows(service.path, "refreshed")) == 1, what="a row of refreshed")
    assert len(rows(service.path, "since_reboot")) == 1
    said = service.close()
    assert "its table refreshed had been emptied" in said
    assert "its table since_reboot had 2 rows; the first is kept" in said


def test_a_table_that_lost_its_row_while_no_relay_ran_is_put_right_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for spoiled in (False, True):
        with UsageWorker("--usage-db", str(path)) as worker:
            service = Service(path, [worker])
            service.record()
            service.wait_for(20 if spoiled else 10)
            assert_sums_agree(path)
            said = service.close()
        assert said.count("its table all_time had been emptied") == int(spoiled)
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("DELETE FROM all_time")


@pytest.mark.parametrize("table", ["usage", "current", *SUMS, "refreshed", "worker_share"])
def test_a_table_that_was_dropped_is_named_and_the_records_are_kept_until_it_is_there(
    service: Service, table: str
) -> None:
    service.spoil(f"ALTER TABLE {table} RENAME TO elsewhere")
    for worker in service.workers:
        worker.ask("record 10 10 happy")
        worker.ask("tick")
    for worker in service.workers:
        assert table in worker.read_warning()
    service.spoil(f"ALTER TABLE elsewhere RENAME TO {table}")
    service.wait_for(service.recorded + 10 * len(service.workers))
    assert_is_whole(service)
    service.close()


def test_rows_that_a_trigger_keeps_out_are_kept_and_told_of(service: Service) -> None:
    service.spoil("CREATE TRIGGER greedy BEFORE INSERT ON usage BEGIN SELECT RAISE(IGNORE); END")
    for worker in service.workers:
        worker.ask("record 10 10 happy")
        assert "its table usage does not take all rows; remove the trigger" in worker.read_warning()
    service.spoil("DROP TRIGGER greedy")
    service.wait_for(service.recorded + 10 * len(service.workers))
    assert_is_whole(service)
    service.close()


def test_shares_that_were_deleted_do_not_make_a_newcomer_begin_the_service_anew(service: Service) -> None:
    service.spoil("DELETE FROM worker_share; DELETE FROM lifeline")
    with UsageWorker("--usage-db", str(service.path)):
        assert rows(service.path, "since_reboot", "connections") == [(service.recorded,)]
    service.close()


# What is beside the file


def garbage(path: Path, begin: int = 0, length: int | None = None) -> None:
    """Overwrite a file with noise, from `begin` on, as another program or a broken disk may."""
    size = path.stat().st_size
    assert size > begin
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(os.urandom(size - begin if length is None else length))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep the log from being copied into the database and begun anew."""
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM usage").fetchall()
        yield


def copy_log_into_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


@pytest.mark.parametrize("kept", [0, 32, "half", "empty"])
def test_a_wal_that_was_overwritten_costs_what_it_held_and_no_more_and_the_log_says_how_much(
    service: Service, kept: int | str
) -> None:
    copy_log_into_database(service.path)
    safe = service.recorded
    for _ in range(5):
        service.record()
        service.wait_for(service.recorded)
    wal = Path(f"{service.path}-wal")
    if kept == "empty":
        os.truncate(wal, 0)
    else:
        garbage(wal, wal.stat().st_size // 2 // FRAME * FRAME + 32 if kept == "half" else int(kept))
    new = service.record_later()
    left = service.count() - new
    assert safe <= left < service.recorded
    if kept == "half":
        assert left > safe, "what was good in it is kept"
    assert_is_whole(service)
    said = service.close()
    (told,) = re.findall(OVERWRITTEN + r"what was in it is lost(?:, at least (\d+) connections)?\n", said)
    assert said.count("\n") == 1
    lost = service.recorded - left
    if len(service.workers) == 1:
        assert int(told) == lost
    else:
        assert int(told or 0) <= lost, "of what the other one has written last it does not know"
    assert os.listdir(service.path.parent) == ["db"]
    assert_is_whole(service)


def test_a_wal_that_was_overwritten_in_the_middle_is_noticed_before_it_gets_into_the_database(service: Service) -> None:
    with reading(service.path):
        for _ in range(5):
            service.record()
            service.wait_for(service.recorded)
        garbage(Path(f"{service.path}-wal"), begin=32 + 4 * FRAME, length=2 * FRAME)
    # Those that come before it is noticed go with the rest; it takes a second.
    wait_until(lambda: spoken_after_one_more(service), what="a word of it")
    service.record_later()
    assert_is_whole(service)
    assert service.close() == ""
    assert_is_whole(service)


def spoken_after_one_more(service: Service) -> bool:
    """Record something, and tell whether a worker speaks of an overwritten -wal."""
    for worker in service.workers:
        worker.ask("record 1 10 errory")
    stderrs = [worker.process.stderr for worker in service.workers if worker.process.stderr is not None]
    speaking, _, _ = select.select(stderrs, [], [], 0.1)
    lines = [worker.read_warning() for worker in service.workers if worker.process.stderr in speaking]
    assert all(
        "-wal was overwritten or cut short while the relay ran; what was in it is lost" in line for line in lines
    )
    return bool(lines)


def test_a_wal_that_was_overwritten_when_all_was_in_the_database_costs_nothing(service: Service) -> None:
    with closing(sqlite3.connect(service.path)) as other:
        assert other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[0] == 0
    garbage(Path(f"{service.path}-wal"))
    service.record_later()
    assert service.count() == service.recorded + 7 * len(service.workers)
    assert_is_whole(service)
    assert OVERWRITTEN + "nothing is lost" in service.close()


@pytest.mark.parametrize("begin", [0, 32 + 3 * FRAME], ids=["from the beginning", "in the middle"])
def test_a_wal_that_was_overwritten_while_no_relay_ran_is_told_of_at_the_next_start(tmp_path: Path, begin: int) -> None:
    path = tmp_path / "db"
    with UsageWorker("--usage-db", str(path)) as worker:
        service = Service(path, [worker])
        for _ in range(5):
            service.record()
            service.wait_for(service.recorded)
        worker.kill()
    garbage(Path(f"{path}-wal"), begin, FRAME)
    with UsageWorker("--usage-db", str(path)) as worker:
        assert (
            "its -wal is not whole (overwritten, or a power cut); what came last in it is lost" in worker.read_warning()
        )
        service = Service(path, [worker])
        service.record_later()
        assert_is_whole(service)
        assert service.close() == ""


def test_a_worker_that_was_killed_is_no_loss_to_speak_of(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for run in range(1, 5):
        with UsageWorker("--usage-db", str(path)) as worker:
            service = Service(path, [worker])
            service.record(1000)
            service.wait_for(1000 * run)
            if run == 4:
                assert service.close() == ""
            else:
                worker.kill()
                assert worker.warnings == ""


def test_a_shm_that_was_removed_costs_nothing(service: Service) -> None:
    os.unlink(f"{service.path}-shm")
    service.record()
    service.wait_for(service.recorded)
    assert_is_whole(service)
    assert service.close().count("its -shm was removed while the relay ran; nothing is lost") >= 1
    assert_is_whole(service)


def test_a_wal_that_was_overwritten_and_a_shm_that_was_removed_are_a_loss_that_is_told(service: Service) -> None:
    copy_log_into_database(service.path)
    service.record()
    service.wait_for(service.recorded)
    garbage(Path(f"{service.path}-wal"))
    os.unlink(f"{service.path}-shm")
    service.record_later()
    assert_is_whole(service)
    assert OVERWRITTEN + "what was in it is lost" in service.close()


def test_a_shm_that_was_cut_short_kills_nobody(service: Service) -> None:
    for _ in range(5):
        os.truncate(f"{service.path}-shm", 0)
        service.record()
        service.wait_for(service.recorded)
    assert_is_whole(service)
    assert service.close() == ""
    assert_is_whole(service)


def lonely(service: Service) -> int:
    """How many rows came later; none while it is being put right."""
    with contextlib.suppress(sqlite3.DatabaseError):
        (row,) = rows(service.path, "usage", "count(*) FILTER (WHERE result = 'lonely')")
        return int(row[0])
    return 0


# The file itself


@pytest.mark.parametrize("pages", [1, 2, 9])
@pytest.mark.parametrize("copied", [True, False], ids=["all copied into it", "some in the -wal"])
def test_a_file_that_was_cut_short_is_named_and_records_are_kept_until_a_good_copy_is_there(
    service: Service, tmp_path: Path, pages: int, copied: bool
) -> None:
    service.record(1000)
    service.wait_for(service.recorded)
    with closing(sqlite3.connect(service.path)) as other:
        assert other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[0] == 0
    good = tmp_path / "good"
    with closing(sqlite3.connect(service.path)) as other, closing(sqlite3.connect(good)) as copy:
        other.backup(copy)
    if not copied:
        service.record(1)
        wait_until(lambda: service.count() == service.recorded, what="some in the -wal")
    assert service.path.stat().st_size > 10 * 4096
    os.truncate(service.path, pages * 4096)
    for worker in service.workers:
        worker.ask("record 3 10 lonely")
    for worker in service.workers:
        assert "it is damaged (it was cut short); repair it, or move it away" in worker.read_warning()
    for beside in ("-wal", "-shm"):
        Path(f"{service.path}{beside}").unlink(missing_ok=True)
    good.replace(service.path)
    wait_until(lambda: lonely(service) == 3 * len(service.workers), what="what was kept")
    assert_is_whole(service)
    assert "works again" in service.close()


def test_a_file_that_was_cut_short_while_no_relay_ran_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with UsageWorker("--usage-db", str(path)) as worker:
        service = Service(path, [worker])
        service.record(1000)
        service.wait_for(1000)
        service.close()
    os.truncate(path, 3 * 4096)
    with pytest.raises(AssertionError, match=r"has ended.*it is damaged"), UsageWorker("--usage-db", str(path)):
        pass
    assert path.stat().st_size == 3 * 4096


def test_a_file_that_a_crash_left_shorter_than_it_says_is_whole_with_its_wal(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with UsageWorker("--usage-db", str(path)) as worker:
        service = Service(path, [worker])
        service.record(1000)
        service.wait_for(1000)
        worker.kill()
    with path.open("r+b") as file:  # as far as copying the -wal had come: the first page
        wal = Path(f"{path}-wal").read_bytes()
        frames = [wal[at : at + FRAME] for at in range(32, len(wal), FRAME)]
        file.write(next(frame[24:] for frame in reversed(frames) if frame[:4] == b"\0\0\0\1"))
    assert bytes_told(path.read_bytes()[:100]) > path.stat().st_size
    with UsageWorker("--usage-db", str(path)) as worker:
        service = Service(path, [worker])
        service.record()
        service.wait_for(1010)
        assert_is_whole(service)
        assert service.close() == ""
