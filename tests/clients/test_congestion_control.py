"""--congestion-control: which one the connections have, what is answered to a wrong choice, and how it changes.

Which ones there are is this machine's affair, and so is which of them it lets an ordinary user have. `reno` is in every
kernel, and open to everybody.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.clients import congestion
from relay.clients.congestion import choose_congestion_control, pace, take_over
from relay.mistakes import Mistake
from tests.support.command_line import complaint, powerless
from tests.support.harness import (
    Relay,
    Service,
    Workers,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
)
from tests.support.hostile import honest_transfer
from tests.support.kernel_view import relays_end
from tests.support.needs import needs_strace
from tests.support.web import dial_web, read_bytes, web_options, web_port

OPTION = "--congestion-control"
SETTINGS = Path("/proc/sys/net/ipv4")


def names(setting: str) -> list[str]:
    return (SETTINGS / setting).read_text().split()


def default() -> str:
    return names("tcp_congestion_control")[0]


def another() -> str:
    """One that is not the default, and that everybody may choose."""
    found = [name for name in names("tcp_allowed_congestion_control") if name != default()]
    if not found:
        pytest.skip(f"this kernel lets an ordinary user choose nothing but its default, {default()}")
    return found[0]


def of_socket(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def of_connection(relay: Service, client: socket.socket) -> str:
    """What the relay's end of this client's connection has."""
    with contextlib.closing(relays_end(relay.pids, client)) as end:
        return of_socket(end)


USERS = pytest.mark.parametrize("inside", [[], powerless()], ids=["this-user", "ordinary-user"])


# At the start.


@USERS
def test_every_connection_has_the_one_that_was_chosen(
    inside: list[str], relay_factory: Callable[..., Relay], stack: contextlib.ExitStack
) -> None:
    relay = relay_factory(OPTION, another(), "--grace", "0", inside=inside)
    for client in met(relay.port, stack=stack):
        assert of_connection(relay, client) == another()
    honest_transfer(relay.port)


def test_without_the_option_it_is_what_the_machine_has_by_default(relay_factory: Callable[..., Relay]) -> None:
    relay = relay_factory("--grace", "0")
    with connect(relay.port) as client:
        assert of_connection(relay, client) == default()


# Wrong choices. Each is answered with one line and exit status 2.


def assert_names_what_there_is(line: str) -> None:
    for name in names("tcp_available_congestion_control"):
        assert re.search(rf"this kernel has [^;]*\b{name}\b", line), line


@USERS
def test_a_name_that_the_kernel_does_not_have_is_answered_with_those_it_has(inside: list[str]) -> None:
    line = complaint(OPTION, "nosuchthing", inside=inside)
    assert line.startswith(f"{OPTION} nosuchthing: ")
    assert line.endswith("modprobe tcp_nosuchthing")
    assert_names_what_there_is(line)


@pytest.mark.parametrize("name", ["", "reno ", "reno-with-a-longer-name", "réno", "re\nno", "r'; reboot; '"])
def test_what_can_be_no_name_is_answered_with_those_it_has(name: str) -> None:
    line = complaint(f"{OPTION}={name}")
    assert line.startswith(OPTION)
    assert "modprobe" not in line
    assert_names_what_there_is(line)


class Refusals:
    """A kernel that refuses the choice, played by strace(1)."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        """Find out, in a run that ends by itself, the how manieth call of its kind `arguments` make the choice with."""
        self.arguments = arguments
        trace = folder / "trace"
        complaint(*arguments, OPTION, "nosuchthing", inside=["strace", "-o", str(trace), "-e", "trace=setsockopt"])
        calls = [line for line in trace.read_text().splitlines() if line.startswith("setsockopt(")]
        (self.call,) = (number for number, line in enumerate(calls, 1) if "TCP_CONGESTION" in line)
        self._output = str(folder / "refused")

    def inside(self, error: str) -> list[str]:
        """What to put before the command so that the choice is refused with `error`."""
        return ["strace", "-o", self._output, "-e", f"inject=setsockopt:error={error}:when={self.call}"]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    return Refusals(tmp_path_factory.mktemp("strace"))


@needs_strace
@pytest.mark.parametrize("error", ["EPERM", "EACCES"])
def test_one_that_this_user_may_not_have_is_answered_with_how_to_allow_it(error: str, refusals: Refusals) -> None:
    line = complaint(OPTION, "reno", inside=refusals.inside(error))
    assert_names_what_there_is(line)
    allowed = " ".join(names("tcp_allowed_congestion_control"))
    assert line.startswith(f"{OPTION} reno: ")
    assert line.endswith(f"sysctl -w net.ipv4.tcp_allowed_congestion_control='{allowed} reno'")


def test_what_the_kernel_keeps_for_root_is_refused_to_others_and_given_to_root(
    relay_factory: Callable[..., Relay],
) -> None:
    allowed = names("tcp_allowed_congestion_control")
    for name in names("tcp_available_congestion_control"):
        if name in allowed:
            continue  # a stock kernel may keep none back
        line = complaint(OPTION, name, inside=powerless())
        assert f"lets this user choose {' and '.join(allowed)}" in line.replace(", ", " and ")
        assert line.endswith(f"sysctl -w net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, name])}'")
        if os.geteuid() == 0:
            relay = relay_factory(OPTION, name, "--grace", "0")
            with connect(relay.port) as client:
                assert of_connection(relay, client) == name


@needs_strace
@pytest.mark.parametrize("error", ["ENOPROTOOPT", "ENOSYS", "EINVAL", "EBUSY", "ENOMEM", "EOPNOTSUPP"])
def test_any_other_refusal_is_one_line_too(error: str, refusals: Refusals) -> None:
    line = complaint(OPTION, "reno", inside=refusals.inside(error))
    assert line.startswith(f"{OPTION} reno: ")
    assert line.endswith("leave the option out to have its default")
    assert_names_what_there_is(line)


# Several workers, and a choice that changes.


@pytest.fixture(params=[[], powerless()], ids=["this-user", "ordinary-user"])
def relay_of_two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    with Workers(tmp_path, count=2, inside=request.param, recording=False) as workers:
        yield workers


def restart_each(workers: Workers, *options: str) -> None:
    """One worker after another, with other options, as misc/rolling-restart does it."""
    workers.options = options
    for number in [number for number, worker in enumerate(workers.workers) if worker.pids]:
        assert workers.stop_one(number) == 0
        workers.start_one()


def of_newcomer(workers: Workers) -> str:
    with connect(workers.port) as client:
        return of_connection(workers, client)


def test_a_rolling_restart_with_another_choice_takes_effect_and_what_moves_keeps_its_own(
    relay_of_two: Workers, stack: contextlib.ExitStack
) -> None:
    transfer = met(relay_of_two.port, stack=stack)
    assert [of_connection(relay_of_two, client) for client in transfer] == [default()] * 2
    restart_each(relay_of_two, OPTION, another())
    assert of_newcomer(relay_of_two) == another()
    assert [of_connection(relay_of_two, client) for client in transfer] == [default()] * 2
    later = met(relay_of_two.port, stack=stack)
    restart_each(relay_of_two, OPTION, another())
    assert [of_connection(relay_of_two, client) for client in later] == [another()] * 2
    restart_each(relay_of_two)
    assert of_newcomer(relay_of_two) == default()
    assert [of_connection(relay_of_two, client) for client in later] == [another()] * 2
    for one, other in (transfer, later):
        one.sendall(b"still here")
        assert read_exactly(other, 10) == b"still here"


def test_websocket_clients_have_it_too_and_keep_theirs_when_they_move(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    web = web_options()
    with Workers(tmp_path, *web, OPTION, another(), count=2, recording=False) as workers:
        browser = stack.enter_context(dial_web(web_port(workers)))
        other = stack.enter_context(connect(workers.port))
        token = new_token()
        browser.send(handshake(token, new_side()))
        other.sendall(handshake(token, new_side()))
        assert read_bytes(browser, 3) == read_exactly(other, 3) == b"ok\n"
        assert of_connection(workers, browser.socket) == another()
        restart_each(workers, *web)
        assert of_connection(workers, browser.socket) == of_connection(workers, other) == another()
        with connect(web_port(workers)) as newcomer:
            assert of_connection(workers, newcomer) == default()
        other.sendall(b"still here")
        assert read_bytes(browser, 10) == b"still here"


def test_a_wrong_choice_in_a_rolling_restart_ends_the_newcomer_and_nobody_else(relay_of_two: Workers) -> None:
    line = complaint("--run-dir", str(relay_of_two.run_dir), OPTION, "nosuchthing")
    assert line.startswith(f"{OPTION} nosuchthing: ")
    assert of_newcomer(relay_of_two) == default()
    honest_transfer(relay_of_two.port)


@needs_strace
def test_a_choice_that_is_refused_on_the_siblings_port_is_one_line_too(tmp_path: Path) -> None:
    with Workers(tmp_path, count=1, recording=False) as workers:
        arguments = ("--run-dir", str(workers.run_dir))
        refusals = Refusals(tmp_path, *arguments)
        line = complaint(*arguments, OPTION, another(), inside=refusals.inside("EPERM"))
        assert "tcp_allowed_congestion_control" in line
        assert of_newcomer(workers) == default()


# Pacing.

SO_MAX_PACING_RATE = 47


def ceiling(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8), sys.byteorder)


@USERS
def test_every_connection_is_paced_and_has_no_ceiling_that_a_path_could_reach(
    inside: list[str], relay_factory: Callable[..., Relay]
) -> None:
    relay = relay_factory("--grace", "0", inside=inside)
    with connect(relay.port) as client, contextlib.closing(relays_end(relay.pids, client)) as end:
        assert 1e12 < ceiling(end) < (1 << 64) - 1, "the last one is the kernel's sign for no pacing"


def test_a_kernel_that_does_not_pace_is_survived() -> None:
    pace(Stubborn())  # type: ignore[arg-type]


# The parts, in this process.


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


class Stubborn:
    """A socket that says what it has, and cannot be told anything else."""

    def getsockopt(self, *_: int) -> bytes:
        return b"no_default\0\0\0\0\0\0"

    def setsockopt(self, *_: object) -> None:
        raise PermissionError(1, "Operation not permitted")


def test_a_default_that_cannot_be_had_back_ends_nothing() -> None:
    take_over(Stubborn(), None)  # type: ignore[arg-type]


def test_a_port_that_an_earlier_version_opened_is_paced_when_it_is_taken_over(listener: socket.socket) -> None:
    assert ceiling(listener) == (1 << 64) - 1
    take_over(listener, None)
    assert ceiling(listener) < (1 << 64) - 1


def test_where_there_is_no_proc_the_choice_works_and_a_wrong_one_is_still_told(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = another()
    monkeypatch.setattr(congestion, "SETTINGS", str(tmp_path))
    choose_congestion_control(listener, name)
    assert of_socket(listener) == name
    take_over(listener, None)
    assert of_socket(listener) == name  # nobody says what the default is
    with pytest.raises(Mistake, match="this kernel does not say what it has"):
        choose_congestion_control(listener, "nosuchthing")
