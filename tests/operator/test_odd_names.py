r"""Databases with odd names, and their operator's programs: a folder's name that is no UTF-8, which they say as in
``\xff``; and a link, beside which there is nothing of what SQLite keeps beside the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from relay.usage.schema import open_database
from tests.operator.test_import import PROGRAM as IMPORTER
from tests.operator.test_import import twisted_database
from tests.support.harness import CHECKOUT, Relay, met, wait_until
from tests.support.status import status_of

MUNIN = CHECKOUT / "misc" / "munin" / "relay_"
ROLLING_RESTART = CHECKOUT / "misc" / "rolling-restart"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A usage database with one record, in such a folder."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff d"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no name that is no UTF-8")
    with closing(open_database(str(folder / "usage.sqlite"))) as database:
        database.execute("INSERT INTO usage VALUES (1700000000, 2.5, 1.5, 10000, 'happy')")
        database.execute("INSERT INTO all_time VALUES (10000, 1, 1, 0, 0)")
        database.execute("INSERT INTO since_reboot VALUES (10000, 1, 1, 0, 0)")
        database.execute("INSERT INTO current VALUES (0, 0, 0)")
        database.execute("INSERT INTO refreshed VALUES (?)", (int(time.time()),))
    return folder / "usage.sqlite"


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with an output that takes nothing but UTF-8."""
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", **env},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("form", [(), ("--json",), ("--csv",), ("--paths",)])
def test_relay_usage_reads_it(odd: Path, form: tuple[str, ...]) -> None:
    ended = run(sys.executable, "-m", "relay.report.cli", *form, odd)
    assert (ended.returncode, ended.stderr) == (0, "")
    if form == ("--json",):
        assert json.loads(ended.stdout)["databases"] == [str(odd.parent.parent) + r"/f\xff d/usage.sqlite"]
    elif form == ():
        assert r"/f\xff d/usage.sqlite" in ended.stdout


def test_relay_usage_tells_of_it_in_an_encoding_that_has_not_its_signs(tmp_path: Path) -> None:
    path = tmp_path / "é.sqlite"
    open_database(str(path)).close()
    for form in ((), ("--json",), ("--csv",)):
        ended = run(sys.executable, "-m", "relay.report.cli", *form, path, PYTHONIOENCODING="ascii")
        assert (ended.returncode, ended.stderr) == (0, ""), form
        if form == ("--json",):
            assert json.loads(ended.stdout)["database"] == str(path)


def test_relay_status_shows_it(odd: Path, tmp_path: Path) -> None:
    missing = odd.with_name("none.sqlite")
    with status_of(odd, missing, folder=tmp_path) as status:
        status.wait_for_health(503, r"/f\xff d/none.sqlite")
        assert [one["readable"] for one in status.document()["databases"]] == [True, False]
        assert status.document()["all_time"]["happy"] == 1
        assert r"/f\xff d/usage.sqlite" in status.get("/").text
        assert status.get("/metrics").code == 200
        assert status.sample("relayed_bytes_total") == 10_000


def test_munin_s_plugin_reads_it(odd: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "relay_all_time"
    plugin.symlink_to(MUNIN)
    ended = run(sys.executable, plugin, database=str(odd))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[0] == "happy.value 1"
    assert run(sys.executable, MUNIN, "autoconf", database=str(odd)).stdout == "yes\n"
    missing = run(sys.executable, MUNIN, "autoconf", database=str(odd.with_name("none")))
    assert missing.stdout.startswith("no (")
    assert missing.stderr == ""


def test_a_twisted_relay_s_records_are_imported_from_it_and_into_it(odd: Path) -> None:
    source = odd.with_name("twisted.sqlite")
    twisted_database(source, 3)
    would = run(sys.executable, IMPORTER, "--dry-run", source, odd)
    assert (would.returncode, would.stderr) == (0, "")
    done = run(sys.executable, IMPORTER, source, odd)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 records imported")
    wrong = run(sys.executable, IMPORTER, odd.with_name("none"), odd)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("echo 'error: <ProtocolError for 127.0.0.1/RPC2: 500>'; exit 1", "cannot tell which workers run; "),
        ("echo 'unix:///nowhere/supervisor.sock no such file' >&2; exit 4", "no such file"),
        ("echo 'relay:relay-0   STOPPED   Nov 27'; exit 3", "no worker runs; "),
    ],
)
def test_a_rolling_restart_tells_no_answer_from_no_worker(tmp_path: Path, answer: str, says: str) -> None:
    control = tmp_path / "supervisorctl"
    control.write_text(f"#!/bin/sh\n{answer}\n")
    control.chmod(0o755)
    conf = tmp_path / "supervisord.conf"
    conf.touch()
    ended = run(ROLLING_RESTART, conf, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert ended.returncode == 1
    assert says in ended.stderr
    assert ended.stderr.startswith("rolling-restart: ")
    assert ended.stderr.count("\n") == 1
    assert ("no worker runs" in ended.stderr) == ("STOPPED" in answer)


def test_by_the_name_of_a_link_they_read_what_a_running_relay_has_written(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "usage.sqlite"
    real.mkdir()
    (real / "usage.sqlite").touch()
    link.symlink_to(real / "usage.sqlite")
    plugin = tmp_path / "relay_all_time"
    plugin.symlink_to(MUNIN)
    source = tmp_path / "twisted.sqlite"
    twisted_database(source, 3)
    with Relay(tmp_path, "--usage-db", str(link)) as relay, status_of(link, folder=tmp_path) as status:
        for sock in met(relay.port):
            sock.close()
        relay.wait_for_rows("usage", 1)
        status.wait_for_health(200, "idle")
        wait_until(lambda: status.document()["all_time"]["happy"] == 1, what="it is seen")
        usage = json.loads(run(sys.executable, "-m", "relay.report.cli", "--json", link).stdout)
        assert usage["all_time"]["connections"] == 1
        assert run(sys.executable, plugin, database=str(link)).stdout.splitlines()[0] == "happy.value 1"
        assert run(sys.executable, IMPORTER, source, link).returncode == 0
        again = run(sys.executable, IMPORTER, "--dry-run", source, link)
        assert again.stdout.startswith("0 records would be imported")
