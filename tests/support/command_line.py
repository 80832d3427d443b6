"""relay-gevent as its operator meets it: what an ended one said, and what to put before its command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.harness import CHECKOUT


def run(
    *arguments: str, inside: Sequence[str] = (), pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run relay-gevent to its end; `inside` is what comes before its command."""
    return subprocess.run(
        [*inside, sys.executable, "-m", "relay", *arguments],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        pass_fds=pass_fds,
    )


def complaint(*arguments: str, inside: Sequence[str] = (), pass_fds: tuple[int, ...] = ()) -> str:
    """Run relay-gevent, which must find a mistake; return what it says behind `relay-gevent: error: `."""
    return checked(run("--port", "0", "--interface", "127.0.0.1", *arguments, inside=inside, pass_fds=pass_fds))


def powerless() -> list[str]:
    """What to put before a command to take root's powers over files and ports from it; an ordinary user has none."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root's powers are taken away with setpriv(1): apt-get install util-linux")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def checked(ended: subprocess.CompletedProcess[str]) -> str:
    """What an ended relay complained of: one line, and nothing else."""
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("relay-gevent: error: ")
    assert ended.stderr.endswith("\n")
    assert ended.stderr[:-1].isprintable(), ended.stderr
    return ended.stderr[len("relay-gevent: error: ") : -1]
