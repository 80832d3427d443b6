"""The simulator of long paths does what it says, and leaves nothing behind.

What relays do over it is measured by `make bench-paths`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command_line import powerless
from tests.support.harness import CHECKOUT, Relay, read_exactly, shake_hands
from tests.support.namespaces import Host
from tests.support.wan import (
    CFLAGS,
    RELAY_ADDRESS,
    SOURCE,
    STOCK,
    Leg,
    LongPaths,
    WanError,
    congestion_by_route,
    long_paths,
    not_allowed,
    settle,
)

BENCH = CHECKOUT / "misc" / "bench" / "paths.py"
PACKET = 1000
OVERHEAD = 28  # of IPv4 and UDP
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it


@pytest.fixture(scope="module", autouse=True)
def skip_unless_allowed() -> None:
    if reason := not_allowed():
        pytest.skip(reason)


class Line:
    """UDP from the sender to the relay's host, to see what becomes of each packet."""

    def __init__(self, net: LongPaths, stack: contextlib.ExitStack) -> None:
        self._sends = stack.enter_context(net.sender.make_there(self._sending))
        self._takes = stack.enter_context(net.relay.make_there(self._taking))

    @staticmethod
    def _sending() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    @staticmethod
    def _taking() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        sock.bind((RELAY_ADDRESS, 9))
        return sock

    def send(self, count: int) -> None:
        """So many packets at once, each with its number."""
        for number in range(count):
            self._sends.sendto(number.to_bytes(4, "big").ljust(PACKET - OVERHEAD), (RELAY_ADDRESS, 9))

    def take(self, silence: float) -> list[int]:
        """The numbers of those that come, until there is so much silence, in seconds."""
        self._takes.settimeout(silence)
        came = []
        with contextlib.suppress(TimeoutError):
            while True:
                came.append(int.from_bytes(self._takes.recv(PACKET)[:4], "big"))
        return came


def test_a_packet_takes_as_long_as_it_was_told(stack: contextlib.ExitStack) -> None:
    for rtt_ms in (40, 200):
        with long_paths(Leg(rtt_ms=rtt_ms), Leg()) as net:
            listener = stack.enter_context(net.relay.make_there(lambda: socket.create_server((RELAY_ADDRESS, 0))))
            client = stack.enter_context(net.connect(net.sender, listener.getsockname()[1]))
            other = stack.enter_context(listener.accept()[0])
            times = []
            for _ in range(5):
                began = time.monotonic()
                client.sendall(b"ping")
                other.sendall(read_exactly(other, 4))
                read_exactly(client, 4)
                times.append((time.monotonic() - began) * 1000)
            assert rtt_ms <= min(times) < rtt_ms + 35


def test_no_more_comes_than_the_line_carries(stack: contextlib.ExitStack) -> None:
    mbit = 10
    with long_paths(Leg(mbit=mbit, queue_ms=2000), Leg()) as net:
        line = Line(net, stack)
        began = time.monotonic()
        line.send(1000)
        assert line.take(0.5) == list(range(1000))  # in their order
        took = time.monotonic() - 0.5 - began
        assert 0.99 < took / (1000 * PACKET * 8e-6 / mbit) < 2
        assert net.sender_path.overrun() == 0


def test_what_finds_the_queue_full_is_dropped_and_counted(stack: contextlib.ExitStack) -> None:
    with long_paths(Leg(mbit=10, queue_ms=80), Leg()) as net:  # 100 packets
        line = Line(net, stack)
        line.send(1000)
        came = line.take(0.5)
        count = net.sender_path.counts().to_relay
        assert 100 <= len(came) < 900
        assert (count.packets, count.dropped, count.lost) == (1000, 1000 - len(came), 0)
        assert came[:100] == list(range(100))


def lost_of_2000(seed: int, loss: float, stack: contextlib.ExitStack) -> set[int]:
    with long_paths(Leg(mbit=100, loss=loss, loss_from_relay=0, queue_ms=1000), Leg(loss=50), seed=seed) as net:
        line = Line(net, stack)
        line.send(2000)
        lost = set(range(2000)) - set(line.take(0.5))
        counts = net.sender_path.counts()
        assert (counts.to_relay.packets, counts.to_relay.lost) == (2000, len(lost))
        assert counts.to_relay.bytes == 2000 * PACKET
        assert counts.from_relay.lost == 0
        return lost


