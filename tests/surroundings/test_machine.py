"""What the relay runs on lets it down: file descriptors, pipe memory, the disk and the reader of its log, the clock."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.clients.door import TURN_SECONDS
from relay.transfer.pipes import PIPE_BYTES
from tests.support.harness import (
    CHECKOUT,
    LISTENING,
    Relay,
    Workers,
    connect,
    fill_the_way,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    wait_until,
)
from tests.support.hostile import honest_transfer, load_while
from tests.support.kernel_view import largest_pipe
from tests.support.needs import needs_a_compiler
from tests.support.neighbours import own_user
from tests.support.usage_disk import fill


def allow_fds(pid: int, most: int) -> None:
    """Change the limit of file descriptors of a relay that runs; the hard limit stays."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))


def echo(pair: tuple[socket.socket, socket.socket] | list[socket.socket]) -> None:
    """A transfer still works, both ways."""
    for one, other in (pair, reversed(list(pair))):
        one.sendall(b"undisturbed")
        assert read_exactly(other, 11) == b"undisturbed"


def test_without_a_file_descriptor_left_it_serves_on_and_takes_newcomers_when_there_is_one(
    relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "0", recording=True)
    pairs = [[stack.enter_context(sock) for sock in met(relay.port)] for _ in range(3)]
    tokens = [new_token() for _ in range(3)]
    waiting = [stack.enter_context(connect(relay.port)) for _ in tokens]
    for sock, token in zip(waiting, tokens, strict=True):
        sock.sendall(handshake(token, new_side()))
    wait_until(lambda: relay.rows("current")[0]["waiting"] == 3, what="three wait")
    _, hard = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
    allow_fds(relay.pid, max(int(name) for name in os.listdir(f"/proc/{relay.pid}/fd")) + 1)
    partners = [stack.enter_context(connect(relay.port)) for _ in tokens]
    for sock, token in zip(partners, tokens, strict=True):
        sock.sendall(handshake(token, new_side()))
    others = [stack.enter_context(connect(relay.port)) for _ in range(200)]
    wait_until(lambda: "no file descriptor" in relay.log_text(), 5, "the log says so")
    assert load_while(1.5, relay.pid) < 0.2
    for pair in pairs:
        echo(pair)  # without pipes
    for sock in others:
        sock.close()
    for sock in pairs.pop():
        sock.close()  # which leaves room for two
    for sock in partners[:1] + waiting[:1]:
        assert read_exactly(sock, 3) == b"ok\n"
    allow_fds(relay.pid, hard)
    for sock in partners[1:] + waiting[1:]:
        assert read_exactly(sock, 3) == b"ok\n"
    honest_transfer(relay.port)
    for pair in pairs:
        echo(pair)
    assert relay.log_text().count("no file descriptor") == 1
    assert relay.stop() == 0


