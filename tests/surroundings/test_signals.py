"""Every signal that can be caught ends a worker in good order or does nothing: none costs a record.

At any time, from the moment in which its own code begins to run; and however its parent has left the signals.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Patience, Relay, accepts, met, read_exactly, read_to_end, wait_until
from tests.support.supervised import is_running, supervised
from tests.support.usage_records import holding_the_lock

Start = Callable[..., Relay]
ENDING = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGABRT", "SIGALRM", "SIGPWR", "SIGXCPU"]
UNCATCHABLE = {signal.SIGKILL, signal.SIGSTOP}
NOTHING = sorted(signal.valid_signals() - {signal.Signals[name] for name in [*ENDING, "SIGTSTP"]} - UNCATCHABLE)


def transfer(relay: Relay, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Two sides under way, which will be closed with the test."""
    sender, receiver = met(relay.port)
    stack.enter_context(sender)
    stack.enter_context(receiver)
    sender.sendall(b"so far")
    assert read_exactly(receiver, 6) == b"so far"
    return sender, receiver


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_that_ends_it_costs_no_record(name: str, relay_factory: Start, stack: contextlib.ExitStack) -> None:
    relay = relay_factory("--grace", "0.3", recording=True)
    transfer(relay, stack)
    relay.process.send_signal(signal.Signals[name])
    assert relay.wait(10) == 0
    assert [(record["mood"], record["total_bytes"]) for record in relay.records()] == [("happy", 6)]
    assert [(row["result"], row["bytes"]) for row in relay.rows("usage")] == [("happy", 6)]
    assert tuple(relay.rows("current")[0]) == (0, 0, 0)
    assert relay.log_text().rstrip().endswith("stopped")


def test_all_other_signals_do_nothing(relay_factory: Start, stack: contextlib.ExitStack) -> None:
    assert len(NOTHING) > 50
    relay = relay_factory(recording=True)
    sender, receiver = transfer(relay, stack)
    for number in NOTHING:
        relay.process.send_signal(number)
        sender.sendall(b"and on")
        assert read_exactly(receiver, 6) == b"and on", f"after signal {number}"
        assert relay.process.poll() is None, f"signal {number}"
    sender.close()
    assert read_to_end(receiver) == b""
    receiver.close()
    assert relay.wait_for_records(1)[0]["total_bytes"] == 6 * (1 + len(NOTHING))
    assert len(relay.log_text().splitlines()) == 1, relay.log_text()


