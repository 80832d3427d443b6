"""Standard input, output and error that are closed, full, or lead nowhere.

Nothing of the relay's own may get one of their numbers: what is meant for stderr would be written into it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay, free_port, wait_until
from tests.support.hostile import honest_transfer
from tests.surroundings.test_environment import PROGRAMS, in_mounts_of_its_own

Start = Callable[..., Relay]
CLOSINGS = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"]


def with_streams(redirections: str) -> list[str]:
    """What to put before a command so that it runs with these redirections of the shell's."""
    return ["/bin/sh", "-c", f'exec "$@" {redirections}', "sh"]


def serve(folder: Path, inside: list[str]) -> list[str]:
    """Start a relay, which may have no log, have it relay, and stop it; return what its descriptors 0 to 2 are."""
    port = free_port()
    recording = ["--usage-db", str(folder / "usage.sqlite"), "--run-dir", str(folder / "run")]
    command = [sys.executable, "-m", "relay", "--port", str(port), "--interface", "127.0.0.1", *recording]
    relay = subprocess.Popen([*inside, *command], cwd=CHECKOUT)
    try:
        wait_until(lambda: listens(port) or relay.poll() is not None, 20, "it listens")
        honest_transfer(port)
        fds = Path(f"/proc/{relay.pid}/fd")
        return [os.readlink(fds / str(fd)) for fd in range(3)]
    finally:
        relay.terminate()
        assert relay.wait(15) == 0


def listens(port: int) -> bool:
    """Tell whether somebody listens on `port`, from the kernel's table, without connecting."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


@pytest.mark.parametrize("closing", CLOSINGS)
def test_a_relay_with_closed_streams_serves_and_gives_their_numbers_to_nothing_of_its_own(
    tmp_path: Path, closing: str
) -> None:
    descriptors = serve(tmp_path, with_streams(closing))
    for fd, redirection in enumerate(["<&-", ">&-", "2>&-"]):
        if redirection in closing.split():
            assert descriptors[fd] == "/dev/null"


def test_nor_where_there_is_no_dev_null(tmp_path: Path) -> None:
    descriptors = serve(tmp_path, [*in_mounts_of_its_own("mount -t tmpfs none /dev"), *with_streams(CLOSINGS[-1])])
    assert [Path(name).name for name in descriptors] == ["program.py"] * 3


def test_a_relay_whose_log_cannot_be_written_serves(tmp_path: Path) -> None:
    serve(tmp_path, with_streams("2>/dev/full"))


@pytest.mark.parametrize(
    ("closing", "options", "fd"),
    [("<&-", ["--log-fd", "0"], 0), (">&-", ["--log-fd", "1"], 1), (">&-", ["--log-stdout"], 1)],
)
def test_json_lines_are_not_written_into_a_closed_stream(closing: str, options: list[str], fd: int) -> None:
    ended = subprocess.run(
        [*with_streams(closing), sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1", *options],
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert re.fullmatch(rf"relay-gevent: error: --log-fd {fd}: it is not open; [^\n]*\n", ended.stderr)


# Programs that print.

PRINTING = {
    "relay-gevent --help": [*PROGRAMS["relay-gevent"], "--help"],
    "relay-gevent --version": [*PROGRAMS["relay-gevent"], "--version"],
    "relay-usage --help": [*PROGRAMS["relay-usage"], "--help"],
    "relay-usage": [*PROGRAMS["relay-usage"], "usage.sqlite"],
    "relay-usage --json": [*PROGRAMS["relay-usage"], "--json", "usage.sqlite"],
    "relay-usage --csv": [*PROGRAMS["relay-usage"], "--csv", "usage.sqlite"],
    "import-twisted-usage --help": [*PROGRAMS["import-twisted-usage"], "--help"],
}


@pytest.fixture(scope="module")
def with_usage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a usage database that a relay has made."""
    folder = tmp_path_factory.mktemp("usage")
    with Relay(folder, recording=True) as relay:
        honest_transfer(relay.port)
        relay.wait_for_records(1)
    return folder


def printed(command: list[str | Path], redirections: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with the streams redirected, and what is left of them captured."""
    return subprocess.run(
        [*with_streams(redirections), sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("program", PRINTING)
@pytest.mark.parametrize(
    ("redirection", "why"), [(">/dev/full", "No space left on device"), (">&-", "standard output is closed")]
)
def test_what_cannot_be_printed_is_one_line(program: str, redirection: str, why: str, with_usage: Path) -> None:
    ended = printed(PRINTING[program], redirection, with_usage)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{program.split()[0]}: error: ")
    assert ended.stderr.endswith(f"{why}\n")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("program", PRINTING)
def test_who_needs_no_more_of_it_may_stop_reading(program: str, with_usage: Path) -> None:
    command = [*map(str, PRINTING[program])]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, *command],
            cwd=with_usage,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


MISTAKES = {
    "relay-gevent": [*PROGRAMS["relay-gevent"], "--port=x"],
    "relay-usage": [*PROGRAMS["relay-usage"], "missing"],
    "import-twisted-usage": [*PROGRAMS["import-twisted-usage"], "missing", "missing"],
}


@pytest.mark.parametrize("program", MISTAKES)
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "<&- >&- 2>&-"])
def test_a_mistake_that_cannot_be_told_is_in_the_status_and_not_told_elsewhere(
    program: str, redirection: str, with_usage: Path
) -> None:
    ended = printed(MISTAKES[program], redirection, with_usage)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")
