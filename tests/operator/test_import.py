"""Moving over from the Twisted relay: its own database, made by itself, brought into ours."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from relay.usage import lifeline
from relay.usage.record import blur_size
from relay.usage.schema import open_database
from tests.support.harness import (
    CHECKOUT,
    Relay,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    query,
    read_exactly,
    read_to_end,
    running,
    wait_until,
)
from tests.support.supervised import ORDINARY_USER
from tests.support.twisted import transit_relay
from tests.support.usage_records import holding_the_lock
from tests.support.usage_worker import UsageWorker

PROGRAM = CHECKOUT / "misc" / "import-twisted-usage"
MAPPED = {
    "happy": "happy",
    "jilted": "happy",
    "lonely": "lonely",
    "redundant": "lonely",
    "errory": "errory",
    "impatient": "errory",
    "empty": "errory",
}
MOODS_IT_WRITES = {"happy", "lonely", "redundant", "errory", "impatient", "empty"}


def run_import(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the importer; whatever its exit status."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def said(*arguments: str | Path) -> str:
    """Return what the importer says; AssertionError when it failed."""
    result = run_import(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    """Return the rows of a query."""
    return [tuple(row) for row in query(path, sql)]


def usage(path: Path) -> list[tuple[object, ...]]:
    """Return the rows of our `usage`."""
    return rows(path, "SELECT started, total_time, waiting_time, bytes, result FROM usage ORDER BY rowid")


def all_time(path: Path) -> tuple[object, ...]:
    """Return the row of our `all_time`."""
    (row,) = rows(path, "SELECT connections, bytes, mood_happy, mood_lonely, mood_errory FROM all_time")
    return row


def in_our_words(twisted: Path) -> list[tuple[object, ...]]:
    """Return the rows of the Twisted relay's `usage`, its moods mapped."""
    source = rows(twisted, "SELECT started, total_time, waiting_time, total_bytes, result FROM usage ORDER BY rowid")
    return [(*row[:4], MAPPED[str(row[4])]) for row in source]


def sums_of(told: list[tuple[object, ...]]) -> tuple[int, ...]:
    """Return what the sums over rows of ours have to be."""
    moods = [row[4] for row in told]
    counts = [moods.count(mood) for mood in ("happy", "lonely", "errory")]
    return (len(told), sum(int(str(row[3])) for row in told), *counts)


class TwistedRelay:
    """A Twisted relay that keeps usage, with as many connections of each mood as one asks for."""

    def __init__(self, database: Path, port: int) -> None:
        self.database = database
        self.port = port

    def count(self) -> int:
        """Return how many rows its database has."""
        with contextlib.suppress(sqlite3.OperationalError):
            return int(str(rows(self.database, "SELECT count(*) FROM usage")[0][0]))
        return 0

    def wait_for(self, count: int) -> None:
        """Wait until its database has so many rows."""
        wait_until(lambda: self.count() == count, what=f"{count} rows (there are {self.count()})")

    def every_mood(self, transferred: int) -> None:
        """Let connections of each mood that it can write come and go, one after another; makes 8 rows."""
        before = self.count()
        token, side = new_token(), new_side()
        with connect(self.port) as first, connect(self.port) as spare, connect(self.port) as second:
            for client in (first, spare):
                client.sendall(handshake(token, side))
            second.sendall(handshake(token, new_side()))
            # Which of the two is the spare is the relay's choice.
            assert read_exactly(second, 3) == b"ok\n"
            second.sendall(b"x" * transferred)
            answers = sorted(self._answer(client, transferred) for client in (first, spare))
            assert [len(answer) for answer in answers] == [0, 3 + transferred]
        self.wait_for(before + 2)  # happy, redundant
        with connect(self.port) as lonely:
            lonely.sendall(handshake(new_token(), new_side()))
        with connect(self.port) as old_form:
            old_form.sendall(handshake(new_token()))
        with connect(self.port) as wrong:
            wrong.sendall(b"please relay nonsense\n")
            assert read_to_end(wrong) == b"bad handshake\n"
        with connect(self.port) as impatient:
            impatient.sendall(handshake(new_token(), new_side()) + b"hello")
            assert read_to_end(impatient) == b"impatient\n"
        with connect(self.port):
            pass  # empty
        with connect(self.port) as unfinished:
            unfinished.sendall(b"please re")
        self.wait_for(before + 8)

    @staticmethod
    def _answer(client: socket.socket, transferred: int) -> bytes:
        received = b""
        while len(received) < 3 + transferred and (chunk := client.recv(65536)):
            received += chunk
        return received