def test_a_worker_without_a_file_descriptor_left_costs_no_client_its_partner(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with Workers(tmp_path, "--grace", "0", count=2) as workers:
        pid = workers.workers[0].pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        allow_fds(pid, max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1)
        tokens = [new_token() for _ in range(30)]
        clients = [(stack.enter_context(connect(workers.port)), token) for token in tokens * 2]
        for sock, token in clients:
            sock.sendall(handshake(token, new_side()))
        # Those whose home is the other worker meet at once; those of this one as soon as it can have them.
        time.sleep(2.5)
        assert load_while(1, *workers.pids) < 0.4
        allow_fds(pid, hard)
        for sock, _ in clients:
            assert read_exactly(sock, 3) == b"ok\n"
        for number in range(30):
            echo([clients[number][0], clients[number + 30][0]])
        for sock, _ in clients:
            sock.close()
        workers.wait_for_records(30)
        assert {record["mood"] for record in workers.records()} == {"happy"}


def test_a_worker_without_a_file_descriptor_left_is_quiet_when_a_newcomer_knocks_and_lets_it_in_later(
    tmp_path: Path,
) -> None:
    with Workers(tmp_path, count=2) as workers:
        full = workers.workers[0]
        _, hard = resource.prlimit(full.pid, resource.RLIMIT_NOFILE)
        allow_fds(full.pid, 3)  # it keeps what it has
        newcomer = workers.start_one()
        assert load_while(2, full.pid) < 0.2
        joined = f"worker {newcomer.pid} has joined"
        assert joined not in full.log_text()
        allow_fds(full.pid, hard)
        wait_until(lambda: joined in full.log_text(), 10, "it is let in")
        honest_transfer(workers.port)


HOG = """
import fcntl, os, sys
while True:
    try:
        fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)
    except PermissionError:
        break
print("used up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("count", [1, 2])
def test_with_the_pipe_memory_of_its_user_used_up_it_still_relays_and_as_before_when_there_is_some_again(
    count: int, stack: contextlib.ExitStack
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may run a relay as another user, who alone is limited; run the tests as root")
    user = str(own_user())  # whose pipe memory no neighbour uses, nor misses
    as_user = ["setpriv", "--reuid", user, "--regid", "65534", "--clear-groups"]
    importing = [*as_user, sys.executable, "-c", "import relay.cli"]
    tried = subprocess.run(importing, cwd="/", env={"PYTHONPATH": str(CHECKOUT)}, capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("an ordinary user may not read this checkout, or setpriv(1) is missing: apt-get install util-linux")
    hog = stack.enter_context(
        subprocess.Popen(
            [*as_user, sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
    )
    stack.callback(hog.kill)
    assert hog.stdout is not None
    assert hog.stdout.readline() == "used up\n"
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.chmod(0o777)  # below one that everybody may enter
    workers = stack.enter_context(Workers(folder, "--grace", "0", count=count, inside=as_user, recording=False))
    for _ in range(4):
        fill_the_way(met(workers.port, stack=stack)[0])
    honest_transfer(workers.port, 20_000_000)
    assert not any(map(largest_pipe, workers.pids)), "a pipe that is not large is worse than a copy"
    hog.kill()
    hog.wait()
    for _ in range(10 * count):  # so that each worker has one
        honest_transfer(workers.port, 3_000_000)
        time.sleep(TURN_SECONDS / 2)
    assert [largest_pipe(pid) for pid in workers.pids] == [PIPE_BYTES] * count


def test_a_log_on_a_full_disk_stops_nothing(small_disk: Path, stack: contextlib.ExitStack) -> None:
    with Relay(small_disk, "--max-waiting-per-token", "1", "--grace", "0") as relay:
        with relay.log.open("a") as log:
            log.write("-" * (os.sysconf("SC_PAGESIZE") - relay.log.stat().st_size - 1) + "\n")  # the page it has
        fill(small_disk / "filler")
        pair = [stack.enter_context(sock) for sock in met(relay.port)]
        token = new_token()
        line = handshake(token, new_side())
        for _ in range(10):
            stack.enter_context(connect(relay.port)).sendall(line)  # a bound is met, and would be said
        time.sleep(1.2)
        honest_transfer(relay.port)
        echo(pair)
        assert "--max-waiting-per-token" not in relay.log_text()
        relay.process.send_signal(signal.SIGHUP)
        assert relay.stop() == 0


def test_a_log_whose_disk_has_space_again_goes_on(small_disk: Path, stack: contextlib.ExitStack) -> None:
    with Relay(small_disk, "--grace", "0") as relay:
        fill(small_disk / "filler")
        with relay.log.open("a") as log:
            log.write("-" * (os.sysconf("SC_PAGESIZE") - relay.log.stat().st_size - 1) + "\n")
        honest_transfer(relay.port)
        (small_disk / "filler").unlink()
        assert relay.stop() == 0
        lines = relay.log_text().splitlines()
        assert lines[-1].endswith("stopped")


def test_a_log_whose_reader_is_gone_stops_nothing(stack: contextlib.ExitStack) -> None:
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1"]
    relay = stack.enter_context(
        subprocess.Popen(
            [*command, "--max-waiting-per-token", "1", "--grace", "0"],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(relay.kill)
    assert relay.stderr is not None
    listening = LISTENING.search(relay.stderr.readline())
    assert listening is not None
    port = int(listening[2])
    pair = [stack.enter_context(sock) for sock in met(port)]
    relay.stderr.close()
    line = handshake(new_token(), new_side())
    for _ in range(3):
        stack.enter_context(connect(port)).sendall(line)
    time.sleep(1.2)
    honest_transfer(port)
    echo(pair)
    assert load_while(0.5, relay.pid) < 0.3
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(10) == 0


SET_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = "";
    int fd = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
        return 0;
    close(fd);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(clock, at);
    if (answer == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        at->tv_sec += offset();
    return answer;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return at ? (*at = now.tv_sec) : now.tv_sec;
}
"""
"""Sets the clock for one process: libfaketime 0.9.10 cannot, with Python, leave CLOCK_MONOTONIC alone."""


@needs_a_compiler
def test_a_clock_that_is_set_leaves_all_durations_true(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    (tmp_path / "clock.c").write_text(SET_CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    offset = tmp_path / "offset"

    def set_clock(seconds: int) -> None:
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").rename(offset)

    set_clock(0)
    faked = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    timeouts = ("--handshake-timeout", "4", "--wait-timeout", "4", "--idle-timeout", "600")
    with Relay(tmp_path, *timeouts, recording=True, env=faked) as relay:
        began = time.time()
        first = [stack.enter_context(sock) for sock in met(relay.port)]
        waiting = stack.enter_context(connect(relay.port))
        waiting.sendall(handshake(new_token(), new_side()))
        mute = stack.enter_context(connect(relay.port))
        mute.sendall(b"p")  # without a byte it would be a health check, and on no record
        wait_until(lambda: relay.rows("current")[0]["waiting"] == 1, what="both are known to the relay")
        for step in (7200, -3600, 86400 * 400, 0):
            set_clock(step)
            time.sleep(0.4)
            honest_transfer(relay.port)
            echo(first)
        assert mute.recv(100) == b"bad handshake\n"
        assert waiting.recv(1) == b""
        assert 3 < time.time() - began < 8, "timeouts are true"
        for sock in first:
            sock.close()
        records = relay.wait_for_records(7)
        assert all(0 <= record["total_time"] < 10 for record in records)
        assert sorted(record["total_time"] for record in records)[-3] >= 1.6, "those that saw the clock being set"
        # What a record says of when is what the clock said then.
        hours = sorted(round((record["started"] - began) / 3600) for record in records)
        assert hours == [-1, 0, 0, 0, 0, 2, 9600]
        wait_until(lambda: relay.row("current") == (0, 0, 0), what="`current` follows")
        assert relay.stop() == 0
