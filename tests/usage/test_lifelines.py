"""Workers on one database that cannot see each other: in other containers, of other users, without /proc.

Each test fails where one worker takes another for dead: its share is dropped then, and a newcomer begins the count of
`since_reboot` anew; or where the dead are taken for living.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay.usage import lifeline
from relay.usage.processes import process_start
from relay.usage.record import Current
from relay.usage.recorder import UsageError
from tests.support.harness import wait_until
from tests.support.usage_records import recording, rows
from tests.support.usage_worker import UsageWorker

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
NO_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
HIDDEN = 'mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid {user} --regid {user} --clear-groups "$@"'
FLOCK = struct.Struct("hhqqi")


def hidden_from_others(user: int) -> list[str]:
    """What to put before a command so that it runs as that user, who sees no processes of other users."""
    return ["unshare", "--mount", "sh", "-c", HIDDEN.format(user=user), "sh"]


def skip_without(inside: list[str]) -> None:
    """Skip a test where a command cannot be run like this."""
    done = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"only root may do that, where the kernel lets it: {done.stderr.strip()}")


def on(path: Path, inside: list[str] | None = None) -> UsageWorker:
    return UsageWorker("--usage-db", str(path), inside=inside or [])


def since_reboot(path: Path) -> int:
    (row,) = rows(path, "since_reboot", "connections")
    return int(row[0])


def assert_two_are_one_relay(path: Path, first: UsageWorker, second: list[str]) -> None:
    """Have a newcomer beside `first`, and see that each counts the other as long as it lives."""
    first.ask("current 1 2 30")
    first.ask("record 5 10 happy")
    wait_until(lambda: since_reboot(path) == 5, what="the first one's records")
    with on(path, second) as newcomer:
        assert since_reboot(path) == 5, "the service goes on"
        newcomer.ask("current 10 20 300")
        newcomer.ask("record 5 10 happy")
        wait_until(lambda: since_reboot(path) == 10, what="the newcomer's records")
        assert rows(path, "current") == [(11, 22, 330)]
        first.ask("record 5 10 happy")
        wait_until(lambda: since_reboot(path) == 15, what="more of the first one's records")
        assert rows(path, "current") == [(11, 22, 330)]
        newcomer.kill()
    wait_until(lambda: refreshed(first, path) == [(1, 2, 30)], what="the share of the one that was killed is dropped")


def refreshed(worker: UsageWorker, path: Path) -> list[tuple[int, ...]]:
    worker.ask("refresh")
    return rows(path, "current")


def test_two_containers_over_one_database_are_one_relay(tmp_path: Path) -> None:
    skip_without(CONTAINER)
    path = tmp_path / "db"
    with on(path, CONTAINER) as first:
        assert_two_are_one_relay(path, first, CONTAINER)


@pytest.mark.parametrize("inside", [[], CONTAINER], ids=["the newcomer outside", "the newcomer inside"])
def test_a_container_and_its_host_are_one_relay(tmp_path: Path, inside: list[str]) -> None:
    skip_without(CONTAINER)
    path = tmp_path / "db"
    with on(path, CONTAINER if not inside else []) as first:
        assert_two_are_one_relay(path, first, inside)


def test_a_service_of_containers_that_were_killed_begins_anew(tmp_path: Path) -> None:
    skip_without(CONTAINER)
    path = tmp_path / "db"
    with on(path, CONTAINER) as first:
        first.ask("record 5 10 happy")
        wait_until(lambda: since_reboot(path) == 5, what="the records")
        first.kill()
    with on(path, CONTAINER):
        wait_until(lambda: since_reboot(path) == 0, what="the count to begin anew")
        assert len(rows(path, "worker_share")) == len(rows(path, "lifeline")) == 1


def test_without_proc_workers_know_each_other(tmp_path: Path) -> None:
    skip_without(NO_PROC)
    path = tmp_path / "db"
    with on(path, NO_PROC) as first:
        assert_two_are_one_relay(path, first, NO_PROC)


def test_users_whose_processes_are_hidden_from_each_other_are_one_relay(open_folder: Path) -> None:
    skip_without(hidden_from_others(65534))
    path = open_folder / "db"
    with on_behalf_of(1, path) as first:
        for end in ("", "-wal", "-shm"):
            os.chmod(f"{path}{end}", 0o666)
        assert_two_are_one_relay(path, first, hidden_from_others(2))


def on_behalf_of(user: int, path: Path) -> UsageWorker:
    return on(path, hidden_from_others(user))


# Workers of an earlier version, which have no lifeline


def test_a_share_without_a_lifeline_is_judged_by_proc(tmp_path: Path) -> None:
    path = tmp_path / "db"
    start = process_start(os.getpid())
    with on(path) as worker:
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("INSERT INTO worker_share VALUES (?, ?, 100, 0, 0)", (os.getpid(), start))
            other.execute("INSERT INTO worker_share VALUES (?, ?, 1000, 0, 0)", (os.getpid(), f"{start}0"))
        wait_until(lambda: refreshed(worker, path) == [(100, 0, 0)], what="the share of this process, which lives")


def test_a_worker_of_an_earlier_version_knows_this_one_by_its_start(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as worker:
        assert rows(path, "worker_share", "pid, process_start") == [(worker.pid, process_start(worker.pid))]


def test_a_database_of_an_earlier_version_is_taken_over_while_its_workers_run(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path):
        pass
    with closing(sqlite3.connect(path, isolation_level=None)) as former:
        former.execute("DROP TABLE lifeline")
        former.execute("INSERT INTO worker_share VALUES (?, ?, 7, 0, 0)", (os.getpid(), process_start(os.getpid())))
        assert former.execute("SELECT * FROM worker_share").fetchall()
        with on(path) as worker:
            assert rows(path, "current") == [(7, 0, 0)]
            assert len(rows(path, "lifeline")) == 1
            former.execute("UPDATE since_reboot SET connections = connections + 3")
            worker.ask("record 2 10 happy")
            wait_until(lambda: since_reboot(path) == 5, what="both in one count")


# What the kernel tells


def test_a_lifeline_ends_with_the_process_and_not_with_a_descriptor_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as worker:
        ((byte,),) = rows(path, "lifeline", "byte")
        with path.open("rb") as file:
            assert lifeline.is_held(file.fileno(), byte)
            assert lifeline.is_any_held(file.fileno())
            assert not lifeline.is_held(file.fileno(), byte + 1)
            assert lifeline.signed_on(file.fileno()) == {byte}
            worker.kill()
            assert not lifeline.is_any_held(file.fileno())
            assert lifeline.signed_on(file.fileno()) == set()


def test_a_worker_keeps_its_lifeline_through_a_trouble(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as worker, path.open("rb") as file:
        ((byte,),) = rows(path, "lifeline", "byte")
        os.unlink(f"{path}-shm")  # so that it opens the database anew
        worker.ask("refresh")
        assert "its -shm was removed" in worker.read_warning()
        assert rows(path, "lifeline", "byte") == [(byte,)]
        assert lifeline.is_held(file.fileno(), byte)


@contextlib.contextmanager
def held_elsewhere(path: Path, byte: int) -> Iterator[None]:
    """Hold a lifeline, as a worker does."""
    with path.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        yield


def test_a_database_that_is_in_use_on_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with recording(path):
        pass
    byte = lifeline.new_byte()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO lifeline VALUES (7, 'another-boot/123', ?)", (byte,))
    with held_elsewhere(path, byte), on_which_refuses(path) as refused:
        assert "a worker on another machine (or in another virtual one) records into it" in refused
        assert "give each machine a file of its own" in refused
    with on(path):  # it was the machine before this boot, and is gone
        assert len(rows(path, "lifeline")) == 1


@contextlib.contextmanager
def on_which_refuses(path: Path) -> Iterator[str]:
    """The one line with which a worker ends that may not have the database."""
    worker = on(path)
    assert worker.end() == 2
    assert worker.warnings.count("\n") == 1
    yield worker.warnings


def test_two_of_one_number_and_one_start_in_two_namespaces_have_a_share_each(tmp_path: Path) -> None:
    path = tmp_path / "db"
    byte = lifeline.new_byte()
    with recording(path):
        pass
    start = process_start(os.getpid())
    with held_elsewhere(path, byte), closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO lifeline VALUES (?, ?, ?)", (os.getpid(), start, byte))
        other.execute("INSERT INTO worker_share VALUES (?, ?, 100, 0, 0)", (os.getpid(), start))
        with recording(path) as recorder:
            recorder.refresh_current()
            assert rows(path, "current") == [(100, 0, 0)]
            assert len(rows(path, "worker_share")) == 2
        assert rows(path, "worker_share", "connected") == [(100,)]


@pytest.fixture
def no_such_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under gVisor, or before Linux 3.15; SQLite's own locks are others."""
    real = fcntl.fcntl

    def refusing(fd: int, command: int, argument: int | bytes = 0) -> int | bytes:
        if command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)


