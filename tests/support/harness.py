"""What the tests use to speak with a relay: relays as real processes, clients as plain blocking sockets.

`Relay` is one worker, `Workers` several that share a run directory; both are a `Service`: a port, and the records that
came out. Each is a context manager that ends what it started, by its own process id, and fails the test when a worker
left a traceback in its log.

    with Relay(tmp_path, "--blur-usage", "600", recording=True) as relay:
        left, right = connect(relay.port), connect(relay.port)
        token = new_token()
        left.sendall(handshake(token, new_side()))
        right.sendall(handshake(token, new_side()))
        ...
        record = relay.wait_for_records(1)[0]

Everything binds to 127.0.0.1 unless told otherwise. Times are seconds, sizes are bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.support.neighbours import own_share

CHECKOUT = Path(__file__).resolve().parents[2]
LISTENING = re.compile(r"listening on (\S+) port (\d+)")

SHAPES = ("one-worker", "two-workers")
"""What any promise of the relay is tried with: see `relay_of`."""

_PATTERN = bytes(range(256)) * 1024

T = TypeVar("T")


class Patience:
    """So many `seconds`. Of those in which this process was kept from running, or the condition was being looked at, at
    most half a second counts each time: a busy machine is no defect of the relay."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._asked = time.monotonic()

    def is_over(self) -> bool:
        """To be asked again and again, each time that nothing has come of it yet."""
        now = time.monotonic()
        self._left -= min(now - self._asked, 0.5)
        self._asked = now
        return self._left < 0


def wait_until(condition: Callable[[], T], seconds: float = 10, what: str = "the condition") -> T:
    """Return the first true value of `condition`, asked every 10 ms.

    Raises:
        AssertionError: naming `what`, when none came within `seconds`.
    """
    patience = Patience(seconds)
    while True:
        value = condition()
        if value:
            return value
        if patience.is_over():
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


def whole_lines(text: str) -> list[str]:
    """Return the lines of a file or stream that is being written; one still without its newline is left for later.

    A file's reader can meet a line of which only a part is there, although it is one write(2): where it goes over the
    end of a page.
    """
    return text[: text.rfind("\n") + 1].splitlines()


def connect(port: int, host: str = "127.0.0.1", timeout: float = 10, source: str | None = None) -> socket.socket:
    """Return a connected TCP socket whose every call fails after `timeout` seconds; `source` is its own address."""
    return socket.create_connection((host, port), timeout, None if source is None else (source, 0))


def accepts(port: int) -> bool:
    """Whether somebody accepts connections at `port`; to ask is to make one."""
    with contextlib.suppress(OSError), connect(port):
        return True
    return False


def new_token() -> str:
    """Return a token that no other transfer uses: 64 hex digits."""
    return secrets.token_hex(32)


def new_side() -> str:
    """Return a side: 16 hex digits."""
    return secrets.token_hex(8)


def handshake(token: str, side: str | None = None) -> bytes:
    """Return the line with which a client says which transfer it belongs to; without `side`, the older form."""
    if side is None:
        return f"please relay {token}\n".encode("ascii")
    return f"please relay {token} for side {side}\n".encode("ascii")


def shake_hands(first: socket.socket, second: socket.socket) -> None:
    """Let two clients meet, with a token that no other transfer uses; AssertionError unless both are told ok."""
    token = new_token()
    for client in (first, second):
        client.sendall(handshake(token, new_side()))
    assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"


def met(
    port: int, source: str | None = None, *, stack: contextlib.ExitStack | None = None
) -> tuple[socket.socket, socket.socket]:
    """Return two clients that were told ok; both come from the address `source`, and `stack` closes them."""
    first, second = connect(port, source=source), connect(port, source=source)
    if stack is not None:
        stack.enter_context(first)
        stack.enter_context(second)
    shake_hands(first, second)
    return first, second


def shortened(**constants: float) -> list[str]:
    """What to put before the relay's command so that it runs with other constants; `transfer__ending__X` is X of
    relay.transfer.ending."""
    paths = [f"relay.{name.replace('__', '.')}" for name in constants]
    modules = {path.rpartition(".")[0] for path in paths}
    for path in paths:
        module, _, constant = path.rpartition(".")
        assert hasattr(import_module(module), constant), f"there is no {path} to make shorter"
    changes = [f"{path} = {value}" for path, value in zip(paths, constants.values(), strict=True)]
    imports = f"import {', '.join(['sys', 'relay.cli', *sorted(modules)])}"
    program = "; ".join([imports, *changes, "relay.cli.main(sys.argv[4:])"])
    return [sys.executable, "-c", program]


