"""A process of the tests' own that is told on its stdin what to do, one line each, and answers each with a line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from tests.support.harness import CHECKOUT

T = TypeVar("T", bound="ToldProcess")


class ToldProcess:
    """One such process, which runs a module of the tests; a context manager that ends it. `start` sends a command
    whose answer `answer` returns later, so that several processes can be at work.

    Args:
        module: its name; what it runs calls `obey_stdin`.
        arguments: of its command line.
        pass_fds: file descriptors that it inherits.
        inside: what comes before its command, such as `unshare --pid`.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], pass_fds: Sequence[int] = (), inside: Sequence[str] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-m", module, *arguments],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
        self.warnings = ""
        """What it said on stderr, once it has ended."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def start(self, *words: object) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Wait until the oldest command without an answer is carried out; return what it said."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            self.end()
            raise AssertionError(f"process {self.pid} has ended: {self.warnings}")
        return line.strip()

    def ask(self, *words: object) -> str:
        """Send a command and return the answer."""
        self.start(*words)
        return self.answer()

    def read_warning(self) -> str:
        """Return the next line that it says on stderr; it is not in `warnings` then."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def kill(self) -> None:
        """End it with SIGKILL and take its status, so that not even a zombie is left."""
        self.process.kill()
        self.end()

    def end(self) -> int:
        """Wait for its end and keep what it said on stderr; return the exit status."""
        _, self.warnings = self.process.communicate(timeout=30)
        return self.process.returncode

    def __enter__(self: T) -> T:
        assert self.answer() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.kill()


def obey_stdin(obey: Callable[[str, list[str]], str]) -> None:
    """Be such a process: `obey` is given each command and its words, and returns what is to be answered."""
    print("ready", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        print(obey(command, words), flush=True)
