"""The kernel, or a sandbox, refuses a system call, with whatever number: the relay does without, or says so in a line.

strace(1) does the refusing. `NEEDLESS` are the calls that the relay can do without, at the start or in the middle of a
transfer; `NEEDED` those that it cannot, and then it ends with status 2 and one line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay, met, read_exactly, wait_until
from tests.support.hostile import NOISE, honest_transfer
from tests.support.needs import needs_strace

NUMBERS = ["EPERM", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EACCES", "ENOMEM"]

NEEDLESS = {
    "splice": "it copies",
    "pipe2": "it copies",
    "setsockopt": "the kernel's defaults hold",
    "getsockopt": "nobody is found dead before TCP itself gives up",
    "getpeername": "the connection counts for nobody",
    "sched_getaffinity": "nobody asks for it",
}
NEEDED = ["socket", "bind", "listen", "epoll_create1"]


def injecting(call: str, number: str, when: str = "") -> list[str]:
    """What to put before the relay's command; `when` is strace's, in counts of that call."""
    quiet = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    return [*quiet, "-e", f"inject={call}:error={number}{when and ':when=' + when}"]


@needs_strace
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("call", NEEDLESS)
def test_a_call_that_is_refused_from_the_start_is_done_without(tmp_path: Path, call: str, number: str) -> None:
    # Python's own start asks for some of these, too, and does without.
    with Relay(tmp_path, "--grace", "0", inside=injecting(call, number), recording=True) as relay:
        honest_transfer(relay.port, 2_000_000)
        assert relay.wait_for_records(1)[0]["mood"] == "happy"


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


@needs_strace
@pytest.mark.parametrize("number", ["EPERM", "ENOSYS", "ENOMEM"])
@pytest.mark.parametrize("call", NEEDED)
def test_without_what_it_needs_it_ends_with_one_line_and_status_2(tmp_path: Path, call: str, number: str) -> None:
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1"]
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
