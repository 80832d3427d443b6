"""One transfer over simulated paths: which relay, under which settings, over which paths, and how fast it was."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clients import busy_seconds
from peers import PeerError, twisted_command

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.namespaces import Host, run_ip
from tests.support.wan import (
    STOCK,
    Leg,
    LongPath,
    LongPaths,
    WanError,
    congestion_by_route,
    long_paths,
    not_allowed,
    settle,
)

PORT = 4001
START_SECONDS = 20.0
BLOCK = 1 << 18
LATE = 0.005
"""Seconds by which no packet should be late."""
OTHERS = 0.25
"""How much of a core others may use."""
STOCK_CONGESTION = "cubic"
NEVER_THE_DEFAULT = "reno"
"""In every kernel, and open to every namespace: the default where the relay itself is to choose."""


@dataclass(frozen=True)
class Setting:
    """A relay and what its host is told beyond a stock Debian.

    Attributes:
        name: what the tables call it.
        kind: `relay` or `twisted`.
        sysctl: settings of the relay's host that are not STOCK's.
        congestion: what the relay's connections have.
        by_option: the relay is told so by --congestion-control, instead of its host.
        qdisc: of the relay's devices, or None for what the kernel gives them.
    """

    name: str
    kind: str = "relay"
    sysctl: Mapping[str, str] = field(default_factory=dict)
    congestion: str = STOCK_CONGESTION
    by_option: bool = False
    qdisc: str | None = None


@dataclass(frozen=True)
class Clients:
    """The clients' hosts: what sysctl(8) says there beyond STOCK, and the congestion control of the sender."""

    sysctl: Mapping[str, str] = field(default_factory=dict)
    congestion: str = STOCK_CONGESTION


@dataclass(frozen=True)
class Outcome:
    """What came of a transfer.

    Attributes:
        mbit: 10^6 bits a second of content that arrived, from the first `ok` on.
        later: the same over the second half of the time: what a large file gets.
        course: the same over each tenth of the time.
        segment: bytes of IP in a packet from the relay to the receiver, in the mean.
        resent: bytes that the relay sent to the receiver for each that it took, headers included, less one.
        congestion: what the kernel says the relay's two connections have.
        late: seconds by which the simulator was late at worst, and `overrun`, packets that it did not get to see.
        others: how much of a core this machine used meanwhile for what is not this transfer.
    """

    mbit: float
    later: float
    course: list[float]
    segment: float
    resent: float
    congestion: list[str]
    late: float
    overrun: int
    others: float = 0

    @property
    def is_disturbed(self) -> bool:
        """Whether something else on this machine may be in these figures."""
        return self.late > LATE or self.overrun > 0 or self.others > OTHERS


def handshake(token: str) -> bytes:
    return f"please relay {token} for side {secrets.token_hex(8)}\n".encode("ascii")


def _relay_command(setting: Setting, checkout: Path) -> list[str]:
    if setting.kind == "twisted":
        return [*twisted_command(), "transitrelay", f"--port=tcp:{PORT}"]
    option = ["--congestion-control", setting.congestion] if setting.by_option else []
    return [sys.executable, "-m", "relay", "--port", str(PORT), "--interface", "0.0.0.0", *option]


@contextlib.contextmanager
def relay_started(net: LongPaths, setting: Setting, checkout: Path, folder: Path) -> Iterator[None]:
    """The relay of this setting on its host, until the end of the block. PeerError when it does not come up."""
    command = [*net.relay.inside, *_relay_command(setting, checkout)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(checkout)}, stdout=log, stderr=log
        )
    try:
        _wait_until_it_listens(net, process, folder / "log")
        yield
    finally:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()  # its transfers have been cut off, there is nothing to wait for
            process.wait(10)