def test_loss_is_by_chance_and_the_same_chance_for_the_same_seed(stack: contextlib.ExitStack) -> None:
    lost = lost_of_2000(1, 5, stack)
    assert 60 < len(lost) < 140  # five standard deviations
    assert lost_of_2000(1, 5, stack) == lost
    assert lost_of_2000(2, 5, stack) != lost
    assert lost_of_2000(1, 0, stack) == set()


def test_a_relay_meets_clients_there_and_each_host_has_settings_of_its_own(tmp_path: Path) -> None:
    far = Leg(rtt_ms=30, mbit=50)
    with long_paths(sender=Leg(rtt_ms=30), receiver=far) as net, contextlib.ExitStack() as stack:
        settle(net.relay, {**STOCK, "net.ipv4.tcp_wmem": "4096 16384 1000000"})
        congestion_by_route(net, "reno")
        relay = stack.enter_context(Relay(tmp_path, interface="0.0.0.0", inside=net.relay.inside))
        sender, receiver = (stack.enter_context(net.connect(host, relay.port)) for host in (net.sender, net.receiver))
        shake_hands(sender, receiver)
        content = os.urandom(300_000)
        sender.sendall(content)
        assert read_exactly(receiver, len(content)) == content
        told = subprocess.run(
            [*net.relay.inside, "ss", "-Htni", "sport", "=", str(relay.port)], capture_output=True, text=True
        )
        assert told.stdout.count(" reno ") == 2, told.stdout
        assert net.receiver_path.counts().from_relay.bytes > len(content)
        wmem = subprocess.run([*net.relay.inside, "cat", "/proc/sys/net/ipv4/tcp_wmem"], capture_output=True, text=True)
        assert wmem.stdout.split() == ["4096", "16384", "1000000"]
        with pytest.raises(AssertionError, match="tcp_wmem = nonsense"):
            settle(net.sender, {"net.ipv4.tcp_wmem": "nonsense"})


def test_a_client_that_nobody_answers_is_told_so() -> None:
    with long_paths(Leg(), Leg()) as net, pytest.raises(ConnectionRefusedError):
        net.connect(net.sender, 4001)


# What it cannot do, and how it ends.


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The simulator, compiled without a warning."""
    program = tmp_path_factory.mktemp("wan") / "wan"
    done = subprocess.run(
        ["cc", *CFLAGS, "-Werror", str(SOURCE), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return str(program)


def refusal(*command: str) -> str:
    """What it says when it cannot: one line, and exit status 2."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("wan: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr[len("wan: error: ") : -1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give two devices"),
        (("one",), "give two devices"),
        (("--speed", "1", "a", "b"), "--speed is not an option"),
        (("--loss", "101", "a", "b"), "--loss 101: give a number from 0 to 100"),
        (("--loss", "1,", "a", "b"), "--loss 1,: give a number"),
        (("--delay", "fast", "a", "b"), "--delay fast: give a number"),
        (("--rate", "0", "a", "b"), "--rate 0: give a number"),
        (("--queue", "nan", "a", "b"), "--queue nan: give a number"),
        (("nowhere-at-all/a", "b"), "no network namespace nowhere-at-all: No such file"),
        (("a-name-that-is-too-long", "b"), "a-name-that-is-too-long: the name of a device"),
        (("lo", "b"), "no TUN device lo: "),
    ],
)
def test_what_the_simulator_cannot_do_it_says_in_one_line(wan: str, words: tuple[str, ...], said: str) -> None:
    assert refusal(wan, *words).startswith(said)


def test_without_the_right_to_it_the_simulator_says_what_it_needs(wan: str) -> None:
    assert refusal(*powerless(), wan, "a", "b").endswith("Operation not permitted (it needs CAP_NET_ADMIN)")


def test_without_tun_devices_the_simulator_says_how_to_have_them(wan: str) -> None:
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
    assert refusal(*hidden, wan, "a", "b").startswith("/dev/net/tun: No such file or directory (modprobe tun")