@contextlib.contextmanager
def twisted_relay(folder: Path, *options: str) -> Iterator[TwistedRelay]:
    """Run `twist transitrelay` with a usage database in the folder."""
    folder.mkdir(exist_ok=True)
    database = folder / "usage.sqlite"
    with transit_relay(folder, "--usage-db", str(database), *options) as port:
        relay = TwistedRelay(database, port)
        relay.wait_for(1)  # the question just asked is an "empty" one
        yield relay


def test_what_the_twisted_relay_recorded_is_imported_with_its_sums(tmp_path: Path) -> None:
    ours = tmp_path / "ours.sqlite"
    with twisted_relay(tmp_path / "twisted") as twisted:
        twisted.every_mood(123_456)
        source = rows(twisted.database, "SELECT result FROM usage")
        assert {mood for (mood,) in source} == MOODS_IT_WRITES
        output = said(twisted.database, ours)
        assert usage(ours) == in_our_words(twisted.database)
        assert all_time(ours) == sums_of(usage(ours)) == (9, 123_456, 1, 3, 5)
        assert output == "9 records imported (1 happy, 3 lonely, 5 errory; 123 kB), 0 were there already\n"


def test_a_second_import_adds_only_what_came_since(tmp_path: Path) -> None:
    ours = tmp_path / "ours.sqlite"
    with twisted_relay(tmp_path / "twisted") as twisted:
        twisted.every_mood(1000)
        said(twisted.database, ours)
        assert "0 records imported" in said(twisted.database, ours)
        assert "9 were there already" in said(twisted.database, ours)
        assert all_time(ours) == (9, 1000, 1, 3, 5)
        twisted.every_mood(2000)
        assert "8 records imported (1 happy, 3 lonely, 4 errory; 2 kB), 9 were there" in said(twisted.database, ours)
        assert usage(ours) == in_our_words(twisted.database)
        assert all_time(ours) == sums_of(usage(ours))
        assert "0 records imported" in said(twisted.database, ours)
        assert len(rows(ours, "SELECT * FROM imported")) == 1


def test_the_twisted_relay_s_own_blur_is_kept(tmp_path: Path) -> None:
    ours = tmp_path / "ours.sqlite"
    with twisted_relay(tmp_path / "twisted", "--blur-usage", "600") as twisted:
        twisted.every_mood(123_456)
        said("--blur-usage", "600", twisted.database, ours)
        assert sorted(usage(ours), key=repr) == sorted(in_our_words(twisted.database), key=repr)
        assert all_time(ours)[1] == 130_000


def test_an_import_into_a_running_relay_s_database_disturbs_nothing(tmp_path: Path) -> None:
    source = tmp_path / "twisted.sqlite"
    twisted_database(source, 50_000)
    (tmp_path / "ours").mkdir()
    with Relay(tmp_path / "ours", recording=True) as relay:
        finished = threading.Event()
        made = 0

        def transfer() -> None:
            nonlocal made
            while not finished.is_set():
                left, right = met(relay.port)
                with left, right:
                    left.sendall(b"x" * 10)
                    read_exactly(right, 10)
                made += 1

        thread = threading.Thread(target=transfer)
        thread.start()
        try:
            relay.wait_for_rows("usage", 10)
            assert "50000 records imported" in said(source, relay.usage_db)
            assert "0 records imported" in said(source, relay.usage_db)
            after_import = made
            wait_until(lambda: made > after_import + 10, what="transfers after the import")
        finally:
            finished.set()
            thread.join()
        relay.wait_for_rows("usage", 50_000 + made)
        assert all_time(relay.usage_db) == sums_of(usage(relay.usage_db))
        assert tuple(relay.rows("since_reboot")[0])[:2] == (10 * made, made)
        assert "locked" not in relay.log_text()


WRITER = """
import sys
from relay.usage.schema import open_database
database = open_database(sys.argv[1])
database.execute("PRAGMA wal_autocheckpoint = 20")
while True:
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT INTO usage VALUES (1, 2, 3, 4, 'happy')", [()] * 400)
    database.execute("COMMIT")
"""


