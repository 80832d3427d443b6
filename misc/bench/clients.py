"""The clients of the benchmark: the load program (load.c), compiled and called, and the check of content in Python."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from peers import CLoops, PeerError, Server

HERE = Path(__file__).parent
CFLAGS = ("-O2", "-std=c11", "-Wall", "-Wextra", "-pthread")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
# A measurement counts as disturbed when others used more than this share of one core meanwhile.
DISTURBED_ABOVE = 0.25


def compile_programs(folder: Path) -> tuple[Path, CLoops]:
    """Compiles the load program and the C loops into a folder.

    Raises:
        PeerError: no C compiler, or it refused.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise PeerError("no C compiler: apt-get install gcc libc6-dev")
    made = []
    for name in ("load", "splice_relay", "frame_relay"):
        done = subprocess.run(
            [compiler, *CFLAGS, str(HERE / f"{name}.c"), "-o", str(folder / name)], capture_output=True, text=True
        )
        if done.returncode:
            raise PeerError(f"{name}.c did not compile: {done.stderr.strip()}")
        made.append(folder / name)
    return made[0], CLoops(made[1], made[2])


def busy_seconds() -> float:
    """CPU seconds that all cores together have been busy since the machine started, in hundredths."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / CLOCK_TICKS  # without idle and iowait


@dataclass(frozen=True, slots=True)
class Sides:
    """Who of a pair speaks WebSocket, and how many bytes are in the sender's messages, in turn; none: 64 KiB."""

    web_sender: bool = False
    web_receiver: bool = False
    messages: tuple[int, ...] = ()

    def words(self, server: Server) -> list[str]:
        """For the load program."""
        words = [word for size in self.messages for word in ("--frame", str(size))]
        words += ["--web-sender"] if self.web_sender else []
        words += ["--web-receiver"] if self.web_receiver else []
        return [*words, "--web", str(server.web)] if self.web_sender or self.web_receiver else []


PLAIN = Sides()


@dataclass(frozen=True, slots=True)
class Latency:
    """Microseconds."""

    count: int
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of the load program says, in seconds. `latency` is of round trips, or of pairs that met."""

    seconds: float
    count: int  # bytes of bulk, or pairs
    beside: int  # bytes of the pairs beside those
    relay_cpu: float
    own_cpu: float
    latency: Latency | None


def _latency(told: dict[str, float] | None) -> Latency | None:
    return None if told is None else Latency(int(told["count"]), told["p50_us"], told["p99_us"])


@dataclass(slots=True)
class Load:
    """Calls the load program, and watches whether others used the machine meanwhile."""

    program: Path
    cpus: str | None = None
    copies: bool = False
    tries: int = 1  # of a measurement that can be repeated, while others disturb it
    runs: int = 0
    disturbed: int = 0

    def _command(self, server: Server, mode: str, *words: str) -> list[str]:
        command = [str(self.program), mode, "--port", str(server.port), *words]
        return command if self.cpus is None else ["taskset", "--cpu-list", self.cpus, *command]

    def _run(self, server: Server, mode: str, *words: str, seconds: float, tries: int = 1) -> Result:
        """One run, or the first of so many that nobody disturbed."""
        for number in range(1, tries + 1):
            result, others = self._run_once(server, mode, *words, seconds=seconds)
            if others <= DISTURBED_ABOVE:
                break
            if number < tries:
                time.sleep(0.5)
        self.runs += 1
        self.disturbed += others > DISTURBED_ABOVE
        return result

    def _run_once(self, server: Server, mode: str, *words: str, seconds: float) -> tuple[Result, float]:
        """What the load program says, and the share of one core that others used meanwhile."""
        watched = [word for pid in server.pids for word in ("--cpu-of", str(pid))]
        start, busy, relay_cpu = time.monotonic(), busy_seconds(), server.cpu()
        try:
            done = subprocess.run(
                self._command(server, mode, *watched, *words), capture_output=True, text=True, timeout=60 + 5 * seconds
            )
        except subprocess.TimeoutExpired as late:
            raise PeerError(f"{server.peer.name}: {mode} did not end in {late.timeout:.0f} s") from late
        if done.returncode:
            raise PeerError(f"{server.peer.name}: {done.stderr.strip()}; its log: {server.last_words()}")
        told = json.loads(done.stdout)
        elapsed = time.monotonic() - start
        others = busy_seconds() - busy - (server.cpu() - relay_cpu) - told["own_cpu"]
        result = Result(
            seconds=told["seconds"],
            count=told["bytes"] if "bytes" in told else told["pairs"],
            beside=told.get("beside", 0),
            relay_cpu=told["relay_cpu"],
            own_cpu=told["own_cpu"],
            latency=_latency(told.get("round_trip") or told.get("met")),
        )
        return result, others / elapsed

    def traffic(
        self,
        server: Server,
        *,
        pairs: int,
        seconds: float,
        ping: bool = False,
        sides: Sides = PLAIN,
        beside: int = 0,
    ) -> Result:
        """Bulk pairs that send for so long, so many plain ones beside them, and perhaps a pair that pings meanwhile."""
        words = ["--pairs", str(pairs), "--seconds", str(seconds), "--beside", str(beside), *sides.words(server)]
        if server.listen:
            words += ["--listen", str(server.listen)]
        if ping:
            words.append("--ping")
        if self.copies:
            words.append("--copy")
        return self._run(server, "traffic", *words, seconds=seconds, tries=self.tries)

    def pairs(
        self, server: Server, *, seconds: float = 0, count: int = 0, concurrent: int = 16, sides: Sides = PLAIN
    ) -> Result:
        """Pairs that connect, shake hands, send 16 bytes each way and close, for so long or so many."""
        words = ["--count", str(count), "--seconds", str(seconds), "--concurrent", str(concurrent)]
        return self._run(server, "pairs", *words, *sides.words(server), seconds=seconds)

    @contextlib.contextmanager
    def crowd(self, server: Server, sides: Sides = PLAIN) -> Iterator[Crowd]:
        """Clients that stay until the end of the block; the one that waits is the sender."""
        process = subprocess.Popen(
            self._command(server, "hold", *sides.words(server)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield Crowd(server, process.stdin, process.stdout, process.stderr)
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True, slots=True)
class Crowd:
    """Clients that wait, and pairs that are idle."""

    server: Server
    orders: IO[str]
    answers: IO[str]
    complaints: IO[str]

    def _order(self, line: str) -> None:
        self.orders.write(line + "\n")
        self.orders.flush()
        if not self.answers.readline():
            raise PeerError(f"{self.server.peer.name}: {line}: {self.complaints.read().strip()}")

    def add_waiters(self, count: int) -> None:
        """Clients that shook hands and have no partner; when this returns, the relay has accepted all."""
        self._order(f"waiters {count}")

    def add_pairs(self, count: int) -> None:
        """Pairs that got `ok` and 16 bytes each way."""
        self._order(f"pairs {count}")

    def verify(self, count: int) -> None:
        """So many of those who wait meet a partner, and so many pairs pass 16 bytes each way."""
        self._order(f"verify {count}")


# ---- content, with nothing of the load program in it ----


def _client(server: Server) -> socket.socket:
    """A connection from another loopback address: from 127.0.0.1, a port where nobody listens yet may meet itself."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=20, source_address=("127.1.0.1", 0))


