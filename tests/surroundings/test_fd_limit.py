"""The limit of file descriptors: one that may not be asked for or raised, that is no limit, or far too much of one."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.cli import MOST_PIPES, RESERVED_FDS, USUAL_FDS, read_options
from relay.mistakes import Mistake
from relay.process import fd_limit
from relay.process.fd_limit import ASSUMED_FDS, raise_fd_limit
from tests.support.harness import CHECKOUT, Relay
from tests.support.hostile import honest_transfer
from tests.support.needs import needs_strace

Start = Callable[..., Relay]
Limits = tuple[int, int]

REFUSALS = ["EPERM", "EINVAL", "ENOSYS", "EACCES", "ENOMEM", "EOPNOTSUPP"]
PRODUCTION = USUAL_FDS - RESERVED_FDS - 2 * MOST_PIPES


def refusing(call: str, refusal: str, when: str = "1+") -> list[str]:
    """What to put before a command so that the kernel refuses it a system call with this error."""
    # -D: the process keeps its id, which belongs to the relay then, and not to strace.
    options = ["-D", "--follow-forks", "--seccomp-bpf", f"--trace={call}", "--output=/dev/null"]
    return ["strace", *options, f"--inject={call}:error={refusal}:when={when}"]


@needs_strace
@pytest.mark.parametrize("refusal", REFUSALS)
def test_where_neither_asking_nor_raising_is_allowed_it_serves_and_says_so(relay_factory: Start, refusal: str) -> None:
    # Both are this one call, in the C library of Linux.
    relay = relay_factory(inside=refusing("prlimit64", refusal), recording=True)
    honest_transfer(relay.port)
    relay.wait_for_records(1)
    assert f"the limit of file descriptors is not to be known here; it is taken for {ASSUMED_FDS}" in relay.log_text()


@needs_strace
@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_nor_does_it_keep_the_help_from_anybody(refusal: str, option: str) -> None:
    told = subprocess.run(
        [*refusing("prlimit64", refusal), sys.executable, "-m", "relay", option],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("relay-gevent")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Limits, Exception | None], list[Limits]]:
    """Play a kernel that has these limits and refuses to change them with this error; returns what is asked of it."""

    def play(now: Limits, refusal: Exception | None = None) -> list[Limits]:
        asked: list[Limits] = []
        at = [now]

        def setrlimit(kind: int, wanted: Limits) -> None:
            assert kind == resource.RLIMIT_NOFILE
            asked.append(wanted)
            if refusal is not None:
                raise refusal
            at[0] = wanted

        monkeypatch.setattr(resource, "getrlimit", lambda kind: at[0])
        monkeypatch.setattr(resource, "setrlimit", setrlimit)
        return asked

    return play


Play = Callable[..., list[Limits]]


@pytest.mark.parametrize("hard", [65_536, 1 << 20, 1_000_000_000, 1_073_741_816])
def test_of_a_large_limit_so_much_is_used_as_production_has(limits: Play, hard: int) -> None:
    limits((hard, hard))
    options = read_options([])
    assert options.max_connections == options.most_held == PRODUCTION
    assert options.most_pipes == MOST_PIPES
    assert options.max_waiting <= PRODUCTION
    assert read_options(["--run-dir", "run"]).max_connections == PRODUCTION // 2


def test_more_of_it_is_used_when_asked_for(limits: Play) -> None:
    limits((1 << 20, 1 << 20))
    options = read_options(["--max-connections", "200000"])
    assert options.max_connections == 200_000
    assert options.most_held == 400_000  # as many again may be handed on
    with pytest.raises(Mistake, match="the limit of file descriptors allows 1048448"):
        read_options(["--max-connections", "1048449"])


def test_no_limit_is_one_that_is_large(limits: Play) -> None:
    limits((resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert raise_fd_limit() == ""
    assert read_options([]).max_connections == PRODUCTION
    assert read_options(["--max-connections", "200000"]).max_connections == 200_000


@pytest.mark.parametrize("hard", [resource.RLIM_INFINITY, 1_073_741_816])
def test_no_more_is_asked_for_than_the_kernel_ever_gives(
    limits: Play, hard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fd_limit, "_most_of_any_process", lambda: 1 << 20)
    asked = limits((1024, hard))
    assert raise_fd_limit() == ""
    assert asked == [(1 << 20, 1 << 20)]


@pytest.mark.parametrize(
    "refusal", [ValueError("not allowed to raise maximum limit"), PermissionError(1, ""), OSError(38, "")], ids=str
)
def test_a_limit_that_cannot_be_raised_is_what_there_is(limits: Play, refusal: Exception) -> None:
    limits((4096, 20_000), refusal)
    assert raise_fd_limit() == "the limit of file descriptors stays at 4096: this system refuses to raise it to 20000"
    assert read_options([]).most_held + 2 * read_options([]).most_pipes == 4096 - RESERVED_FDS


def test_a_limit_that_need_not_be_raised_is_left_alone(limits: Play) -> None:
    asked = limits((20_000, 20_000), PermissionError(1, ""))
    assert raise_fd_limit() == ""
    assert asked == []


def test_a_kernel_that_does_not_tell_what_it_gives_is_taken_for_a_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "")

    monkeypatch.setattr("builtins.open", no_proc)
    assert fd_limit._most_of_any_process() == fd_limit.NR_OPEN


def calls_before_raising(folder: Path) -> int:
    """Tell how many calls like this one a start makes before the one that raises the limit."""
    trace = folder / "trace"
    tracing = ["strace", "--trace=prlimit64", f"--output={trace}"]
    lowered = ["/bin/sh", "-c", 'ulimit -S -n 4000 && exec "$@"', "sh"]
    subprocess.run(
        [*lowered, *tracing, sys.executable, "-m", "relay", "--version"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        timeout=30,
        check=True,
    )
    calls = [line for line in trace.read_text().splitlines() if line.startswith("prlimit64")]
    (raising,) = [number for number, call in enumerate(calls) if "RLIMIT_NOFILE, {" in call]
    return raising


@needs_strace
def test_a_refused_raise_is_told_once_and_costs_nothing_else(relay_factory: Start, tmp_path: Path) -> None:
    refused = refusing("prlimit64", "EPERM", f"{calls_before_raising(tmp_path) + 1}+")
    relay = relay_factory(inside=["/bin/sh", "-c", 'ulimit -S -n 4000 && exec "$@"', "sh", *refused], recording=True)
    honest_transfer(relay.port)
    relay.wait_for_records(1)
    told = [line for line in relay.log_text().splitlines() if "limit of file descriptors" in line]
    assert len(told) == 1, relay.log_text()
    assert "the limit of file descriptors stays at 4000: this system refuses to raise it to " in told[0]


@needs_strace
@pytest.mark.parametrize("refusal", REFUSALS)
def test_transfers_go_on_where_asking_is_refused_from_some_moment_on(relay_factory: Start, refusal: str) -> None:
    relay = relay_factory(recording=True)
    command = refusing("prlimit64", refusal)
    command.remove("-D")
    command.remove("--seccomp-bpf")  # which is for what strace itself starts
    with subprocess.Popen([*command, "-p", str(relay.pid)], stderr=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
            honest_transfer(relay.port)
        finally:
            tracer.terminate()
    (record,) = relay.wait_for_records(1)
    assert record["total_bytes"] > 0
