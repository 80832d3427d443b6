"""The way of the JSON lines into rsyslogd: the shipped configuration, real rsyslogd and logrotate, and two workers.

What is changed of the shipped files are the paths, nothing else. rsyslogd needs no root for this.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.usage.reopen import FollowedFile
from tests.support.harness import (
    CHECKOUT,
    Service,
    Workers,
    connect,
    free_port,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    wait_until,
    whole_lines,
)
from tests.support.usage_disk import disk_of

CONFIGURATION = CHECKOUT / "etc" / "rsyslog.d" / "relay-gevent.conf"
ROTATION = CHECKOUT / "etc" / "logrotate.d" / "relay-gevent"
RSYSLOGD = shutil.which("rsyslogd") or "/usr/sbin/rsyslogd"
LOGROTATE = shutil.which("logrotate") or "/usr/sbin/logrotate"
PATIENCE = 30  # seconds; it polls once a second, and the machine may be busy

needs_logrotate = pytest.mark.skipif(not os.path.exists(LOGROTATE), reason="apt-get install logrotate")
pytestmark = pytest.mark.skipif(not os.path.exists(RSYSLOGD), reason="apt-get install rsyslog")

FIELDS = re.compile(
    r"(?P<when>\S+) mood=(?P<mood>happy|lonely|errory) bytes=(?P<bytes>\d+) waiting=(?P<waiting>[-.e\d]+)"
    r" total=(?P<total>[-.e\d]+) started=(?P<started>[.\d]+)"
)
Key = tuple[float, float, float | None, int, str]


class Rsyslog:
    """rsyslogd with the shipped configuration, on the files of a folder."""

    def __init__(self, folder: Path, change: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.output = folder / "relay-gevent.log"
        self.unparsed = folder / "relay-gevent-unparsed.log"
        self.log = folder / "rsyslogd.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        (folder / "spool").mkdir()
        text = CONFIGURATION.read_text().replace("/var/lib/relay-gevent/var/relay/", f"{folder}/")
        text = text.replace("/var/log/", f"{folder}/")
        for old, new in (change or {}).items():
            assert old in text
            text = text.replace(old, new)
        (folder / "relay-gevent.conf").write_text(text)
        self.configuration = folder / "rsyslog.conf"
        self.configuration.write_text(
            f'global(workDirectory="{folder}/spool")\ninclude(file="{folder}/relay-gevent.conf")\n'
        )

    def start(self) -> None:
        """Start it in the foreground of a process of its own."""
        self.starts += 1
        command = [RSYSLOGD, "-n", "-f", str(self.configuration), "-i", str(self.folder / f"pid{self.starts}")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the one that runs."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, with SIGTERM as its service does, and wait."""
        self.send(number)
        assert self.process is not None
        self.process.wait(20)
        self.process = None

    def lines(self) -> list[str]:
        """Return what it wrote so far."""
        return whole_lines(self.output.read_text()) if self.output.exists() else []

    def records(self) -> list[Key]:
        """Return the lines it wrote, as keys of the records; AssertionError for one that is not in fields."""
        return [key_of_line(line) for line in self.lines()]


def key_of_line(line: str) -> Key:
    """Return the record that a line in fields tells of."""
    match = FIELDS.fullmatch(line)
    assert match is not None, line
    waiting = None if match["waiting"] == "-" else float(match["waiting"])
    return float(match["started"]), float(match["total"]), waiting, int(match["bytes"]), match["mood"]


def key_of_record(record: dict[str, Any]) -> Key:
    """Return the same of a JSON line."""
    started, total, waiting = record["started"], record["total_time"], record["waiting_time"]
    return started, total, waiting, record["total_bytes"], record["mood"]


def written_by_the_relay(folder: Path) -> list[Key]:
    """Return all records in the JSON lines, rotated or not."""
    lines = [line for path in folder.glob("usage*.jsonl") for line in path.read_text().splitlines()]
    return [key_of_record(json.loads(line)) for line in lines]


