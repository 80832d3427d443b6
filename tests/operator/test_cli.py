"""The command line: what a wrong one is answered with, what a right one means, and how the relay is stopped.

Every mistake of an operator's is one line on stderr that names the option or the file, and exit status 2.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from relay import __version__
from relay.cli import LEAST_FDS, main, read_options
from tests.support.command_line import checked, complaint, powerless, run
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Workers,
    connect,
    free_port,
    handshake,
    met,
    new_token,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.hostile import honest_transfer

DOCUMENTATION_ADDRESS = "198.51.100.7"  # TEST-NET-2 (RFC 5737): no machine's own
Start = Callable[..., Relay]


Here = Callable[..., str]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """Like `complaint`, in this process: for what is found out before the relay opens anything."""

    def complained(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        written = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return checked(subprocess.CompletedProcess(arguments, ended.value.code, written.out, written.err))

    return complained


# Wrong values.


@pytest.mark.parametrize(
    "argument",
    ["--port=x", "--port=40\n01", "--blur-usage=0", "--grace=soon", "--max-connections=1", "--pair-rate=0"],
)
def test_a_wrong_value_ends_the_relay_with_one_line(argument: str) -> None:
    assert checked(run(argument)).startswith(argument.partition("=")[0])


@pytest.mark.parametrize(
    "value",
    ["", "x", "-1", "65536", "123456789", "1.5", "4001 ", "40\n01", "٤٠٠١", "tcp:", "tcp:x", "tcp:65536", "udp:4001",
     "tcp:4001:interface=", "tcp:4001:backlog", "tcp:4001:interface=127.0.0.1:more"],
)  # fmt: skip
def test_a_wrong_port_is_a_mistake(value: str, here: Here) -> None:
    assert here(f"--port={value}", "--interface", "127.0.0.1").startswith("--port ")


@pytest.mark.parametrize("value", ["", "localhost", "256.1.1.1", "::g", DOCUMENTATION_ADDRESS, "2001:db8::7"])
def test_a_wrong_interface_is_a_mistake(value: str) -> None:
    assert "--interface " in checked(run("--port", "0", f"--interface={value}"))


@pytest.mark.parametrize("value", ["", "localhost", "192.0.2.0/33", "192.0.2.1,,192.0.2.2", "fe80::1%eth0", "::/129"])
def test_wrong_proxies_are_a_mistake(value: str, here: Here) -> None:
    assert here(f"--trusted-proxies={value}").startswith("--trusted-proxies ")


def test_a_proxy_header_of_nobody_is_a_mistake(here: Here) -> None:
    assert "--trusted-proxies" in here("--proxy-protocol")


@pytest.mark.parametrize("value", ["", "0", "-600", "1.5", "ten", "1e3", "600s"])
def test_a_wrong_blur_is_a_mistake(value: str, here: Here) -> None:
    assert here(f"--blur-usage={value}").startswith("--blur-usage ")


@pytest.mark.parametrize("option", ["--grace", "--handshake-timeout", "--wait-timeout", "--idle-timeout"])
@pytest.mark.parametrize("value", ["", "-1", "soon", "nan", "inf", "1e400", "1,5"])
def test_wrong_seconds_are_a_mistake(option: str, value: str, here: Here) -> None:
    assert here(f"{option}={value}").startswith(f"{option} ")


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "all"])
@pytest.mark.parametrize(
    "option",
    [
        "--max-handshakes",
        "--max-waiting",
        "--max-waiting-per-token",
        "--max-per-source",
        "--max-new-per-source",
        "--max-pair-bytes",
        "--pair-rate",
        "--relay-rate",
    ],
)
def test_a_wrong_bound_is_a_mistake(option: str, value: str, here: Here) -> None:
    assert here(f"{option}={value}").startswith(f"{option} ")


def test_a_number_that_is_too_long_is_told_of_as_such(here: Here) -> None:
    assert here("--max-waiting", "1" * 13).endswith(": give a whole number of at most 12 digits")
    assert here("--relay-rate", "1" * 19).endswith(": give a whole number of at most 18 digits")
    assert "at most 9 digits" in here("--grace", "1" * 10)


def test_a_relay_takes_any_number_of_bytes_that_it_is_given(relay_factory: Start) -> None:
    most = "9" * 18
    relay = relay_factory("--max-pair-bytes", most, "--pair-rate", most, "--relay-rate", most)
    honest_transfer(relay.port)


@pytest.mark.parametrize("option", ["--handshake-timeout", "--wait-timeout", "--idle-timeout"])
def test_no_time_at_all_is_a_mistake(option: str, here: Here) -> None:
    assert here(option, "0").startswith(f"{option} 0: ")


@pytest.mark.parametrize("value", ["", "0", "1", "-5", "many", "100000000"])
def test_a_wrong_number_of_connections_is_a_mistake(value: str, here: Here) -> None:
    assert here(f"--max-connections={value}").startswith("--max-connections ")


@pytest.mark.parametrize("value", ["", "-1", "x", "1.0", "99999999999"])
def test_a_wrong_fd_is_a_mistake(value: str) -> None:
    assert complaint(f"--log-fd={value}").startswith("--log-fd ")


@pytest.mark.parametrize("fd", range(3, 16))
def test_an_fd_that_is_not_open_is_a_mistake_and_not_something_of_the_relays_own(tmp_path: Path, fd: int) -> None:
    # With a database and a run directory there is something at nearly every one of these numbers soon after the start.
    common = ["--usage-db", str(tmp_path / "usage.sqlite"), "--run-dir", str(tmp_path / "run")]
    said = complaint(*common, "--log-fd", str(fd))
    assert said.startswith(f"--log-fd {fd}: ")
    assert "not open" in said


def test_an_fd_that_is_open_for_reading_only_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "lines").touch()
    fd = os.open(tmp_path / "lines", os.O_RDONLY)
    try:
        assert complaint("--log-fd", str(fd), pass_fds=(fd,)).startswith(f"--log-fd {fd}: ")
    finally:
        os.close(fd)


def test_two_places_for_the_json_lines_are_a_mistake() -> None:
    assert "--log-stdout" in complaint("--log-stdout", "--log-fd", "2")


def test_what_file_a_descriptor_is_without_a_descriptor_is_a_mistake() -> None:
    assert complaint("--log-path", "usage.jsonl").startswith("--log-path usage.jsonl: ")
    assert read_options(["--log-path", "usage.jsonl", "--log-stdout"]).log_path == "usage.jsonl"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nonsense"], "--nonsense"),
        (["--nonsense=3"], "--nonsense"),
        (["-v"], "-v"),
        (["4001"], "4001"),
        (["--grace"], "--grace"),
        (["--log-stdout=yes"], "--log-stdout"),
        (["--grace", "1", "--grace", "2"], "--grace"),
        (["serve", "--grace", "1"], "serve"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_a_mistake_that_names_what_is_wrong(arguments: list[str], named: str) -> None:
    assert named in checked(run(*arguments))


def test_a_port_in_use_is_a_mistake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert checked(run("--port", str(port), "--interface", "127.0.0.1")).startswith(f"--port {port}: ")


def test_a_port_that_is_not_for_this_user_is_a_mistake() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("on this machine every user may listen on every port")
    said = checked(run("--port", str(lowest - 1), "--interface", "127.0.0.1", inside=powerless()))
    assert said.startswith(f"--port {lowest - 1}: ")


# A database that cannot be used is left as it was.


def refused(database: Path, inside: Sequence[str] = ()) -> str:
    """What the relay says of a database that it cannot use, which it must leave alone."""
    before = (database.stat(), database.read_bytes()) if database.is_file() else None
    there = sorted(database.parent.iterdir()) if database.parent.is_dir() else None
    said = complaint("--usage-db", str(database), inside=inside)
    assert said.startswith(f"--usage-db {database}: ")
    if before is not None:
        assert (database.stat().st_mtime_ns, database.read_bytes()) == (before[0].st_mtime_ns, before[1])
    if there is not None:
        assert sorted(database.parent.iterdir()) == there, "nothing was left beside it"
    return said


def made(path: Path, *statements: str) -> Path:
    """An SQLite database."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "usage").mkdir()
    refused(tmp_path / "usage")


