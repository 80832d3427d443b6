"""A process that dies of a fault leaves none of its memory, and with it no token and no address, on the disk."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT, Relay
from tests.support.needs import needs_strace

Start = Callable[..., Relay]

DIES = "import os; from relay.process.program import get_ready; get_ready(); os.abort()"


def allow_cores() -> None:
    """Allow this process cores of any size, as far as it may, as containers' engines do."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def _hard() -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    return "unlimited" if hard == resource.RLIM_INFINITY else str(hard)


def leaves_core(folder: Path) -> bool:
    """Tell whether a process that dies of a fault, in `folder`, has its core written, to a file or to a program."""
    process = subprocess.Popen(
        [sys.executable, "-c", DIES],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        preexec_fn=allow_cores,
    )
    _, status = os.waitpid(process.pid, 0)
    process.returncode = status
    assert os.WIFSIGNALED(status)
    return os.WCOREDUMP(status) or any(folder.iterdir())


def test_a_program_of_the_relays_that_dies_of_a_fault_leaves_no_core(tmp_path: Path) -> None:
    # Where no process may have one, as where the hard limit is 0, there is nothing to see here.
    assert not leaves_core(tmp_path)


@pytest.mark.parametrize("program", ["relay", "relay.status.cli"])
def test_each_program_gives_up_its_cores_and_leaves_who_wants_one_the_hard_limit(
    relay_factory: Start, tmp_path: Path, program: str
) -> None:
    if program == "relay":
        relay = relay_factory(inside=["prlimit", f"--core={_hard()}"])
        limits = Path(f"/proc/{relay.pid}/limits").read_text()
    else:
        pytest.importorskip("prometheus_client")
        status = subprocess.Popen(
            [sys.executable, "-m", program, "--usage-db", str(tmp_path / "usage.sqlite"), "--port", "0"],
            cwd=CHECKOUT,
            stderr=subprocess.PIPE,
            preexec_fn=allow_cores,
            text=True,
        )
        try:
            assert status.stderr is not None
            assert "the status page is at" in status.stderr.readline()
            limits = Path(f"/proc/{status.pid}/limits").read_text()
        finally:
            status.terminate()
            status.communicate(timeout=20)
    found = re.search(r"^Max core file size +(\w+) +(\w+) ", limits, re.MULTILINE)
    assert found is not None
    assert found[1] in ("0", "1")
    assert found[2] == _hard()


@needs_strace
def test_where_the_limit_may_not_be_set_the_programs_work_all_the_same() -> None:
    refusing = ["strace", "-D", "--follow-forks", "--trace=prlimit64", "--output=/dev/null"]
    told = subprocess.run(
        [*refusing, "--inject=prlimit64:error=EPERM", sys.executable, "-m", "relay.report.cli", "--version"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (told.returncode, told.stderr) == (0, "")