def _ends(server: Server, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Two sockets with the peer between them, ready for bytes."""
    if server.listen:
        with socket.create_server(("127.0.0.1", server.listen)) as listener:
            listener.settimeout(20)
            one = stack.enter_context(_client(server))
            other = stack.enter_context(listener.accept()[0])
            other.settimeout(20)
            return one, other
    token = secrets.token_hex(32)
    one, other = (stack.enter_context(_client(server)) for _ in range(2))
    for end, side in ((one, "1"), (other, "2")):
        end.sendall(f"please relay {token} for side {side * 16}\n".encode())
    for end in (one, other):
        if end.recv(3, socket.MSG_WAITALL) != b"ok\n":
            raise PeerError(f"{server.peer.name}: no ok for a good handshake")
    return one, other


def _digest(end: socket.socket, size: int) -> str:
    """Of the next so many bytes. Not to the end of the stream: there the Twisted relay cuts the other direction too."""
    digest = hashlib.sha256()
    while size and (chunk := end.recv(min(size, 1 << 18))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def check_content(server: Server, size: int) -> None:
    """Random bytes through the peer in both directions at once, compared by their SHA-256.

    Raises:
        PeerError: what came out is not what went in.
    """
    with contextlib.ExitStack() as stack:
        ends = _ends(server, stack)
        contents = [secrets.token_bytes(size) for _ in ends]
        senders = [
            threading.Thread(target=end.sendall, args=(content,), daemon=True)
            for end, content in zip(ends, contents, strict=True)
        ]
        got = ["", ""]

        def receive(index: int) -> None:
            got[index] = _digest(ends[1 - index], size)

        receivers = [threading.Thread(target=receive, args=(index,), daemon=True) for index in (0, 1)]
        for thread in (*senders, *receivers):
            thread.start()
        for thread in (*senders, *receivers):
            thread.join(60)
    if got != [hashlib.sha256(content).hexdigest() for content in contents]:
        raise PeerError(f"{server.peer.name}: the content changed on its way, or did not arrive")


def seconds_to_first_pair(server: Server, begun: float) -> float:
    """Seconds from `begun` (time.monotonic) until the peer has accepted two clients and said `ok` to both."""
    token = secrets.token_hex(32)
    deadline = begun + 20
    clients: list[socket.socket] = []
    try:
        while len(clients) < 2:
            try:
                client = _client(server)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise PeerError(f"{server.peer.name} does not accept: {server.last_words()}") from None
                time.sleep(0.001)
                continue
            clients.append(client)
            client.sendall(f"please relay {token} for side {str(len(clients)) * 16}\n".encode())
        for client in clients:
            if client.recv(3, socket.MSG_WAITALL) != b"ok\n":
                raise PeerError(f"{server.peer.name}: no ok for the first pair")
        return time.monotonic() - begun
    finally:
        for client in clients:
            client.close()
