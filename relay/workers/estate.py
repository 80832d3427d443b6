"""What the workers of a relay have in common, and each newcomer gets from a sibling: the files of the homes, and the
listening sockets, of which that for plain TCP comes last, so that workers of other languages find it, too.
"""

from __future__ import annotations

import errno
import os
import socket

from relay.mistakes import Mistake
from relay.process.memory import no_memory
from relay.workers.homes import FILES, Homes
from relay.workers.language import LANGUAGE

_ADVICE = {
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENFILE: "raise the limit (ulimit -n)",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f, LimitFSIZE=), which holds for files in memory, too",
}
"""What to do when the homes, files in memory, cannot be had."""


class Estate:
    """This worker's hold on what is common; nothing as long as no sibling has given it, and it has made none."""

    def __init__(self) -> None:
        self.port: socket.socket | None = None
        self.web_port: socket.socket | None = None
        self.homes: Homes | None = None

    def make_homes(self, run_dir: str, *, first: bool) -> None:
        """Make the homes, as the `first` worker of the relay in `run_dir`, unless there are some.

        Raises Mistake when they cannot be made, or should have come from a sibling.
        """
        if self.homes is not None:
            return
        try:
            if first:
                self.homes = Homes.make()
                return
            reason = errno.EMFILE  # those of a sibling did not all arrive
        except OSError as error:
            reason = error.errno or 0
        if reason == errno.ENOMEM:
            raise Mistake(f"--run-dir {run_dir}: {no_memory()}")
        advice = _ADVICE.get(reason, "see memfd_create(2)")
        raise Mistake(f"--run-dir {run_dir}: {os.strerror(reason)}; {advice}")

    def fds_for(self, language: int) -> list[int]:
        """What a newcomer of that language gets."""
        ports = [port.fileno() for port in (self.port,) if port is not None and port.fileno() >= 0]
        if language != LANGUAGE:
            return ports
        web_ports = [port.fileno() for port in (self.web_port,) if port is not None and port.fileno() >= 0]
        return [*(() if self.homes is None else self.homes.fds), *web_ports, *ports]

    def take(self, language: int, fds: list[int]) -> bool:
        """A sibling of that language has given us these; what is left in `fds` is not needed.

        True when the homes are others than before, so that everybody who waits here has to be settled anew.
        """
        if self.port is None and len(fds) > (FILES if language == LANGUAGE else 0):
            self.port = _last_as_socket(fds)
        if language != LANGUAGE or len(fds) < FILES:
            return False
        if self.web_port is None and len(fds) > FILES:
            self.web_port = _last_as_socket(fds)
        before = self.homes
        try:
            if before is not None and before.made <= Homes.made_when(fds):
                return False  # as a rule, the same
            self.homes = Homes(fds[:FILES])
        except OSError:
            return False  # no file descriptor left for them
        del fds[:FILES]
        if before is None:
            return False
        before.close()  # the giver was too slow to be heard when we joined, so that we took ourselves for the first
        return True


def _last_as_socket(fds: list[int]) -> socket.socket:
    sock = socket.socket(fileno=fds[-1])
    fds.pop()
    return sock
