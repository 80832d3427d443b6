"""What the workers of a relay have in common, and each newcomer gets from a sibling: the files of the homes, and the
listening sockets, of which that for plain TCP comes last, so that workers of other languages find it, too. Before it
comes that for WebSocket, and before that the one for health checks, of which workers of earlier versions know nothing:
where there is no other for WebSocket, the plain one stands in its place then.
"""

from __future__ import annotations

import errno
import os
import socket

from relay.mistakes import Mistake
from relay.process.memory import no_memory
from relay.workers.homes import FILES, Homes
from relay.workers.language import LANGUAGE

Listeners = tuple[socket.socket | None, socket.socket | None, socket.socket | None]
"""The relay's listening sockets: for plain TCP, for WebSocket, and for health checks; None where there is none."""

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
        self.health_port: socket.socket | None = None
        self.homes: Homes | None = None
        self._keeps_ports = False

    @property
    def listeners(self) -> Listeners:
        """What there is of them."""
        return self.port, self.web_port, self.health_port

    def keep(self, *listeners: socket.socket | None) -> None:
        """Of all listening sockets this worker has these three, and accepts there. A sibling's that it makes no use of
        is closed: it would look open, and nobody be let in, when the others have left."""
        for sock in self.listeners:
            if sock is not None and sock not in listeners:
                sock.close()
        self.port, self.web_port, self.health_port = listeners
        self._keeps_ports = True

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
        ports, web_ports, health_ports = (
            [sock.fileno()] if sock is not None and sock.fileno() >= 0 else [] for sock in self.listeners
        )
        if language != LANGUAGE:
            return ports
        if health_ports and not web_ports:
            web_ports = ports
        return [*(() if self.homes is None else self.homes.fds), *health_ports, *web_ports, *ports]

    def take(self, language: int, fds: list[int]) -> bool:
        """A sibling of that language has given us these; what is left in `fds` is not needed.

        True when the homes are others than before, so that everybody who waits here has to be settled anew.
        """
        if not self._keeps_ports:
            self._take_ports(fds, most=max(0, len(fds) - FILES) if language == LANGUAGE else 1)
        if language != LANGUAGE or len(fds) < FILES:
            return False
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

    def _take_ports(self, fds: list[int], *, most: int) -> None:
        """Take those listening sockets that we have not yet out of these, of which the last is that for plain TCP."""
        held = list(self.listeners)
        for place, fd in enumerate(fds[: -most - 1 : -1]):
            if place < len(held) and held[place] is None:
                held[place] = socket.socket(fileno=fd)
                fds.remove(fd)
        self.port, self.web_port, self.health_port = held
