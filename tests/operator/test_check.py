"""`relay-gevent --check` says what the start would say, needs no port, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay.usage.schema import open_database
from tests.support.command_line import checked, powerless, run
from tests.support.harness import free_port
from tests.support.usage_disk import disk_of

LOCAL = ("--port", "0", "--interface", "127.0.0.1")


def prepare(folder: Path) -> None:
    """What the options below name."""
    (folder / "file").write_text("no database")
    (folder / "folder").mkdir()
    (folder / "open").mkdir()
    (folder / "open").chmod(0o755)
    (folder / "to-nowhere").symlink_to(folder / "nowhere")
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o500)
    with closing(sqlite3.connect(folder / "recipes.sqlite")) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    with closing(sqlite3.connect(folder / "newer.sqlite")) as newer:
        newer.execute("PRAGMA application_id = 0x52474556")
        newer.execute("PRAGMA user_version = 99")


REFUSED = {
    "an address of somebody else's": ("--interface", "192.0.2.55"),
    "a name as an address": ("--interface", "localhost"),
    "an address without its link": ("--interface", "fe80::1"),
    "an address of somebody else's, for WebSocket": ("--websocket", "tcp:0:interface=192.0.2.55"),
    "an address of somebody else's, for health checks": ("--health", "tcp:0:interface=192.0.2.55"),
    "an address of somebody else's, at the port": ("--port", "tcp:0:interface=192.0.2.55"),
    "an address that is none, for WebSocket": ("--websocket", "tcp:0:interface=nope"),
    "an address that is none, for health checks": ("--health", "tcp:0:interface=nope"),
    "an address that is none, at the port": ("--port", "tcp:0:interface=nope"),
    "an address of many machines": ("--interface", "224.0.0.1"),
    "an IPv6 address of many machines": ("--interface", "ff02::1"),
    "an address of all machines": ("--interface", "255.255.255.255"),
    "the broadcast address of a network, for health checks": ("--health", "tcp:0:interface=127.255.255.255"),
    "a congestion control that is not there": ("--congestion-control", "nosuch"),
    "no congestion control": ("--congestion-control", ""),
    "a descriptor that is not open": ("--log-fd", "77"),
    "an empty path of a database": ("--usage-db", ""),
    "a folder as a database": ("--usage-db", "HERE/folder"),
    "the root as a database": ("--usage-db", "/"),
    "a database in no folder": ("--usage-db", "HERE/none/usage.sqlite"),
    "a database in a file": ("--usage-db", "HERE/file/usage.sqlite"),
    "a device as a database": ("--usage-db", "/dev/null"),
    "a file that is no database": ("--usage-db", "HERE/file"),
    "another program's database": ("--usage-db", "HERE/recipes.sqlite"),
    "a newer relay's database": ("--usage-db", "HERE/newer.sqlite"),
    "a database where nothing may be written": ("--usage-db", "HERE/locked/usage.sqlite"),
    "an empty path of a run directory": ("--run-dir", ""),
    "a file as a run directory": ("--run-dir", "HERE/file"),
    "a run directory in no folder": ("--run-dir", "HERE/none/run"),
    "a run directory that others may enter": ("--run-dir", "HERE/open"),
    "a run directory where nothing may be made": ("--run-dir", "HERE/locked/run"),
    "a run directory that its user may not write to": ("--run-dir", "HERE/locked"),
    "a link to nowhere as a run directory": ("--run-dir", "HERE/to-nowhere"),
    "a run directory in a file": ("--run-dir", "HERE/file/run"),
    "a run directory with too long a name": ("--run-dir", f"HERE/{'x' * 256}"),
    "a run directory among processes": ("--run-dir", "/proc/relay-gevent"),
    "a run directory among devices": ("--run-dir", "/sys/relay-gevent"),
    "a database with too long a name": ("--usage-db", f"HERE/{'x' * 256}"),
    "a database with too long a name for its log": ("--usage-db", f"HERE/{'x' * 252}"),
    "a database among processes": ("--usage-db", "/proc/usage.sqlite"),
    "a database among devices": ("--usage-db", "/sys/usage.sqlite"),
    "an upstream of no known name": ("--websocket", "0", "--upstream", f"{'a' * 64}.example.org:4001"),
}
"""HERE is the test's folder."""


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_the_start_refuses_it_says_in_the_same_words(tmp_path: Path, options: tuple[str, ...]) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = [option.replace("HERE", str(tmp_path)) for option in options]
    interface = () if "--interface" in given else ("--interface", "127.0.0.1")
    port = () if "--port" in given else ("--port", "0")
    told = checked(run("--check", *port, *interface, *given, inside=powerless()))
    assert sorted(tmp_path.rglob("*")) == before
    assert told == checked(run(*port, *interface, *given, inside=powerless()))
    assert re.match(f"{given[-2]}[: ]", told)