def test_the_simulator_ends_with_its_caller_or_when_its_time_is_over(wan: str) -> None:
    inside = ["unshare", "--net", wan]
    for seconds, close in (("60", True), ("0.2", False)):
        with subprocess.Popen(
            [*inside, "--seconds", seconds, "a", "b"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if close:
                process.stdin.close()
            assert process.wait(10) == 0
            assert [way["packets"] for way in json.loads(process.stdout.readline())] == [0, 0]


def namespaces_and_files() -> set[str]:
    return {path.name for folder in ("/run/netns", "/etc/netns") for path in Path(folder).glob("rg*")}


def test_nothing_is_left_of_it_after_an_error_either(monkeypatch: pytest.MonkeyPatch) -> None:
    class Expected(Exception):
        pass

    with contextlib.suppress(Expected), long_paths(Leg(), Leg()) as net:
        own = {host.name for host in (net.relay, net.sender, net.receiver)}
        assert own <= namespaces_and_files()
        processes = [net.sender_path.process, net.receiver_path.process]
        raise Expected
    assert not own & namespaces_and_files()
    assert all(process.poll() == 0 for process in processes)
    made: list[str] = []

    def noted(name: str) -> Host:
        made.append(name)
        return Host(name)

    monkeypatch.setattr("tests.support.wan.Host", noted)
    with pytest.raises(WanError, match="--delay"), long_paths(Leg(), Leg(rtt_ms=1e9)):
        pass
    assert len(made) == 3
    assert not {*made} & namespaces_and_files()


def test_one_whose_time_was_over_says_so_when_it_is_asked() -> None:
    with long_paths(Leg(), Leg(), seconds=0.3) as net:
        net.sender_path.process.wait(10)
        net.sender_path.counts()  # its last words
        with pytest.raises(WanError, match="its time was over"):
            net.sender_path.counts()


# The benchmark itself. No number is asserted here.


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *words], capture_output=True, text=True, timeout=100, cwd=CHECKOUT, check=False
    )


def test_both_relays_are_measured_over_long_paths(tmp_path: Path) -> None:
    kept = tmp_path / "paths.json"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- run: queue -->\nold\n<!-- end -->\n<!-- run: loss -->\nkept\n<!-- end -->\n")
    words = ("--only", "queue", "--quick", "--seconds", "0.5")
    done = bench(*words, "--settings", "relay,--congestion-control bbr", "--json", str(kept), "--markdown", str(page))
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stderr, done.stderr
    samples = json.loads(kept.read_text())["samples"]
    assert len(samples) == 4
    for sample in samples:
        wanted = "bbr" if sample["setting"].endswith("bbr") else "cubic"
        assert sample["outcome"]["congestion"] == [wanted, wanted]
        assert sample["outcome"]["mbit"] > 0
    assert "| 80 ms, queue 60 ms |" in page.read_text()
    assert "old" not in page.read_text()
    assert "kept" in page.read_text()
    again = bench("--from", str(kept), "--only", "queue")
    assert "80 ms, queue 60 ms" in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "nothing"), "--only nothing: no table is called so; see --list"),
        (("--settings", "nothing"), "--settings nothing: no setting is called so; see --list"),
        (("--seconds", "0", "--only", "queue"), "--seconds 0: give a number above 0, and up to 3600"),
        (("--relay", "/proc", "--only", "queue"), "--relay /proc: no relay/ in this folder"),
    ],
)
def test_a_wrong_word_to_the_benchmark_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"bench-paths: error: {said}"


def test_each_line_of_the_shipped_settings_is_one_that_the_kernel_has_and_a_host_takes() -> None:
    lines = (CHECKOUT / "etc" / "sysctl.d" / "relay-gevent.conf").read_text().splitlines()
    settings = dict(re.split(r"\s*=\s*", line.lstrip("#")) for line in lines if re.match(r"#?net\.", line))
    assert len(settings) >= 4
    for name in settings:
        assert Path("/proc/sys", *name.split(".")).exists(), name
    with long_paths(Leg(), Leg()) as net:
        settle(net.relay, {name: value for name, value in settings.items() if re.search("tcp_.mem", name)})
        congestion_by_route(net, settings["net.ipv4.tcp_congestion_control"])