def test_a_database_that_a_relay_is_just_checkpointing_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    ours = tmp_path / "ours.sqlite"
    open_database(str(ours)).close()
    with running([sys.executable, "-c", WRITER, str(ours)], tmp_path / "writer.log", cwd=CHECKOUT):
        wait_until(lambda: len(rows(ours, "SELECT 1 FROM usage LIMIT 1")) == 1, what="a writer at work")
        for _ in range(3000):
            open_database(str(ours)).close()


def twisted_database(path: Path, count: int, *, moods: tuple[str, ...] = ("happy",), seed: int = 0) -> None:
    """Make a database of the Twisted relay's schema version 1, with rows that no other seed has."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            "CREATE TABLE version (version INTEGER);"
            "INSERT INTO version VALUES (1);"
            "CREATE TABLE current (rebooted INTEGER, updated INTEGER, connected INTEGER, waiting INTEGER,"
            " incomplete_bytes INTEGER);"
            "CREATE TABLE usage (started INTEGER, total_time INTEGER, waiting_time INTEGER, total_bytes INTEGER,"
            " result VARCHAR);"
        )
        database.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?)", twisted_rows(count, moods, seed))
        database.commit()


def twisted_rows(count: int, moods: tuple[str, ...], seed: int) -> Iterator[tuple[float, float, float, int, str]]:
    """Return rows as that relay writes them, unblurred."""
    for number in range(count):
        total = 1.5 + seed / 7 + number / 1024
        yield 1700000000.25 + number, total, 0.25 + number / 4096, 1234 * number, moods[number % len(moods)]


def add_rows(path: Path, *numbers: int) -> None:
    """Add more rows of the same kind."""
    with closing(sqlite3.connect(path)) as database:
        wanted = [row for number, row in enumerate(twisted_rows(max(numbers) + 1, ("happy",), 0)) if number in numbers]
        database.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?)", wanted)
        database.commit()


def test_every_mood_of_its_history_is_mapped(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, len(MAPPED), moods=tuple(MAPPED))
    said(source, ours)
    assert [row[4] for row in usage(ours)] == list(MAPPED.values())


def test_a_mood_that_it_never_writes_has_to_be_explained(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 4, moods=("happy", "pruney"))
    refused = run_import(source, ours)
    assert refused.returncode == 2
    assert "the mood 'pruney' in row 2" in refused.stderr
    assert usage(ours) == []
    said("--other-moods", "lonely", source, ours)
    assert [row[4] for row in usage(ours)] == ["happy", "lonely"] * 2


def test_an_exact_history_is_blurred_on_the_way(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 1000)
    said("--blur-usage", "600", source, ours)
    imported = usage(ours)
    assert imported != sorted(imported, key=by_duration), "they are in no order"
    for ours_row, theirs in zip(sorted(imported, key=by_duration), in_our_words(source), strict=True):
        assert ours_row[0] == int(float(str(theirs[0]))) // 600 * 600
        assert ours_row[1:3] == theirs[1:3]
        assert ours_row[3] == blur_size(int(str(theirs[3])))
    assert all_time(ours) == sums_of(usage(ours))
    add_rows(source, 1000)
    assert "1 records imported" in said("--blur-usage", "3600", source, ours)


@pytest.mark.parametrize("blur", [(), ("--blur-usage", "60"), ("--blur-usage", "900")])
def test_beside_a_relay_that_rounds_nothing_is_imported_that_is_not_rounded_as_much(
    tmp_path: Path, blur: tuple[str, ...]
) -> None:
    source = tmp_path / "twisted.sqlite"
    twisted_database(source, 3)
    (tmp_path / "ours").mkdir()
    with Relay(tmp_path / "ours", "--blur-usage", "600", recording=True) as relay:
        relay.wait_for_rows("worker_status", 1)
        for more in ((), ("--dry-run",)):
            refused = run_import(*blur, *more, source, relay.usage_db)
            assert refused.returncode == 2
            assert "rounds to 600 seconds; give --blur-usage 600" in refused.stderr
        assert not usage(relay.usage_db)
        assert "3 records imported" in said("--blur-usage", "1200", source, relay.usage_db)


def test_a_relay_that_was_killed_keeps_nothing_out_nor_does_one_that_uses_another_copy(tmp_path: Path) -> None:
    source, ours, copy = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite", tmp_path / "copy.sqlite"
    twisted_database(source, 3)
    with UsageWorker("--usage-db", str(ours), "--blur-usage", "600") as worker:
        with closing(sqlite3.connect(ours)) as database:
            database.execute("VACUUM INTO ?", (str(copy),))
        assert run_import(source, ours).returncode == 2
        assert "3 records would be imported" in said("--dry-run", source, copy)
        assert "3 records imported" in said(source, copy)
        worker.kill()
    assert len(rows(ours, "SELECT * FROM worker_status")) == 1
    assert "3 records would be imported" in said("--dry-run", source, ours)
    assert "3 records imported" in said(source, ours)


def test_a_relay_that_has_not_come_to_say_how_it_rounds_is_waited_for(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 3)
    open_database(str(ours)).close()
    with ours.open("rb") as file, contextlib.ExitStack() as stack:
        with holding_the_lock(ours):
            worker = stack.enter_context(beginning(ours))
            wait_until(lambda: lifeline.count_held(file.fileno()) == 1, what="its lifeline")
            os.kill(worker.pid, signal.SIGSTOP)
        refused = run_import(source, ours)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "a relay has it open and has not come to record there yet" in refused.stderr
        os.kill(worker.pid, signal.SIGCONT)
        assert "rounds to 600 seconds" in run_import(source, ours).stderr
        assert not usage(ours)
        assert "3 records imported" in said("--blur-usage", "600", source, ours)


def test_an_exact_import_during_which_a_relay_begins_that_rounds_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 3)
    open_database(str(ours)).close()
    importer = as_module(PROGRAM, monkeypatch)
    refuse_too_much = importer.refuse_too_much
    with ours.open("rb") as file, contextlib.ExitStack() as stack:

        def a_relay_begins(*given: object) -> None:
            stack.enter_context(beginning(ours))
            wait_until(lambda: lifeline.count_held(file.fileno()) == 1, what="its lifeline")
            refuse_too_much(*given)

        monkeypatch.setattr(importer, "refuse_too_much", a_relay_begins)  # when the rows are written
        options = importer.read_options([str(source), str(ours)])
        with pytest.raises(importer.Mistake, match="rounds to 600 seconds"):
            importer.imported_when_all_have_told(source, tmp_path, options)
        assert not usage(ours)


@contextlib.contextmanager
def beginning(path: Path) -> Iterator[UsageWorker]:
    """A worker that rounds, and that has been started; whatever it has come to."""
    worker = UsageWorker("--usage-db", str(path), "--blur-usage", "600")
    try:
        yield worker
    finally:
        worker.kill()


def as_module(program: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What a program is made of."""
    loader = SourceFileLoader("program", str(program))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    return module