@contextlib.contextmanager
def running(rsyslog: Rsyslog) -> Iterator[Rsyslog]:
    """Start rsyslogd, and end the one that runs at last."""
    rsyslog.start()
    try:
        yield rsyslog
    finally:
        if rsyslog.process is not None:
            rsyslog.send(signal.SIGCONT)
            rsyslog.stop()


def rotate(folder: Path) -> None:
    """Run logrotate with the shipped configuration, but for the paths and the user, whom this machine has not."""
    text = ROTATION.read_text().replace("/var/lib/relay-gevent/var/relay/", f"{folder}/")
    text = text.replace("/var/log/", f"{folder}/")
    text = text.replace("    su relay-gevent relay-gevent\n", "")
    # There is no rsyslog.service here; what its script does, to the rsyslogd of this test.
    text = text.replace("/usr/lib/rsyslog/rsyslog-rotate", f"{folder}/rotated")
    script = folder / "rotated"
    script.write_text(f"#!/bin/sh\nfor pid in {folder}/pid*; do kill -HUP $(cat $pid); done\n")
    script.chmod(0o755)
    configuration = folder / "logrotate.conf"
    configuration.write_text(text)
    configuration.chmod(0o644)
    before = set(folder.glob("usage*.jsonl"))
    # Two rotations within a second would get the same name, and logrotate's clock, time(2), may be a little behind.
    wait_until(
        lambda: not any(folder.joinpath(f"usage-{second}.jsonl").exists() for second in seconds_of_logrotate()),
        what="a new second",
    )
    command = [LOGROTATE, "--force", "--state", str(folder / "logrotate.state"), str(configuration)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    assert len(set(folder.glob("usage-*.jsonl")) - before) == 1, result.stderr


def seconds_of_logrotate() -> list[str]:
    """Return the present second, and the one before, in the form of the rotated files' names."""
    now = time.time()
    return [time.strftime("%Y%m%d-%H%M%S", time.localtime(now - ago)) for ago in (0, 1)]


def make_connections(relay: Service, transfers: int) -> int:
    """Let transfers, a client that leaves and one that talks nonsense come; return how many records that makes."""
    for number in range(transfers):
        left, right = met(relay.port)
        with left, right:
            left.sendall(b"x" * (number + 1))
            read_exactly(right, number + 1)
    with connect(relay.port) as lonely:
        lonely.sendall(handshake(new_token(), new_side()))
    with connect(relay.port) as wrong:
        wrong.sendall(b"GET / HTTP/1.1\r\n")
        read_to_end(wrong)
    return transfers + 2


@needs_logrotate
def test_every_record_arrives_once_through_a_restart_and_a_rotation(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as relay, running(Rsyslog(tmp_path)) as rsyslog:
        made = make_connections(relay, 20)
        wait_until(lambda: len(rsyslog.lines()) == made, PATIENCE, "the first records in rsyslogd's file")
        made += make_connections(relay, 20)
        rsyslog.stop()
        made += make_connections(relay, 20)
        rsyslog.start()
        made += make_connections(relay, 20)
        rotate(tmp_path)
        made += make_connections(relay, 20)
        rotate(tmp_path)
        made += make_connections(relay, 20)
        relay.wait_for_rows("usage", made)
        wait_until(lambda: len(arrived(tmp_path)) >= made, PATIENCE, "all records in rsyslogd's files")
        rsyslog.stop()
        assert len(list(tmp_path.glob("usage-*.jsonl"))) == 2
        assert not rsyslog.unparsed.exists()
        assert Counter(arrived(tmp_path)) == Counter(written_by_the_relay(tmp_path))
        assert Counter(arrived(tmp_path)) == Counter(
            (row["started"], row["total_time"], row["waiting_time"], row["bytes"], row["result"])
            for row in relay.rows("usage")
        )
        assert len(set(arrived(tmp_path))) == made


def arrived(folder: Path) -> list[Key]:
    """Return the records in what rsyslogd wrote; its own file is rotated, and at its second rotation compressed."""
    written = [path.read_bytes() for path in folder.glob("relay-gevent.log*")]
    texts = [gzip.decompress(text) if text.startswith(b"\x1f\x8b") else text for text in written]
    return [key_of_line(line) for text in texts for line in whole_lines(text.decode())]


class Writers:
    """What the relay's workers do to their log, without the relay: processes' worth of lines, each its own."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.path = folder / "usage.jsonl"
        self.logs = []
        for _ in range(count):
            self.logs.append(FollowedFile(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)))
        self.written = 0
        self.first = 0
        """What the first line counts as."""

    def write(self, lines: int) -> None:
        """Write so many lines, by turns."""
        for _ in range(lines):
            log = self.logs[self.written % len(self.logs)]
            log.follow()
            times = f'"started": 1795176000, "total_time": {self.first + self.written}.0, "waiting_time": 0.5'
            os.write(log.fd, f'{{{times}, "total_bytes": 1000, "mood": "happy"}}\n'.encode())
            self.written += 1

    def close(self) -> None:
        """Close the descriptors."""
        for log in self.logs:
            os.close(log.fd)


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    """Two workers' logs on one file."""
    writers = Writers(tmp_path)
    yield writers
    writers.close()


def assert_all_arrived(rsyslog: Rsyslog, writers: Writers, *, once: bool = True) -> None:
    """Wait until every line has arrived; `once` as well as at all."""
    wait_until(lambda: len(set(rsyslog.lines())) == writers.written, PATIENCE, "every line in rsyslogd's file")
    if once:
        assert len(rsyslog.lines()) == writers.written


@needs_logrotate
def test_rotations_while_rsyslogd_is_down_lose_no_line(tmp_path: Path, writers: Writers) -> None:
    with running(Rsyslog(tmp_path)) as rsyslog:
        writers.write(300)
        assert_all_arrived(rsyslog, writers)
        writers.write(300)
        rsyslog.stop()
        for _ in range(2):
            writers.write(300)
            os.rename(writers.path, tmp_path / f"usage-2026112{writers.written}.jsonl")
        writers.write(300)
        rsyslog.start()
        assert_all_arrived(rsyslog, writers)


def test_lines_written_to_the_renamed_file_are_not_lost(tmp_path: Path, writers: Writers) -> None:
    with running(Rsyslog(tmp_path)) as rsyslog:
        writers.write(20)
        assert_all_arrived(rsyslog, writers)
        writers.path.rename(tmp_path / "usage-20261120-000000.jsonl")
        writers.logs[0].path = None  # a worker that has not noticed yet
        writers.write(20)
        # Where a busy machine lets it look late, it was seen to read some of them twice.
        assert_all_arrived(rsyslog, writers, once=False)


def test_a_worker_that_never_stops_writing_is_read_through_rotations(tmp_path: Path, writers: Writers) -> None:
    with running(Rsyslog(tmp_path)) as rsyslog:
        ended = threading.Event()

        def write() -> None:
            for _ in range(400):
                writers.write(10)
                ended.wait(0.01)
            ended.set()

        thread = threading.Thread(target=write)
        thread.start()
        for number in range(1000):
            read = len(rsyslog.lines())
            if ended.wait(0.7):
                break
            # It looks once a second; where a busy machine lets it look less often than files are renamed here, it was
            # seen to read some lines twice.
            wait_until(
                lambda read=read: ended.is_set() or len(rsyslog.lines()) > read,  # type: ignore[misc]
                PATIENCE,
                "it reads on",
            )
            with contextlib.suppress(FileNotFoundError):
                writers.path.rename(tmp_path / f"usage-2026-{number:04d}.jsonl")
        thread.join()
        assert_all_arrived(rsyslog, writers)
        assert len(list(tmp_path.glob("usage-*.jsonl"))) > 3


def test_a_killed_rsyslogd_loses_no_line(tmp_path: Path, writers: Writers) -> None:
    with running(Rsyslog(tmp_path)) as rsyslog:
        for _ in range(4):
            writers.write(2000)
            wait_until(lambda: len(rsyslog.lines()) > writers.written - 2000, PATIENCE, "some lines")
            rsyslog.stop(signal.SIGKILL)
            writers.write(100)
            rsyslog.start()
        assert_all_arrived(rsyslog, writers, once=False)


def test_a_slow_rsyslogd_holds_up_no_transfer(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as relay, running(Rsyslog(tmp_path)) as rsyslog:
        made = make_connections(relay, 5)
        wait_until(lambda: len(rsyslog.lines()) == made, PATIENCE, "the first records in rsyslogd's file")
        rsyslog.send(signal.SIGSTOP)
        made += make_connections(relay, 50)
        relay.wait_for_records(made)
        assert len(rsyslog.lines()) < made
        rsyslog.send(signal.SIGCONT)
        wait_until(lambda: len(rsyslog.lines()) >= made, PATIENCE, "all records in rsyslogd's file")
        assert Counter(rsyslog.records()) == Counter(written_by_the_relay(tmp_path))


def test_a_backlog_of_a_day_is_worked_off_in_seconds(tmp_path: Path, writers: Writers) -> None:
    writers.write(50_000)
    with running(Rsyslog(tmp_path)) as rsyslog:
        assert_all_arrived(rsyslog, writers)


def test_what_is_blurred_stays_blurred(tmp_path: Path) -> None:
    with Workers(tmp_path, "--blur-usage", "600", count=2) as relay, running(Rsyslog(tmp_path)) as rsyslog:
        made = make_connections(relay, 3)
        wait_until(lambda: len(rsyslog.lines()) == made, PATIENCE, "all records in rsyslogd's file")
        for line in rsyslog.lines():
            assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d0:00Z ", line)
            assert key_of_line(line)[0] % 600 == 0
            assert key_of_line(line)[3] in (0, 10_000)


def test_a_line_that_is_not_json_is_kept_apart(tmp_path: Path, writers: Writers) -> None:
    writers.write(1)
    with writers.path.open("a") as file:
        file.write("somebody's echo\n")
    writers.write(1)
    with running(Rsyslog(tmp_path)) as rsyslog:
        assert_all_arrived(rsyslog, writers)
        assert rsyslog.unparsed.read_text() == "somebody's echo\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of a quarter of a megabyte."""
    with disk_of("256k", tmp_path) as disk:
        yield disk


def test_what_a_full_disk_takes_from_rsyslogd_is_still_in_the_json_lines(
    tmp_path: Path, small_disk: Path, writers: Writers
) -> None:
    rsyslog = Rsyslog(tmp_path, {f"{tmp_path}/relay-gevent.log": f"{small_disk}/relay-gevent.log"})
    rsyslog.output = small_disk / "relay-gevent.log"
    (small_disk / "something else").write_bytes(b"x" * 240_000)
    with running(rsyslog):
        writers.write(500)
        wait_until(lambda: "No space left" in rsyslog.log.read_text(errors="replace"), PATIENCE, "a full disk")
        (small_disk / "something else").unlink()
        writers.write(1)
        wait_until(
            lambda: any(" total=500 " in line or " total=500.0 " in line for line in rsyslog.lines()),
            PATIENCE,
            "a line that has room again",
        )
        rsyslog.stop()
        # As the docs say: forget how far it had read, and read it all again.
        rsyslog.output.unlink()
        for state in (tmp_path / "spool").glob("imfile-state:*"):
            state.unlink()
        rsyslog.start()
        assert_all_arrived(rsyslog, writers)


def test_lines_wait_while_the_output_cannot_be_opened(tmp_path: Path, writers: Writers) -> None:
    rsyslog = Rsyslog(tmp_path)
    rsyslog.output.mkdir()
    with running(rsyslog):
        writers.write(500)
        wait_until(lambda: "relay-gevent.log" in rsyslog.log.read_text(errors="replace"), PATIENCE, "a complaint")
        rsyslog.output.rmdir()
        # It tries again every ten seconds.
        wait_until(rsyslog.output.exists, 60, "rsyslogd's file")
        assert_all_arrived(rsyslog, writers)


UNCOMMENTED = re.compile(r"^#module\(load=\"omrelp\"\)$|^#action\(.*?^#\)", re.MULTILINE | re.DOTALL)
CENTRAL = CHECKOUT / "etc" / "rsyslog.d" / "relay-gevent-central.conf"
RELP = [Path(f"/usr/lib/{machine}-linux-gnu/rsyslog/imrelp.so") for machine in ("x86_64", "aarch64")]
needs_relp = pytest.mark.skipif(not any(map(Path.exists, RELP)), reason="apt-get install rsyslog-relp")


def with_forwarding(port: int) -> dict[str, str]:
    """Return what to change in the configuration: the commented blocks' first signs, and the host."""
    changes = {}
    for match in UNCOMMENTED.finditer(CONFIGURATION.read_text()):
        uncommented = "\n".join(line.removeprefix("#") for line in match[0].splitlines())
        uncommented = uncommented.replace('"loghost.example.org" port="2514"', f'"127.0.0.1" port="{port}"')
        changes[match[0]] = uncommented.replace('resumeInterval="5"', 'resumeInterval="1"')
    assert len(changes) == 2
    return changes


class CentralHost(Rsyslog):
    """rsyslogd of a central host, with the shipped configuration."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        super().__init__(folder)
        self.output = folder / "relay-gevent-central.log"
        text = CENTRAL.read_text().replace('port="2514"', f'port="{port}"').replace("/var/log/", f"{folder}/")
        text = text.replace("/opt/relay-gevent/share/relay-gevent/", f"{CHECKOUT}/")
        (folder / "relay-gevent.conf").write_text(text)

    def totals(self) -> list[float]:
        """What tells the lines apart, of all that have come."""
        return sorted(json.loads(line.split(" ", 2)[2])["total_time"] for line in self.lines())


@needs_relp
def test_a_central_host_gets_every_line_of_both_machines_once_through_its_restarts_and_while_it_is_away(
    tmp_path: Path,
) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        machines = []
        for number in range(2):
            folder = tmp_path / f"machine{number}"
            folder.mkdir()
            writers = Writers(folder)
            stack.callback(writers.close)
            writers.first = number * 1_000_000
            machines.append((stack.enter_context(running(Rsyslog(folder, with_forwarding(port)))), writers))

        def write(count: int) -> None:
            for _, writers in machines:
                writers.write(count)

        def assert_all_came_once() -> None:
            wanted = sorted(float(w.first + number) for _, w in machines for number in range(w.written))
            wait_until(lambda: len(central.totals()) >= len(wanted), PATIENCE, "all lines at the central host")
            assert central.totals() == wanted

        write(500)  # nobody is there yet, and the local files do not wait for it
        for rsyslog, writers in machines:
            assert_all_arrived(rsyslog, writers)
        central = CentralHost(tmp_path / "central", port)
        with running(central):
            assert_all_came_once()
            for _ in range(2):
                write(2000)  # it ends while they come
                central.stop()
                write(500)
                time.sleep(2)
                central.start()
                assert_all_came_once()
            central.send(signal.SIGSTOP)  # as behind a line that is broken
            write(500)
            time.sleep(8)  # longer than a session waits
            central.send(signal.SIGCONT)
            assert_all_came_once()


@needs_relp
def test_what_waits_for_the_central_host_is_on_no_disk_where_the_docs_say_how(tmp_path: Path) -> None:
    told = re.search(r"^ *sed -i '(s\|queue[^']+)'", (CHECKOUT / "docs" / "rsyslog.md").read_text(), re.MULTILINE)
    assert told is not None
    port = free_port()
    forwarding = with_forwarding(port)
    for commented, block in forwarding.items():
        changed = subprocess.run(["sed", told[1]], input=block, capture_output=True, text=True, timeout=20, check=True)
        forwarding[commented] = changed.stdout.rstrip("\n").replace("/var/spool/rsyslog/forward", f"{tmp_path}/memory")
    (tmp_path / "memory").mkdir()
    writers = Writers(tmp_path)
    stamps = re.compile(rb"tRcvdAt:")
    with contextlib.closing(writers), running(Rsyslog(tmp_path, forwarding)) as rsyslog:
        writers.write(5)
        assert_all_arrived(rsyslog, writers)
        rsyslog.stop()
        assert any(map(stamps.search, (path.read_bytes() for path in (tmp_path / "memory").iterdir())))
        assert not any(map(stamps.search, (path.read_bytes() for path in (tmp_path / "spool").iterdir())))
        rsyslog.start()
        with running(CentralHost(tmp_path / "central", port)) as central:
            assert isinstance(central, CentralHost)
            wait_until(lambda: len(central.totals()) >= 5, PATIENCE, "all lines at the central host")
            assert central.totals() == [0, 1, 2, 3, 4]


CENTRAL_LOG = CHECKOUT / "misc" / "central-log"


def central_log(path: Path, first: int, end: int) -> None:
    """Bring these lines to misc/central-log, as omprog does."""
    record = '{"started": 1795184400, "total_time": 12.4, "waiting_time": 1.3, "total_bytes": 1000000, "mood": "happy"}'
    lines = "".join(f"machine {number * len(record)} {record}\n" for number in range(first, end))
    command = [sys.executable, str(CENTRAL_LOG), str(path)]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=60, check=True)
    assert done.stdout == b"OK\n" * (end - first + 1)


def test_the_central_host_knows_what_a_killed_rsyslogd_sends_again(tmp_path: Path) -> None:
    central_log(tmp_path / "central.log", 0, 100_000)
    central_log(tmp_path / "central.log", 40_000, 100_001)
    lines = (tmp_path / "central.log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 100_001


@needs_logrotate
def test_nothing_comes_twice_over_a_rotation_at_the_central_host(tmp_path: Path) -> None:
    log = tmp_path / "relay-gevent-central.log"
    stanza = CHECKOUT / "etc" / "logrotate.d" / "relay-gevent-central"
    configuration = tmp_path / "logrotate.conf"
    configuration.write_text(stanza.read_text().replace("/var/log/relay-gevent-central.log", str(log)))
    configuration.chmod(0o644)
    for number in range(3):
        central_log(log, 10 * number, 10 * number + 15)
        command = [LOGROTATE, "--force", "--state", str(tmp_path / "state"), str(configuration)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr
    written = [path.read_bytes() for path in tmp_path.glob(f"{log.name}.*")]
    lines = b"".join(gzip.decompress(text) if text.startswith(b"\x1f\x8b") else text for text in written).splitlines()
    assert len(written) == 3
    assert len(lines) == len(set(lines)) == 35


@needs_relp
def test_rsyslogd_finds_nothing_wrong_in_the_configuration(tmp_path: Path) -> None:
    for change in (None, with_forwarding(2514)):
        folder = tmp_path / str(bool(change))
        folder.mkdir()
        rsyslog = Rsyslog(folder, change)
        command = [RSYSLOGD, "-N1", "-f", str(rsyslog.configuration)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr
        assert len(result.stderr.splitlines()) == 2, result.stderr  # its greeting and its farewell


@needs_logrotate
def test_rotation_cuts_nothing_off_and_makes_nothing() -> None:
    stanza = ROTATION.read_text().partition("}")[0]
    settings = {line.strip() for line in stanza.splitlines()}
    assert {"nocreate", "nocompress", "extension .jsonl"} <= settings
    assert "copytruncate" not in settings
