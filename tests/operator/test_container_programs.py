"""What the image's own programs do, tried without an image."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT


class _Well(BaseHTTPRequestHandler):
    """A status page that has nothing to complain of."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"all is well\n")

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Server(HTTPServer):
    def __init__(self, address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), _Well)


@contextlib.contextmanager
def answering(address: str) -> Iterator[int]:
    """What answers there that all is well; its port."""
    with _Server(address) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def healthy(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """The exit status of the image's health check, its words and its complaints."""
    ended = subprocess.run(
        [sys.executable, "-I", CHECKOUT / "misc" / "container" / "healthy", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_health_check_asks_no_proxy_that_the_engine_names_in_the_environment() -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:1")
    with answering("127.0.0.1") as port:
        assert healthy(RELAY_STATUS_LISTEN=str(port), **proxies) == (0, "all is well\n", "")


@pytest.mark.parametrize(
    ("address", "environment"),
    [
        ("127.0.0.1", {"RELAY_HEALTH": "PORT", "RELAY_OPTIONS": "--interface 0:0:0:0:0:0:0:0"}),
        ("127.0.0.2", {"RELAY_HEALTH": "PORT", "RELAY_OPTIONS": "--grace 5 --interface 127.0.0.2"}),
        ("127.0.0.2", {"RELAY_HEALTH": "tcp:PORT", "RELAY_OPTIONS": "--max-waiting=9 --inter=127.0.0.2"}),
        ("::1", {"RELAY_HEALTH": "PORT", "RELAY_OPTIONS": "--interface ::1"}),
        ("127.0.0.2", {"RELAY_HEALTH": "PORT", "RELAY_LISTEN": "tcp:4001:interface=127.0.0.2"}),
        ("127.0.0.1", {"RELAY_HEALTH": "tcp:PORT:interface=127.0.0.1", "RELAY_OPTIONS": "--interface 127.0.0.2"}),
        ("127.0.0.2", {"RELAY_HEALTH": "", "RELAY_OPTIONS": "--health tcp:PORT:interface=127.0.0.2"}),
    ],
)
def test_whether_a_worker_lives_is_asked_where_all_variables_together_have_it_answer(
    address: str, environment: dict[str, str]
) -> None:
    with answering(address) as port:
        there = {name: value.replace("PORT", str(port)) for name, value in environment.items()}
        assert healthy("--alive", **there) == (0, "a worker answers\n", "")


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        (["--alive"], {"RELAY_HEALTH": ""}, "RELAY_HEALTH names no port"),
        (["--alive"], {"RELAY_HEALTH": "x"}, "RELAY_HEALTH, .*: --health x: give a number from 0 to 65535"),
        (["--alive"], {"RELAY_OPTIONS": "--version"}, "RELAY_OPTIONS: with --help or --version nothing is served"),
        ([], {"RELAY_STATUS_LISTEN": "x"}, "RELAY_STATUS_LISTEN, .*: --port x: give a whole number from 0 to 65535"),
        ([], {"RELAY_STATUS_LISTEN": "70000"}, "RELAY_STATUS_LISTEN, .*: --port 70000: give a whole number"),
        ([], {"RELAY_STATUS_OPTIONS": "--nothing"}, "RELAY_STATUS_OPTIONS: .*--nothing"),
        ([], {"RELAY_STATUS_OPTIONS": "--help"}, "RELAY_STATUS_OPTIONS: with --help or --version nothing is served"),
    ],
)
def test_where_its_variables_are_wrong_the_health_check_says_which_in_one_line(
    arguments: list[str], environment: dict[str, str], complaint: str
) -> None:
    status, words, told = healthy(*arguments, **environment)
    assert (status, words) == (1, "")
    assert re.search(complaint, told), told
    assert len(told.splitlines()) == 1


def test_a_container_writes_no_lines_that_its_engine_would_stamp_unless_it_is_asked_to(tmp_path: Path) -> None:
    start = (CHECKOUT / "misc" / "container" / "start").read_text()
    (tmp_path / "var").mkdir()
    (tmp_path / "supervisord").write_text('#!/bin/sh\nrm -r "$RELAY_PLACE"\necho "$RELAY_USAGE_LOG"\n')
    (tmp_path / "supervisord").chmod(0o755)
    (tmp_path / "start").write_text(start.replace("cd /relay ", f"cd {tmp_path} "))
    told = []
    for asked in ({}, {"RELAY_USAGE_LOG": ""}, {"RELAY_USAGE_LOG": "/dev/stdout"}):
        done = subprocess.run(
            ["sh", tmp_path / "start"],
            env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin", **asked},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        told.append(done.stdout.split()[-1])
    assert told == ["/dev/null", "/dev/null", "/dev/stdout"]
