"""What HAProxy in front of a relay costs: `python misc/bench/fronts.py`, half a minute, on loopback.

The front is that of etc/haproxy/relay-gevent.cfg, with both relays on this machine. Rounds alternate between the relay
alone and the relay behind the front; printed are medians. CPU is of the processes, in seconds for each GiB.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve()
CONFIGURATION = HERE.parents[2] / "etc" / "haproxy" / "relay-gevent.cfg"
ROUNDS = 5
BULK_BYTES = 1 << 30
PINGS = 2000
PAIRS = 400
TICK = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def cpu(pids: list[int]) -> float:
    """What these processes have used, in seconds: proc_pid_stat(5)."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICK


def wait_for(port: int) -> None:
    """Return once somebody listens."""
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    sys.exit(f"nothing listens on port {port}")


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended at the end."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(20)


def relay(port: int, health: int) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One worker, which believes the front who has called it."""
    options = ("--trusted-proxies", "127.0.0.1", "--health", str(health), "--grace", "0")
    return started(sys.executable, "-m", "relay", "--port", str(port), "--interface", "127.0.0.1", *options)


def front(
    folder: Path, port: int, relays: tuple[int, int], health: tuple[int, int]
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The shipped front, for TCP."""
    text = CONFIGURATION.read_text().partition("frontend wss")[0]
    for old, new in (
        ("maxconn 20000", "maxconn 4000"),
        ("/run/haproxy/relay-gevent.sock", f"{folder}/front.sock"),
        (":::4001 v4v6", f"127.0.0.1:{port}"),
        ("192.0.2.1:10000", f"127.0.0.1:{free_port()}"),
        ("192.0.2.2:10000", f"127.0.0.1:{free_port()}"),
        ("192.0.2.11:4001", f"127.0.0.1:{relays[0]} port {health[0]}"),
        ("192.0.2.12:4001", f"127.0.0.1:{relays[1]} port {health[1]}"),
        ("sc0_conn_rate gt 500", "sc0_conn_rate gt 500000"),  # all come from one address
    ):
        text = text.replace(old, new)
    configuration = folder / "front.cfg"
    configuration.write_text(text)
    haproxy = shutil.which("haproxy") or "/usr/sbin/haproxy"
    return started(haproxy, "-db", "-L", "front1", "-f", str(configuration))


def meet(port: int) -> tuple[socket.socket, socket.socket]:
    """Two clients that were told ok."""
    token = secrets.token_hex(32)
    both = socket.create_connection(("127.0.0.1", port), 5), socket.create_connection(("127.0.0.1", port), 5)
    for sock in both:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(f"please relay {token} for side {secrets.token_hex(8)}\n".encode())
    for sock in both:
        if sock.recv(3) != b"ok\n":
            raise ConnectionError("not ok")
    return both


def bulk(port: int, pids: list[int]) -> float:
    """CPU seconds for each GiB of one transfer."""
    sender, receiver = meet(port)
    chunk, into = bytes(1 << 20), bytearray(1 << 20)
    before = cpu(pids)

    def send() -> None:
        for _ in range(BULK_BYTES >> 20):
            sender.sendall(chunk)
        sender.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    while receiver.recv_into(into):
        pass
    thread.join()
    sender.close()
    receiver.close()
    return (cpu(pids) - before) * (1 << 30) / BULK_BYTES


def round_trips(port: int) -> tuple[float, float]:
    """Median and 99th percentile of a byte there and back, in microseconds."""
    one, other = meet(port)
    times = []
    for _ in range(PINGS):
        began = time.perf_counter()
        one.sendall(b"?")
        other.recv(1)
        other.sendall(b"!")
        one.recv(1)
        times.append((time.perf_counter() - began) * 1e6)
    one.close()
    other.close()
    times.sort()
    return times[PINGS // 2], times[PINGS * 99 // 100]


def pairs_a_second(port: int) -> float:
    """Short transfers, one after the other."""
    began = time.perf_counter()
    for _ in range(PAIRS):
        for sock in meet(port):
            sock.close()
    return PAIRS / (time.perf_counter() - began)


def seconds_until_served(port: int, dies: subprocess.Popen[bytes]) -> float:
    """How long after a relay's death the last newcomer was turned away, or had to wait."""
    dies.send_signal(signal.SIGKILL)
    died = time.perf_counter()
    bad_until = died
    while time.perf_counter() - died < 5:
        began = time.perf_counter()
        try:
            for sock in meet(port):
                sock.close()
            if time.perf_counter() - began < 0.5:
                time.sleep(0.01)
                continue
        except OSError:
            pass
        bad_until = time.perf_counter()
    return bad_until - died


def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports, health = (free_port(), free_port()), (free_port(), free_port())
        relays = [stack.enter_context(relay(*both)) for both in zip(ports, health, strict=True)]
        port = free_port()
        proxy = stack.enter_context(front(Path(folder), port, ports, health))
        for each in (*ports, port):
            wait_for(each)
        time.sleep(4)  # until the front has seen both relays twice
        pids = [each.pid for each in relays]
        ways: dict[str, Callable[[], list[float]]] = {
            "alone": lambda: [bulk(ports[0], pids), *round_trips(ports[0]), pairs_a_second(ports[0])],
            "behind": lambda: [bulk(port, [*pids, proxy.pid]), *round_trips(port), pairs_a_second(port)],
        }
        rounds: dict[str, list[list[float]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, measure in ways.items():
                rounds[way].append(measure())
        print("| | relay alone | behind the front |\n| --- | --- | --- |")
        names = (
            "CPU s/GiB, one transfer",
            "round trip, median, µs",
            "round trip, 99 %, µs",
            "pairs a second, one client",
        )
        for number, name in enumerate(names):
            alone, behind = (statistics.median(each[number] for each in rounds[way]) for way in ways)
            form = ".2f" if number == 0 else ".0f"
            print(f"| {name} | {alone:{form}} | {behind:{form}} |")
        print(
            f"\nAfter a relay's death newcomers are served again within {seconds_until_served(port, relays[1]):.1f} s."
        )


if __name__ == "__main__":
    main()
