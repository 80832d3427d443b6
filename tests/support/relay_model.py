"""A model of the relay that Hypothesis drives beside a real one: what each client must read and leave behind.

The model follows from docs/protocol.md alone. What cannot be told apart from outside, such as which of several spares
is matched, it leaves open. tests/hostile/test_fuzz.py drives it for seconds, misc/fuzz.py for as long as wanted.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.harness import Patience, Workers, connect, new_side, new_token, reset
from tests.support.model_clients import REQUEST, SETTLED_SECONDS, Client, WebClient
from tests.support.web import web_options, web_port

BARRIER_SECONDS = 0.05
"""What has been sent has arrived by then, nearly always."""

SOME_BYTES = st.integers(1, 6).flatmap(lambda digits: st.integers(1, 10**digits))
WAYS_TO_LEAVE = st.sampled_from(["close", "reset", "cut off"])
WEB = st.sampled_from(["with a newline", "", "without a newline"])
_NOISE = random.Random(3).randbytes(3_000_017)


@dataclass(eq=False)
class Transfer:
    """Two that have met, and the bytes that have gone through."""

    sides: tuple[Client, Client]
    moved: int = 0

    def send(self, frm: int, size: int) -> None:
        """One side sends, and the other does not read yet; only what fits on the way is sent."""
        at = random.randrange(len(_NOISE) - size)
        self._went(frm, self.sides[frm].send(_NOISE[at : at + size]))

    def _went(self, frm: int, content: bytes) -> None:
        self.sides[1 - frm].owed += content
        self.moved += len(content)

    def come_between_frames(self, frm: int) -> None:
        """One side sends what is left of a frame, of which the other reads as much as it has to for that."""
        sender, receiver = self.sides[frm], self.sides[1 - frm]
        patience = Patience(SETTLED_SECONDS)
        while not sender.is_between_frames:
            assert not patience.is_over(), f"{sender} cannot end a frame"
            assert isinstance(sender, WebClient)
            receiver.reads(bytes(receiver.owed))
            receiver.owed.clear()
            self._went(frm, sender.flush())

    def read(self) -> None:
        """Both sides read all that they are owed."""
        for client in self.sides:
            client.reads(bytes(client.owed))
            client.owed.clear()


def _leave(client: Client, way: str) -> None:
    {"close": client.hang_up, "reset": client.reset, "cut off": client.cut_off}[way]()


class Books:
    """A relay of two workers, and what must be on record there. It lives through many runs, and begins anew when one
    went wrong."""

    def __init__(self) -> None:
        self._opened: contextlib.ExitStack | None = None
        self.expected: Counter[tuple[str, int]] = Counter()
        self.runs = self.restarts = self.clients = self.web_clients = 0

    def open(self) -> None:
        """Have a relay with clean books."""
        if self._opened is None:
            stack = contextlib.ExitStack()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            patient = ("--handshake-timeout", "600", "--max-waiting-per-token", "1000")
            web = (*web_options(), "--ping-interval", "1")
            self.workers = stack.enter_context(Workers(folder, *patient, *web, count=2))
            self._opened = stack
            self.web_port = web_port(self.workers)
            self.expected.clear()
        self.runs += 1

    def close(self) -> None:
        """End the relay; AssertionError when there is a traceback in its log."""
        opened, self._opened = self._opened, None
        if opened is not None:
            with opened:
                assert self.workers.stop() == 0
                assert "Traceback" not in self.workers.log_text(), self.workers.log_text()

    def settle(self) -> None:
        """Everything that has ended is on record once, in the database and in the lines, and nothing else is."""
        count = sum(self.expected.values())
        rows = self.workers.wait_for_rows("usage", count, SETTLED_SECONDS)
        lines = self.workers.wait_for_records(count, SETTLED_SECONDS)
        for found in (
            Counter((str(row["result"]), int(row["bytes"])) for row in rows),
            Counter((str(line["mood"]), int(line["total_bytes"])) for line in lines),
        ):
            assert found == self.expected, f"too much {found - self.expected}, missing {self.expected - found}"

    def restart(self, number: int) -> None:
        """Replace one of the workers; the newcomer is there before or after the old one goes."""
        self.restarts += 1
        living = [place for place, worker in enumerate(self.workers.workers) if worker.pids]
        self.workers.start_one()
        assert self.workers.stop_one(living[number % len(living)]) == 0


class RelayModel(RuleBasedStateMachine):
    """Clients come, say things, meet and go, while workers are replaced."""

    books = Books()

    def __init__(self) -> None:
        super().__init__()
        self.new: list[Client] = []
        self.waiting: list[Client] = []
        self.transfers: list[Transfer] = []

    @initialize()
    def begin(self) -> None:
        """A relay that nobody is connected to."""
        self.books.open()
        self.tokens = [new_token() for _ in range(3)]
        self.sides = [new_side(), new_side(), None]

    def over(self, mood: str, moved: int = 0) -> None:
        """A connection has ended."""
        self.books.expected[mood, moved] += 1

    # Coming

    @rule(token=st.integers(0, 2), side=st.integers(0, 2), part=st.floats(0, 1), whole=st.booleans(), web=WEB)
    def call(self, token: int, side: int, part: float, whole: bool, web: str) -> None:
        """Connect, and say part of the line or all of it."""
        who = self.tokens[token], self.sides[side]
        if web:
            client: Client = WebClient(self.books.web_port, *who, newline=web == "with a newline")
        else:
            client = Client(self.books.workers.port, *who)
        self.books.clients += 1
        self.books.web_clients += client.is_web
        self.new.append(client)
        self._say(client, len(client.line) if whole else int(part * (len(client.line) - 1)))

    @precondition(lambda self: self.new)
    @rule(which=st.integers(0, 99), more=st.integers(1, 120))
    def say_more(self, which: int, more: int) -> None:
        """Go on with a line that is not whole."""
        self._say(self.new[which % len(self.new)], more)

    def _say(self, client: Client, count: int) -> None:
        client.say_more(count)
        if client.said == len(client.line):
            self.new.remove(client)
            self._meet(client)

    def _meet(self, client: Client) -> None:
        rivals = [other for other in self.waiting if other.token == client.token]
        matches = [other for other in rivals if other.side is None or client.side is None or other.side != client.side]
        if not matches:
            self.waiting.append(client)
            time.sleep(BARRIER_SECONDS)
            return
        client.reads(b"ok\n")
        partners = []
        for other in rivals:
            self.waiting.remove(other)
            assert other.can_read(SETTLED_SECONDS), "neither matched nor sent away"
            if other.is_at_its_end():
                other.reads_end()
                self.over("lonely")
            else:
                other.reads(b"ok\n")
                partners.append(other)
        assert len(partners) == 1, f"{len(partners)} of {len(rivals)} were matched"
        self.transfers.append(Transfer((partners[0], client)))

    # Going without a partner

    @precondition(lambda self: self.new)
    @rule(which=st.integers(0, 99), words=st.sampled_from([b"\0", b"\r\n", b"z" * 200, b"GET / HTTP/1.1\r\n" * 5000]))
    def talk_nonsense(self, which: int, words: bytes) -> None:
        """Say what can no longer become a line."""
        client = self.new.pop(which % len(self.new))
        with contextlib.suppress(ConnectionError):
            client.say(words)
        client.reads(b"bad handshake\n")
        client.reads_end()
        self.over("errory")

    @precondition(lambda self: self.new)
    @rule(which=st.integers(0, 99), way=WAYS_TO_LEAVE)
    def leave_early(self, which: int, way: str) -> None:
        """Go before the line is whole."""
        client = self.new.pop(which % len(self.new))
        _leave(client, way)
        if way == "cut off":
            client.reads(b"bad handshake\n")
            client.reads_end()
        if client.said or client.is_web:
            self.over("errory")
        # Else it was a health check: of this machine's own, and without a byte.

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 99))
    def speak_too_early(self, which: int) -> None:
        """Say something while waiting."""
        client = self.waiting.pop(which % len(self.waiting))
        client.say(b"hello")
        client.reads(b"impatient\n")
        client.reads_end()
        self.over("errory")

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 99), way=WAYS_TO_LEAVE)
    def give_up(self, which: int, way: str) -> None:
        """Go while waiting."""
        client = self.waiting.pop(which % len(self.waiting))
        _leave(client, way)
        if way == "cut off":
            client.reads_end(None)
        self.over("lonely")
        time.sleep(BARRIER_SECONDS)

    # What only clients over WebSocket can do

    @precondition(lambda self: any(client.is_web for client in [*self.new, *self.waiting]))
    @rule(which=st.integers(0, 99))
    def break_the_protocol(self, which: int) -> None:
        """Send a frame that no client may send, before it has met anybody."""
        clients = [client for client in [*self.new, *self.waiting] if isinstance(client, WebClient)]
        client = clients[which % len(clients)]
        (self.new if client in self.new else self.waiting).remove(client)
        client.reads_end(client.break_the_protocol())
        self.over("errory")
        time.sleep(BARRIER_SECONDS)

    @precondition(lambda self: any(client.is_web for client in [*self.new, *self.waiting]))
    @rule(which=st.integers(0, 99))
    def ping(self, which: int) -> None:
        """Ask the relay whether it is there."""
        clients = [client for client in [*self.new, *self.waiting] if isinstance(client, WebClient)]
        clients[which % len(clients)].ping()

    @rule(part=st.integers(1, len(REQUEST) - 1), way=st.sampled_from(["close", "reset"]))
    def leave_in_the_request(self, part: int, way: str) -> None:
        """Ask for an upgrade, but not to the end."""
        sock = connect(self.books.web_port)
        sock.sendall(REQUEST[:part])
        time.sleep(BARRIER_SECONDS)
        reset(sock) if way == "reset" else sock.close()
        self.books.clients += 1
        self.over("errory")

    @precondition(lambda self: any(client.is_web for one in self.transfers for client in one.sides))
    @rule(which=st.integers(0, 99), wrong=st.booleans())
    def ping_or_break_the_protocol_in_a_transfer(self, which: int, wrong: bool) -> None:
        """Between two frames; what is on its way arrives all the same."""
        found = [(one, place) for one in self.transfers for place in (0, 1) if one.sides[place].is_web]
        transfer, place = found[which % len(found)]
        client = transfer.sides[place]
        assert isinstance(client, WebClient)
        for frm in (0, 1):
            transfer.come_between_frames(frm)
        transfer.read()
        if not wrong:
            client.ping()
            return
        self.transfers.remove(transfer)
        code = client.break_the_protocol()
        transfer.sides[1 - place].reads_end()
        client.reads_end(code)
        self.over("happy", transfer.moved)

    # Transfers

    @precondition(lambda self: self.transfers)
    @rule(which=st.integers(0, 99), frm=st.integers(0, 1), size=SOME_BYTES, read=st.booleans())
    def move(self, which: int, frm: int, size: int, read: bool) -> None:
        """Send, and read at once or some time later."""
        transfer = self.transfers[which % len(self.transfers)]
        transfer.send(frm, size)
        if read:
            transfer.read()

    @precondition(lambda self: self.transfers)
    @rule(which=st.integers(0, 99), frm=st.integers(0, 1), sizes=st.tuples(SOME_BYTES, SOME_BYTES))
    def part(self, which: int, frm: int, sizes: tuple[int, int]) -> None:
        """One side ends its stream behind its last words; the other answers, and then does the same."""
        transfer = self.transfers.pop(which % len(self.transfers))
        first, second = transfer.sides[frm], transfer.sides[1 - frm]
        transfer.send(frm, sizes[0])
        transfer.come_between_frames(frm)
        if first.is_web:  # its Close is the end of both directions: what it has not read by then it never reads
            transfer.come_between_frames(1 - frm)
            transfer.read()
        first.finish()
        transfer.read()
        second.reads_end_of_stream()
        if not first.is_web:
            transfer.send(1 - frm, sizes[1])
            transfer.come_between_frames(1 - frm)
        second.finish()
        transfer.read()
        first.reads_end()
        second.sock.close()
        self.over("happy", transfer.moved)

    @precondition(lambda self: self.transfers)
    @rule(which=st.integers(0, 99), frm=st.integers(0, 1), way=st.sampled_from(["close", "reset"]))
    def break_off(self, which: int, frm: int, way: str) -> None:
        """One side is gone altogether, having read and delivered everything."""
        transfer = self.transfers.pop(which % len(self.transfers))
        for place in (0, 1):
            transfer.come_between_frames(place)
        transfer.read()
        first, second = transfer.sides[frm], transfer.sides[1 - frm]
        _leave(first, way)
        second.reads_end(None if way == "reset" or first.is_web else 1000)
        self.over("happy", transfer.moved)

    # The relay

    @rule(number=st.integers(0, 1), wanted=st.integers(0, 15))
    def replace_a_worker(self, number: int, wanted: int) -> None:
        """One worker goes, another one comes; now and then."""
        if wanted == 15:
            self.books.restart(number)

    @invariant()
    def nobody_is_told_anything_before_its_time(self) -> None:
        """Who has not met anybody reads nothing, and not an end; and in a transfer, nothing that was not sent."""
        quiet = [*self.new, *self.waiting]
        quiet += [client for transfer in self.transfers for client in transfer.sides if not client.owed]
        for client in quiet:
            if client.can_read():
                raise AssertionError(f"{client} is told something")

    def teardown(self) -> None:
        """Everybody leaves, and the books are right."""
        for client in [*self.new, *self.waiting, *(client for one in self.transfers for client in one.sides)]:
            note(repr(client))
        try:
            while self.transfers:
                self.break_off(which=0, frm=0, way="close")
            while self.waiting:
                self.give_up(which=0, way="cut off")
            while self.new:
                self.leave_early(which=0, way="cut off")
            if self.books._opened is not None:
                self.books.settle()
        except BaseException:
            self.books.close()
            raise
        finally:
            for client in [*self.new, *self.waiting, *(client for one in self.transfers for client in one.sides)]:
                client.sock.close()