def reset(sock: socket.socket) -> None:
    """Close so that the peer gets a reset (RST) and no end of stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def fill_the_way(sender: socket.socket, calm: float = 0.3, most: float = math.inf) -> int:
    """Send to a partner that does not read, until nothing is taken for `calm` seconds, or `most` bytes are; return how
    many were."""
    sent = 0
    sender.settimeout(calm)
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += sender.send(_PATTERN)
    sender.settimeout(10)
    return sent


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes.

    Raises:
        AssertionError: when the stream ends before.
        TimeoutError: when the socket's own timeout passes.
    """
    received = bytearray()
    while len(received) < count:
        chunk = sock.recv(count - len(received))
        assert chunk, f"the stream ended after {bytes(received)!r}, expected {count} bytes"
        received += chunk
    return bytes(received)


def read_to_end(sock: socket.socket, seconds: float = 10) -> bytes:
    """Return everything up to the end of the stream.

    Raises:
        AssertionError: when the end has not come within `seconds`; the message holds what came.
        ConnectionError: when the peer reset the connection.
    """
    deadline = time.monotonic() + seconds
    received = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise AssertionError(
                f"no end of stream within {seconds} s, after {len(received)} bytes: {bytes(received[:80])!r}"
            )
        sock.settimeout(left)
        with contextlib.suppress(TimeoutError):
            chunk = sock.recv(65536)
            if not chunk:
                return bytes(received)
            received += chunk


_ports: Iterator[int] = iter(())


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that was free a moment ago, for programs that cannot choose one themselves.

    It is none of those from which the kernel takes one for each connection (ip(7), ip_local_port_range), or another
    test's connection could have it by the time that the program comes to listen there; and of those that are left, one
    that no other process of tests is given, and that this one was not given for as long as possible.
    """
    global _ports
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    own = own_share(range(first_of_connections // 2, first_of_connections))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in own:
        port = next(_ports, 0)
        if port not in own:  # all were given, or this process is a fork of that whose they are
            _ports = iter(own)
            port = next(_ports)
        with socket.socket(family) as sock, contextlib.suppress(OSError):
            sock.bind((host, port))
            return port
    raise AssertionError("no TCP port is free")


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes: shared pages count by the share."""
    return _rollup(pid, "Pss:")


def own_memory(pid: int) -> int:
    """Return what of `pss` is no file's: it does not change when other programs that use the same libraries end."""
    return _rollup(pid, "Pss_Anon:")


def _rollup(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} line for process {pid}")


def open_fds(pid: int) -> int:
    """Return how many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_seconds(pid: int) -> float:
    """Return what a process has used of the processors, in user and system mode: see proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def query(path: Path, sql: str, *values: object) -> list[sqlite3.Row]:
    """Return the rows of a query on a database, opened for reading only."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as database:
        database.row_factory = sqlite3.Row
        return database.execute(sql, values).fetchall()


class Service:
    """A relay as those around it see it: a port, JSON lines, the tables. Subclasses start its processes."""

    folder: Path
    port: int

    @property
    def usage_db(self) -> Path:
        """The SQLite file, when recording."""
        return self.folder / "usage.sqlite"

    @property
    def json_lines(self) -> Path:
        """The file of JSON lines, when recording."""
        return self.folder / "usage.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """Return the JSON lines written so far, parsed; a line still without its newline is left for later."""
        if not self.json_lines.exists():
            return []
        return [json.loads(line) for line in whole_lines(self.json_lines.read_text())]

    def wait_for_records(self, count: int, seconds: float = 10) -> list[dict[str, Any]]:
        """Return the records as soon as there are at least `count`; AssertionError if `seconds` were not enough."""

        def enough() -> list[dict[str, Any]]:
            records = self.records()
            return records if len(records) >= count else []

        if count == 0:
            return self.records()
        return wait_until(enough, seconds, f"{count} records in {self.json_lines} (there are {len(self.records())})")

    def query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Return the rows of a query on the usage database, opened for reading only."""
        return query(self.usage_db, sql, *values)

    def rows(self, table: str) -> list[sqlite3.Row]:
        """Return all rows of one table of the usage database."""
        return self.query(f"SELECT * FROM {table}")

    def row(self, table: str) -> tuple[int, ...]:
        """Return the one row of `current`, `since_reboot` or `all_time`."""
        (row,) = self.rows(table)
        return tuple(row)

    def wait_for_rows(self, table: str, count: int, seconds: float = 10) -> list[sqlite3.Row]:
        """Return the rows of `table` as soon as there are at least `count`."""

        def enough() -> list[sqlite3.Row]:
            rows = self.rows(table)
            return rows if len(rows) >= count else []

        if count == 0:
            return self.rows(table)
        return wait_until(enough, seconds, f"{count} rows in {table}")

    def living(self) -> list[Relay]:
        """Return the workers that run."""
        raise NotImplementedError

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        return [worker.pid for worker in self.living()]

    def log_text(self) -> str:
        """What the workers wrote to stderr so far, one after another."""
        raise NotImplementedError

    def stop(self, seconds: float = 15) -> int:
        """Ask every worker to stop, wait for all; return the exit status (the first that is not 0, if any)."""
        raise NotImplementedError


