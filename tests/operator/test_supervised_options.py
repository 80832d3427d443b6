"""What a relay under supervisor may be told without touching the file, and what it says of what it may not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.support.harness import connect, free_port, read_exactly, wait_until
from tests.support.supervised import supervised


@pytest.mark.parametrize(
    ("options", "word", "remedy"),
    [
        ("--grace 5 --blur-usage 60", "--blur-usage", "RELAY_BLUR_USAGE"),
        ("-w4002", "-w4002", "RELAY_WEBSOCKET"),
        ("--log-stdout", "--log-stdout", "RELAY_USAGE_LOG"),
        ("--log-path=x", "--log-path=x", "RELAY_USAGE_LOG"),
        ("--health 4003", "--health", "RELAY_HEALTH"),
        ("--check", "--check", "end at once"),
        ("--chec", "--chec", "end at once"),
        ("--hel", "--hel", "end at once"),
        ("--grace 5 --v", "--v", "end at once"),
        ("--upstream 127.0.0.1:4001", "--upstream", "docs/machines.md"),
        ("--up=127.0.0.1:4001", "--up=127.0.0.1:4001", "docs/machines.md"),
        ("--port=4001", "--port=4001", "RELAY_LISTEN"),
    ],
)
def test_an_option_that_is_not_for_relay_options_is_told_of_with_what_to_do(
    options: str, word: str, remedy: str
) -> None:
    with supervised(started=False, options=options) as service:
        service.env["RELAY_HEALTH"] = str(free_port())
        line = service.complaint()
        assert line.startswith(f"relay-gevent: error: RELAY_OPTIONS, {word}: "), line
        assert remedy in line


def test_the_beginning_of_an_option_that_the_file_gives_is_told_of_as_a_repetition() -> None:
    with supervised(started=False, options="--blur 60") as service:
        line = service.complaint()
        assert line.startswith("relay-gevent: error: --blur-usage is given more than once, as --blur, too; "), line


@pytest.mark.parametrize("blur", ["60", "no"])
def test_the_blur_and_the_port_for_health_checks_are_changed_without_the_file(blur: str) -> None:
    with supervised(started=False, options="--websocket-url ws://relay.example.org/") as service:
        health = free_port()
        service.env.update(RELAY_BLUR_USAGE=blur, RELAY_HEALTH=f"tcp:{health}:interface=127.0.0.1")
        service.start()
        told = {Path(f"/proc/{pid}/cmdline").read_bytes() for pid in service.pids()}
        (words,) = [[word.decode() for word in line.split(b"\0")] for line in told]
        assert ("--blur-usage" in words) == (blur != "no")
        assert blur == "no" or words[words.index("--blur-usage") + 1] == blur
        assert words[words.index("--log-path") + 1].endswith("/var/relay/usage.jsonl")
        with connect(health) as check:
            check.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_exactly(check, 12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("options", ["--verbose", "--ch9", "--c", "--websocket-ur"])
def test_what_only_looks_like_the_beginning_of_such_an_option_is_the_relays_to_tell_of(options: str) -> None:
    with supervised(started=False, options=options) as service:
        line = service.complaint()
        assert line.startswith("relay-gevent: error: --"), line
        assert options in line


@pytest.mark.parametrize(
    ("options", "word", "remedy"),
    [
        ("--port 4080", "--port", "set RELAY_STATUS_LISTEN"),
        ("--workers 2 --hel", "--hel", "give it to relay-status in a shell"),
        ("--version", "--version", "give it to relay-status in a shell"),
    ],
)
def test_an_option_that_is_not_for_the_status_page_is_told_of_with_what_to_do(
    options: str, word: str, remedy: str
) -> None:
    with supervised(started=False) as service:
        service.env["RELAY_STATUS_OPTIONS"] = options
        service.run("-m", "supervisor.supervisord", "-c", str(service.conf))
        log = service.var / "status.log"
        wait_until(lambda: log.exists() and "\n" in log.read_text(), 20, service.logs())
        line = log.read_text().splitlines()[0]
        assert line.startswith(f"relay-status: error: RELAY_STATUS_OPTIONS, {word}: ")
        assert line.endswith(remedy)


def test_a_path_among_the_options_of_the_status_page_begins_where_other_paths_do() -> None:
    with supervised(started=False) as service:
        service.env["RELAY_STATUS_OPTIONS"] = "--usage-db var/relay/other.sqlite"
        service.start()
        wait_until(lambda: begins_in(service.home, b"--usage-db\0var/relay/other.sqlite\0"), 20, service.logs())


def begins_in(folder: Path, words: bytes) -> bool:
    """Whether a process that was given these words is in that folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if words in (process / "cmdline").read_bytes() and (process / "cwd").samefile(folder):
                return True
    return False