def test_a_file_that_is_not_a_database_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a database, but long enough to have a header of a hundred bytes\n" * 20)
    refused(tmp_path / "notes")


def test_a_missing_folder_is_a_mistake(tmp_path: Path) -> None:
    refused(tmp_path / "missing" / "usage.sqlite")
    assert not (tmp_path / "missing").exists()


def test_a_database_of_a_newer_schema_is_a_mistake(tmp_path: Path) -> None:
    newer = made(tmp_path / "newer", "PRAGMA application_id = 0x52474556", "PRAGMA user_version = 99",
                 "CREATE TABLE usage (started)")  # fmt: skip
    assert "newer" in refused(newer)


def test_another_programs_database_is_a_mistake(tmp_path: Path) -> None:
    refused(made(tmp_path / "other", "CREATE TABLE recipes (name TEXT)"))


def test_the_twisted_relays_database_is_a_mistake(tmp_path: Path) -> None:
    twisted = made(
        tmp_path / "twisted",
        "CREATE TABLE version (version INTEGER)",
        "CREATE TABLE current (rebooted INTEGER, updated INTEGER, connected INTEGER, waiting INTEGER,"
        " incomplete_bytes INTEGER)",
        "CREATE TABLE usage (started INTEGER, total_time INTEGER, waiting_time INTEGER, total_bytes INTEGER,"
        " result VARCHAR)",
    )
    assert "Twisted" in refused(twisted)


