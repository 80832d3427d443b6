"""Anything in any column, as SQLite lets it in: the operator's programs read the rest, and a relay records."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from relay.report import cli
from relay.report.counters import numbers_of
from relay.status.source import Source
from relay.usage.record import Current, Record
from relay.usage.recorder import open_recorder
from relay.usage.schema import TABLES, open_database
from tests.support.harness import CHECKOUT, wait_until
from tests.support.status import status_of

ODD = {
    "text": "'abc'",
    "text that is no UTF-8": "CAST(x'ff41' AS TEXT)",
    "nothing": "NULL",
    "bytes": "x'00ff'",
    "infinity": "9e999",
    "less than anything": "-9e999",
    "a large fraction": "1e300",
    "a large number": "9223372036854775807",
    "a small number": "-9223372036854775808",
    "JSON of another kind": "'[1, {\"a\": NaN}]'",
    "JSON without end": f"'{'[' * 5000}'",
    "counters of odd names": """'{"path_rtt.x": 1, "path_rtt.nan": 1, "size.sum": 3, "bound.\\ud800": 1,
        "path_limit.x": 1, "bytes": 1e999, "connections": 1e308, "load": true,
        "path_rate.1e9": 123456789012345678901234567890}'""",
}
"""As SQL."""

COLUMNS = {table: [column.split()[0] for column in columns.partition(", PRIMARY")[0].split(", ")]
           for table, columns in TABLES.items()}  # fmt: skip
PLACES = [(table, column) for table, columns in COLUMNS.items() for column in columns]
NOT_NULL = {("service", "id")}
"""A rowid, which takes whole numbers only."""

READ_BY_WORKERS = ("worker_share", "lifeline", "worker_status", "service", "all_time", "refreshed")


def made(path: Path) -> Path:
    """A database with a row in each table, closed."""
    with closing(open_database(str(path))) as database:
        for table, columns in COLUMNS.items():
            database.execute(f"DELETE FROM {table}")
            database.execute(f"INSERT INTO {table} VALUES ({', '.join(['1'] * len(columns))})")
        database.execute("UPDATE refreshed SET at = ?", (int(time.time()),))
        database.execute("INSERT INTO usage VALUES (1700000000, 2.5, 1.5, 10000, 'happy')")
    return path


def spoil(path: Path, table: str, column: str, value: str) -> None:
    """Put that into the column, of the first row and of one that is added."""
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"UPDATE {table} SET {column} = {value} WHERE rowid = 1")
        if table == "usage":
            database.execute(f"INSERT INTO usage ({column}, result) VALUES ({value}, 'happy')") if (
                column != "result"
            ) else database.execute(f"INSERT INTO usage (result) VALUES ({value})")
        database.commit()


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_relay_usage_tells_of_the_rest(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (table, column) in enumerate(PLACES):
        if (table, column) in NOT_NULL:
            continue
        path = made(tmp_path / f"{number}.sqlite")
        spoil(path, table, column, value)
        for form in ((), ("--json", "--last", "all"), ("--csv", "--by", "month"), ("--paths",)):
            cli.main([*form, str(path)])
            told = capsys.readouterr()
            assert (bool(told.out), told.err) == (True, ""), (table, column, form)
            if "--json" in form:
                document = json.loads(told.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
                assert {period["period"] for period in document["periods"]} >= {"2023-11-14"}
        assert Source(path).read().all_time is not None, (table, column)


def test_relay_status_shows_the_rest(tmp_path: Path) -> None:
    paths = []
    for number, value in enumerate(ODD.values()):
        paths.append(made(tmp_path / f"{number}.sqlite"))
        for table, column in PLACES:
            if (table, column) not in NOT_NULL:
                spoil(paths[-1], table, column, value)
    with status_of(*paths, folder=tmp_path) as status:
        wait_until(lambda: all(one["readable"] for one in status.document()["databases"]), 20, "all are read")
        wait_until(lambda: status.document()["days"], 20, "the days are counted")
        assert "2023-11-14" in {day["day"] for day in status.document()["days"]}
        for path in ("/", "/metrics", "/status.json"):
            assert status.get(path).code == 200, path
        assert status.health()[0] == 503
        assert status.sample("database_readable") == 1
        assert status.log.read_text().count("\n") == 1, status.log.read_text()


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_munin_is_told_of_numbers_or_of_nothing_known(tmp_path: Path, value: str) -> None:
    path = made(tmp_path / "usage.sqlite")
    for table, column in PLACES:
        if (table, column) not in NOT_NULL and table not in ("refreshed", "since_reboot"):
            spoil(path, table, column, value)
    for graph in ("connected", "all_time", "bytes"):
        plugin = tmp_path / f"relay_{graph}"
        plugin.symlink_to(CHECKOUT / "misc" / "munin" / "relay_")
        ended = subprocess.run(
            [sys.executable, plugin],
            env={**os.environ, "database": str(path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        for line in ended.stdout.splitlines():
            told = line.split()[1]
            assert told == "U" or abs(float(told)) < float("inf"), line
    spoil(path, "refreshed", "at", value)
    ended = subprocess.run(
        [sys.executable, plugin], env={**os.environ, "database": str(path)}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_of_what_a_worker_tells_only_numbers_by_plain_names_count() -> None:
    assert numbers_of('{"a": 1, "b.c": 2.5, "size.1e+06": 3, "load": true, "d": -1, "e": "1", "f g": 1}') == {
        "a": 1,
        "b.c": 2.5,
        "size.1e+06": 3,
    }
    for text in ("", "[]", "[" * 100_000, '{"a": NaN, "b": Infinity}', '{"\\ud800": 1}', None, 7, b"{}"):
        assert numbers_of(text) == {}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_a_relay_that_starts_over_it_records(tmp_path: Path, value: str) -> None:
    for number, (table, column) in enumerate(PLACES):
        if (table, column) in NOT_NULL or table not in READ_BY_WORKERS:
            continue
        path = made(tmp_path / f"{number}.sqlite")
        spoil(path, table, column, value)
        said: list[str] = []
        recorder = open_recorder(
            usage_db=str(path), log_fd=None, blur_seconds=None, current=lambda: Current(0, 0, 0), warn=said.append
        )
        recorder.record(Record(1700000000.0, 1.0, 0.5, 5, "happy"))
        assert recorder.close(10) == 0, (table, column, said)
        assert not [line for line in said if "cannot" in line], (table, column, said)
