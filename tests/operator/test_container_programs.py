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


def test_the_health_check_asks_no_proxy_that_the_engine_names_in_the_environment(tmp_path: Path) -> None:
    check = tmp_path / "healthy"
    text = (CHECKOUT / "misc" / "container" / "healthy").read_text()
    assert "127.0.0.1:4080" in text
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:1")
    with HTTPServer(("127.0.0.1", 0), _Well) as server:
        check.write_text(text.replace("127.0.0.1:4080", f"127.0.0.1:{server.server_port}"))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            ended = subprocess.run(
                [sys.executable, "-I", check],
                env={**os.environ, **proxies},
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        finally:
            server.shutdown()
            thread.join()
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "all is well\n", "")
