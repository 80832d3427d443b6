"""Long paths: a relay's host and two clients' hosts, and between them delay, a rate, queues and loss.

    sender ==== relay ==== receiver       each ==== is a path of its own, simulated by misc/bench/wan.c

    with long_paths(sender=Leg(rtt_ms=80), receiver=Leg(rtt_ms=20, mbit=50, loss=0.5)) as net:
        with Relay(folder, interface="0.0.0.0", inside=net.relay.inside) as relay:
            one = net.connect(net.sender, relay.port)        # a blocking socket on that host, usable here
            other = net.connect(net.receiver, relay.port)
            ...
        print(net.receiver_path.counts().from_relay.lost)

A receiver that does not read is a socket that nobody reads from; a sender that is far is a `Leg` with much `rtt_ms`.
New namespaces have this machine's settings: `settle(host, STOCK)` gives one those of a stock Debian.

Needs root, TUN devices, network namespaces and a C compiler: `not_allowed()` says what is missing, for a test to skip
with. Everything that is made here has names that no other run uses, and is removed at the end, also after an error; the
simulator itself ends when its caller does. Also used by misc/bench/paths.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import namespaces
from tests.support.namespaces import Host, run_ip

SOURCE = Path(__file__).resolve().parents[2] / "misc" / "bench" / "wan.c"
CFLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra")

# TEST-NET-1 to -3 (RFC 5737): nobody's addresses, so nothing real can be reached by mistake.
RELAY_ADDRESS = "192.0.2.1"
NETWORKS = ("198.51.100", "203.0.113")
DEVICE = "wan0"
"""What a client's end of its path is called; the relay's are `wan0` for the sender and `wan1` for the receiver."""

STOCK = {
    "net.ipv4.tcp_rmem": "4096 131072 6291456",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    "net.ipv4.tcp_slow_start_after_idle": "1",
    "net.ipv4.tcp_notsent_lowat": "4294967295",
}
"""What a Debian 12 or 13 with at least 1 GiB of memory starts with (tcp_init() in net/ipv4/tcp.c), without its
congestion control, cubic: which one a namespace may have by default, its kernel decides; see `congestion_by_route`."""


class WanError(AssertionError):
    """A path could not be had; one line that says why."""


@dataclass(frozen=True)
class Leg:
    """The path between the relay and one client.

    Attributes:
        rtt_ms: round trip without queues, milliseconds; half of it each way.
        mbit: rate of the line each way, 10^6 bits a second.
        loss: packets lost by chance, percent: both ways; `loss_from_relay`, when given, is that of the other way.
        queue_ms: how much waits for the line at most, in milliseconds of its rate.
    """

    rtt_ms: float = 2
    mbit: float = 1000
    loss: float = 0
    loss_from_relay: float | None = None
    queue_ms: float = 60

    def options(self) -> list[str]:
        """Say this to wan, whose A is the client and whose B is the relay."""
        back = self.loss if self.loss_from_relay is None else self.loss_from_relay
        return [
            *("--delay", f"{self.rtt_ms / 2:g}"),
            *("--rate", f"{self.mbit:g}"),
            *("--queue", f"{max(self.mbit * self.queue_ms / 8, 3):g}"),
            *("--loss", f"{self.loss:g},{back:g}"),
        ]


@dataclass(frozen=True)
class Count:
    """What came to one way of a path.

    Attributes:
        packets, bytes: all that came, whatever then happened to it.
        lost: by chance.
        dropped: since the queue was full.
        refused: at its end, where the device was down.
        late: seconds by which the latest packet left after it was due; with more than some milliseconds, the machine
            was too busy for what is measured.
    """

    packets: int
    bytes: int
    lost: int
    dropped: int
    refused: int
    late: float


@dataclass(frozen=True)
class Counts:
    """Both ways of a path."""

    to_relay: Count
    from_relay: Count


@dataclass
class LongPath:
    """One path while it is simulated: the process, and its two ends as (host, device)."""

    process: subprocess.Popen[str]
    ends: tuple[tuple[Host, str], tuple[Host, str]]

    def counts(self) -> Counts:
        """What has come to it so far."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said last is still to be read
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WanError("the simulator of a path has ended: its time was over")
        return Counts(*(Count(**way) for way in json.loads(line)))

    def overrun(self) -> int:
        """How many packets the kernel threw away before the path saw them, since nobody took them in time: none, or
        what is measured is this machine."""
        dropped = 0
        for host, device in self.ends:
            said = subprocess.run(
                ["ip", "-n", host.name, "-json", "-statistics", "link", "show", "dev", device],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            dropped += int(json.loads(said.stdout)[0]["stats64"]["tx"]["dropped"])
        return dropped

    def end(self) -> None:
        """End it; its devices go with it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


@dataclass(frozen=True)
class LongPaths:
    """The three hosts and the two paths; the relay has `relay_address` for both clients."""

    relay: Host
    sender: Host
    receiver: Host
    sender_path: LongPath
    receiver_path: LongPath
    relay_address: str = RELAY_ADDRESS

    def connect(self, host: Host, port: int, *, congestion_control: str | None = None) -> socket.socket:
        """A client of the relay on `host`, a blocking socket with a time-out of a minute.

        Args:
            congestion_control: of what the client sends; None means what that host has by default.
        """

        def call() -> socket.socket:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.settimeout(60)
            if congestion_control is not None:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())
            sock.connect((self.relay_address, port))
            return sock

        return host.make_there(call)


def not_allowed() -> str:
    """Return why long paths cannot be simulated here, or an empty string when they can."""
    if reason := namespaces.not_allowed():
        return reason
    if shutil.which("cc") is None:
        return "no C compiler: apt-get install gcc libc6-dev"
    try:
        with Path("/dev/net/tun").open("rb+", buffering=0):
            return ""
    except OSError as refused:
        return f"TUN devices are not to be had here: /dev/net/tun: {refused.strerror} (modprobe tun)"


@functools.cache
def _compiled() -> str:
    """The simulator, compiled once for each process; its folder is removed when that ends."""
    folder = Path(tempfile.mkdtemp(prefix="relay-wan-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = folder / "wan"
    done = subprocess.run(["cc", *CFLAGS, str(SOURCE), "-o", str(program)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WanError(f"wan.c did not compile: {done.stderr.strip()}")
    return str(program)


@contextlib.contextmanager
def long_path(
    client: Host, relay: Host, device: str, leg: Leg, *, seed: int = 1, seconds: float = 600
) -> Iterator[LongPath]:
    """Join `client` with `relay` by two devices, DEVICE there and `device` here; neither has an address yet.

    Args:
        seed: which packets are lost; the same seed loses the same of the same.
        seconds: the path ends by itself after so long.

    Raises:
        WanError: with what the simulator said, when it cannot.
    """
    command = [_compiled(), *leg.options(), "--seed", str(seed), "--seconds", f"{seconds:g}"]
    ends = ((client, DEVICE), (relay, device))
    with subprocess.Popen(
        [*command, *(f"{host.name}/{name}" for host, name in ends)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            raise WanError(process.stderr.read().strip().removeprefix("wan: error: "))
        path = LongPath(process, ends)
        try:
            for host, name in ends:
                # Whoever sends a whole window at once shall wait in the path's queue and not be thrown away before it.
                run_ip("-n", host.name, "link", "set", name, "txqueuelen", "20000", "up")
            yield path
        finally:
            path.end()


@contextlib.contextmanager
def long_paths(sender: Leg, receiver: Leg, *, seed: int = 1, seconds: float = 600) -> Iterator[LongPaths]:
    """Make the network drawn above, and remove it at the end. Raises WanError when it cannot be had."""
    prefix = f"rg{secrets.token_hex(4)}"
    relay, *clients = (Host(f"{prefix}-{name}") for name in ("relay", "sender", "receiver"))
    with contextlib.ExitStack() as stack:
        for host in (relay, *clients):
            stack.callback(host.remove)
            host.create()
            # A host that looks for IPv6 routers at a moment of its own would take part in what is lost by chance.
            if Path("/proc/sys/net/ipv6").exists():
                settle(host, {"net.ipv6.conf.default.disable_ipv6": "1"})
        run_ip("-n", relay.name, "address", "add", f"{RELAY_ADDRESS}/32", "dev", "lo")
        paths = []
        for number, (client, leg) in enumerate(zip(clients, (sender, receiver), strict=True)):
            device, network = f"wan{number}", NETWORKS[number]
            paths.append(
                stack.enter_context(long_path(client, relay, device, leg, seed=2 * seed + number, seconds=seconds))
            )
            run_ip("-n", relay.name, "address", "add", f"{network}.1/24", "dev", device)
            run_ip("-n", client.name, "address", "add", f"{network}.2/24", "dev", DEVICE)
            run_ip("-n", client.name, "route", "add", f"{RELAY_ADDRESS}/32", "dev", DEVICE)
        yield LongPaths(relay, clients[0], clients[1], paths[0], paths[1])


def settle(host: Host, settings: Mapping[str, str]) -> None:
    """Give `host` these settings of sysctl(8); AssertionError when its kernel refuses one."""
    for name, value in settings.items():
        path = "/proc/sys/" + name.replace(".", "/")
        write = ["sh", "-c", 'echo "$1" >"$0"', path, value]
        done = subprocess.run([*host.inside, *write], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, f"{name} = {value}: {done.stderr.strip()}"


def congestion_by_route(net: LongPaths, name: str) -> None:
    """Let what the relay sends have congestion control `name`, whatever the default is on this machine: a namespace may
    not have each as its own default, but a route may name each. It is stronger than what the relay itself chooses."""
    for number, network in enumerate(NETWORKS):
        run_ip(
            *("-n", net.relay.name, "route", "replace", f"{network}.0/24", "dev", f"wan{number}"),
            *("src", f"{network}.1", "proto", "kernel", "scope", "link", "congctl", name),
        )