def stands_still(pid: int) -> bool:
    """Whether a process is stopped."""
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def signal_of_a_terminal() -> signal.Signals:
    """SIGTSTP, if the kernel lets that stop anybody here; where no shell looks after our process group, it does not."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        sleeper.send_signal(signal.SIGTSTP)
        try:
            wait_until(lambda: stands_still(sleeper.pid), 1)
            return signal.SIGTSTP
        except AssertionError:
            return signal.SIGSTOP
        finally:
            sleeper.kill()


def test_a_suspended_one_goes_on_when_it_is_continued(relay_factory: Start, stack: contextlib.ExitStack) -> None:
    relay = relay_factory()
    sender, receiver = transfer(relay, stack)
    relay.process.send_signal(signal_of_a_terminal())
    wait_until(lambda: stands_still(relay.pid), what="it stands still")
    sender.sendall(b"and on")
    relay.process.send_signal(signal.SIGCONT)
    assert read_exactly(receiver, 6) == b"and on"


def test_what_the_system_repeats_each_second_does_not_end_it_at_once(
    relay_factory: Start, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "60", recording=True)
    sender, receiver = transfer(relay, stack)
    for name in ["SIGXCPU", "SIGXCPU", "SIGPWR", "SIGALRM", "SIGTERM"]:
        relay.process.send_signal(signal.Signals[name])
        wait_until(lambda: "60 seconds to finish" in relay.log_text(), what="it stops")
        sender.sendall(b"and on")
        assert read_exactly(receiver, 6) == b"and on", f"after {name}"
    relay.process.send_signal(signal.SIGINT)  # the second that somebody sends
    assert relay.wait(10) == 0
    assert [record["total_bytes"] for record in relay.records()] == [36]


PATIENT = "import sys, relay.cli; relay.cli.RECORDS_SECONDS = 600.0; sys.argv[:4] = sys.argv[3:4]; relay.cli.main()"
"""To be run before the command of a relay: one that would wait that long for its last records."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("during", ["its last records", "the grace of a transfer"])
def test_a_second_one_ends_it_at_once_while_records_are_held_back_and_it_says_how_many_are_lost(
    name: str, during: str, relay_factory: Start, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory("--grace", "600", recording=True, inside=[sys.executable, "-c", PATIENT])
    with holding_the_lock(relay.usage_db):
        for side in transfer(relay, stack):
            side.close()
        wait_until(lambda: "records are kept until it works again (1 now)" in relay.log_text(), 30, "it is held back")
        if during == "the grace of a transfer":
            transfer(relay, stack)
        relay.process.send_signal(signal.Signals[name])
        wait_until(lambda: "1 records are held back" in relay.log_text(), what="it is told to stop")
        if during == "its last records":
            wait_until(lambda: not accepts(relay.port), what="nothing is left to do but to write")
        relay.process.send_signal(signal.Signals[name])
        assert relay.wait(60) == 0
    count = 1 if during == "its last records" else 2
    lines = relay.log_text().splitlines()
    assert f"{relay.usage_db}: {count} records are lost, the relay had to end before: another program" in lines[-2]
    assert lines[-1].endswith("stopped")
    assert len(relay.records()) == count


SLOW_BETWEEN = """\
import sys, time, relay.cli
from relay.process.signals import Ending
go_on = Ending.go_on_without_loop
def later(self, hurry):
    print("the loop has ended", file=sys.stderr, flush=True)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        time.sleep(0.01)
    go_on(self, hurry)
Ending.go_on_without_loop = later
relay.cli.RECORDS_SECONDS = 600.0
sys.argv[:4] = sys.argv[3:4]
relay.cli.main()
"""
"""To be run before the command of a relay: one that has a second between the last turn of its event loop and the moment
from which its signals are heard without one, and would wait ten minutes for its last records."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGABRT"])
def test_a_second_one_that_comes_when_the_loop_has_just_ended_is_heard(
    name: str, relay_factory: Start, stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(recording=True, inside=[sys.executable, "-c", SLOW_BETWEEN])
    with holding_the_lock(relay.usage_db):
        for side in transfer(relay, stack):
            side.close()
        wait_until(lambda: "records are kept until it works again (1 now)" in relay.log_text(), 30, "it is held back")
        relay.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "the loop has ended" in relay.log_text(), what="nothing is left to do but to write")
        relay.process.send_signal(signal.Signals[name])
        assert relay.wait(60) == 0
    assert "1 records are lost, the relay had to end before: another program" in relay.log_text()


@pytest.mark.parametrize("how", ["segmentation fault", "abort", "segmentation fault in another thread"])
def test_a_real_fault_still_ends_the_process(how: str) -> None:
    program = {
        "segmentation fault": "ctypes.string_at(0)",
        "abort": "ctypes.CDLL(None).abort()",
        "segmentation fault in another thread": "t = threading.Thread(target=ctypes.string_at, args=[0])\n"
        "t.start(); t.join()",
    }[how]
    preparing = "import ctypes, resource, threading\nfrom relay.process.signals import be_ready_for_signals"
    without_core = "be_ready_for_signals()\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    done = subprocess.run(
        [sys.executable, "-c", f"{preparing}\n{without_core}\n{program}\nprint('survived')"],
        cwd=CHECKOUT,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGABRT)
    assert done.stdout == b""


# At the start.

SEND_AT = """
import os, sys

class Sender:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Sender())
"""
"""A sitecustomize.py that sends a signal to its own process when a module is about to be imported."""

MOMENTS = ["relay.cli", "relay.process.program", "docopt", "gevent", "relay.server", "relay.usage.database", "_sqlite3"]


def run_with_signal(folder: Path, module: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run relay-gevent, which gets a signal when it is about to import `module`, to its end."""
    (folder / "sitecustomize.py").write_text(SEND_AT.format(module=module, number=int(number)))
    recording = ["--usage-db", str(folder / "usage.sqlite"), "--run-dir", str(folder / "run")]
    return subprocess.run(
        [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1", *recording, *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder}:{CHECKOUT}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGALRM"])
