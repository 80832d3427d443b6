"""The probes of misc/container, asked as a platform asks them: of a relay that is full, and has no status page."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay, connect, new_side, read_to_end, shake_hands
from tests.support.hostile import beside, move
from tests.support.namespaces import Host, not_allowed

FOLDER = CHECKOUT / "misc" / "container"
KUBERNETES = (FOLDER / "kubernetes.yaml").read_text()
PORTS = {name: int(port) for name, port in re.findall(r"\{name: (\w+), containerPort: (\d+)\}", KUBERNETES)}
PROBES = {
    kind: (PORTS[port], path)
    for kind, path, port in re.findall(r"(\w+)Probe:\n +httpGet: \{path: (\S+), port: (\w+)\}", KUBERNETES)
}

pytestmark = pytest.mark.skipif(bool(not_allowed()), reason=not_allowed())


@pytest.fixture
def host() -> Iterator[Host]:
    """A host whose listen queues are short, so that they are soon full, as a container's may be."""
    host = Host(f"rg{new_side()}")
    try:
        host.create()
        short = ["sh", "-c", "echo 16 >/proc/sys/net/core/somaxconn"]
        subprocess.run([*host.inside, *short], timeout=20, check=True)
        yield host
    finally:
        host.remove()


def finds_no_room(call: Callable[[], object]) -> bool:
    """Whether nobody answers a call."""
    try:
        call()
    except TimeoutError:
        return True
    return False


@contextlib.contextmanager
def full_relay(host: Host, folder: Path) -> Iterator[Relay]:
    """A relay with the container's ports, no place and no room in its listen queues, and no status page."""
    options = ["--websocket", str(PORTS["websocket"]), "--health", str(PORTS["health"]), "--grace", "0"]
    options += ["--max-connections", "4", "--max-per-source", "4"]
    with (
        Relay(folder, *options, port=PORTS["tcp"], interface="::", inside=host.inside) as relay,
        contextlib.ExitStack() as stack,
    ):

        def call(port: int, timeout: float = 10) -> socket.socket:
            return stack.enter_context(host.make_there(partial(connect, port, timeout=timeout)))

        for _ in range(2):
            first, second = call(PORTS["tcp"]), call(PORTS["tcp"])
            shake_hands(first, second)
            stack.enter_context(beside(partial(move, first, second)))
        for name in ("tcp", "websocket"):
            assert any(finds_no_room(partial(call, PORTS[name], 0.5)) for _ in range(100)), name
        yield relay


def said(host: Host, port: int, path: str) -> bytes:
    """What a GET is answered with within the five seconds that a probe has; OSError without."""
    with host.make_there(lambda: connect(port, timeout=5)) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {port}\r\nConnection: close\r\n\r\n".encode())
        return read_to_end(sock, 5)


def healthy(host: Host, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and words of /relay/healthy."""
    command = [*host.inside, sys.executable, "-I", str(FOLDER / "healthy"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout + done.stderr


def test_no_probe_ends_a_relay_that_is_full_or_takes_it_out_of_service_without_its_status_page(
    host: Host, tmp_path: Path
) -> None:
    assert set(PROBES) == {"startup", "liveness", "readiness"}
    compose = re.search(r"test: \[CMD, /relay/healthy(?:, (\S+))?\]", (FOLDER / "compose.yaml").read_text())
    assert compose is not None
    with full_relay(host, tmp_path):
        for kind, (port, path) in PROBES.items():
            assert said(host, port, path).startswith(b"HTTP/1.1 200 "), kind
        assert healthy(host, *filter(None, compose.groups())) == (0, "a worker answers\n")
        status, words = healthy(host)
        assert (status, words.startswith("the status page does not answer")) == (1, True)


def test_probes_find_a_relay_that_does_not_run(host: Host) -> None:
    for port, path in PROBES.values():
        with pytest.raises(ConnectionRefusedError):
            said(host, port, path)
    status, words = healthy(host, "--alive")
    assert (status, words.startswith("no worker answers")) == (1, True)


def test_a_proxy_for_others_is_not_asked_whether_the_relay_lives(host: Host, tmp_path: Path) -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://192.0.2.9:3128")
    with Relay(tmp_path, "--health", "4003", inside=host.inside):
        assert healthy(host, "--alive", **proxies) == (0, "a worker answers\n")


@pytest.mark.parametrize(
    "health", ["4013", "tcp:4013", "tcp:4013:interface=127.0.0.9", r"tcp:4013:interface=\:\:1"]
)
def test_a_worker_is_asked_wherever_the_container_has_it_answer(host: Host, tmp_path: Path, health: str) -> None:
    with Relay(tmp_path, "--health", health, inside=host.inside):
        assert healthy(host, "--alive", RELAY_HEALTH=health) == (0, "a worker answers\n")
    status, words = healthy(host, "--alive", RELAY_HEALTH=health)
    assert (status, words.startswith("no worker answers")) == (1, True)


def test_without_a_port_for_checks_it_says_so(host: Host) -> None:
    assert healthy(host, "--alive", RELAY_HEALTH="") == (1, "RELAY_HEALTH names no port for health checks\n")
    for health in ("none", "tcp:4003:interface="):
        status, words = healthy(host, "--alive", RELAY_HEALTH=health)
        assert status == 1
        assert words.startswith(f"RELAY_HEALTH, RELAY_LISTEN, RELAY_OPTIONS: --health {health}: give a number from 0")


@pytest.mark.parametrize(
    ("listen", "options"),
    [
        ("4090", "--interface :: --workers 2"),
        ("", "--workers 2 --interface=0.0.0.0"),
        ("4090", "--workers 2"),
        ("4090", "--workers 2 --interface 127.0.0.9"),
        ("4090", "--interface ::1"),
    ],
)
def test_the_status_page_is_asked_wherever_the_container_has_it_listen(
    host: Host, tmp_path: Path, listen: str, options: str
) -> None:
    pytest.importorskip("prometheus_client")
    command = [*host.inside, sys.executable, "-m", "relay.status.cli", "--usage-db", str(tmp_path / "usage.sqlite")]
    status = subprocess.Popen(
        [*command, "--port", listen or "4080", *options.split()], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert status.stderr is not None
        assert "the status page is at" in status.stderr.readline()
        code, words = healthy(host, RELAY_STATUS_LISTEN=listen, RELAY_STATUS_OPTIONS=options)
    finally:
        status.terminate()
        status.communicate(timeout=20)
    assert code == 1  # there is no relay, as it says
    assert words
    assert "does not answer" not in words
    assert "127.0.0" not in words