def by_duration(row: tuple[object, ...]) -> float:
    """What the rows of `twisted_rows` are in order of."""
    return float(str(row[1]))


def test_sums_that_somebody_emptied_are_put_right_before_anything_is_added(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    said(source, ours)
    with closing(sqlite3.connect(ours)) as database:
        database.execute("DELETE FROM all_time")
        database.commit()
    add_rows(source, 10)
    again = run_import(source, ours)
    assert again.returncode == 0
    assert "its table all_time had been emptied; it is made anew from the rows of usage" in again.stderr
    assert all_time(ours) == sums_of(usage(ours))
    assert all_time(ours)[0] == 11


def test_an_earlier_copy_adds_nothing(tmp_path: Path) -> None:
    source, earlier, ours = tmp_path / "twisted.sqlite", tmp_path / "earlier.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    shutil.copy(source, earlier)
    add_rows(source, 10, 11)
    said(source, ours)
    assert "0 records imported" in said(earlier, ours)
    assert all_time(ours)[0] == 12


def test_two_relays_histories_go_into_one(tmp_path: Path) -> None:
    first, second, ours = tmp_path / "first.sqlite", tmp_path / "second.sqlite", tmp_path / "ours.sqlite"
    twisted_database(first, 10)
    twisted_database(second, 20, seed=1)
    said(first, ours)
    said(second, ours)
    assert "0 records imported" in said(first, ours)
    assert "0 records imported" in said(second, ours)
    assert all_time(ours)[0] == 30


@pytest.mark.parametrize("deleted", ["rowid = 1", "rowid = 5"])
def test_a_history_that_was_cut_is_refused_rather_than_counted_twice(tmp_path: Path, deleted: str) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    said(source, ours)
    with closing(sqlite3.connect(source)) as database:
        database.execute(f"DELETE FROM usage WHERE {deleted}")
        database.commit()
    add_rows(source, 10, 11, 12)
    refused = run_import(source, ours)
    assert refused.returncode == 2
    assert "nothing was imported" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert all_time(ours)[0] == 10


def test_a_vacuumed_history_is_still_the_same(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    said(source, ours)
    with closing(sqlite3.connect(source)) as database:
        database.execute("VACUUM")
    add_rows(source, 10)
    assert "1 records imported" in said(source, ours)


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    assert "10 records would be imported" in said("--dry-run", source, ours)
    assert os.listdir(tmp_path) == ["twisted.sqlite"]
    assert "10 records imported" in said(source, ours)
    add_rows(source, 10)
    before = ours.read_bytes()
    assert "1 records would be imported" in said("--dry-run", source, ours)
    assert (sorted(os.listdir(tmp_path)), ours.read_bytes()) == (["ours.sqlite", "twisted.sqlite"], before)
    for wrong, complaint in (
        (tmp_path / "no" / "folder", "there is no folder"),
        (source, "the Twisted relay's database"),
    ):
        result = run_import("--dry-run", source, wrong)
        assert (result.returncode, complaint in result.stderr) == (2, True), result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_root_makes_no_database_in_another_user_s_folder(tmp_path: Path) -> None:
    source, folder = tmp_path / "twisted.sqlite", tmp_path / "relay"
    twisted_database(source, 1)
    folder.mkdir()
    shutil.chown(folder, ORDINARY_USER)
    result = run_import(source, folder / "usage.sqlite")
    assert result.returncode == 2
    assert f"run this as {ORDINARY_USER} and not as root" in result.stderr
    assert os.listdir(folder) == []


def test_what_was_written_before_is_added_to(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    with closing(open_database(str(ours))) as database:
        database.execute("INSERT INTO all_time (connections, bytes, mood_happy, mood_lonely, mood_errory)"
                         " VALUES (7, 8, 1, 2, 4)")  # fmt: skip
    said(source, ours)
    assert all_time(ours) == (17, 8 + 1234 * 45, 11, 2, 4)


def test_a_database_that_its_relay_left_half_written_is_recovered_in_a_copy(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 10)
    # The journal gets to the disk when the pages do, which a small cache brings about before the commit.
    program = (
        "import sqlite3, os, signal, sys; database = sqlite3.connect(sys.argv[1]);"
        "database.execute('PRAGMA cache_size = 1');"
        "database.executemany('INSERT INTO usage VALUES (1, 2, 3, 4, ?)', [('happy' * 100,)] * 5000);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(source)], check=False)
    assert killed.returncode == -signal.SIGKILL
    journal = Path(f"{source}-journal").read_bytes()
    assert "10 records imported" in said(source, ours)
    assert Path(f"{source}-journal").read_bytes() == journal


def test_the_source_is_not_written_to(tmp_path: Path) -> None:
    source = tmp_path / "twisted.sqlite"
    twisted_database(source, 10)
    before = source.read_bytes()
    said(source, tmp_path / "ours.sqlite")
    assert source.read_bytes() == before


def test_mistakes_are_one_line_and_exit_status_2(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 1)
    newer, text = tmp_path / "newer.sqlite", tmp_path / "text"
    twisted_database(newer, 1)
    with closing(sqlite3.connect(newer)) as database:
        database.execute("UPDATE version SET version = 2")
        database.commit()
    text.write_text("no database " * 100)
    open_database(str(ours)).close()
    for arguments, complaint in (
        ([source], "give two files"),
        ([tmp_path / "nowhere", ours], "no such file"),
        ([text, ours], "not a database"),
        ([ours, ours], "not the usage database of a Twisted relay"),
        ([newer, ours], "schema version 2"),
        ([source, source], "it is the Twisted relay's usage database"),
        ([source, tmp_path / "no" / "folder.sqlite"], "does not exist"),
        (["--blur-usage", "0", source, ours], "--blur-usage 0"),
        (["--other-moods", "sad", source, ours], "--other-moods sad"),
    ):
        result = run_import(*arguments)
        assert result.returncode == 2, result.stdout
        assert re.fullmatch(r"import-twisted-usage: error: [^\n]*\n", result.stderr)
        assert complaint in result.stderr


ODD_ROWS = {
    "text as a start": ("noon", 1, 1, 5, "happy"),
    "text as a duration": (1, "long", 1, 5, "happy"),
    "text as a waiting time": (1, 1, "short", 5, "happy"),
    "text as a size": (1, 1, 1, "much", "happy"),
    "text that is no UTF-8": (1, 1, 1, b"\xff", "happy"),
    "bytes as a start": (b"\0", 1, 1, 5, "happy"),
    "an infinite start": (float("inf"), 1, 1, 5, "happy"),
    "an infinite duration": (1, float("inf"), 1, 5, "happy"),
    "an infinite waiting time": (1, 1, float("-inf"), 5, "happy"),
    "an infinite size": (1, 1, 1, float("inf"), "happy"),
    "a size beyond all measure": (1, 1, 1, 1e300, "happy"),
    "a size of 63 bits": (1, 1, 1, (1 << 63) - 1, "happy"),
    "a size below zero": (1, 1, 1, -1, "happy"),
    "a start beyond all measure": (1e300, 1, 1, 5, "happy"),
    "a start before 1970": (-5e12, 1, 1, 5, "happy"),
}


@pytest.mark.parametrize("blur", [(), ("--blur-usage", "600")], ids=["exact", "blurred"])
@pytest.mark.parametrize("row", ODD_ROWS.values(), ids=ODD_ROWS)
def test_a_row_that_no_twisted_relay_writes_is_named_and_nothing_imported(
    tmp_path: Path, row: tuple[object, ...], blur: tuple[str, ...]
) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 3)
    with closing(sqlite3.connect(source)) as database:
        what = "?, ?, ?, CAST(? AS TEXT), ?" if row[3] == b"\xff" else "?, ?, ?, ?, ?"
        database.execute(f"INSERT INTO usage VALUES ({what})", row)
        database.commit()
    refused = run_import(*blur, source, ours)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert "row 4 has " in refused.stderr
    assert usage(ours) == []


def test_rows_with_nulls_and_numbers_as_text_are_imported_and_can_be_read(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 1)
    with closing(sqlite3.connect(source)) as database:
        database.executemany(
            "INSERT INTO usage VALUES (?, ?, ?, ?, ?)",
            [(None, None, None, None, "happy"), ("1700000000", "2.5", "1.5", "10", "happy"), (1, -3, -3, 7.5, "happy")],
        )
        database.commit()
    said(source, ours)
    assert usage(ours)[1:] == [(0, 0, None, 0, "happy"), (1700000000, 2.5, 1.5, 10, "happy"), (1, -3, -3, 7, "happy")]
    command = [sys.executable, "-m", "relay.report.cli", "--last", "all"]
    for form in ((), ("--json",), ("--csv",)):
        read = subprocess.run([*command, *form, ours], cwd=CHECKOUT, capture_output=True, check=False)
        assert (read.returncode, read.stderr) == (0, b"")


def test_sums_that_no_column_holds_and_a_spoiled_note_are_told_in_one_line(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 3)
    said(source, ours)
    for spoil, says in (
        ("UPDATE all_time SET bytes = 4611686018427387904", "more than can be counted"),
        ("UPDATE imported SET rows = 'some'", "rows that were imported before have changed"),
    ):
        add_rows(source, 3)
        with closing(sqlite3.connect(ours)) as database:
            database.execute(spoil)
            database.commit()
        refused = run_import(source, ours)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert says in refused.stderr


def test_a_usage_table_of_other_columns_is_told_of_as_the_twisted_database_s(tmp_path: Path) -> None:
    source, ours = tmp_path / "twisted.sqlite", tmp_path / "ours.sqlite"
    twisted_database(source, 1)
    with closing(sqlite3.connect(source)) as database:
        database.execute("ALTER TABLE usage RENAME COLUMN total_bytes TO bytes")
        database.commit()
    refused = run_import(source, ours)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"import-twisted-usage: error: {source}: no such column")
    assert not ours.exists()


@dataclass
class Held:
    """An import that has made its copy and waits, since `other` has the database `ours`."""

    importing: subprocess.Popen[bytes]
    other: sqlite3.Connection
    ours: Path
    temporary: Path


@contextlib.contextmanager
def held_up(folder: Path, *before: str) -> Iterator[Held]:
    """One of 10 records, started by the command `before`; what is left of it in the end is ended."""
    source, ours, temporary = folder / "twisted.sqlite", folder / "ours.sqlite", folder / "tmp"
    twisted_database(source, 10)
    open_database(str(ours)).close()
    temporary.mkdir()
    with closing(sqlite3.connect(ours, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        importing = subprocess.Popen(
            [*before, sys.executable, str(PROGRAM), "--blur-usage", "600", str(source), str(ours)],
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: list(temporary.glob("*/twisted.sqlite")), what="the copy")
            yield Held(importing, other, ours, temporary)
        finally:
            importing.kill()
            importing.wait()


@pytest.mark.parametrize("ending", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_no_exact_copy_is_left_when_its_terminal_is_lost_or_it_is_told_to_end(
    tmp_path: Path, ending: signal.Signals
) -> None:
    # What nohup(1), or a shell's background, has ignored is inherited.
    with held_up(tmp_path, "env", "--default-signal=HUP,INT,TERM") as held:
        held.importing.send_signal(ending)
        assert held.importing.wait(10) in (128 + ending, 130)
    assert list(held.temporary.iterdir()) == []
    assert usage(held.ours) == []


def test_one_whose_terminal_may_go_imports_to_the_end(tmp_path: Path) -> None:
    with held_up(tmp_path, "nohup") as held:
        held.importing.send_signal(signal.SIGHUP)
        held.other.execute("ROLLBACK")
        assert held.importing.wait(20) == 0
    assert len(usage(held.ours)) == 10


def started_by_its_name(folder: Path, *, python: bool) -> subprocess.CompletedProcess[str]:
    """Start an installed copy as `misc/import-twisted-usage`, with a Python first on the PATH that knows no relay.

    Args:
        folder: what it was installed into.
        python: whether the Python is there that it was installed for.
    """
    program = folder / "share" / "relay-gevent" / "misc" / PROGRAM.name
    program.parent.mkdir(parents=True)
    shutil.copy(PROGRAM, program)
    (folder / "bin").mkdir()
    if python:
        (folder / "bin" / "python").write_text('#!/bin/sh\nshift\necho "the right one was told $*"\n')
        (folder / "bin" / "python").chmod(0o755)
    (folder / "path").mkdir()
    (folder / "path" / "python3").write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -I -S "$@"\n')
    (folder / "path" / "python3").chmod(0o755)
    env = {"PATH": f"{folder / 'path'}:/usr/bin:/bin"}
    return subprocess.run(
        [program, "old.sqlite", "new.sqlite"], env=env, capture_output=True, text=True, timeout=30, check=False
    )


def test_started_by_its_name_it_goes_on_with_the_python_that_it_was_installed_for(tmp_path: Path) -> None:
    done = started_by_its_name(tmp_path, python=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the right one was told old.sqlite new.sqlite\n", "")


def test_without_that_python_it_says_in_one_line_what_to_do(tmp_path: Path) -> None:
    done = started_by_its_name(tmp_path, python=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("import-twisted-usage: error: this Python has no ")
    assert "run it with the one that relay-gevent is installed in" in done.stderr


def test_the_printed_import_rounds_as_the_relay_that_is_configured_does() -> None:
    page = (CHECKOUT / "docs" / "moving.md").read_text()
    command = re.search(r"runuser .*misc/import-twisted-usage \\\n +(.*)$", page, re.MULTILINE)
    conf = (CHECKOUT / "etc" / "supervisord.conf").read_text()
    rounded = re.search(r"RELAY_BLUR_USAGE[:-]+(\d+)", conf)
    assert command is not None
    assert rounded is not None
    assert command[1].startswith(f"--blur-usage {rounded[1]} /")


def test_what_the_printed_import_makes_is_for_the_relay_s_user_and_group_alone(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs" / "moving.md").read_text()
    (commands,) = re.findall(r"^       (install -d .*?\n.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    for printed, here in (
        ("-o relay-gevent -g relay-gevent ", ""),
        ("runuser -u relay-gevent -- ", ""),
        ("/opt/relay-gevent/bin/python ", f"{sys.executable} "),
        ("/opt/relay-gevent/share/relay-gevent/misc/import-twisted-usage", str(PROGRAM)),
        ("/var/lib/twisted/", f"{tmp_path}/"),
        ("/var/lib/relay-gevent/", f"{tmp_path}/"),
    ):
        assert printed in commands
        commands = commands.replace(printed, here)
    twisted_database(tmp_path / "usage.sqlite", 3)
    subprocess.run(["/bin/sh", "-e", "-c", f"umask 022\n{commands}"], check=True, timeout=60)
    ours = tmp_path / "var" / "relay"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (ours, ours / "usage.sqlite")] == [0o750, 0o640]
    assert len(usage(ours / "usage.sqlite")) == 3