def _wait_until_it_listens(net: LongPaths, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        told = subprocess.run([*net.relay.inside, "ss", "-Htnl", f"sport = :{PORT}"], capture_output=True, text=True)
        if told.stdout.strip():
            return
        time.sleep(0.05)
    raise PeerError(f"the relay did not start: {log.read_text(errors='replace').strip()[-300:]}")


def _meet(net: LongPaths, clients: Clients) -> tuple[socket.socket, socket.socket]:
    token = secrets.token_hex(32)
    pair = [net.connect(host, PORT, congestion_control=clients.congestion) for host in (net.sender, net.receiver)]
    for client in pair:
        client.sendall(handshake(token))
    for client in pair:
        got = b""
        while len(got) < 3:
            got += client.recv(3 - len(got)) or b"?"
        if got != b"ok\n":
            raise PeerError(f"the relay answered {got!r}")
    return pair[0], pair[1]


def _send_until_cut_off(sender: socket.socket, piece: int) -> None:
    content = bytes(piece)
    with contextlib.suppress(OSError):
        while True:
            sender.sendall(content)


def _receive(receiver: socket.socket, seconds: float) -> list[int]:
    """Bytes that came within each tenth of so many seconds."""
    space = memoryview(bytearray(BLOCK))
    came = [0] * 10
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        receiver.settimeout(seconds - passed)
        try:
            got = receiver.recv_into(space)
        except TimeoutError:
            break
        if not got:
            raise PeerError("the relay ended the transfer")
        came[int(passed / seconds * 10)] += got
    return came


def _congestion(net: LongPaths) -> list[str]:
    """What the kernel says of the relay's connections: ss(8) puts it first, behind a blank."""
    told = subprocess.run([*net.relay.inside, "ss", "-Htni", f"sport = :{PORT}"], capture_output=True, text=True)
    return re.findall(r"^\s+(?:ts )?(?:sack )?(?:ts )?(?:sack )?([a-z]\w*)", told.stdout, re.MULTILINE)


def _prepare(net: LongPaths, setting: Setting, clients: Clients) -> None:
    for host in (net.sender, net.receiver):
        settle(host, {**STOCK, **clients.sysctl})
    settle(net.relay, {**STOCK, **setting.sysctl})
    if setting.by_option:
        settle(net.relay, {"net.ipv4.tcp_congestion_control": NEVER_THE_DEFAULT})
    else:
        congestion_by_route(net, setting.congestion)
    if setting.qdisc is not None and not all(_queue_with(net.relay, f"wan{n}", setting.qdisc) for n in (0, 1)):
        raise PeerError(f"no queueing discipline {setting.qdisc} in this kernel")


def _queue_with(host: Host, device: str, qdisc: str) -> bool:
    command = ["tc", "-n", host.name, "qdisc", "replace", "dev", device, "root", qdisc]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def has_qdisc(name: str) -> bool:
    """Whether this kernel has a queueing discipline of that name."""
    host = Host(f"rg{secrets.token_hex(4)}-qdisc")
    host.create()
    try:
        run_ip("-n", host.name, "link", "add", "one", "type", "veth", "peer", "name", "other")
        return _queue_with(host, "one", name)
    finally:
        host.remove()


def measure(
    setting: Setting,
    sender: Leg,
    receiver: Leg,
    *,
    checkout: Path,
    seconds: float,
    seed: int = 1,
    clients: Clients | None = None,
    piece: int = BLOCK,
) -> Outcome:
    """Send as fast as can be for `seconds`.

    Args:
        sender, receiver: their paths to the relay.
        piece: bytes in each write of the sender.

    Raises:
        PeerError, WanError: what could not be had, in one line.
    """
    began, busy = time.monotonic(), busy_seconds() - _own_seconds()
    outcome = _transfer(setting, sender, receiver, checkout, seconds, seed, clients or Clients(), piece)
    others = (busy_seconds() - _own_seconds() - busy) / (time.monotonic() - began)
    return dataclasses.replace(outcome, others=max(others, 0))


def _own_seconds() -> float:
    """CPU time of this process, and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _transfer(
    setting: Setting,
    sender: Leg,
    receiver: Leg,
    checkout: Path,
    seconds: float,
    seed: int,
    clients: Clients,
    piece: int,
) -> Outcome:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-paths-")))
        net = stack.enter_context(long_paths(sender, receiver, seed=seed, seconds=seconds + 60))
        _prepare(net, setting, clients)
        stack.enter_context(relay_started(net, setting, checkout, folder))
        source, sink = (stack.enter_context(client) for client in _meet(net, clients))
        sending = threading.Thread(target=_send_until_cut_off, args=(source, piece))
        sending.start()
        try:
            came = _receive(sink, seconds)
            congestion = _congestion(net)
        finally:
            source.shutdown(socket.SHUT_RDWR)
            sending.join()
        return _outcome(net, came, seconds, congestion)


def _outcome(net: LongPaths, came: list[int], seconds: float, congestion: list[str]) -> Outcome:
    to_receiver = net.receiver_path.counts().from_relay
    paths: tuple[LongPath, ...] = (net.sender_path, net.receiver_path)
    ways = [way for path in paths for way in (path.counts().to_relay, path.counts().from_relay)]
    return Outcome(
        mbit=sum(came) * 8e-6 / seconds,
        later=sum(came[5:]) * 8e-6 / (seconds / 2),
        course=[part * 8e-6 / (seconds / 10) for part in came],
        segment=to_receiver.bytes / max(to_receiver.packets, 1),
        resent=to_receiver.bytes / max(sum(came), 1) - 1,
        congestion=congestion,
        late=max(way.late for way in ways),
        overrun=sum(path.overrun() for path in paths),
    )


__all__ = ["Clients", "Leg", "Outcome", "PeerError", "Setting", "WanError", "has_qdisc", "measure", "not_allowed"]
