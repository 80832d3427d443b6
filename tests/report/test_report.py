"""relay-usage against databases: empty, of one row, of two million, in use, in a folder that nobody may write to."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.report import cli
from relay.report.database import opened
from relay.usage.schema import open_database
from tests.support.harness import CHECKOUT, Relay, met, read_exactly

NOBODY = 65534
COMMAND = [sys.executable, "-m", "relay.report.cli"]


def relay_usage(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run relay-usage; whatever its exit status."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=CHECKOUT,
        env={**os.environ, "TZ": "UTC", **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def told(*arguments: str | Path) -> Any:  # noqa: ANN401 - what JSON may be
    """Return the JSON document that relay-usage prints."""
    result = relay_usage("--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """An empty usage database, closed."""
    path = tmp_path / "usage.sqlite"
    open_database(str(path)).close()
    return path


ROWS = """
    INSERT INTO usage SELECT started, total, waiting, bytes, result FROM (
        WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count)
        SELECT :until - (i * 7919 % :days) * 86400 - (i * 600) % 86400 AS started,
            1.0 + (i * 2654435761 % 100000) / 100.0 AS total,
            CASE WHEN i % 10 < 7 THEN (i * 40503 % 1000) / 100.0 END AS waiting,
            CASE WHEN i % 10 < 7 THEN (1 + i * 48271 % 100) * 10000 ELSE 0 END AS bytes,
            CASE WHEN i % 10 < 7 THEN 'happy' WHEN i % 10 < 9 THEN 'lonely' ELSE 'errory' END AS result
        FROM n)
"""
SUMS = """
    INSERT INTO all_time SELECT
        sum(bytes), count(*), sum(result = 'happy'), sum(result = 'lonely'), sum(result = 'errory') FROM usage
