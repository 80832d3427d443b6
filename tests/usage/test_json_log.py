"""The JSON lines: their form, and that each comes once whatever becomes of the descriptor they go to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import tempfile
import threading
from collections import deque
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.usage.json_log import JsonLog, encode
from relay.usage.record import Record
from relay.usage.recorder import UsageError
from relay.usage.trouble import Trouble
from tests.support.harness import wait_until
from tests.support.usage_disk import fill
from tests.support.usage_records import append_to, numbered, numbers_of_lines, recording, records

KEYS = ["started", "total_time", "waiting_time", "total_bytes", "mood"]


class SlowReader:
    """Reads a descriptor on a thread of its own, from the moment it is told to until the end of the stream."""

    def __init__(self, fd: int) -> None:
        self.text = b""
        self._fd = fd
        self._thread = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _read(self) -> None:
        while part := os.read(self._fd, 65536):
            self.text += part

    def count(self) -> int:
        return self.text.count(b"\n")


@given(records)
def test_a_line_is_one_json_object_with_exactly_the_five_keys(record: Record) -> None:
    line = encode(record)
    assert line.startswith(b"{")
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert len(line) < 4096
    parsed = json.loads(line)
    assert list(parsed) == KEYS
    assert Record(**parsed) == record


def test_a_lonely_connection_has_a_waiting_time_of_null() -> None:
    assert json.loads(encode(Record(1.0, 2.0, None, 0, "lonely")))["waiting_time"] is None


def test_a_blurred_line_has_a_whole_multiple_of_the_seconds_and_a_rounded_size(tmp_path: Path) -> None:
    with open(append_to(tmp_path / "log"), "ab") as log:
        with recording(log.fileno(), [], blur=600) as recorder:
            recorder.record(Record(1_800_000_123.5, 1.5, 0.25, 10_001, "happy"))
        text = (tmp_path / "log").read_text()
    assert text == (
        '{"started": 1800000000, "total_time": 1.5, "waiting_time": 0.25, "total_bytes": 20000, "mood": "happy"}\n'
    )


def test_a_file_gets_many_whole_lines_in_each_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []

    def write(fd: int, some: bytes) -> int:
        writes.append(some)
        return len(some)

    monkeypatch.setattr("relay.usage.json_log.os.write", write)
    with open(append_to(tmp_path / "log"), "ab") as log:
        JsonLog(log.fileno(), None, print).write(kept := deque(map(numbered, range(500))), set())
    assert not kept
    assert all(some.endswith(b"\n") and len(some) <= select.PIPE_BUF for some in writes)
    assert len(writes) < 500 / 20
    assert numbers_of_lines(b"".join(writes)) == list(range(500))


@pytest.mark.parametrize("flags", [os.O_APPEND, 0], ids=["appending", "at its own place"])
@given(cuts=st.lists(st.integers(0, 400), min_size=1, max_size=50))
@settings(max_examples=60)
def test_wherever_a_write_is_cut_short_each_line_comes_once_and_whole(flags: int, cuts: list[int]) -> None:
    real_write = os.write
    left = deque(cuts)

    def write(fd: int, some: bytes) -> int:
        return real_write(fd, some[: left.popleft()] if left else some)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "log"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
        patch.setattr("relay.usage.json_log._append", lambda fd: None)
        log = JsonLog(fd, None, print)
        patch.setattr("relay.usage.json_log.os.write", write)
        kept = deque(map(numbered, range(100)))
        while kept:
            with contextlib.suppress(Trouble):
                log.write(kept, set())
            if flags:
                assert path.read_bytes()[-1:] in (b"", b"\n"), "another worker may go on"
        os.close(fd)
        assert numbers_of_lines(path.read_bytes()) == list(range(100))


def test_workers_that_were_not_told_to_append_do_not_write_over_each_others_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a line of yesterday\n")
    fds = [os.open(path, os.O_WRONLY) for _ in range(2)]
    logs = [JsonLog(fd, None, print) for fd in fds]
    for number in range(20):
        logs[number % 2].write(deque([numbered(number)]), set())
    for fd in fds:
        os.close(fd)
    yesterday, lines = path.read_bytes().split(b"\n", 1)
    assert yesterday == b"a line of yesterday"
    assert numbers_of_lines(lines) == list(range(20))


def test_where_it_may_be_a_datagram_each_line_is_one_write_of_its_own() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.settimeout(10)
    with closing(near), closing(far):
        with recording(near.fileno(), []) as recorder:
            for number in range(50):
                recorder.record(numbered(number))
            packets = [far.recv(65536) for _ in range(50)]
        assert [numbers_of_lines(packet) for packet in packets] == [[number] for number in range(50)]


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_a_reader_that_stops_is_told_of_once_and_gets_every_line_once_when_it_goes_on(blocking: bool) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, blocking)
    warnings: list[str] = []
    reader = SlowReader(read_end)
    count = 3000  # several times what a pipe holds
    try:
        with recording(write_end, warnings) as recorder:
            for number in range(count):
                recorder.record(numbered(number))
            wait_until(lambda: warnings, what="the warning that nobody reads")
            assert "its reader does not keep up; records are kept" in warnings[0]
            reader.start()
            wait_until(lambda: reader.count() == count, what="all lines")
            wait_until(lambda: len(warnings) == 2, what="the word that it is over")
            assert "works again" in warnings[1]
    finally:
        os.close(write_end)
    assert numbers_of_lines(reader.text) == list(range(count))
    os.close(read_end)


def test_lines_come_through_a_socket_whose_reader_is_slow() -> None:
    near, far = socket.socketpair()
    near.setblocking(False)
    warnings: list[str] = []
    reader = SlowReader(far.fileno())
    count = 10_000
    with closing(near), closing(far), recording(near.fileno(), warnings) as recorder:
        for number in range(count):
            recorder.record(numbered(number))
        wait_until(lambda: warnings, what="the warning that nobody reads")
        reader.start()
        wait_until(lambda: reader.count() == count, what="all lines")
    assert numbers_of_lines(reader.text) == list(range(count))


def test_a_fifo_whose_reader_goes_away_and_comes_back_gets_every_line_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    read_end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_end = os.open(tmp_path / "fifo", os.O_WRONLY)
    warnings: list[str] = []
    with recording(write_end, warnings) as recorder:
        for number in range(100):
            recorder.record(numbered(number))
        wait_until(lambda: readable_bytes(read_end) == sum(len(encode(numbered(n))) for n in range(100)))
        text = os.read(read_end, 1 << 20)
        os.close(read_end)
        for number in range(100, 200):
            recorder.record(numbered(number))
        wait_until(lambda: warnings, what="the warning that the reader is gone")
        assert "its reader is gone" in warnings[0]
        read_end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        wait_until(lambda: len(warnings) == 2, what="the word that it is over")
        assert "the 100 records kept until now are written" in warnings[1]
        text += os.read(read_end, 1 << 20)
    os.close(read_end)
    os.close(write_end)
    assert numbers_of_lines(text) == list(range(200))


def test_a_fifo_opened_for_both_ends_so_as_not_to_wait_keeps_lines_for_its_first_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    both_ends = os.open(tmp_path / "fifo", os.O_RDWR)
    warnings: list[str] = []
    with recording(both_ends, warnings) as recorder:
        for number in range(100):
            recorder.record(numbered(number))
        wait_until(lambda: warnings, what="the warning that there is no reader")
        assert "its reader is gone" in warnings[0]
        read_end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        wait_until(lambda: len(warnings) == 2, what="the word that it is over")
        text = os.read(read_end, 1 << 20)
    os.close(read_end)
    os.close(both_ends)
    assert numbers_of_lines(text) == list(range(100))


def readable_bytes(fd: int) -> int:
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("appending", [True, False], ids=["appended to", "written to"])
def test_a_full_disk_is_told_of_once_and_every_line_is_there_once_when_there_is_space(
    small_disk: Path, appending: bool
) -> None:
    log = small_disk / "log"
    fd = append_to(log) if appending else os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    warnings: list[str] = []
    with recording(fd, warnings) as recorder:
        recorder.record(numbered(0))
        wait_until(lambda: log.stat().st_size > 0, what="the first line")
        fill(small_disk / "ballast")
        # The rest of the log's last page takes some lines yet, and one of them only in part.
        for number in range(1, 200):
            recorder.record(numbered(number))
        wait_until(lambda: warnings, what="the warning that the disk is full")
        assert "no space is left on its disk" in warnings[0]
        (small_disk / "ballast").unlink()
        wait_until(lambda: len(warnings) == 2, what="the word that it is over")
    os.close(fd)
    assert numbers_of_lines(log.read_bytes()) == list(range(200))


def test_a_line_cut_short_by_a_full_disk_is_not_in_the_way_of_another_workers_line(small_disk: Path) -> None:
    log = small_disk / "log"
    fds = [append_to(log), append_to(log)]
    one, other = (JsonLog(fd, None, warn=lambda line: None) for fd in fds)
    cut_short = deque(numbered(number) for number in range(100))
    one.write(deque([numbered(1000)]), set())
    fill(small_disk / "ballast")
    with pytest.raises(Trouble):
        one.write(cut_short, set())
    assert 0 < len(cut_short) < 100
    (small_disk / "ballast").unlink()
    other.write(deque([numbered(2000)]), set())
    one.write(cut_short, set())
    for fd in fds:
        os.close(fd)
    assert sorted(numbers_of_lines(log.read_bytes())) == [*range(100), 1000, 2000]


def test_two_workers_on_a_full_disk_do_not_mix_their_lines(small_disk: Path) -> None:
    log = small_disk / "log"
    fds = [append_to(log), append_to(log)]
    warnings: tuple[list[str], list[str]] = ([], [])
    with recording(fds[0], warnings[0]) as one, recording(fds[1], warnings[1]) as other:
        one.record(numbered(0))
        wait_until(lambda: log.stat().st_size > 0, what="the first line")
        fill(small_disk / "ballast")
        for number in range(1, 100):
            one.record(numbered(number))
            other.record(numbered(1000 + number))
        wait_until(lambda: warnings[0] and warnings[1], what="both warnings that the disk is full")
        (small_disk / "ballast").unlink()
        wait_until(lambda: len(warnings[0]) == 2 and len(warnings[1]) == 2, what="the word that it is over, twice")
    for fd in fds:
        os.close(fd)
    assert sorted(numbers_of_lines(log.read_bytes())) == [*range(100), *range(1001, 1100)]


def test_a_renamed_log_file_is_followed_by_a_new_one_without_losing_a_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fd = append_to(log)
    with recording(fd, []) as recorder:
        recorder.record(numbered(0))
        wait_until(lambda: log.stat().st_size > 0, what="the first line")
        log.rename(tmp_path / "log.1")
        recorder.record(numbered(1))
        wait_until(lambda: log.exists() and log.stat().st_size > 0, what="a new file with the second line")
    os.close(fd)
    assert numbers_of_lines((tmp_path / "log.1").read_bytes()) == [0]
    assert numbers_of_lines(log.read_bytes()) == [1]


def refusal(fd: int) -> str:
    with pytest.raises(UsageError) as refused, recording(fd, []):
        pass
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    fd = os.dup(0)
    os.close(fd)
    assert refusal(fd) == f"--log-fd {fd}: it is not open; have the shell open it, as in {fd}>>usage.json"


def test_a_descriptor_for_reading_is_refused() -> None:
    with open(os.devnull, "rb") as file:
        assert "open for reading only" in refusal(file.fileno())


def test_a_descriptor_of_the_relays_own_is_refused_as_not_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert "it is not open" in refusal(listening.fileno())
    with closing(select.epoll()) as epoll:
        assert "it is not open" in refusal(epoll.fileno())
    assert "it is not open" in refusal(-1)