class Relay(Service):
    """One worker: `python -m relay` from the checkout, started on entry and ended on exit.

    Args:
        folder: where the log, the JSON lines and the database go; must exist.
        options: further options of relay-gevent.
        port: 0 picks a free one; `self.port` tells which, once started.
        interface: address to listen on.
        env: variables set in addition to the test's own environment.
        nofile: the fd limit, soft and hard.
        inside: what comes before the command, such as `ip netns exec NAME`; it must exec, so that the process id stays.
        recording: turn on --usage-db (`usage_db`) and --log-fd (`json_lines`).
        name: what the log is called, when several share a folder.
        program: the module that is run.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        port: int = 0,
        interface: str = "127.0.0.1",
        env: Mapping[str, str] | None = None,
        nofile: int | None = None,
        inside: Sequence[str] = (),
        recording: bool = False,
        name: str = "relay",
        program: str = "relay",
    ) -> None:
        self.folder = folder
        self.options = options
        self.port = port
        self.interface = interface
        self.env = dict(env or {})
        self.nofile = nofile
        self.inside = list(inside)
        self.recording = recording
        self.log = folder / f"{name}.log"
        self.program = program
        self.tracebacks_expected = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The worker's process; AssertionError before the start."""
        assert self._process is not None, "the relay was not started"
        return self._process

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self.process.pid

    def living(self) -> list[Relay]:
        """Return this worker, in a list, while it runs."""
        return [self] if self._process is not None and self._process.poll() is None else []

    def log_text(self) -> str:
        """Return what the worker wrote to stderr so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self, seconds: float = 20) -> Relay:
        """Start the worker and return once it listens; AssertionError with its log if it ended or stayed silent."""
        assert self._process is None, "the relay was started already"
        self._process = self._spawn()
        try:
            match = wait_until(self._listening, seconds, "the relay's line 'listening on …'")
        except BaseException:
            self.kill()
            raise
        assert match is not None
        self.port = int(match.group(2))
        return self

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.program, "--port", str(self.port), "--interface", self.interface]
        passed: list[int] = []
        if self.recording:
            passed.append(os.open(self.json_lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
            command += ["--usage-db", str(self.usage_db), "--log-fd", str(passed[0])]
        command += self.options
        if self.nofile is not None:
            command = ["/bin/sh", "-c", 'ulimit -n "$0" && exec "$@"', str(self.nofile), *command]
        command = self.inside + command
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", **self.env}
        try:
            with self.log.open("ab") as log:
                return subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stderr=log, pass_fds=passed
                )
        finally:
            for fd in passed:
                os.close(fd)

    def _listening(self) -> re.Match[str] | None:
        match = LISTENING.search(self.log_text())
        if match is None and self.process.poll() is not None:
            raise AssertionError(f"the relay ended with {self.process.returncode}: {self.log_text()}")
        return match

    def stop(self, seconds: float = 15) -> int:
        """Send SIGTERM if it still runs, wait at most `seconds`, return the exit status.

        Raises:
            AssertionError: when it did not end in time (it is killed then).
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(seconds)

    def wait(self, seconds: float = 15) -> int:
        """Wait at most `seconds` for the end of a worker that was told to stop, return its exit status.

        Raises:
            AssertionError: when it did not end in time (it is killed then).
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the relay did not stop within {seconds} s: {self.log_text()}") from None

    def kill(self) -> None:
        """End the worker at once, with SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> Relay:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        if kind is None and not self.tracebacks_expected:
            assert "Traceback" not in self.log_text(), self.log_text()