@pytest.mark.parametrize("options", [("--run-dir", "new"), ("--run-dir", "run"), ("--usage-db", "new")])
def test_a_file_system_that_is_mounted_read_only_is_told_of_as_such(tmp_path: Path, options: tuple[str, str]) -> None:
    with disk_of("1m", tmp_path) as disk:
        (disk / "run").mkdir(mode=0o700)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        option, path = options[0], f"{disk}/{options[1]}"
        told = checked(run("--check", option, path))
        assert told == checked(run(*LOCAL, option, path))
        assert told.startswith(f"{option} {path}: its file system is mounted read-only; ")


@contextlib.contextmanager
def attribute(letter: str, path: Path) -> Iterator[None]:
    """The file or folder with this attribute of chattr(1)."""
    done = subprocess.run(["chattr", f"+{letter}", path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs root, and a file system with attributes: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{letter}", path], check=True)


@pytest.mark.parametrize(
    ("letter", "fixed", "option", "path"),
    [
        ("i", "db", "--usage-db", "db"),
        ("a", "db", "--usage-db", "db"),
        ("i", "db-wal", "--usage-db", "db"),
        ("a", "db-shm", "--usage-db", "db"),
        ("i", "folder", "--usage-db", "folder/db"),
        ("a", "folder", "--usage-db", "folder/db"),
        ("i", "run", "--run-dir", "run"),
        ("i", "locked", "--run-dir", "locked"),
        ("i", "folder", "--run-dir", "folder/run"),
    ],
)
def test_an_attribute_that_keeps_even_root_from_writing_is_named_with_what_takes_it_away(
    tmp_path: Path, letter: str, fixed: str, option: str, path: str
) -> None:
    for folder in ("folder", "run", "locked"):
        (tmp_path / folder).mkdir(mode=0o700)
    (tmp_path / "locked" / "lock").touch()
    for file in ("db", "db-wal", "db-shm"):
        (tmp_path / file).touch()
    with attribute(letter, tmp_path / fixed):
        told = checked(run("--check", option, str(tmp_path / path)))
        assert told == checked(run(*LOCAL, option, str(tmp_path / path)))
    word = {"i": "immutable", "a": "append-only"}[letter]
    assert told.startswith(f"{option} {tmp_path / path}: {tmp_path / fixed} is {word} (lsattr)")
    assert f"chattr -{letter} it" in told


@pytest.mark.parametrize("there", [[], ["run"], ["run", "run/lock"]], ids=str)
def test_a_run_directory_for_which_no_inode_is_left_is_told_of_as_such(tmp_path: Path, there: list[str]) -> None:
    with disk_of(f"1m,nr_inodes={1 + len(there)}", tmp_path) as disk:
        if there:
            (disk / "run").mkdir(mode=0o700)
        for file in there[1:]:
            (disk / file).touch()
        told = checked(run("--check", "--run-dir", f"{disk}/run"))
        assert told == checked(run(*LOCAL, "--run-dir", f"{disk}/run"))
        assert told == f"--run-dir {disk}/run: no inode is left on its disk (df -i)"


@pytest.mark.parametrize("option", ["--run-dir", "--usage-db"])
@pytest.mark.parametrize("place", ["/proc", "/sys"])
def test_what_nobody_can_make_there_it_tells_roots_relay_as_well(option: str, place: str) -> None:
    told = checked(run("--check", option, f"{place}/relay-gevent"))
    assert told == checked(run(*LOCAL, option, f"{place}/relay-gevent"))
    assert "does not exist" not in told


SAME = {
    "health checks at the port": ("--port HERE --health HERE", "--health", "--port"),
    "health checks at the one port for both": ("--port HERE --websocket HERE --health HERE", "--health", "--port"),
    "health checks at WebSocket's": ("--port 0 --websocket HERE --health HERE", "--health", "--websocket"),
    "WebSocket at another address of all": (
        "--port tcp:HERE:interface=0.0.0.0 --websocket tcp:HERE:interface=127.0.0.1",
        "--websocket",
        "--port",
    ),
    "health checks at one address of all": (
        "--port tcp:HERE:interface=\\:\\: --health tcp:HERE:interface=127.0.0.1",
        "--health",
        "--port",
    ),
    "health checks at a gateway's": (
        "--websocket HERE --upstream 192.0.2.1:4001 --health HERE",
        "--health",
        "--websocket",
    ),
}
"""HERE is a free port."""


@pytest.mark.parametrize("same", SAME)
def test_a_port_that_is_given_twice_is_told_of_by_both_options(same: str) -> None:
    options, second, first = SAME[same]
    port = str(free_port())
    given = ("--interface", "127.0.0.1", *options.replace("HERE", port).split())
    told = checked(run("--check", *given))
    assert told == checked(run(*given))
    assert told == f"{second} {port}: {first} listens there already; choose another port"


def test_a_port_may_be_given_twice_for_two_addresses_and_for_both_kinds_of_clients() -> None:
    port = str(free_port())
    for options in (
        f"--port {port} --websocket {port} --health tcp:{port}:interface=127.0.0.2",
        "--port 0 --websocket 0 --health 0",
    ):
        ended = run("--check", "--interface", "127.0.0.1", *options.split())
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("opened", ["folder", "file"])
def test_a_descriptor_that_takes_no_lines_is_told_for_what_it_is(tmp_path: Path, opened: str) -> None:
    prepare(tmp_path)
    fd = os.open(tmp_path / opened, os.O_RDONLY)
    try:
        told = checked(run("--check", "--log-fd", str(fd), pass_fds=(fd,)))
        assert told == checked(run(*LOCAL, "--log-fd", str(fd), pass_fds=(fd,)))
    finally:
        os.close(fd)
    assert told.startswith(f"--log-fd {fd}: it is {'a folder; ' if opened == 'folder' else 'open for reading only; '}")


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal", "-wal.former"])
@pytest.mark.parametrize("flags", [os.O_APPEND, os.O_TRUNC], ids=[">>", ">"])
def test_lines_that_would_go_into_the_database_are_told_of_by_both_options(
    tmp_path: Path, end: str, flags: int
) -> None:
    database = tmp_path / "usage.sqlite"
    open_database(str(database)).close()
    fd = os.open(f"{database}{end}", os.O_WRONLY | os.O_CREAT | flags)
    (tmp_path / "by-a-link").symlink_to(database)
    try:
        for path in (database, tmp_path / "by-a-link"):
            options = ("--log-fd", str(fd), "--usage-db", str(path))
            told = checked(run("--check", *options, pass_fds=(fd,)))
            assert told == checked(run(*LOCAL, *options, pass_fds=(fd,)))
            what = f"the {end} of the file" if end else "the file"
            assert told.startswith(f"--log-fd {fd}: it is {what} that --usage-db names, {path}; ")
    finally:
        os.close(fd)


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal", "-wal.former"])
def test_lines_that_would_go_into_the_database_after_a_rotation_are_told_of_by_both_options(
    tmp_path: Path, end: str
) -> None:
    database = tmp_path / "usage.sqlite"
    (tmp_path / "by-a-link").symlink_to(database)
    with (tmp_path / "usage.jsonl").open("ab") as lines:
        fd = lines.fileno()
        options = ("--log-fd", str(fd), "--log-path", f"{database}{end}", "--usage-db", str(tmp_path / "by-a-link"))
        told = checked(run("--check", *options, pass_fds=(fd,)))
        assert told == checked(run(*LOCAL, *options, pass_fds=(fd,)))
    assert told.startswith(f"--log-path {database}{end}: it is of the database that --usage-db names, ")


def test_a_log_path_that_no_file_can_have_is_told_of(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "usage.jsonl").open("ab") as lines:
        fd = lines.fileno()
        for path, reason in (
            (tmp_path, "it is a folder"),
            (tmp_path / "fifo", "it is no file"),
            (tmp_path / "none" / "usage.jsonl", f"there is no folder {tmp_path / 'none'}"),
            (tmp_path / "usage.jsonl" / "usage.jsonl", "it cannot be looked at (Not a directory)"),
        ):
            options = ("--log-fd", str(fd), "--log-path", str(path))
            told = checked(run("--check", *options, pass_fds=(fd,)))
            assert told == checked(run(*LOCAL, *options, pass_fds=(fd,)))
            assert told == f"--log-path {path}: {reason}; name the file that --log-fd {fd} was opened as"


def test_a_log_path_of_another_file_than_the_descriptors_is_told_of(tmp_path: Path) -> None:
    with (tmp_path / "usage.jsonl").open("ab") as lines:
        fd = lines.fileno()
        for name, is_told in (("other.jsonl", True), ("usage.jsonl", False)):
            path = tmp_path / name
            done = run("--check", "--log-fd", str(fd), "--log-path", str(path), pass_fds=(fd,))
            assert done.returncode == 0
            told = f"--log-path {path}: the lines go there, and not to {tmp_path / 'usage.jsonl'}, which fd {fd} is "
            assert (told in done.stderr) == is_told
            assert done.stderr.count("\n") == is_told


def test_a_standard_descriptor_that_is_closed_is_told_of(tmp_path: Path) -> None:
    shut = ["/bin/sh", "-c", 'exec "$0" "$@" >&-']
    assert "it is not open" in checked(run("--check", "--log-stdout", inside=shut))


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


def in_use(folder: Path) -> None:
    """Have a database and a run directory there, as a relay makes them."""
    open_database(str(folder / "usage.sqlite")).close()
    (folder / "run").mkdir(mode=0o700)


@pytest.mark.parametrize("before", [nothing, in_use])
def test_what_the_start_takes_it_says_nothing_of_and_leaves_as_it_was(
    tmp_path: Path, before: Callable[[Path], None]
) -> None:
    before(tmp_path)
    there = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    port = free_port()
    with (tmp_path.parent / "lines").open("ab") as log:
        ended = run(
            *("--check", "--port", str(port), "--websocket", "4002", "--run-dir", str(tmp_path / "run")),
            *("--usage-db", str(tmp_path / "usage.sqlite"), "--log-fd", str(log.fileno())),
            pass_fds=(log.fileno(),),
        )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == there
