"""What a worker does without, so that it takes little memory before its first client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.harness import CHECKOUT, Relay
from tests.support.hostile import honest_transfer

DEAR = {
    *("encodings.idna", "unicodedata", "websockets", "ssl", "gevent.pool", "gevent.monkey"),
    *("dataclasses", "inspect", "ast", "dis", "pprint", "logging", "sqlite3", "datetime"),
    *("relay.workers.household", "relay.clients.proxied", "relay.clients.upstream"),
}
"""Modules that are dear and of no use to one that is alone and takes TCP clients."""


def loaded(said: str) -> set[str]:
    """The modules of which Python says, with -X importtime, how long it took to load them."""
    lines = [line for line in said.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_modules_that_are_dear_and_of_no_use_are_not_loaded() -> None:
    check = [sys.executable, "-X", "importtime", "-m", "relay", "--check", "--interface", "127.0.0.1"]
    all_of_it = [sys.executable, "-X", "importtime", "-c", "import relay.cli, relay.server"]
    for command, there in ((check, "relay.process.addresses"), (all_of_it, "relay.server")):
        said = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True).stderr
        assert there in loaded(said)
        assert not loaded(said) & DEAR


def test_nor_by_a_worker_that_records_and_has_served_a_transfer(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True, env={"PYTHONPROFILEIMPORTTIME": "1"}) as relay:
        honest_transfer(relay.port, 1_000_000)
        assert relay.wait_for_rows("usage", 1)
        modules = loaded(relay.log_text())
    assert {"relay.usage.database", "relay.transfer.pair"} <= modules
    assert not modules & DEAR


def test_docopt_and_what_it_made_of_the_options_is_gone_when_they_are_read() -> None:
    program = (
        "import gc, sys; from relay.cli import read_options; read_options(['--port', '0']); gc.collect();"
        "print([each for each in gc.get_objects() if getattr(type(each), '__module__', '') == 'docopt'],"
        " 'docopt' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said == "[] False\n"
