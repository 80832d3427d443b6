"""Where a relay under supervisor writes, as RELAY_USAGE_LOG, RELAY_USAGE_DB and RELAY_RUN_DIR say."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.harness import wait_until
from tests.support.hostile import honest_transfer
from tests.support.supervised import supervised


def lines_of(path: Path) -> int:
    """How many JSON lines there are."""
    return path.read_text().count('"happy"') if path.exists() else 0


def rows_of(path: Path) -> int:
    """How many rows of `usage` there are."""
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM usage").fetchone()[0])


@pytest.mark.parametrize("where", ["relative", "absolute"])
def test_paths_are_in_the_folder_that_holds_etc_and_var_as_the_defaults_are(where: str) -> None:
    with supervised(started=False) as service:
        (service.home / "else where").mkdir()
        begin = "" if where == "relative" else f"{service.home}/"
        service.env["RELAY_USAGE_LOG"] = f"{begin}else where/lines.jsonl"
        service.env["RELAY_USAGE_DB"] = f"{begin}else where/our.sqlite"
        service.env["RELAY_RUN_DIR"] = f"{begin}var/relay/run2"
        service.start()
        honest_transfer(service.port)
        wait_until(lambda: lines_of(service.home / "else where" / "lines.jsonl") == 1, 10, "the line")
        wait_until(lambda: rows_of(service.home / "else where" / "our.sqlite") == 1, 10, "the row")
        assert len(list((service.relay_folder / "run2").glob("worker-*"))) == 2
        assert [path.name for path in service.relay_folder.iterdir()] == ["run2"]
        assert "Traceback" not in service.logs()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("RELAY_USAGE_LOG", "none/lines.jsonl", "cannot be opened for writing"),
        ("RELAY_USAGE_LOG", "var", "cannot be opened for writing"),
        ("RELAY_RUN_DIR", "none/run", "does not exist; make it"),
        ("RELAY_RUN_DIR", "etc/supervisord.conf", "name a folder of its own"),
        ("RELAY_USAGE_DB", "none/our.sqlite", "does not exist; make it"),
        ("RELAY_USAGE_DB", "etc", "it is a folder; name a file"),
    ],
)
def test_a_path_that_will_not_do_is_told_of_with_the_variable_and_what_to_do(
    variable: str, value: str, says: str
) -> None:
    with supervised(started=False) as service:
        service.env[variable] = value
        line = service.complaint()
        assert line.startswith(f"relay-gevent: error: {variable}, "), line
        assert f"{service.home}/{value}" in line
        assert says in line


def test_a_fifo_without_a_reader_holds_up_no_start_and_its_first_reader_gets_every_line() -> None:
    with supervised(started=False) as service:
        service.env["RELAY_USAGE_LOG"] = "var/relay/lines"
        service.relay_folder.mkdir()
        os.mkfifo(service.relay_folder / "lines")
        service.start()
        for _ in range(3):
            honest_transfer(service.port)
        wait_until(lambda: len(service.query("SELECT 1 FROM usage")) == 3, 10, "the rows")
        fd = os.open(service.relay_folder / "lines", os.O_RDONLY | os.O_NONBLOCK)
        text = b""

        def read() -> int:
            nonlocal text
            with contextlib.suppress(BlockingIOError):
                text += os.read(fd, 65536)
            return text.count(b'"happy"')

        try:
            wait_until(lambda: read() == 3, 10, "every line")
        finally:
            os.close(fd)
