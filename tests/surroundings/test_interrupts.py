"""Somebody types Ctrl-C while a program imports itself, or when it has done its work: it ends, without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.harness import CHECKOUT

IN_ITS_IMPORTS = """
import os, signal, sys
from {program}.__main__ import main

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "{program}.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
main()
"""

AT_ITS_END = """
import atexit, os, signal
from {program}.__main__ import main

atexit.register(lambda: [os.kill(os.getpid(), signal.SIGINT), os.getpid()])
main()
"""


def interrupted(text: str, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text.format(program=program), "--version"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("program", "status"), [("relay", 0), ("relay.status", 0), ("relay.report", 130)])
def test_an_interrupt_while_a_program_is_imported_ends_it_without_a_word(program: str, status: int) -> None:
    ended = interrupted(IN_ITS_IMPORTS, program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", "")


@pytest.mark.parametrize(("program", "status"), [("relay", 0), ("relay.status", 0), ("relay.report", 130)])
def test_an_interrupt_at_the_end_of_a_program_is_not_told_of(program: str, status: int) -> None:
    ended = interrupted(AT_ITS_END, program)
    assert (ended.returncode, ended.stderr) == (status, "")
    assert "1." in ended.stdout