@pytest.mark.usefixtures("no_such_locks")
def test_where_there_are_no_such_locks_proc_tells(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with on(path) as other:
        other.ask("current 10 0 0")
        other.ask("record 5 10 happy")
        wait_until(lambda: since_reboot(path) == 5, what="its records")
        with recording(path, current=lambda: Current(1, 0, 0)) as recorder:
            assert since_reboot(path) == 5, "the service goes on"
            assert rows(path, "current") == [(11, 0, 0)]
            assert len(rows(path, "lifeline")) == 1
            other.ask("refresh")
            wait_until(lambda: rows(path, "current") == [(11, 0, 0)], what="the other one counts this one, too")
            other.kill()
            recorder.refresh_current()
            wait_until(lambda: rows(path, "current") == [(1, 0, 0)], what="the share of the killed one is dropped")


@pytest.mark.usefixtures("no_such_locks")
def test_where_nobody_can_tell_who_lives_the_start_ends_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.usage.shares.process_start", lambda pid: None)
    with (
        pytest.raises(UsageError, match=r"nobody could tell that this worker lives: .*mount /proc"),
        recording(tmp_path / "db"),
    ):
        pass


def test_each_lifeline_is_counted_wherever_it_is_and_no_lock_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    numbers = [lifeline._FIRST, lifeline._FIRST + 1, lifeline._FIRST + lifeline._COUNT - 1]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb+")) for _ in range(40)]
        asking, others, *holding = files
        assert lifeline.count_held(asking.fileno()) == 0
        for count, file in enumerate(holding, 1):
            assert lifeline.hold(file.fileno(), numbers.pop() if numbers else lifeline.new_byte())
            assert lifeline.count_held(asking.fileno()) == count
        fcntl.fcntl(others, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1 << 31, 0))  # as SQLite's are
        assert lifeline.count_held(asking.fileno()) == len(holding)
        holding[0].close()
        assert lifeline.count_held(asking.fileno()) == len(holding) - 1
