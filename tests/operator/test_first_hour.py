"""docs/first-hour.md, its commands run in order on a Debian made for that.

Without those that need further packages of Debian's, which `misc/first_hour.py` runs as well when it is told to.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.support.debian import debian, wheels
from tests.support.harness import CHECKOUT

PAGE = CHECKOUT / "docs" / "first-hour.md"
PROGRAM = CHECKOUT / "misc" / "first_hour.py"

pytestmark = [
    pytest.mark.skipif(bool(namespaces.not_allowed()), reason=namespaces.not_allowed()),
    pytest.mark.timeout(900),  # it may have to make a Debian first
]


def follow(page: Path, base: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the short form of a page's commands; whatever the exit status."""
    command = [sys.executable, str(PROGRAM), "--short", "--base", str(base), "--wheels", str(folder), str(page)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_the_backup_holds_nothing_that_lies_between_the_rows(tmp_path: Path) -> None:
    database, backup = tmp_path / "usage.sqlite", tmp_path / "backup.sqlite"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as usage:
        usage.execute("PRAGMA secure_delete=OFF")  # as SQLite is by itself; not so Debian's
        usage.execute("CREATE TABLE usage (result TEXT)")
        usage.executemany("INSERT INTO usage VALUES (?)", [("deleted",)] * 3 + [("kept",)])
        usage.execute("DELETE FROM usage WHERE result = 'deleted'")
        (command,) = (
            line for line in PAGE.read_text().splitlines() if line.startswith("runuser") and "VACUUM INTO" in line
        )
        program = command.partition("python3 -c '")[2].rpartition("'")[0]
        program = program.replace("/var/lib/relay-gevent/var/relay", str(tmp_path))
        program = program.replace("/var/lib/relay-gevent/var", str(tmp_path))
        subprocess.run([sys.executable, "-c", program], timeout=30, check=True)
    assert b"deleted" in database.read_bytes()
    assert b"kept" in backup.read_bytes()
    assert b"deleted" not in backup.read_bytes()


def test_what_takes_the_relay_away_takes_every_file_that_a_page_put_on_its_machine() -> None:
    taken = {
        word
        for line in PAGE.read_text().splitlines()
        if re.match(r"rm -(f|r|rf) ", line)
        for word in line.split()[2:]
        if word.startswith("/")
    }
    put = set()
    for name in ("first-hour", "systemd", "rsyslog", "munin", "tuning"):
        page = (CHECKOUT / "docs" / f"{name}.md").read_text()
        put |= set(re.findall(r">>? ?(/(?:etc|usr)/\S+)", page))
        for sources, folder in re.findall(r"^ *(?:cp|ln -s) (?:-\S+ )*(\S.*) (/(?:etc|usr)/\S+/)$", page, re.MULTILINE):
            put |= {folder + Path(source).name for source in sources.split()}
    put -= {
        # Of the central host, which serves other machines, and of a spool on either.
        "/etc/rsyslog.d/relay-gevent-central.conf",
        "/etc/logrotate.d/relay-gevent-central",
        "/etc/fstab",
    }
    assert "/etc/logrotate.d/relay-gevent" in put
    assert "/etc/letsencrypt/renewal-hooks/pre/nginx" in put
    left = {path for path in put if not any(path == word or path.startswith(f"{word}/") for word in taken)}
    assert left == set()


@pytest.fixture(scope="module")
def all_wheels(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of the relay and of all that it needs."""
    folder = tmp_path_factory.mktemp("first-hour") / "wheels"
    shutil.copytree(wheels(pytestconfig), folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(CHECKOUT)], check=True, timeout=200)
    return folder


def test_the_first_hour_s_commands_do_what_the_page_says(pytestconfig: pytest.Config, all_wheels: Path) -> None:
    done = follow(PAGE, debian(pytestconfig), all_wheels)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-5000:]}"
    assert "blocks of commands held" in done.stdout
    assert "relay-gevent usage" in done.stdout


def test_a_command_that_fails_is_named(pytestconfig: pytest.Config, all_wheels: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```sh\ntrue\n```\n\n```sh long\nfalse\n```\n\n```sh\ncurl --silent http://127.0.0.1:1/\n```\n"
    )
    done = follow(page, debian(pytestconfig), all_wheels)
    assert done.returncode != 0
    assert "the commands from line 12 on failed with status 7" in done.stderr
