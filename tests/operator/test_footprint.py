"""What a worker does without, so that it takes little memory before its first client."""

from __future__ import annotations

import subprocess
import sys

from tests.support.harness import CHECKOUT


def test_modules_that_are_dear_and_of_no_use_are_not_loaded() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "relay", "--check", "--interface", "127.0.0.1"]
    said = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    assert "relay.clients.listening" in loaded
    assert not loaded & {"encodings.idna", "unicodedata", "sqlite3", "websockets", "ssl"}
