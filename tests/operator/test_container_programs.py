"""What the image's own programs do, tried without an image."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from tests.support.harness import CHECKOUT


class _Well(BaseHTTPRequestHandler):
    """A status page that has nothing to complain of."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"all is well\n")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_the_health_check_asks_no_proxy_that_the_engine_names_in_the_environment() -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:1")
    with HTTPServer(("127.0.0.1", 0), _Well) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            ended = subprocess.run(
                [sys.executable, "-I", CHECKOUT / "misc" / "container" / "healthy"],
                env={**os.environ, **proxies, "RELAY_STATUS_LISTEN": str(server.server_port)},
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        finally:
            server.shutdown()
            thread.join()
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "all is well\n", "")


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