@pytest.mark.parametrize("module", MOMENTS)
def test_one_that_ends_it_while_it_starts_ends_it_silently(tmp_path: Path, module: str, name: str) -> None:
    done = run_with_signal(tmp_path, module, signal.Signals[name])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGHUP", "SIGPROF"])
@pytest.mark.parametrize("module", MOMENTS)
def test_one_that_means_nothing_does_nothing_while_it_starts(tmp_path: Path, module: str, name: str) -> None:
    # A mistake that is found after all the imports ends it by itself.
    (tmp_path / "usage.sqlite").write_text("not a database, but long enough to have a header of a hundred bytes\n" * 20)
    done = run_with_signal(tmp_path, module, signal.Signals[name])
    assert done.returncode == 2
    assert done.stderr.startswith("relay-gevent: error: --usage-db ")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_one_that_waits_for_its_turn_to_join_can_be_ended(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1", "--run-dir", str(run_dir)]
    with (run_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        worker = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: has_open(worker.pid, run_dir / "lock"), what="it waits")
            worker.send_signal(signal.Signals[name])
            assert worker.communicate(timeout=10)[1] == ""
            assert worker.returncode == 0
        finally:
            worker.kill()
            worker.wait()


def has_open(pid: int, path: Path) -> bool:
    """Tell whether a process has this file open."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a file that was open for a moment
            if os.readlink(fd) == str(path):
                return True
    return False


def started_by(program: str) -> list[str]:
    """What to put before a command so that `program` runs in its process first."""
    return [sys.executable, "-c", f"import os, signal, sys\n{program}\nos.execvp(sys.argv[1], sys.argv[1:])"]


def test_it_can_be_ended_though_its_parent_had_the_signals_blocked(relay_factory: Start) -> None:
    for number in ("SIGTERM", "SIGINT", "SIGQUIT"):
        blocking = started_by("signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())")
        relay = relay_factory(inside=blocking)
        relay.process.send_signal(signal.Signals[number])
        assert relay.wait(10) == 0


def test_an_alarm_that_was_set_for_it_ends_it_in_good_order(relay_factory: Start, stack: contextlib.ExitStack) -> None:
    relay = relay_factory("--grace", "0", recording=True, inside=started_by("signal.alarm(3)"))
    transfer(relay, stack)
    assert relay.wait(10) == 0
    assert [record["mood"] for record in relay.records()] == ["happy"]


IMPATIENT = """
import os, signal, sys, relay.cli
class Impatient:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=getattr(signal, sys.argv[1])):
        kill(pid, number)
impatient = Impatient()
sys.argv[:5] = sys.argv[4:5]
relay.cli.main()
"""
"""To be run, with the name of a signal, before the command of a relay: it is sent once more when Python has given all
signals their own meaning again, and forgets what the program had."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_one_that_comes_when_all_is_done_does_not_make_it_look_killed(name: str, relay_factory: Start) -> None:
    relay = relay_factory(inside=[sys.executable, "-c", IMPATIENT, name])
    relay.process.send_signal(signal.Signals[name])
    assert relay.wait(10) == 0


# As platforms end it.

DOCKER_SECONDS = 10.0
"""How long `docker stop` waits before it kills."""


def test_docker_stop_leaves_time_for_a_record_of_each_transfer_that_it_cuts(stack: contextlib.ExitStack) -> None:
    with supervised() as service:
        sides = [stack.enter_context(side) for _ in range(100) for side in met(service.port)]
        for sender in sides[::2]:
            sender.sendall(b"so far")
        pids = [service.supervisord_pid(), *service.pids()]
        os.kill(pids[0], signal.SIGTERM)
        patience = Patience(DOCKER_SECONDS)
        while any(is_running(pid) for pid in pids) and not patience.is_over():
            time.sleep(0.05)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_running(pid) for pid in pids), what="all have ended")
        assert service.query("SELECT result, count(*) FROM usage GROUP BY 1") == [("happy", 100)]
        lines = (service.relay_folder / "usage.jsonl").read_text().splitlines()
        assert len(lines) == 100
        stopped = [line for line in service.log_lines() if line.endswith("stopped")]
        assert len(stopped) == 2, service.logs()
