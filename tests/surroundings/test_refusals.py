"""The kernel, or a sandbox, refuses a system call, with whatever number: the relay does without, or says so in a line.

strace(1) does the refusing. `NEEDLESS` are the calls that the relay can do without, at the start or in the middle of a
transfer; `NEEDED` those that it cannot, and then it ends with status 2 and one line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.harness import (
    CHECKOUT,
    Relay,
    Workers,
    connect,
    free_port,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.hostile import NOISE, honest_transfer
from tests.support.kernel_view import in_listen_queue
from tests.support.needs import needs_strace

NUMBERS = ["EPERM", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EACCES", "ENOMEM"]

NEEDLESS = {
    "splice": "it copies",
    "pipe2": "it copies",
    "setsockopt": "the kernel's defaults hold",
    "getsockopt": "nobody is found dead before TCP itself gives up",
    "getpeername": "the connection counts for nobody",
    "sched_getaffinity": "nobody asks for it",
    "eventfd2": "libev wakes itself through a pipe",
    "fallocate": "the homes' files grow when they are written",
    "fchown": "files are whose they are",
    "madvise": "memory goes back to the system later",
    "readlink": "a database is called what it was given as",
    "rt_sigprocmask": "signals are as whoever started it left them",
    "sysinfo": "it is SQLite's, for nothing that is used here",
    "sigaltstack": "it is for a stack that overflows",
}
NEEDED = ["socket", "bind", "listen", "epoll_create1", "ioctl"]
NEEDED_TO_MEET = ["socketpair", "sendmsg", "recvmsg", "memfd_create", "flock", "mkdir", "fchmodat"]
"""With `--run-dir`, besides."""

MEANWHILE = ["splice", "pipe2", "getsockopt", "setsockopt", "accept4", "poll", "sendmsg", "recvmsg"]
MEANWHILE += ["getsockname", "memfd_create", "write", "newfstatat"]
"""What may be refused for a while, with transfers under way."""


def injecting(call: str, number: str, when: str = "") -> list[str]:
    """What to put before the relay's command; `when` is strace's, in counts of that call."""
    quiet = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    return [*quiet, "-e", f"inject={call}:error={number}{when and ':when=' + when}"]


@needs_strace
@pytest.mark.parametrize("call", NEEDLESS)
def test_a_call_that_is_refused_from_the_start_is_done_without(tmp_path: Path, call: str) -> None:
    # Python's own start asks for some of these, too, and does without.
    def try_with(number: str) -> str:
        folder = tmp_path / number
        folder.mkdir()
        options = ["--grace", "0"]
        if call != "getsockopt":  # who shares a run directory is asked for its user
            options += ["--run-dir", str(folder / "run")]
        with Relay(folder, *options, inside=injecting(call, number), recording=True) as relay:
            honest_transfer(relay.port, 2_000_000)
            (row,) = relay.wait_for_rows("usage", 1)
            assert (row["result"], row["bytes"]) == ("happy", relay.wait_for_records(1)[0]["total_bytes"])
        return number

    with ThreadPoolExecutor(3) as several:
        numbers = [number for number in NUMBERS if (call, number) != ("fallocate", "ENOMEM")]  # no refusal, but true
        assert list(several.map(try_with, numbers)) == numbers


@needs_strace
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("call", ["splice", "pipe2", "getsockopt"])
def test_a_call_that_is_refused_in_mid_transfer_is_done_without_and_no_byte_is_lost(
    tmp_path: Path, call: str, number: str
) -> None:
    for when in ("3+", "6+", "20..22"):
        folder = tmp_path / when
        folder.mkdir()
        with Relay(folder, "--grace", "0", inside=injecting(call, number, when), recording=True) as relay:
            for size in (300_000, 2_000_000):
                honest_transfer(relay.port, size)
            records = relay.wait_for_records(2)
            assert [record["mood"] for record in records] == ["happy"] * 2
            assert relay.pids


@contextlib.contextmanager
def refused(call: str, number: str, pids: list[int]) -> Iterator[None]:
    """Have a call of processes that run refused, meanwhile."""
    quiet = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    processes = [word for pid in pids for word in ("-p", str(pid))]
    tracer = subprocess.Popen([*quiet, "-e", f"inject={call}:error={number}", *processes])
    try:
        for pid in pids:
            status = Path(f"/proc/{pid}/status")
            wait_until(lambda s=status: "TracerPid:\t0\n" not in s.read_text(), what="strace looks")  # type: ignore[misc]
        yield
    finally:
        tracer.terminate()
        tracer.wait(10)


@needs_strace
@pytest.mark.parametrize("call", MEANWHILE)
def test_what_is_refused_for_a_while_costs_no_transfer_under_way_a_byte_and_nobody_afterwards(
    tmp_path: Path, call: str
) -> None:
    with Workers(tmp_path, "--grace", "0", count=2) as workers:
        pids = workers.pids
        for number in NUMBERS:
            with contextlib.ExitStack() as stack:
                first, second = met(workers.port, stack=stack)
                with refused(call, number, pids):
                    late = [stack.enter_context(connect(workers.port)) for _ in range(2)]  # heard now, or later
                    token = new_token()
                    for side in late:
                        side.sendall(handshake(token, new_side()))
                    for _ in range(10):
                        first.sendall(NOISE)
                        assert read_exactly(second, len(NOISE)) == NOISE
                for side in late:
                    assert read_exactly(side, 3) == b"ok\n"
            honest_transfer(workers.port)
        assert workers.pids == pids
        moods = [record["mood"] for record in workers.wait_for_records(3 * len(NUMBERS))]
        assert moods == ["happy"] * 3 * len(NUMBERS)
        workers.wait_for_rows("usage", 3 * len(NUMBERS))


@needs_strace
@pytest.mark.parametrize("number", ["ENOMEM", "ENOSPC"])
def test_when_nothing_can_be_watched_for_a_while_everybody_is_heard_afterwards(tmp_path: Path, number: str) -> None:
    health = free_port()
    options = ("--grace", "0", "--handshake-timeout", "60", "--health", str(health))
    with Relay(tmp_path, *options, recording=True) as relay, contextlib.ExitStack() as stack:
        old = met(relay.port, stack=stack)
        going = met(relay.port, stack=stack)
        with refused("epoll_ctl", number, [relay.pid]):
            late = [stack.enter_context(connect(relay.port)) for _ in range(2)]
            waits = stack.enter_context(connect(relay.port))
            waits.sendall(handshake(new_token(), new_side()))
            wait_until(lambda: relay.row("current")[1] == 1, 20, "it waits")
            wait_until(lambda: in_listen_queue(relay.port) == 0, what="they are accepted")
            going[0].close()  # which is not to be watched any more, and libev begins anew when it still is
            assert read_to_end(going[1]) == b""
            with connect(health) as check:
                check.sendall(b"GET / HTTP/1.1\r\n\r\n")
                time.sleep(0.5)  # for libev to find out
        token = new_token()
        for client in late:
            client.sendall(handshake(token, new_side()))
        for first, second in (late, old):
            if first in late:
                assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
            first.sendall(NOISE)
            assert read_exactly(second, len(NOISE)) == NOISE
        honest_transfer(relay.port)
        with connect(health) as check:
            check.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert read_to_end(check).startswith(b"HTTP/1.1 200")
        for client in (*old, *late, waits):
            client.close()
        relay.wait_for_records(4)  # that of who waited among them
        assert relay.stop() == 0
        assert sorted(record["mood"] for record in relay.records()) == ["happy"] * 4 + ["lonely"]


@needs_strace
@pytest.mark.parametrize("number", ["EPERM", "ENOSYS", "ENOMEM"])
@pytest.mark.parametrize("call", [*NEEDED, *NEEDED_TO_MEET])
def test_without_what_it_needs_it_ends_with_one_line_and_status_2(tmp_path: Path, call: str, number: str) -> None:
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1"]
    if call in NEEDED_TO_MEET:
        command += ["--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [*injecting(call, number), *command], capture_output=True, text=True, timeout=30, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("relay-gevent: error: "), done.stderr


def test_what_was_read_before_a_refusal_is_delivered(relay: Relay) -> None:
    first, second = met(relay.port)
    first.sendall(NOISE[:1000])
    assert read_exactly(second, 1000) == NOISE[:1000]
    first.close()
    second.close()
    wait_until(lambda: relay.records(), what="its record")
