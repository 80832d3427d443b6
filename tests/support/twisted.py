"""The Twisted relay, as PyPI has it: `pip install magic-wormhole-transit-relay`.

with transit_relay(tmp_path, "--usage-db", str(database)) as port: ...
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import accepts, free_port, running, wait_until


@contextlib.contextmanager
def transit_relay(folder: Path, *options: str) -> Iterator[int]:
    """Run one in the folder; gives its TCP port, at which somebody was there already: a connection that said nothing.
    Skips the test where it is not installed."""
    pytest.importorskip("wormhole_transit_relay", reason="pip install magic-wormhole-transit-relay")
    port = free_port()
    command = [sys.executable, "-m", "twisted", "transitrelay", "--port", f"tcp:{port}:interface=127.0.0.1"]
    with running([*command, *options], folder / "twist.log", cwd=folder):
        wait_until(lambda: accepts(port), 20, "the Twisted relay")
        yield port
