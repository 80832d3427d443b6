"""What a worker does without, so that it takes little memory before its first client."""

from __future__ import annotations

import subprocess
import sys

from tests.support.harness import CHECKOUT


def test_modules_that_are_dear_and_of_no_use_are_not_loaded() -> None:
    dear = {"encodings.idna", "unicodedata", "sqlite3", "websockets", "ssl", "gevent.pool", "gevent.monkey"}
    check = [sys.executable, "-X", "importtime", "-m", "relay", "--check", "--interface", "127.0.0.1"]
    all_of_it = [sys.executable, "-X", "importtime", "-c", "import relay.cli, relay.server"]
    for command, there in ((check, "relay.clients.listening"), (all_of_it, "relay.server")):
        said = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True).stderr
        loaded = {line.rpartition("|")[2].strip() for line in said.splitlines()}
        assert there in loaded
        assert not loaded & dear
