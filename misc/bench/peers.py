"""The peers of the benchmark: how each is started on a free loopback port, what it costs, and how it is ended.

Our relay, the Twisted relay and the C loops pair two clients by their handshakes. HAProxy and the direct
connection know no handshakes: for them the receiving side is a listening socket of the load program, `Server.listen`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 20.0
STOP_SECONDS = 15.0
LISTEN_STATE = "0A"  # in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class CLoops:
    """The compiled programs that are the limit: with pipes, and with frames."""

    splice_relay: Path
    frame_relay: Path


class PeerError(Exception):
    """A peer could not be started or did not do its work; one line that says which and why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and how to start it. `name` is what the tables call it."""

    name: str
    kind: str  # "relay", "twisted", "haproxy", "c", "direct"
    checkout: Path | None = None
    usage_db: bool = False
    json_lines: bool = False
    workers: int = 1
    web: bool = False  # takes WebSocket clients, too

    @property
    def pairs_by_token(self) -> bool:
        return self.kind in ("relay", "twisted", "c")


def free_port() -> int:
    """A port that nobody listens on just now, and that no client's connection takes by chance later on: one below those
    that the kernel gives out (ip(7), ip_local_port_range)."""
    for port in random.sample(range(15000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 15000 and 32000")


def is_listening(port: int) -> bool:
    """Whether a socket listens on the port, without connecting: a probing client would be the first one."""
    wanted = f":{port:04X}"
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN_STATE and fields[1].endswith(wanted):
                return True
    return False


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads, ended ones too, with the precision of the scheduler.

    This is the kernel's numbering of CPU clocks (clock_getcpuclockid(3)): the process id, inverted, and 2 for the
    scheduler's own accounting. /proc/PID/stat counts in hundredths of a second.
    """
    return time.clock_gettime(~pid << 3 | 2)


