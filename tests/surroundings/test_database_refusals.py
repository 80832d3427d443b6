"""The kernel, a sandbox or a file system refuses what the database needs, with whatever number.

strace(1) does the refusing, on the database's own files. `NEEDLESS` is what recording can do without; `NEEDED` what it
cannot: then the start ends with one line that names the cause, and nothing is left where nothing was.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay
from tests.support.hostile import honest_transfer
from tests.support.needs import needs_strace
from tests.support.usage_records import assert_sums_agree
from tests.support.usage_worker import UsageWorker

NUMBERS = ["EPERM", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EACCES", "ENOMEM", "ENOLCK"]

FOLDER, DATABASE, WAL, SHM, JOURNAL, LINES = (
    "",
    "usage.sqlite",
    "usage.sqlite-wal",
    "usage.sqlite-shm",
    "",
    "usage.jsonl",
)

NEEDLESS = {
    "the lock on the folder": ("flock", ["."]),
    "the question who may write in the folder": ("access,faccessat,faccessat2", ["."]),
    "flushing to the disk": ("fsync,fdatasync", [".", DATABASE, WAL, JOURNAL]),
    "giving the files to their owner": ("fchown", [WAL, SHM, JOURNAL]),
    "looking at the -shm": ("pread64", [SHM]),
    "how the lines' descriptor was opened": ("fcntl", [LINES]),
    "where the lines end": ("lseek", [LINES]),
}
NEEDED = {
    "locks on the file": ("fcntl", [DATABASE], "cannot keep its WAL there: files cannot be locked there"),
    "locks on the -shm": ("fcntl", [SHM], "cannot keep its WAL there: files cannot be locked there"),
    "shared memory": ("mmap", [SHM], "cannot keep its WAL there: processes cannot share memory through a file there"),
    "a longer -shm": ("ftruncate", [SHM], "cannot be used"),
    "writing": ("pwrite64", [DATABASE], "cannot be used"),
    "making it": ("openat", [DATABASE], "cannot be used"),
    "making the -wal": ("openat", [WAL], "cannot be"),
    "writing to the -wal": ("pwrite64", [WAL], "cannot be used"),
}


def refusing(folder: Path, calls: str, names: list[str], number: str, when: str = "") -> list[str]:
    """What to put before a command so that calls on these files in the folder are refused."""
    paths = [argument for name in names for argument in ("-P", os.path.normpath(folder / name))]
    options = ["-D", "-f", "-qq", "-o", "/dev/null", *paths, "-e", f"trace={calls}"]
    return ["strace", *options, "-e", f"inject={calls}:error={number}{when and ':when=' + when}"]


@needs_strace
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("what", NEEDLESS)
def test_what_is_refused_from_the_start_is_done_without(tmp_path: Path, what: str, number: str) -> None:
    inside = refusing(tmp_path, *NEEDLESS[what], number)
    with Relay(tmp_path, "--grace", "0", inside=inside, recording=True) as relay:
        honest_transfer(relay.port, 20_000)
        assert relay.wait_for_records(1)[0]["mood"] == "happy"
        assert relay.wait_for_rows("usage", 1)[0]["result"] == "happy"
        assert "lost" not in relay.log_text()
    assert_sums_agree(relay.usage_db)


@needs_strace
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("what", NEEDED)
def test_without_what_it_needs_a_relay_ends_with_one_line_and_leaves_no_file(
    tmp_path: Path, what: str, number: str
) -> None:
    calls, names, words = NEEDED[what]
    path = tmp_path / DATABASE
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1", "--usage-db", str(path)]
    done = subprocess.run(
        [*refusing(tmp_path, calls, names, number), *command],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"relay-gevent: error: --usage-db {path}: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert "another program holds its lock" not in done.stderr
    assert os.listdir(tmp_path) == []


@needs_strace
@pytest.mark.parametrize("number", ["EPERM", "ENOSYS", "ENOLCK"])
@pytest.mark.parametrize("what", ["flushing to the disk", "shared memory", "locks on the -shm", "writing to the -wal"])
def test_what_is_refused_to_a_newcomer_harms_nothing_that_is_there(tmp_path: Path, what: str, number: str) -> None:
    path = tmp_path / DATABASE
    with UsageWorker("--usage-db", str(path)) as worker:
        worker.ask("record 10 10 happy")
        assert worker.ask("close 10") == "0"
    before = path.read_bytes()
    calls, names = (NEEDLESS.get(what) or NEEDED[what])[:2]
    newcomer = UsageWorker("--usage-db", str(path), inside=refusing(tmp_path, calls, names, number))
    if what in NEEDLESS:
        with newcomer:
            newcomer.ask("record 10 10 happy")
            assert newcomer.ask("close 10") == "0"
    else:
        assert newcomer.end() == 2
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [DATABASE]
    assert_sums_agree(path)


@needs_strace
@pytest.mark.parametrize("number", ["EPERM", "ENOSYS", "EIO", "ENOMEM"])
@pytest.mark.parametrize(
    ("calls", "names"),
    [("pwrite64", [WAL]), ("fcntl", [SHM]), ("fdatasync", [WAL, DATABASE]), ("pread64", [WAL]), ("mmap", [SHM])],
)
def test_what_is_refused_for_a_while_costs_no_record(tmp_path: Path, calls: str, names: list[str], number: str) -> None:
    path = tmp_path / DATABASE
    with UsageWorker("--usage-db", str(path), inside=refusing(tmp_path, calls, names, number, when="40..60")) as worker:
        for _ in range(30):
            worker.ask("record 100 10 happy")
            worker.ask("refresh")
        assert worker.ask("close 30") == "0"
    assert_sums_agree(path)


@needs_strace
@pytest.mark.parametrize("number", ["EPERM", "EAGAIN", "ENOMEM"])
def test_without_a_thread_the_start_ends_with_one_line(tmp_path: Path, number: str) -> None:
    no_thread = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=clone,clone3"]
    no_thread += ["-e", f"inject=clone,clone3:error={number}"]
    for module in ("relay", "tests.support.usage_worker"):
        done = subprocess.run(
            [*no_thread, sys.executable, "-m", module, "--usage-db", str(tmp_path / DATABASE)],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=CHECKOUT,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "the system lets this process have no further thread" in done.stderr
        assert os.listdir(tmp_path) == []
