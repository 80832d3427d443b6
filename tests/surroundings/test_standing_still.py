"""The event loop waits for nothing but its sockets: not for the reader of its own log, whatever that is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, accepts, free_port, wait_until
from tests.support.hostile import honest_transfer

F_SETPIPE_SZ = 1031
Reader = Callable[[contextlib.ExitStack], int]


def full_pipe(stack: contextlib.ExitStack) -> int:
    """A pipe that nobody empties any more."""
    outlet, inlet = os.pipe()
    stack.callback(os.close, outlet)
    fcntl.fcntl(inlet, F_SETPIPE_SZ, 4096)
    os.set_blocking(inlet, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(inlet, bytes(4096))
    os.set_blocking(inlet, True)
    return inlet


def stopped_terminal(stack: contextlib.ExitStack) -> int:
    """A terminal in which somebody has typed Ctrl-S."""
    master, terminal = pty.openpty()
    stack.callback(os.close, master)
    attributes = termios.tcgetattr(terminal)
    attributes[0] |= termios.IXON
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    termios.tcflow(terminal, termios.TCOOFF)
    return terminal


def full_socket(stack: contextlib.ExitStack) -> int:
    """A socket whose other end does not read, as a log collector's may be."""
    ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4096))
    theirs.setblocking(True)
    del ours
    return os.dup(theirs.fileno())


@pytest.mark.parametrize("reader", [full_pipe, stopped_terminal, full_socket])
def test_a_log_whose_reader_stands_still_stops_neither_transfers_nor_newcomers_nor_the_end(
    tmp_path: Path, stack: contextlib.ExitStack, reader: Reader
) -> None:
    stderr, port = reader(stack), free_port()
    try:
        relay = subprocess.Popen(
            [sys.executable, "-m", "relay", "--port", str(port), "--interface", "127.0.0.1", "--run-dir", "run"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    finally:
        os.close(stderr)
    stack.callback(relay.wait, 10)
    stack.callback(relay.kill)
    wait_until(lambda: accepts(port), what="the relay accepts connections")
    for _ in range(3):
        honest_transfer(port, 1_000_000)
    for _ in range(40):  # each of these is a line in the log
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = next(path for path in (tmp_path / "run").iterdir() if path.name.startswith("worker-"))
        link.connect(str(name))
        link.send(b"nonsense")
        link.close()
    honest_transfer(port, 1_000_000)
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(10) == 0


def test_lines_that_nobody_reads_are_counted_and_the_others_arrive_when_somebody_does(tmp_path: Path) -> None:
    outlet, inlet = os.pipe()
    fcntl.fcntl(inlet, F_SETPIPE_SZ, 4096)
    program = (
        "from relay.process import log; from relay.usage.own_log import MOST_LINES, OwnLog; own_log = OwnLog();"
        "log.send_to(own_log.write);"
        "[log.tell('line %d', number) for number in range(MOST_LINES + 500)]; print(flush=True);"
        "import sys; sys.stdin.read(1); log.tell('after'); own_log.finish(10)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=inlet, env=environment
    )
    os.close(inlet)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"\n"  # it has logged all that
        text = b""
        os.set_blocking(outlet, False)
        deadline = time.monotonic() + 20
        told = False
        while time.monotonic() < deadline and b"after" not in text:
            try:
                chunk = os.read(outlet, 65536)
                if not chunk:
                    break
                text += chunk
            except BlockingIOError:
                if not told and b"line 900" in text:
                    told = True
                    assert writer.stdin is not None
                    writer.stdin.write(b"x")
                    writer.stdin.flush()
                time.sleep(0.01)
        assert writer.wait(10) == 0
    finally:
        os.close(outlet)
        writer.kill()
    lines = text.decode().splitlines()
    assert lines[0].endswith("line 0")
    assert lines[-1].endswith("after")
    lost = [int(line.split("] ")[1].split()[0]) for line in lines if "lines are lost" in line]
    kept = [line for line in lines if " line " in line]
    assert lost
    assert len(kept) + sum(lost) == 1500
