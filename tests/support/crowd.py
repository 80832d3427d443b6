"""Many clients at once, all driven by the test's own thread.

    with Crowd(workers.port) as crowd:
        waiting = crowd.call(new_token(), new_side())       # connects, shakes hands
        transfer = crowd.transfer(left=1e6)                 # two that meet; the first sends a megabyte a second
        crowd.begin([transfer])
        crowd.run_beside(lambda: workers.stop_one(0))       # something happens meanwhile
        crowd.end([transfer])                               # both end their streams, no byte is missing

Whatever a client sends is random, and both ends keep a running SHA-256 of it, so a byte that is lost, doubled or out of
place shows. Nothing is raised in the middle: what goes wrong is in `Caller.error`. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import select
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.support.harness import Patience, connect, handshake, new_side, new_token

# Longer than anything the relay holds, and of an odd length, so that no loss fits the repetition by chance.
_NOISE = secrets.token_bytes(3_000_017)
_CHUNK = 1 << 17
_TICK = 0.005

T = TypeVar("T")

Sock: TypeAlias = "socket.socket | WebSock"


@dataclass
class Stream:
    """What went in one direction: how much, and its SHA-256."""

    size: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, chunk: bytes | memoryview) -> None:
        """Note what was sent or received."""
        self.size += len(chunk)
        self.digest.update(chunk)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.size == other.size and self.digest.digest() == other.digest.digest()

    def __repr__(self) -> str:
        return f"Stream({self.size}, {self.digest.hexdigest()[:8]})"


class Caller:
    """One client: `met` once it was told ok, `ended` when it has read the end of the stream, `closed` when it closed.

    `answer` is what it read up to ok, or all of it when no ok came; `first_words` the first bytes of its partner.
    """

    def __init__(
        self,
        crowd: Crowd,
        token: str,
        side: str | None,
        head: bytes,
        rate: float,
        quota: int | None,
        expects: int | None = None,
    ) -> None:
        self.token = token
        self.side = side
        self.answer = b""
        self.first_words = b""
        self.said = Stream()
        self.heard = Stream()
        self.reads = True
        self.rate = rate
        self.quota = quota
        self.expects = expects
        self.met = False
        self.ended = False
        self.closed = False
        self.error: OSError | None = None
        self.met_at = 0.0
        self.closed_at = 0.0
        self._crowd = crowd
        self._head = memoryview(head)
        self._at = secrets.randbelow(len(_NOISE))
        self._due = 0.0
        self._last = 0.0
        self._finishing = False
        self.finished = False
        self.called_at = time.time()
        self.called = time.monotonic()
        self.sock: Sock = self._connect()
        self.sock.setblocking(False)

    def __repr__(self) -> str:
        parts = (f"{name} " for name in ("finished", "ended", "closed") if getattr(self, name))
        return f"{self.answer!r} said {self.said.size}, heard {self.heard.size} {''.join(parts)}{self.error or ''}"

    def _connect(self) -> Sock:
        return connect(self._crowd.port)

    def shake_hands(self, line: bytes) -> None:
        """Say who it wants to meet."""
        self.sock.send(line)

    def finish(self) -> None:
        """End the stream once all that is due was sent; not before it was told ok."""
        self._finishing = True
        if self.met and not self.finished:
            self._crowd.senders.add(self)

    def stop_reading(self) -> None:
        """Leave in the kernel whatever comes."""
        self.reads = False
        self._crowd.epoll.modify(self.sock.fileno(), 0)

    def read_again(self) -> None:
        """Take everything that has come, and will come."""
        self.reads = True
        self._crowd.epoll.modify(self.sock.fileno(), select.EPOLLIN)

    def hear(self) -> None:
        """The socket is readable."""
        try:
            chunk = self.sock.recv(_CHUNK if self.met else max(1, 3 - len(self.answer)))
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if not chunk:
            self.ended = True
            self._crowd.epoll.modify(self.sock.fileno(), 0)
            if self.met and not self.finished:
                self._crowd.senders.add(self)  # nothing that it expects will come any more
            self._close_if_over()
        elif self.met:
            self.heard.add(chunk)
            if self.expects is not None and self.heard.size >= self.expects:
                self._crowd.senders.add(self)
            if len(self.first_words) < 64:
                self.first_words += chunk[: 64 - len(self.first_words)]
        else:
            self.answer += chunk
            self.met = self.answer == b"ok\n"
            if self.met:
                self.met_at = self._last = time.monotonic()
                self._crowd.senders.add(self)

    def pour(self, now: float) -> None:
        """Send what is due."""
        try:
            while self._head:
                sent = self.sock.send(self._head)
                self.said.add(self._head[:sent])
                self._head = self._head[sent:]
            self._due = min(self._due + self.rate * (now - self._last), 4 * _CHUNK)
            self._last = now
            if self.quota is not None:
                self._due = min(self._due, self.quota - self.said.size)
            while self._due >= 1:
                view = memoryview(_NOISE)[self._at : self._at + min(int(self._due), _CHUNK)]
                sent = self.sock.send(view)
                self.said.add(view[:sent])
                self._at = (self._at + sent) % len(_NOISE)
                self._due -= sent
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if self.quota is not None and self.said.size >= self.quota:
            self._finishing |= self.ended or self.expects is None or self.heard.size >= self.expects
        if self._finishing:
            self._end_stream()
            if self.finished:
                self._crowd.senders.discard(self)
                self._close_if_over()
        elif not self.rate:
            self._crowd.senders.discard(self)

    def _end_stream(self) -> None:
        self.finished = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._fail(error)

    def hang_up(self) -> None:
        """Close, whatever has happened."""
        if not self.closed:
            self.closed = True
            self.closed_at = time.monotonic()
            self._crowd.forget(self)
            self.sock.close()

    def _close_if_over(self) -> None:
        if self.ended and (self.finished or not self.met):
            self.hang_up()

    def _fail(self, error: OSError) -> None:
        self.error = error
        self.hang_up()


class WebSock:
    """What a `Caller` needs of a socket, over WebSocket: bytes in, bytes out. The end of the stream is a Close.

    A frame is on its way as a whole before the next one is begun; until then `send` would block.
    """

    def __init__(self, port: int) -> None:
        self._sock = connect(port)
        self._protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/"), max_size=None)
        self._protocol.send_request(self._protocol.connect())
        self._sock.sendall(b"".join(self._protocol.data_to_send()))
        while not self._protocol.events_received():
            chunk = self._sock.recv(1024)
            if not chunk:
                raise ConnectionResetError("no answer to an opening handshake")
            self._protocol.receive_data(chunk)
        self._out = b""
        self._in_frame = 0
        self._heard = bytearray()
        self._over = False
        self.fileno, self.close, self.setblocking = self._sock.fileno, self._sock.close, self._sock.setblocking

    @property
    def has_more(self) -> bool:
        """Whether something was read from the kernel and not from here."""
        return bool(self._heard) or self._over

    def send(self, data: bytes | memoryview) -> int:
        """Send one frame of this, or go on with the last one; return how much has gone with it."""
        if self._over:
            raise BlockingIOError  # the partner has ended, and nobody would hear more
        if not self._out:
            self._in_frame = min(len(data), _CHUNK)
            self._protocol.send_binary(bytes(data[: self._in_frame]))
            self._out = b"".join(self._protocol.data_to_send())
        self._flush()
        return self._in_frame

    def _flush(self) -> None:
        while self._out:
            self._out = self._out[self._sock.send(self._out) :]

    def recv(self, most: int) -> bytes:
        """Payload; nothing once a Close has come."""
        if not self._heard and not self._over:
            self._over = not self._receive()
        if not self._heard and not self._over:
            raise BlockingIOError
        chunk = bytes(self._heard[:most])
        del self._heard[:most]
        return chunk

    def _receive(self) -> bool:
        chunk = self._sock.recv(_CHUNK)
        if not chunk:
            return False
        self._protocol.receive_data(chunk)
        assert self._protocol.parser_exc is None, self._protocol.parser_exc
        for frame in self._protocol.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode is Opcode.CLOSE:
                return False
            assert frame.opcode in (Opcode.BINARY, Opcode.PING), frame
            self._heard += frame.data
        return True

    @property
    def unfinished(self) -> int:
        """Payload of the frame that is on its way."""
        return self._in_frame if self._out else 0

    def finish(self) -> None:
        """Say a Close, after what is on its way; to be called until that does not block."""
        self._flush()
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
            self._out = b"".join(self._protocol.data_to_send())
        self._flush()

    def shutdown(self, how: int) -> None:
        """Answer the Close that has come, after what is on its way; to be called until that does not block."""
        self._flush()
        self._out = b"".join(self._protocol.data_to_send())
        self._flush()


class WebCaller(Caller):
    """A client over WebSocket: it ends its stream when its partner has, since a Close is the end of both; or by itself,
    when it has a quota and has heard what it expects."""

    def _connect(self) -> Sock:
        assert self._crowd.web_port is not None
        return WebSock(self._crowd.web_port)

    def finish(self) -> None:
        """Nothing: the partner does."""

    def _end_stream(self) -> None:
        assert isinstance(self.sock, WebSock)
        try:
            self.sock.finish()
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self.finished = True

    def hear(self) -> None:
        """The socket is readable."""
        super().hear()
        while not self.closed and not self.ended and self.sock.has_more:  # type: ignore[union-attr]
            super().hear()
        if self.ended and not self.closed:
            self._crowd.senders.add(self)

    def pour(self, now: float) -> None:
        """Send what is due; in the end, what is left of the last frame, and the Close."""
        if not self.ended:
            super().pour(now)
            return
        assert isinstance(self.sock, WebSock)
        unfinished = self.sock.unfinished
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        view = self._head or memoryview(_NOISE)[self._at :]
        self.said.add(view[:unfinished])
        self.finished = True
        self._close_if_over()


@dataclass
class Transfer:
    """Both clients of a pair; `left` called first."""

    left: Caller
    right: Caller

    @property
    def met(self) -> bool:
        """Whether both were told ok."""
        return self.left.met and self.right.met

    @property
    def closed(self) -> bool:
        """Whether both are done."""
        return self.left.closed and self.right.closed

    @property
    def cut(self) -> bool:
        """Whether the stream ended for both, or one was reset, before either had finished."""
        return all(caller.ended or caller.error is not None for caller in (self.left, self.right))

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.left.said.size + self.right.said.size

    def finish(self) -> None:
        """Let both end their streams, and read what they have left unread."""
        for caller in (self.left, self.right):
            if not caller.closed:
                caller.finish()
                if not caller.reads:
                    caller.read_again()

    def assert_intact(self) -> None:
        """Every byte of either direction arrived once, in its place, and nobody saw an error."""
        assert (self.left.error, self.right.error) == (None, None)
        assert self.left.said == self.right.heard
        assert self.right.said == self.left.heard


class Crowd:
    """All clients of a test; ends what is left of them on exit."""

    def __init__(self, port: int, web_port: int | None = None) -> None:
        self.port = port
        self.web_port = web_port
        self.callers: list[Caller] = []
        self.senders: set[Caller] = set()
        self.epoll = select.epoll()
        self.every_tick: Callable[[], None] | None = None
        self._by_fd: dict[int, Caller] = {}
        self._ticked = 0.0
        self._aside = ThreadPoolExecutor(1)

    def call(
        self,
        token: str,
        side: str | None = None,
        *,
        head: bytes = b"",
        rate: float = 0,
        quota: int | None = None,
        expects: int | None = None,
        line: bytes | None = None,
        web: bool = False,
    ) -> Caller:
        """Connect and shake hands.

        Args:
            token: whom to meet.
            side: None for a client of the older kind.
            head: what to send first, once told ok.
            rate: bytes a second to send after that, until `finish`.
            quota: end the stream by itself after so many bytes;
            expects: and not before so many have come, as long as any may.
            line: send this instead of the handshake.
            web: over WebSocket.
        """
        caller = (WebCaller if web else Caller)(self, token, side, head, rate, quota, expects)
        caller.shake_hands(handshake(token, side) if line is None else line)
        self.callers.append(caller)
        self._by_fd[caller.sock.fileno()] = caller
        self.epoll.register(caller.sock.fileno(), select.EPOLLIN)
        return caller

    def transfer(
        self, left: float = 0, right: float = 0, *, head: bytes = b"", answer: bytes = b"", web: str = ""
    ) -> Transfer:
        """Two that will meet; each sends its first words, and then so many bytes a second. The one that `web` names,
        `left` or `right`, comes over WebSocket."""
        token = new_token()
        return Transfer(
            self.call(token, new_side(), head=head, rate=left, web=web == "left"),
            self.call(token, new_side(), head=answer, rate=right, web=web == "right"),
        )

    def begin(self, transfers: Sequence[Transfer], seconds: float = 10) -> None:
        """Go on until both sides of all `transfers` have met."""
        self.run_until(lambda: all(transfer.met for transfer in transfers), seconds, "all transfers have begun")

    def end(self, transfers: Sequence[Transfer], seconds: float = 20) -> None:
        """Let all `transfers` end, and make sure that none has lost a byte."""
        for transfer in transfers:
            transfer.finish()
        self.run_until(lambda: all(transfer.closed for transfer in transfers), seconds, "all transfers end")
        for transfer in transfers:
            transfer.assert_intact()

    def step(self) -> None:
        """Let everybody do what they can now; waits a few milliseconds when there is nothing."""
        for fd, _ in self.epoll.poll(_TICK, 256):
            caller = self._by_fd.get(fd)
            if caller is not None and not caller.closed:
                if caller.reads:
                    caller.hear()
                else:
                    caller._fail(ConnectionResetError("while it did not read"))
        now = time.monotonic()
        if now - self._ticked >= _TICK:
            self._ticked = now
            for caller in list(self.senders):
                if not caller.closed:
                    caller.pour(now)
            if self.every_tick is not None:
                self.every_tick()

    def run_until(self, condition: Callable[[], object], seconds: float = 10, what: str = "the condition") -> None:
        """Go on until `condition` is true; AssertionError naming `what` when it takes longer than `seconds`."""
        patience = Patience(seconds)
        while not condition():
            if patience.is_over():
                raise AssertionError(f"not within {seconds} s: {what}; {self.troubles()[:5]}")
            self.step()

    def run_for(self, seconds: float) -> None:
        """Go on for so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.step()

    def run_beside(self, work: Callable[[], T], seconds: float = 60) -> T:
        """Go on while `work` runs on another thread; return what that returns."""
        future = self._aside.submit(work)
        self.run_until(future.done, seconds, "what goes on beside the clients")
        return future.result()

    def troubles(self) -> list[str]:
        """What went wrong for anybody so far."""
        return [f"{caller.answer!r} {caller.error!r}" for caller in self.callers if caller.error is not None]

    def forget(self, caller: Caller) -> None:
        """A caller is about to close its socket."""
        self.epoll.unregister(caller.sock.fileno())
        del self._by_fd[caller.sock.fileno()]
        self.senders.discard(caller)

    def hang_up(self) -> None:
        """Close all connections that are still open."""
        for caller in self.callers:
            caller.hang_up()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aside.shutdown()
        self.hang_up()
        self.epoll.close()


def call_in_random_order(
    crowd: Crowd, transfers: dict[str, tuple[str, str]], among: Callable[[], None] = lambda: None
) -> list[Caller]:
    """Both sides of each transfer call, in any order, each saying who it is first."""
    sides = [(token, side) for token, pair in transfers.items() for side in pair]
    random.shuffle(sides)
    callers = []
    for number, (token, side) in enumerate(sides):
        callers.append(crowd.call(token, side, head=side.encode()))
        if number % 20 == 0:
            crowd.step()
            among()
    return callers


def assert_each_met_its_own_partner(callers: list[Caller], transfers: dict[str, tuple[str, str]]) -> None:
    """Each heard `ok` and the name of the other side of its own token, and nothing else."""
    for caller in callers:
        assert caller.error is None
        assert caller.met
        (partner,) = {*transfers[caller.token]} - {caller.side}
        assert caller.first_words == partner.encode()
        assert caller.heard.size == len(partner)
