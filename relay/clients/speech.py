"""How a client speaks before it has a partner: plainly over TCP, or in WebSocket frames.

What is decided about a client (`reception`, `matching`, `farewell`) is the same for both; what differs is how its bytes
become a handshake, how it is told something, and how one finds out that it has left or spoken. `Plain` is one object
for all, so that a client over TCP is not larger for it; each WebSocket client has a `Web` of its own. Nothing here
waits.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from relay.clients.bounds import Bound
from relay.clients.claim import Claim, pack_claim
from relay.clients.handshake import LONGEST, OK, Handshake, Refusal, read_handshake
from relay.process.dataclass import dataclass
from relay.usage.record import Mood

if TYPE_CHECKING:
    from relay.clients.frames import FrameReader
    from relay.clients.pings import Pings


class Speaker(Protocol):
    """A client, as far as its speech is concerned."""

    sock: socket.socket
    received: bytes
    speech: Speech
    claim: Claim | None
    arrived: float
    discarded: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ends that has no partner: the mood on record (None is no record), the last words, whether
    it has gone already, so that nobody need wait for these to arrive, and what the log is to count it as, if anything.
    `impatient`: it spoke before it was told ok.
    """

    mood: Mood | None
    words: bytes = b""
    gone: bool = False
    bound: Bound | None = None
    impatient: bool = False


class Speech(Protocol):
    """How one client speaks."""

    @property
    def reader(self) -> FrameReader | None:
        """Where its frames are; None if it speaks plainly."""

    def hear(self, client: Speaker) -> Handshake | Ending | None:
        """Read what has come of a handshake: the whole, the end of the connection, or None while more is needed.

        Raises BlockingIOError when nothing has come. If that leaves a `claim` with the client, it is to be settled
        first; and where nothing else was heard, there may be more to hear.
        """

    def keeps(self, claim: Claim) -> bool:
        """Keep what a trusted proxy has said, whose word may still be taken for more, until that has come; False when
        nothing more will."""

    def interruption(self, client: Speaker) -> Ending | None:
        """What has become of a client that waits and was to say nothing: None while it is there and has said nothing,
        as far as the kernel knows by now."""

    def refusal(self, refusal: Refusal) -> Ending:
        """How to turn the client away."""

    def lonely(self) -> Ending:
        """How to send it away for want of a partner."""

    def ok(self) -> bytes:
        """What it reads when its partner is there."""

    def be_pinged(self, pings: Pings, sock: socket.socket) -> None:
        """Be pinged from now on, if that means anything to it."""

    def be_silent(self) -> None:
        """Say nothing of its own accord any more."""

    def pack(self) -> bytes:
        """As it travels to another worker; empty for one that speaks plainly."""


class Plain:
    """Over TCP, as the protocol has it."""

    reader = None

    def hear(self, client: Speaker) -> Handshake | Ending | None:
        """See `Speech`."""
        try:
            # One byte more than a handshake can have tells everything there is to know.
            chunk = client.sock.recv(LONGEST + 1 - len(client.received))
        except BlockingIOError:
            raise
        except OSError:
            chunk = b""
        client.received += chunk
        verdict = read_handshake(client.received) if chunk else Refusal.BAD_HANDSHAKE
        if isinstance(verdict, Refusal):
            return Ending("errory", verdict.value, gone=not chunk, impatient=verdict is Refusal.IMPATIENT)
        return verdict

    def keeps(self, claim: Claim) -> bool:
        """See `Speech`: a handshake names nobody."""
        return False

    def interruption(self, client: Speaker) -> Ending | None:
        """See `Speech`."""
        try:
            spoke = bool(client.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return None
        except OSError:
            spoke = False
        return self.refusal(Refusal.IMPATIENT) if spoke else Ending("lonely", gone=True)

    def refusal(self, refusal: Refusal) -> Ending:
        """See `Speech`."""
        return Ending("errory", refusal.value, impatient=refusal is Refusal.IMPATIENT)

    def lonely(self) -> Ending:
        """See `Speech`."""
        return Ending("lonely")

    def ok(self) -> bytes:
        """See `Speech`."""
        return OK

    def be_pinged(self, pings: Pings, sock: socket.socket) -> None:
        """See `Speech`."""

    def be_silent(self) -> None:
        """See `Speech`."""

    def pack(self) -> bytes:
        """See `Speech`."""
        return b""


PLAIN = Plain()


UNDECIDED = b"?"
"""What an `Either` that travels begins with."""


class Either:
    """On a port for both: the first byte tells. HTTP begins with a capital letter, a handshake does not.

    `new_web` makes the speech of a WebSocket client, and `claim` is what a trusted proxy has said about the client.
    """

    __slots__ = ("_claim", "_new_web")

    def __init__(self, new_web: Callable[[], Speech], claim: Claim | None = None) -> None:
        self._new_web = new_web
        self._claim = claim

    def hear(self, client: Speaker) -> Handshake | Ending | None:
        """See `Speech`; from the first byte on the client has another one."""
        try:
            # What a proxy has left, which looked for something else, comes first.
            first = client.received[:1] or client.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            raise
        except OSError:
            first = b""
        client.speech = self._new_web() if first.isupper() else PLAIN
        if self._claim is not None and not client.speech.keeps(self._claim):
            client.claim = self._claim
        return client.speech.hear(client)

    def keeps(self, claim: Claim) -> bool:
        """See `Speech`: HTTP may say more."""
        self._claim = claim
        return True

    reader = None
    interruption = PLAIN.interruption
    refusal = PLAIN.refusal
    lonely = PLAIN.lonely
    ok = PLAIN.ok
    be_pinged = PLAIN.be_pinged
    be_silent = PLAIN.be_silent

    def pack(self) -> bytes:
        """See `Speech`: it travels before its first byte."""
        return UNDECIDED + pack_claim(self._claim)