"""


def fill(path: Path, count: int, days: int = 701) -> None:
    """Write `count` rows of the last `days` days, in no order of time."""
    with closing(open_database(str(path))) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(ROWS, {"count": count, "days": days, "until": int(time.time()) // 600 * 600})
        connection.execute(SUMS)
        connection.execute("INSERT INTO current VALUES (3, 2, 10000)")
        connection.execute("INSERT INTO refreshed VALUES (?)", (int(time.time()) - 60,))
        connection.execute("COMMIT")


def test_an_empty_database_is_told_of_as_empty(database: Path) -> None:
    document = told(database)
    assert document["all_time"] == {
        "connections": 0,
        "happy": 0,
        "lonely": 0,
        "errory": 0,
        "bytes": 0,
        "size": None,
        "waiting_time": None,
        "total_time": None,
    }
    assert document["now"]["stale"] is True
    assert document["periods"] == []
    assert "by day, UTC: nothing yet" in relay_usage(database).stdout


def test_one_row_is_its_own_median(database: Path) -> None:
    fill(database, 1, 1)
    document = told(database, "--by", "month", "--last", "1")
    (month,) = document["periods"]
    assert month["connections"] == month["happy"] == 1
    assert month["bytes"] == 10_000
    assert month["size"] == {"median": 10_000, "p95": 10_000}
    assert month["waiting_time"] == {"median": 0.0, "p95": 0.0}
    assert month["total_time"] == document["all_time"]["total_time"] == {"median": 1.0, "p95": 1.0}


def test_the_percentiles_are_those_that_sqlite_finds_by_sorting(database: Path) -> None:
    fill(database, 5000, days=30)
    document = told(database, "--last", "all")
    with closing(sqlite3.connect(database)) as connection:
        days = connection.execute(
            "SELECT date(started, 'unixepoch') AS day, count(*), sum(bytes), sum(result = 'happy'),"
            " sum(result = 'lonely'), sum(result = 'errory') FROM usage GROUP BY day ORDER BY day"
        ).fetchall()
        found = [
            tuple(period[name] for name in ("period", "connections", "bytes", "happy", "lonely", "errory"))
            for period in document["periods"]
        ]
        assert found == days
        happy = days[10][3]
        for name, column in (("size", "bytes"), ("waiting_time", "waiting_time"), ("total_time", "total_time")):
            for key, percent in (("median", 50), ("p95", 95)):
                (expected,) = connection.execute(
                    f"SELECT {column} FROM usage WHERE date(started, 'unixepoch') = ? AND result = 'happy'"
                    f" ORDER BY {column} LIMIT 1 OFFSET ?",
                    (days[10][0], -(-happy * percent // 100) - 1),
                ).fetchone()
                assert document["periods"][10][name][key] == expected


def test_days_are_local_ones_unless_asked_otherwise(database: Path) -> None:
    with closing(open_database(str(database))) as connection:
        connection.execute("INSERT INTO usage VALUES (1795217400, 1.5, 0.5, 10000, 'happy')")  # 2026-11-20 23:30 UTC
    berlin = relay_usage("--json", "--last", "all", database, env={"TZ": "Europe/Berlin"})
    utc = relay_usage("--json", "--last", "all", "--utc", database, env={"TZ": "Europe/Berlin"})
    assert json.loads(berlin.stdout)["periods"][0]["period"] == "2026-11-21"
    assert json.loads(utc.stdout)["periods"][0]["period"] == "2026-11-20"


# In a small process of its own: what a process has at most includes, for Linux, what its parent had when it forked.
MEASURE = """
import os, sys, time
began = time.monotonic()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(pid, 0)
assert status == 0
print(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
"""


def measured(database: Path, output: Path) -> tuple[float, float]:
    """Run relay-usage; return seconds and the most megabytes it had at once.

    The seconds are those of the clock or, on a machine that other programs keep busy, those that its processors (two at
    most) spent on this one.
    """
    with output.open("wb") as file:
        told = subprocess.run(
            [sys.executable, "-S", "-c", MEASURE, *COMMAND, str(database)],
            cwd=CHECKOUT,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        ).stderr
    passed, spent, most = map(float, told.split())
    return min(passed, spent / min(len(os.sched_getaffinity(0)), 2)), most * 1024 / 1e6


def test_two_million_rows_take_less_than_a_hundred_megabytes(
    database: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    fill(database, 2_000_000)
    output = tmp_path / "output"
    seconds, megabytes = min(measured(database, output) for _ in range(3))
    assert "2,000,000" in output.read_text()
    assert megabytes < 100
    record_property("seconds", seconds)
    print(f"{seconds:.2f} s, {megabytes:.0f} MB")


def test_a_day_of_two_million_rows_takes_a_hundred_megabytes(database: Path, tmp_path: Path) -> None:
    fill(database, 2_000_000, days=1)
    _, megabytes = measured(database, tmp_path / "output")
    assert megabytes < 100


def test_nothing_is_left_beside_a_database_that_nobody_has_open(database: Path) -> None:
    fill(database, 10)
    before = database.stat()
    told(database)
    assert os.listdir(database.parent) == ["usage.sqlite"]
    assert database.stat().st_mtime_ns == before.st_mtime_ns


@contextmanager
def in_use(path: Path) -> Iterator[sqlite3.Connection]:
    """Have the database open for writing, with a row that is only in the WAL."""
    with closing(open_database(str(path))) as connection:
        connection.execute("INSERT INTO usage VALUES (1700000000, 1.5, 0.5, 10000, 'happy')")
        yield connection


def test_a_database_in_use_is_read_with_what_is_in_its_wal(database: Path) -> None:
    with in_use(database):
        assert told(database, "--last", "all")["periods"][0]["happy"] == 1
    assert os.listdir(database.parent) == ["usage.sqlite"]


def test_a_database_whose_writer_holds_the_lock_is_read(database: Path) -> None:
    with in_use(database) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO usage VALUES (1700000000, 1.5, 0.5, 10000, 'happy')")
        assert told(database, "--last", "all")["periods"][0]["happy"] == 1
        writer.execute("ROLLBACK")


def as_nobody(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run relay-usage as a user who may not write in the folder."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        return relay_usage(*arguments)
    folder.chmod(0o755)
    # The interpreter itself may be somewhere that nobody else may enter, so the user changes once all is imported.
    program = (
        "import os, sys; from relay.report import cli; os.setgroups([]);"
        f" os.setgid({NOBODY}); os.setuid({NOBODY}); cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def guarded(open_folder: Path) -> Iterator[Path]:
    """An empty database where others may read it; its folder is opened again at the end, so that it can be removed."""
    path = open_folder / "usage.sqlite"
    open_database(str(path)).close()
    yield path
    open_folder.chmod(0o755)


def test_a_database_in_a_read_only_folder_is_read(guarded: Path) -> None:
    fill(guarded, 10)
    result = as_nobody(guarded.parent, guarded)
    assert result.returncode == 0, result.stderr
    assert os.listdir(guarded.parent) == ["usage.sqlite"]


def test_a_folder_that_may_not_be_entered_is_told_in_one_line(guarded: Path) -> None:
    shut = guarded.parent / "shut"
    shut.mkdir()
    path = shut / guarded.name
    guarded.rename(path)
    shut.chmod(0)
    result = as_nobody(guarded.parent, path)
    shut.chmod(0o700)
    assert (result.returncode, result.stdout) == (2, "")
    reason = "no permission to enter its folder; run as the relay's user or in its group"
    assert result.stderr == f"relay-usage: error: {path}: {reason}\n"


def test_what_is_no_file_is_told_in_one_line(tmp_path: Path, database: Path) -> None:
    for path, complaint in (
        (tmp_path, "not a file"),
        (tmp_path / "missing", "no such file"),
        (database / "below", "no such file"),
        (tmp_path / ("long" * 100), "File name too long"),
    ):
        result = relay_usage(path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"relay-usage: error: {path}: {complaint}")
        assert result.stderr.count("\n") == 1


def test_a_database_in_use_in_a_read_only_folder_is_read(guarded: Path) -> None:
    with in_use(guarded):
        result = as_nobody(guarded.parent, "--json", "--last", "all", guarded)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["periods"][0]["happy"] == 1
        guarded.parent.chmod(0o755)


def test_a_copy_of_a_database_in_use_is_read_whole_and_left_alone(guarded: Path) -> None:
    copy = guarded.parent / "copy"
    copy.mkdir()
    with in_use(guarded):
        shutil.copy(guarded, copy)
        shutil.copy(f"{guarded}-wal", copy)
    result = as_nobody(copy, "--json", "--last", "all", copy / "usage.sqlite")
    copy.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["periods"][0]["happy"] == 1
    assert sorted(os.listdir(copy)) == ["usage.sqlite", "usage.sqlite-wal"]


def test_a_relay_that_starts_while_the_database_is_read_without_locks_is_noticed(database: Path) -> None:
    os.utime(database, (1, 1))  # a file system's clock may be coarser than a test is quick
    with opened(database) as reading:
        assert not reading.was_disturbed()
        with in_use(database):
            assert reading.was_disturbed()
        assert reading.was_disturbed()


def test_it_reads_while_a_relay_writes(relay: Relay) -> None:
    left, right = met(relay.port)
    with left, right:
        left.sendall(b"x" * 1234)
        read_exactly(right, 1234)
    relay.wait_for_rows("usage", 1)
    document = told(relay.usage_db)
    assert document["now"]["stale"] is False
    assert document["since_start"]["bytes"] == document["all_time"]["bytes"] == 1234
    assert document["periods"][-1]["happy"] == 1
    assert document["periods"][-1]["size"] == {"median": 1234, "p95": 1234}


def test_csv_has_a_row_for_each_period(database: Path) -> None:
    fill(database, 100, days=3)
    rows = list(csv.DictReader(io.StringIO(relay_usage("--csv", "--by", "week", "--last", "4", database).stdout)))
    assert [row["span"] for row in rows] == ["now", "since_start", "all_time", "week", "week", "week", "week"]
    assert sum(int(row["connections"]) for row in rows[3:]) == 100


def test_rows_by_other_hands_are_counted_where_they_can_be(database: Path) -> None:
    with closing(open_database(str(database))) as connection:
        connection.executemany(
            "INSERT INTO usage VALUES (?, ?, ?, ?, ?)",
            [
                (None, None, None, None, None),
                (-5e12, 1, None, 7, "lonely"),
                (9e18, 1, None, 0, "errory"),
                ("noon", 1, 2, 10, "happy"),
                (1700000000.75, 1.5, 0.5, 10000, "happy"),
            ],
        )
    document = told(database, "--last", "all")
    assert [(day["period"], day["connections"], day["bytes"]) for day in document["periods"]] == [
        ("1970-01-01", 3, 17),
        ("2023-11-14", 1, 10000),
        ("2100-01-01", 1, 0),
    ]


@pytest.mark.parametrize("span", ["day", "week", "month"])
def test_as_many_periods_as_there_can_be_are_shown_and_none_of_before_1970(database: Path, span: str) -> None:
    fill(database, 10, days=3)
    for form in ("--json", "--csv"):
        assert relay_usage(form, "--by", span, "--last", str(cli.MOST_PERIODS), database).returncode == 0
    periods = told("--by", span, "--last", str(cli.MOST_PERIODS), database)["periods"]
    assert periods[0]["from"] <= "1970-01-01" <= periods[0]["to"]
    assert sum(period["connections"] for period in periods) == 10


def test_a_terminal_gets_bars_and_no_colour_when_asked(database: Path) -> None:
    fill(database, 1000, days=10)
    colourful = in_terminal(database, {"TERM": "xterm", "COLUMNS": "100"})
    plain = in_terminal(database, {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"})
    assert "█" in colourful
    assert "\x1b[32m" in colourful
    assert "█" in plain
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 100 + len(str(database))
    assert "█" not in relay_usage(database).stdout


def in_terminal(database: Path, env: dict[str, str]) -> str:
    """Return what relay-usage writes to a terminal."""
    master, slave = pty.openpty()
    environment = {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "PYTHONUTF8": "1", **env}
    process = subprocess.Popen([*COMMAND, str(database)], cwd=CHECKOUT, env=environment, stdout=slave)
    os.close(slave)
    output = b""
    try:
        while chunk := os.read(master, 65536):
            output += chunk
    except OSError:  # how a terminal says that its last writer is gone
        pass
    os.close(master)
    assert process.wait(30) == 0
    return output.decode()


def test_a_reader_that_leaves_early_is_no_error(database: Path) -> None:
    command = f"{sys.executable} -m relay.report.cli --csv --last 50000 {database} | head -n 1"
    result = subprocess.run(command, shell=True, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.sqlite"], "nowhere.sqlite: no such file"),
        (["."], ".: not a file"),
        (["README.md"], "README.md: not a database"),
        ([""], "DATABASE: it is empty; give the path"),
        (["--by", "year", "x"], "--by year: give day, week or month"),
        (["--last", "0", "x"], "--last 0: give a whole number"),
        (["--json", "--csv", "x"], "--json and --csv: give one of them"),
        ([], "see relay-usage --help"),
        (["--colour", "x"], "see relay-usage --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments: list[str], complaint: str) -> None:
    result = relay_usage(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("relay-usage: error: ")
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_other_databases_are_told_apart(tmp_path: Path) -> None:
    twisted, newer, other = tmp_path / "twisted", tmp_path / "newer", tmp_path / "other"
    for path, script in (
        (twisted, "CREATE TABLE version (version); CREATE TABLE current (x); CREATE TABLE usage (x)"),
        (newer, f"PRAGMA application_id = {0x52474556}; PRAGMA user_version = 9; CREATE TABLE x (x)"),
        (other, "CREATE TABLE x (x)"),
    ):
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(script)
    assert "import-twisted-usage" in relay_usage(twisted).stderr
    assert "newer relay-gevent" in relay_usage(newer).stderr
    assert "not a usage database" in relay_usage(other).stderr


def test_of_a_damaged_database_it_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    open_database(str(path)).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    ended = relay_usage(path)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"relay-usage: error: {path}: it is damaged (database disk image is malformed); ")
    assert f"sqlite3 {path} .recover" in ended.stderr


def test_no_permission_is_said_in_words(guarded: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root, to become another user")
    guarded.chmod(0o600)
    result = as_nobody(guarded.parent, guarded)
    assert result.returncode == 2
    assert "no permission to read" in result.stderr


def test_the_help_is_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert not ended.value.code
    assert "relay-usage [options] DATABASE" in capsys.readouterr().out


def test_several_databases_are_added_up_with_percentiles_over_all_rows(tmp_path: Path, database: Path) -> None:
    second = tmp_path / "second.sqlite"
    open_database(str(second)).close()
    whole = tmp_path / "whole.sqlite"
    open_database(str(whole)).close()
    fill(database, 3000, days=5)
    fill(second, 500, days=9)
    with closing(sqlite3.connect(second)) as connection:
        connection.execute(
            "UPDATE usage SET bytes = bytes * 7, waiting_time = waiting_time / 3, total_time = total_time + 9"
        )
        connection.execute("DELETE FROM all_time")
        connection.execute(SUMS)
        connection.execute("UPDATE current SET connected = 2, waiting = 3, partal_bytes = 4")
        connection.commit()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE current SET connected = 10, waiting = 20, partal_bytes = 30")
        connection.commit()
    with closing(sqlite3.connect(whole)) as connection:
        for path in (database, second):
            connection.execute("ATTACH ? AS part", [str(path)])
            connection.execute("INSERT INTO usage SELECT * FROM part.usage")
            connection.commit()
            connection.execute("DETACH part")
        connection.execute("DELETE FROM all_time")
        connection.execute(SUMS)
        connection.commit()
    both, one = told("--last", "all", database, second), told("--last", "all", whole)
    assert both["periods"] == one["periods"]
    assert both["all_time"] == one["all_time"]
    assert [both["now"][key] for key in ("connected", "waiting", "partial_bytes")] == [12, 23, 34]
    assert both["databases"] == [str(database), str(second)]
    table = relay_usage(database, second).stdout
    assert f"{database}, {second}" in table.splitlines()[0]


def test_one_of_several_that_is_missing_broken_or_given_twice_is_named(tmp_path: Path, database: Path) -> None:
    missing, broken, link = tmp_path / "missing.sqlite", tmp_path / "broken.sqlite", tmp_path / "link.sqlite"
    broken.write_bytes(b"this is no database at all" * 100)
    link.symlink_to(database)
    for bad in (missing, broken, link):
        result = relay_usage(database, bad)
        assert (result.returncode, result.stdout) == (2, "")
        assert str(bad) in result.stderr
        assert result.stderr.count("\n") == 1
