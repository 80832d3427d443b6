"""`make run` and `make stop`, in a checkout of their own, and what an installation leaves in one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, met, read_to_end

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="apt-get install make")


@pytest.fixture
def checkout() -> Iterator[Path]:
    """What `make run` needs of a checkout, with an environment in which everything is installed already."""
    # Not below pytest's folder: supervisord's socket is in it, and the path of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="rg-make-", dir="/tmp") as above:
        top = Path(above)
        for name in ("Makefile", "setup.py", "setup.cfg", "pyproject.toml"):
            shutil.copy(CHECKOUT / name, top)
        shutil.copytree(CHECKOUT / "etc", top / "etc")
        shutil.copytree(CHECKOUT / "relay", top / "relay", ignore=shutil.ignore_patterns("__pycache__"))
        (top / "var").mkdir()
        bin_folder = top / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        for program, module in (
            ("supervisord", "supervisor.supervisord"),
            ("supervisorctl", "supervisor.supervisorctl"),
        ):
            (bin_folder / program).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            (bin_folder / program).chmod(0o755)
        # Beside the python that runs supervisord there is a relay-gevent; it is that of the tests.
        (bin_folder / "python").symlink_to(sys.executable)
        (top / ".venv" / ".relay").touch()
        yield top


def make(checkout: Path, *words: str) -> str:
    """Run make, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "MAKE"))}
    done = subprocess.run(
        ["make", *words], cwd=checkout, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def test_make_run_tells_the_port_that_the_relay_has(checkout: Path) -> None:
    options = ("RELAY_LISTEN=tcp:0:interface=127.0.0.1", "RELAY_WEBSOCKET=tcp:0:interface=127.0.0.1")
    told = make(checkout, "run", *options)
    try:
        port = re.search(r"^The relay runs, listening on 127\.0\.0\.1 port (\d+)$", told, re.MULTILINE)
        assert port is not None, told
        assert re.search(r"^ +WebSocket on 127\.0\.0\.1 port \d+$", told, re.MULTILINE)
        sender, receiver = met(int(port[1]))
        with sender, receiver:
            sender.sendall(b"as make told")
            sender.shutdown(1)
            assert read_to_end(receiver) == b"as make told"
        # Once more, with others in mind: what runs is what is told.
        assert f"listening on 127.0.0.1 port {port[1]}\n" in make(checkout, "run", "RELAY_LISTEN=4001")
    finally:
        make(checkout, "stop")
    assert not (checkout / "var" / "supervisord.pid").exists()