def test_a_folder_that_may_not_be_written_is_a_mistake(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    refused(folder / "usage.sqlite", inside=powerless())


def test_a_database_that_may_not_be_written_is_a_mistake(tmp_path: Path) -> None:
    database = tmp_path / "usage.sqlite"
    database.touch()
    database.chmod(0o444)
    refused(database, inside=powerless())


@pytest.mark.parametrize("kilobytes", [4, 20])
def test_a_limit_of_file_sizes_that_is_too_low_is_named(tmp_path: Path, kilobytes: int) -> None:
    with_limit = ["prlimit", f"--fsize={kilobytes * 1024}"]
    for option in (("--usage-db", str(tmp_path / "db")), ("--run-dir", str(tmp_path / "run"))):
        told = complaint(*option, inside=with_limit)
        assert told.startswith(f"{option[0]} {option[1]}: ")
        assert "the limit of file sizes" in told
        assert "ulimit -f" in told
    assert not (tmp_path / "db").exists()


# A run directory that cannot be used.


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert complaint("--run-dir", str(tmp_path / "file")).startswith(f"--run-dir {tmp_path / 'file'}: ")


def test_a_run_directory_that_others_may_enter_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    assert complaint("--run-dir", str(tmp_path / "open")).startswith(f"--run-dir {tmp_path / 'open'}: ")


# Right ones.


def test_help_names_every_option_and_version_the_version() -> None:
    helped = run("--help")
    assert helped.returncode == 0
    # fmt: off
    for option in ["--port", "--interface", "--blur-usage", "--log-fd", "--log-stdout", "--usage-db", "--run-dir",
                   "--grace", "--handshake-timeout", "--wait-timeout", "--max-connections", "--help", "--version"]:
        # fmt: on
        assert re.search(rf"^  {option}\b", helped.stdout, re.MULTILINE), option
    assert run("--version").stdout == f"relay-gevent {__version__}\n"


def test_without_options_the_defaults_are_those_of_the_twisted_relay() -> None:
    options = read_options([])
    assert (options.port, options.interface) == (4001, "::")
    assert (options.blur_usage, options.log_fd, options.usage_db, options.run_dir) == (None, None, None, None)
    assert (options.grace, options.handshake_timeout, options.wait_timeout) == (7, 30, 3600)


@pytest.mark.parametrize(
    ("given", "port", "interface"),
    [
        ("4001", 4001, "::"),
        ("tcp:4001", 4001, "::"),
        ("tcp:4001:interface=127.0.0.1", 4001, "127.0.0.1"),
        (r"tcp:4001:interface=\:\:", 4001, "::"),
        (r"tcp:0:interface=\:\:1", 0, "::1"),
    ],
)
def test_the_twisted_relays_forms_of_the_port_are_understood(given: str, port: int, interface: str) -> None:
    options = read_options(["--port", given])
    assert (options.port, options.interface) == (port, interface)


def test_a_relay_listens_where_a_twisted_endpoint_says(tmp_path: Path) -> None:
    endpoint = f"tcp:{free_port()}:interface=127.0.0.1"
    command = [sys.executable, "-m", "relay", "--port", endpoint]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stderr=log)
    try:
        wait_until(lambda: "listening on 127.0.0.1 port" in (tmp_path / "log").read_text(), what="it listens")
        connect(int(endpoint.split(":")[1])).close()
    finally:
        process.terminate()
        assert process.wait(15) == 0


def test_the_json_lines_go_to_stdout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1", "--log-stdout"]
    with (tmp_path / "log").open("wb") as log, (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stderr=log, stdout=out)
    try:
        listening = wait_until(lambda: re.search(r"port (\d+)", (tmp_path / "log").read_text()), what="it listens")
        assert listening is not None
        with connect(int(listening[1])) as client:
            client.sendall(b"nonsense\n")
            assert read_to_end(client) == b"bad handshake\n"
    finally:
        process.terminate()
        assert process.wait(15) == 0
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert '"mood": "errory"' in line


def test_the_limit_of_file_descriptors_is_raised_to_the_hard_one(relay_factory: Start) -> None:
    with_soft_limit = ["/bin/sh", "-c", 'ulimit -S -n 100 && exec "$0" "$@"']
    relay = relay_factory(inside=with_soft_limit)
    limits = Path(f"/proc/{relay.pid}/limits").read_text()
    found = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits)
    assert found is not None
    assert found[1] == found[2]