def _from_rollup(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise PeerError(f"no {key} in /proc/{pid}/smaps_rollup")


@dataclass(slots=True)
class Server:
    """A peer that runs. `listen` is the load program's own port where the peer pairs nobody, else 0; `web` its port for
    WebSocket, where it has one."""

    peer: Peer
    folder: Path
    port: int = 0
    listen: int = 0
    web: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    cpus: str | None = None  # for taskset

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def usage_db(self) -> Path:
        return self.folder / "usage.sqlite"

    @property
    def json_lines(self) -> Path:
        return self.folder / "usage.log"

    def cpu(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(cpu_seconds(pid) for pid in self.pids)

    def pss(self) -> int:
        """Bytes: its private memory, and its share of what it shares with others."""
        return sum(_from_rollup(pid, "Pss") for pid in self.pids)

    def rss(self) -> int:
        """Bytes, what is shared counted in full: free of who else runs Python on this machine."""
        return sum(_from_rollup(pid, "Rss") for pid in self.pids)

    def settle(self, seconds: float = 5.0) -> None:
        """Waits until it uses no CPU (twice in a row), at most so long."""
        quiet, before, deadline = 0, self.cpu(), time.monotonic() + seconds
        while quiet < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            after = self.cpu()
            quiet = quiet + 1 if after - before < 0.0002 else 0
            before = after

    def recorded(self) -> int | None:
        """Finished connections that are on disk in all its records, or None when it records nothing."""
        counts: list[int] = []
        if self.peer.usage_db:
            with contextlib.closing(sqlite3.connect(f"file:{self.usage_db}?mode=ro", uri=True, timeout=10)) as database:
                counts.append(database.execute("SELECT count(*) FROM usage").fetchone()[0])
        if self.peer.json_lines:
            counts.append(self.json_lines.read_bytes().count(b"\n"))
        return min(counts) if counts else None

    def wait_for_records(self, count: int, seconds: float = 20.0) -> float:
        """Returns the seconds until that many are on disk.

        Raises:
            PeerError: that many never came, or more.
        """
        start = time.monotonic()
        while (now := self.recorded() or 0) < count:
            if time.monotonic() - start > seconds:
                raise PeerError(f"{self.peer.name} recorded {now} of {count} connections")
            time.sleep(0.002)
        if now != count:
            raise PeerError(f"{self.peer.name} recorded {now} connections, but there were {count}")
        return time.monotonic() - start

    def last_words(self) -> str:
        """The end of what it wrote to its log, on one line."""
        log = self.folder / "log"
        return log.read_text(errors="replace")[-400:].replace("\n", " / ") if log.exists() else ""

    def launch(self, command: list[str], *, cwd: Path | None = None, record_to: Path | None = None) -> None:
        """Starts one of its processes. `record_to` is opened for appending as its fd 3."""
        if self.cpus is not None:
            command = ["taskset", "--cpu-list", self.cpus, *command]
        environment = dict(os.environ)
        if cwd is not None:
            environment["PYTHONPATH"] = str(cwd)
        if record_to is not None:
            command = ["/bin/sh", "-c", 'exec "$@" 3>>"$0"', str(record_to), *command]
        with (self.folder / "log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    command, cwd=cwd or self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Polls until the condition holds while all its processes live.

        Raises:
            PeerError: one of them ended, or it took too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            for process in self.processes:
                if process.poll() is not None:
                    raise PeerError(f"{self.peer.name} ended with {process.returncode}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise PeerError(f"{self.peer.name}: {what} took over {START_SECONDS:.0f} s: {self.last_words()}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Ends its processes, by force those that do not go."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            _wait_or_kill(process)


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def twisted_command() -> list[str]:
    beside = Path(sys.executable).with_name("twist")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "twisted"]


def why_missing(peer: Peer) -> str | None:
    """What to install, or None when the peer can be started here."""
    if peer.kind == "haproxy" and haproxy_path() is None:
        return "apt-get install haproxy"
    if peer.kind == "twisted":
        probe = subprocess.run([sys.executable, "-c", "import twisted, wormhole_transit_relay"], capture_output=True)
        if probe.returncode:
            return "pip install 'magic-wormhole-transit-relay>=0.5.0'"
    if peer.workers > 1 and not knows_run_dir(peer):
        return "this checkout has no --run-dir yet"
    return None


def compile_relay(checkout: Path) -> None:
    """Compiles it as pip does when it installs one. Where the environment forbids Python to keep what it has compiled
    (PYTHONDONTWRITEBYTECODE), each start of a checkout takes 1.8 times the CPU, and 1.4 MB more."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(checkout / "relay")], stdout=subprocess.DEVNULL)


def knows_run_dir(peer: Peer) -> bool:
    assert peer.checkout is not None
    shown = subprocess.run(
        [sys.executable, "-m", "relay", "--help"],
        cwd=peer.checkout,
        env={**os.environ, "PYTHONPATH": str(peer.checkout)},
        capture_output=True,
        text=True,
    )
    return "--run-dir" in shown.stdout


def haproxy_path() -> str | None:
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


HAPROXY_CONF = """\
global
    nbthread 1
    maxconn 2000
    maxpipes 4000
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    option splice-auto
    option splice-request
    option splice-response
listen bench
    bind 127.0.0.1:{port}
    server sink 127.0.0.1:{sink}
"""


def _start_relay(server: Server) -> None:
    peer = server.peer
    assert peer.checkout is not None
    command = [sys.executable, "-m", "relay", "--port", str(server.port), "--interface", "127.0.0.1"]
    if peer.usage_db:
        command += ["--usage-db", str(server.usage_db)]
    if peer.json_lines:
        command += ["--log-fd", "3"]
    if peer.workers > 1:
        command += ["--run-dir", str(server.folder / "run")]
    if peer.web:
        command += ["--websocket", f"tcp:{server.web}:interface=127.0.0.1"]
    for _ in range(peer.workers):
        server.launch(command, cwd=peer.checkout, record_to=server.json_lines if peer.json_lines else None)


def _is_ready(server: Server) -> bool:
    """Whether all its processes take connections. Our relay's port listens before that, and before its database is
    there; its log says when it is ready."""
    if server.peer.kind == "relay":
        return (server.folder / "log").read_text().count("listening on") >= server.peer.workers
    return is_listening(server.port) and (not server.web or is_listening(server.web))


def _start_twisted(server: Server) -> None:
    command = [*twisted_command(), "transitrelay", f"--port=tcp:{server.port}:interface=127.0.0.1"]
    if server.peer.usage_db:
        command.append(f"--usage-db={server.usage_db}")
    if server.peer.json_lines:
        command.append("--log-fd=3")
    if server.peer.web:
        command.append(f"--websocket=tcp:{server.web}:interface=127.0.0.1")
    server.launch(command, record_to=server.json_lines if server.peer.json_lines else None)


def _start_haproxy(server: Server) -> None:
    program = haproxy_path()
    assert program is not None
    server.listen = free_port()
    conf = server.folder / "haproxy.cfg"
    conf.write_text(HAPROXY_CONF.format(port=server.port, sink=server.listen))
    server.launch([program, "-db", "-q", "-f", str(conf)])


def _start_c(server: Server, c_loops: CLoops) -> None:
    if server.peer.web:
        server.web = server.port  # one port for both
        server.launch([str(c_loops.frame_relay), str(server.port)])
    else:
        server.launch([str(c_loops.splice_relay), str(server.port)])


@contextlib.contextmanager
def started(
    peer: Peer, folder: Path, c_loops: CLoops, *, cpus: str | None = None, wait: bool = True
) -> Iterator[Server]:
    """A peer that listens, in a folder of its own; it is ended with the block.

    Args:
        c_loops: the compiled C loops.
        cpus: a CPU list for taskset, or None.
        wait: until it listens; without, the caller sees to that.
    """
    folder.mkdir(parents=True)
    server = Server(peer, folder, port=free_port(), web=free_port() if peer.web else 0, cpus=cpus)
    try:
        if peer.kind == "relay":
            _start_relay(server)
        elif peer.kind == "twisted":
            _start_twisted(server)
        elif peer.kind == "haproxy":
            _start_haproxy(server)
        elif peer.kind == "c":
            _start_c(server, c_loops)
        else:
            server.listen = server.port
        if wait and server.processes:
            server.wait_until(lambda: _is_ready(server), "the start")
        yield server
    finally:
        server.stop()