class Workers(Service):
    """Several workers that are one relay: they share `run_dir`, the database, the JSON lines and the port.

    Starts `count` of them on entry, one after another, and ends those that still run on exit.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        count: int = 2,
        interface: str = "127.0.0.1",
        env: Mapping[str, str] | None = None,
        nofile: int | None = None,
        inside: Sequence[str] = (),
        recording: bool = True,
        program: str = "relay",
    ) -> None:
        self.folder = folder
        self.program = program
        self.options = options
        """Of the workers that are started from now on."""
        self.count = count
        self.interface = interface
        self.env = env
        self.nofile = nofile
        self.inside = inside
        self.recording = recording
        self.port = 0
        self.run_dir = folder / "run"
        self.workers: list[Relay] = []
        self._numbering = threading.Lock()

    def start_one(self) -> Relay:
        """Start one more worker, wait until it listens, and return it; its number is its place in `workers`.

        Several threads may do so at once, when the port is known.
        """
        with self._numbering:
            worker = Relay(
                self.folder,
                "--run-dir",
                str(self.run_dir),
                *self.options,
                port=self.port,
                interface=self.interface,
                env=self.env,
                nofile=self.nofile,
                inside=self.inside,
                recording=self.recording,
                name=f"relay-{len(self.workers)}",
                program=self.program,
            )
            self.workers.append(worker)
        worker.start()
        self.port = worker.port
        return worker

    def stop_one(self, number: int, seconds: float = 15) -> int:
        """Stop worker `number` with SIGTERM and return its exit status."""
        return self.workers[number].stop(seconds)

    def kill_one(self, number: int) -> None:
        """End worker `number` at once, with SIGKILL."""
        self.workers[number].kill()

    def living(self) -> list[Relay]:
        """Return the workers that run."""
        return [worker for worker in self.workers if worker.pids]

    def log_text(self) -> str:
        """Return what all workers wrote to stderr so far, one after another."""
        return "".join(worker.log_text() for worker in self.workers)

    def stop(self, seconds: float = 15) -> int:
        """Send one SIGTERM to all at once, wait for all; return the first exit status that is not 0, else 0."""
        living = self.living()
        for worker in living:
            worker.process.send_signal(signal.SIGTERM)
        return next((status for status in [worker.wait(seconds) for worker in living] if status != 0), 0)

    def __enter__(self) -> Workers:
        try:
            for _ in range(self.count):
                self.start_one()
        except BaseException:
            for worker in self.workers:
                if worker.pids:
                    worker.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None:
            for worker in self.workers:
                assert worker.tracebacks_expected or "Traceback" not in worker.log_text(), worker.log_text()


def relay_of(shape: str, folder: Path, *options: str, nofile: int | None = None) -> Relay | Workers:
    """Return a recording relay of one of the `SHAPES`, not started yet: a single worker, or two that are one relay."""
    if shape == "one-worker":
        return Relay(folder, *options, recording=True, nofile=nofile)
    return Workers(folder, *options, count=2, nofile=nofile)


@contextlib.contextmanager
def stopped(*workers: Relay) -> Iterator[None]:
    """Keep workers from running, as on a machine that is overwhelmed; those that have ended already are left out. None
    of them is just writing to the database, which would keep all others from it."""
    living = [worker for worker in workers if worker.pids]
    try:
        for worker in living:
            wait_until(lambda worker=worker: _stop(worker), what="the worker stands still")  # type: ignore[misc]
        yield
    finally:
        for worker in living:
            worker.process.send_signal(signal.SIGCONT)


def _stop(worker: Relay) -> bool:
    """Have it stand still, unless it is writing to the database: then False, and it goes on."""
    worker.process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{worker.pid}/stat")
    wait_until(lambda: ") T " in stat.read_text(), what="the worker stands still")
    if not _locks_database(worker.pid):
        return True
    worker.process.send_signal(signal.SIGCONT)
    return False


def _locks_database(pid: int) -> bool:
    """Whether a process keeps others from writing to a database: see proc_pid_fdinfo(5)."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if ".sqlite" in os.readlink(fd) and "WRITE" in Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text():
            return True
    return False


@contextlib.contextmanager
def running(
    command: list[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run any other program in the background, its output in `log`, and end it by its own process id.

    Args:
        command: program and arguments.
        log: takes stdout and stderr.
        env: the whole environment; None means the test's own.
        cwd: folder to run in.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