@pytest.mark.parametrize("limit", [20, 42, 60, LEAST_FDS - 1])
def test_too_low_a_limit_of_file_descriptors_is_named(tmp_path: Path, limit: int) -> None:
    with_limit = ["/bin/sh", "-c", f'ulimit -n {limit} && exec "$0" "$@"']
    assert complaint("--run-dir", str(tmp_path / "run"), inside=with_limit) == (
        f"the limit of file descriptors is {limit}; raise it to {LEAST_FDS} or more (ulimit -n)"
    )


def test_the_lowest_limit_of_file_descriptors_is_enough_for_a_transfer_and_two_siblings(tmp_path: Path) -> None:
    with Workers(tmp_path, count=3, nofile=LEAST_FDS, recording=True) as workers:
        honest_transfer(workers.port)
        assert workers.stop_one(0) == 0
        honest_transfer(workers.port)


def test_beyond_max_connections_new_ones_wait_in_the_listen_queue(relay_factory: Start) -> None:
    relay = relay_factory("--max-connections", "4", "--max-waiting", "4")  # else the first is sent away for the fourth
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(connect(relay.port)) for _ in range(4)]
        for client in first:
            client.sendall(handshake(new_token()))
        fifth = stack.enter_context(connect(relay.port))
        fifth.sendall(b"nonsense\n")
        fifth.settimeout(0.3)
        with pytest.raises(TimeoutError):
            fifth.recv(1)
        first[0].close()
        assert read_to_end(fifth) == b"bad handshake\n"


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_relay_without_clients_stops_at_once(relay_factory: Start, number: signal.Signals) -> None:
    relay = relay_factory()
    began = time.monotonic()
    relay.process.send_signal(number)
    assert relay.process.wait(10) == 0
    assert time.monotonic() - began < 3
    assert relay.log_text().rstrip().endswith("stopped")


def test_a_lone_relay_that_stops_lets_a_transfer_finish_and_takes_no_new_clients(relay_factory: Start) -> None:
    relay = relay_factory("--grace", "30", recording=True)
    with contextlib.ExitStack() as stack:
        sender, receiver = met(relay.port, stack=stack)
        waiting = stack.enter_context(connect(relay.port))
        waiting.sendall(handshake(new_token()))
        wait_until(lambda: relay.rows("current")[0]["waiting"] == 1, what="it waits")
        relay.process.send_signal(signal.SIGTERM)
        assert read_to_end(waiting) == b""
        waiting.close()
        with pytest.raises(ConnectionRefusedError):
            connect(relay.port)
        for number in range(20):
            sender.sendall(bytes([number]) * 50_000)
            assert read_exactly(receiver, 50_000) == bytes([number]) * 50_000
        assert relay.process.poll() is None
        sender.close()
        assert read_to_end(receiver) == b""
        receiver.close()
        began = time.monotonic()
        assert relay.process.wait(10) == 0
        assert time.monotonic() - began < 3, "it does not wait for its grace to pass"
    assert sorted((record["mood"], record["total_bytes"]) for record in relay.records()) == [
        ("happy", 1_000_000),
        ("lonely", 0),
    ]


def test_a_transfer_that_takes_longer_than_the_grace_is_cut_off_and_recorded(relay_factory: Start) -> None:
    relay = relay_factory("--grace", "0.5", recording=True)
    with contextlib.ExitStack() as stack:
        sender, receiver = met(relay.port, stack=stack)
        sender.sendall(b"so far")
        assert read_exactly(receiver, 6) == b"so far"
        began = time.monotonic()
        assert relay.stop() == 0
        assert 0.5 <= time.monotonic() - began < 5
        with contextlib.suppress(ConnectionResetError):
            assert read_to_end(receiver) == b""
    (record,) = relay.records()
    assert (record["mood"], record["total_bytes"]) == ("happy", 6)
    assert [row["bytes"] for row in relay.rows("usage")] == [6]
    assert relay.row("current") == (0, 0, 0)


def test_a_second_signal_ends_it_at_once(relay_factory: Start) -> None:
    relay = relay_factory("--grace", "60", recording=True)
    with contextlib.ExitStack() as stack:
        met(relay.port, stack=stack)
        relay.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in relay.log_text(), what="it stops")
        assert relay.process.poll() is None
        began = time.monotonic()
        relay.process.send_signal(signal.SIGTERM)
        assert relay.process.wait(10) == 0
        assert time.monotonic() - began < 3
    assert [record["mood"] for record in relay.records()] == ["happy"]


def test_the_log_says_nothing_of_clients(relay_factory: Start) -> None:
    relay = relay_factory(recording=True)
    with contextlib.ExitStack() as stack:
        met(relay.port, stack=stack)
        with connect(relay.port) as bad:
            bad.sendall(b"nonsense\n")
            assert read_to_end(bad) == b"bad handshake\n"
        relay.wait_for_records(1)
        lines = relay.log_text().splitlines()
    assert len(lines) == 1
    assert "listening on" in lines[0]
