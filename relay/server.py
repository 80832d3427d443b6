"""The relay of one process: it accepts, shakes hands, lets wait, pairs, and stops.

A connection is a `Client` until it has a partner, and costs no greenlet: one libev watcher calls in here when it has
something to say. Two that match become a `Pair`, which has a greenlet and looks after itself. So nearly everything in
this file runs in the hub and must not wait.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

import gevent
from gevent.event import Event

from relay.clients.bounds import Bound, BoundsMet, Sources, is_loopback, source_of
from relay.clients.client import Client, Stage
from relay.clients.deadlines import Deadlines
from relay.clients.door import Door, is_at, open_port
from relay.clients.handshake import LONGEST, Handshake, Refusal, read_handshake
from relay.clients.waiting_room import WaitingRoom
from relay.mistakes import Mistake
from relay.options import Options
from relay.transfer.pace import Pace
from relay.transfer.pair import Limits, Pair
from relay.transfer.pipes import Pipe, PipePool
from relay.transfer.state import PairState
from relay.transfer.turns import Turns
from relay.usage.record import Current, Mood, Record
from relay.usage.recorder import Recorder
from relay.workers.balance import Balance
from relay.workers.link import Link
from relay.workers.load import FULL_LOAD, Load
from relay.workers.run_dir import RunDir
from relay.workers.siblings import Siblings

LINGER_SECONDS = 2.0
LINGER_BYTES = 384 << 10
"""How long the relay keeps the connection of a client it has turned away, and how many bytes it reads meanwhile.
Closing a socket with unread input resets the connection, and that can overtake and destroy the reply. Whoever sends
more has to wait in its own backlog until the time is over: it would only be back the sooner."""

CURRENT_SECONDS = 300.0
"""How often the `current` table is refreshed when nothing else does it."""

TICK_SECONDS = 1.0

MOST_HOPS = 8
"""A client that has been handed on so often stays where it is for a second, in which the siblings may find out who is
there: they do not all learn of a change in the same moment."""

ROOM_FOR_HANDED_ON = 9 / 8
"""How many times --max-connections a worker may hold when siblings hand it what they have: they may be leaving."""

logger = logging.getLogger(__name__)

_scrap = bytearray(1 << 16)


class Relay:
    """One worker: everything between the listening socket and the usage records."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.siblings = None if options.run_dir is None else Siblings(RunDir(options.run_dir), self)
        self.pairs: set[Pair] = set()
        self.stopping = False
        self._recorder: Recorder | None = None
        self._door: Door | None = None
        self._open = 0
        self._finished_bytes = 0
        self._room: WaitingRoom[Client] = WaitingRoom()
        self._deadlines: Deadlines[Client] = Deadlines()
        self._shaking: dict[Client, None] = {}  # in the order in which they came
        self._sources = Sources(options.max_per_source, options.max_new_per_source)
        self._bounds_met = BoundsMet()
        self._relay_pace = None if options.relay_rate is None else Pace(options.relay_rate)
        self._limits = self._limits_of_pairs()
        self._next_idle_check = 0.0
        self._balance: Balance[Pair] = Balance()
        self._load = Load()
        self._pipes = PipePool()
        self._turns = Turns()
        self._told: tuple[int, int] | None = None
        self._loop = gevent.get_hub().loop
        self._epoll = select.epoll.fromfd(os.dup(self._loop.fileno()))
        self._tick = self._loop.timer(TICK_SECONDS, TICK_SECONDS)
        self._on_readable = self._listen_to  # bound once, and not for every client
        self._current_greenlet: gevent.Greenlet | None = None
        self._grace_ends: float | None = None
        self._given_up = False
        self._changed = Event()
        self._ended = Event()

    # What the rest of the program asks for

    def current(self) -> Current:
        """This worker's share of the `current` table, at once and from any thread."""
        return Current(len(self.pairs), len(self._room), max(0, self._turns.moved - self._finished_bytes))

    def find_port(self) -> socket.socket:
        """The relay's listening socket: a sibling's, or, where there is none, a new one.

        Raises Mistake, also when the siblings listen elsewhere than this worker was told to.
        """
        listener = None if self.siblings is None else self.siblings.join()
        if listener is None:
            return self._open_port()
        if not is_at(listener, self.options.interface, self.options.port):
            address, port = listener.getsockname()[:2]
            raise Mistake(
                f"--run-dir {self.options.run_dir}: its relay listens on {address} port {port}, not on "
                f"{self.options.interface} port {self.options.port}; give each relay a run directory of its own"
            )
        return listener

    def _open_port(self) -> socket.socket:
        try:
            return open_port(self.options.interface, self.options.port)
        except Mistake as mistake:
            if self.siblings is None or not self.siblings.unanswering:
                raise
            raise Mistake(
                f"--run-dir {self.options.run_dir}: {self.siblings.unanswering} of its workers do not answer; "
                f"wait until they run again, or end them ({mistake})"
            ) from None

    def start(self, listener: socket.socket, recorder: Recorder) -> None:
        """Begin to accept from `listener`, and to record with `recorder`."""
        self._recorder = recorder
        self._door = Door(
            listener, self._accepted, self._is_full, self._turns.busy, self._pass_the_door_on, self._bounds_met.note
        )
        self._tick.start(self._every_second)
        self._current_greenlet = gevent.spawn(self._keep_current_fresh)
        self._door.start()
        address, port = listener.getsockname()[:2]
        logger.info("listening on %s port %d", address, port)
        if self.siblings is not None:
            self.siblings.announce(listener)

    def wait_until_ended(self) -> None:
        """Block the calling greenlet until `stop` has done its work."""
        self._ended.wait()

    def stop(self) -> None:
        """End in good order, in the calling greenlet; called a second time, end at once."""
        if self.stopping:
            self._ended.set()
            return
        self.stopping = True
        assert self._door is not None
        self._door.retire()
        if self.siblings is not None:
            self.siblings.leave()
        while not self._ended.is_set():
            self._changed.clear()
            self._clear_out()
            if self._is_cleared_out():
                break
            patience = None if self._grace_ends is None else self._grace_ends - time.monotonic()
            if patience is not None and patience <= 0:
                break
            self._changed.wait(patience)
        self._ended.set()

    def _clear_out(self) -> None:
        """Give everything that is here into other hands, or, when there are none, begin to end it."""
        if self.siblings is not None and not self.siblings.alone:
            self._grace_ends = None
            self._hand_everything_on(self.siblings)
            return
        for pair in self.pairs:
            if not pair.started_pumping:
                pair.start()  # it was to be handed on, and there is nobody to hand it to
        if self._grace_ends is None:
            self._grace_ends = time.monotonic() + self.options.grace
            logger.info("stopping: %d transfers have %g seconds to finish", len(self.pairs), self.options.grace)
        if not self._given_up and (self.siblings is None or not self.siblings.hopes):
            self._give_up()

    def _hand_everything_on(self, siblings: Siblings) -> None:
        for client in list(self._deadlines):
            if client.stage is Stage.WAITING:
                self._uproot(client, siblings.heir(client.token))
            elif client.stage is Stage.SHAKING:
                self._hand_on(client, siblings.any_home())
        for pair in list(self.pairs):
            if siblings.alone:
                return  # things have changed meanwhile
            self._hand_on_pair(pair, siblings.any_home())

    def _give_up(self) -> None:
        """Nobody will take over: close the port, and send those away who have no partner."""
        self._given_up = True
        assert self._door is not None
        self._door.close()
        for client in list(self._deadlines):
            if client.stage is not Stage.LEAVING:  # its refusal may still be on its way
                self._overdue(client)

    def _is_cleared_out(self) -> bool:
        return self._open == 0 and (self.siblings is None or self.siblings.left)

    def close(self) -> None:
        """Cut off what is still here, record it, and let go of everything; however far `start` has come."""
        if self._door is not None:
            self._door.close()
        self._tick.stop()
        for line in self._bounds_met.lines(math.inf):
            logger.warning("%s", line)
        if self._current_greenlet is not None:
            gevent.kill(self._current_greenlet)
        if self.siblings is not None:
            self.siblings.close()
        for pair in list(self.pairs):
            pair.detach()
            if pair in self.pairs:  # and has not ended by itself while another one was detached
                pair.close()
                self._pair_over(pair)
        for client in list(self._deadlines):
            if client.stage is not Stage.LEAVING:
                self._finish(client, "lonely" if client.token else "errory")
            self._close(client)
        self._pipes.close()
        self._epoll.close()

    # A connection, from accept to its place in the waiting room

    def _is_full(self) -> bool:
        return self._open >= self.options.max_connections

    def _accepted(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        source = self._source_of(address[0])
        if source is not None:
            bound = self._sources.refuses(source)
            if bound is not None:
                self._bounds_met.note(bound)
                sock.close()
                return
            self._sources.add(source)
        sock.setblocking(False)
        self._open += 1
        client = Client(sock)
        client.source = source
        self._deadlines.set(client, client.arrived + self.options.handshake_timeout)
        self._shake_hands(client)

    def _source_of(self, host: str) -> bytes | None:
        """Whom a connection counts for; None for one that nobody counts."""
        return source_of(host) if self.options.bounds_loopback or not is_loopback(host) else None

    def _source_of_peer(self, sock: socket.socket) -> bytes | None:
        try:
            host = sock.getpeername()[0]
        except OSError:
            return None  # it has just gone
        source = self._source_of(host)
        if source is not None:
            self._sources.add(source)
        return source

    def _listen_to(self, client: Client) -> None:
        """The client's socket has become readable."""
        if client.stage is Stage.SHAKING:
            self._shake_hands(client)
        elif client.stage is Stage.WAITING:
            self._interrupted(client)
        else:
            self._discard(client)

    def _watch(self, client: Client) -> None:
        if client.watcher is None:
            client.watcher = self._loop.io(client.sock.fileno(), 1)
            client.watcher.start(self._on_readable, client)

    def _shake_hands(self, client: Client) -> None:
        try:
            # One byte more than a handshake can have tells everything there is to know.
            chunk = client.sock.recv(LONGEST + 1 - len(client.received))
        except BlockingIOError:
            self._expect_more(client)
            return
        except OSError:
            chunk = b""
        client.received += chunk
        verdict = read_handshake(client.received) if chunk else Refusal.BAD_HANDSHAKE
        if verdict is None:
            self._expect_more(client)
        elif isinstance(verdict, Handshake):
            client.token, client.side, client.received = verdict.token, verdict.side, b""
            client.asked = time.monotonic()
            self._admit(client)
        else:
            self._refuse(client, verdict, left=not chunk)

    def _expect_more(self, client: Client) -> None:
        """Wait for the rest of a handshake. When too many are waited for, the oldest gives way: it has had the most
        time, and an honest one needs no longer than a round trip."""
        self._watch(client)
        self._shaking[client] = None
        if len(self._shaking) > self.options.max_handshakes:
            self._bounds_met.note(Bound.HANDSHAKES)
            self._refuse(next(iter(self._shaking)), Refusal.BAD_HANDSHAKE, left=False)

    def _admit(self, client: Client) -> None:
        """See a client whose handshake is whole to its token's home."""
        home = None
        if self.siblings is not None and not self._room.waiting_for(client.token):
            if client.hops <= MOST_HOPS:
                home = self.siblings.home(client.token)
            else:
                self.siblings.ask_again()
        if home is None:
            self._meet(client)
        else:
            self._hand_on(client, home)

    def _meet(self, client: Client) -> None:
        """Pair `client`, whose handshake is whole, or let it wait."""
        last_match = self._last_match(client.token)
        if client.asked < last_match:
            self._vacate(client.token)
            self._close_spare(client)
            return
        while (partner := self._room.partner_for(client)) is not None:
            if partner.asked < last_match:
                self._leave_room(partner)
                self._close_spare(partner)
            elif self._has_kept_quiet(partner):
                self._match(partner, client)
                return
            else:
                self._interrupted(partner)
            if not self._room.waiting_for(client.token):
                self._admit(client)  # nobody is home to it now
                return
        self._wait(client)

    def _wait(self, client: Client) -> None:
        if self._given_up:
            self._finish(client, "lonely")  # the relay stops, nobody will come any more
            self._send_away(client)
            return
        if self._room.waiting_for(client.token) >= self.options.max_waiting_per_token:
            # Only who knows the token can do this, and so to nobody but itself and its partner.
            self._bounds_met.note(Bound.PER_TOKEN)
            self._finish(client, "lonely")
            self._send_away(client)
            return
        self._shaking.pop(client, None)
        client.stage = Stage.WAITING
        self._deadlines.clear(client)
        self._deadlines.set(client, client.arrived + self.options.wait_timeout)
        self._room.enter(client)
        self._watch(client)
        if len(self._room) > self.options.max_waiting:
            # The oldest gives way. Were newcomers turned away instead, whoever fills the room once would own it for as
            # long as clients may wait; like this it takes more newcomers all the time, and those are bounded, too.
            self._bounds_met.note(Bound.WAITING)
            self._overdue(self._room.oldest())

    def _leave_room(self, client: Client) -> None:
        """Take out of the waiting room somebody who is not matched."""
        self._room.leave(client)
        self._vacate(client.token)

    def _vacate(self, token: bytes) -> None:
        """Be home to `token` no longer if nobody waits for it here."""
        if self.siblings is not None and not self._room.waiting_for(token):
            self.siblings.give_up(token)

    def _has_kept_quiet(self, client: Client) -> bool:
        """Whether a waiting client is still there and has sent nothing, as far as the kernel knows by now."""
        try:
            client.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _interrupted(self, client: Client) -> None:
        """A waiting client has left, or has said something before it was told ``ok``."""
        try:
            spoke = bool(client.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return  # a false alarm
        except OSError:
            spoke = False
        self._leave_room(client)
        if spoke:
            self._refuse(client, Refusal.IMPATIENT, left=False)
        else:
            self._finish(client, "lonely")
            self._close(client)

    # Two that match, and their spares

    def _last_match(self, token: bytes) -> float:
        """When two sides were last matched for `token` at any worker, in monotonic seconds: who had asked before that,
        and is not one of them, is a spare. It may be forgotten, and is of no use to a worker on its own."""
        return 0.0 if self.siblings is None else self.siblings.last_match(token)

    def _close_spare(self, spare: Client) -> None:
        self._finish(spare, "lonely")
        self._send_away(spare)

    def _match(self, waited: Client, newcomer: Client) -> None:
        self._room.leave(waited)
        spares = self._room.take_all(newcomer.token)
        if self.siblings is not None:
            self.siblings.matched(newcomer.token)
        self._pair(waited, newcomer)
        for spare in spares:
            self._close_spare(spare)

    def _pair(self, waited: Client, newcomer: Client) -> None:
        first, second = sorted((waited, newcomer), key=lambda client: client.arrived)
        for client in (waited, newcomer):
            self._forget(client)
            with contextlib.suppress(OSError):  # one that has just gone: the pair will see it
                client.sock.send(b"ok\n")
        self._pump(
            self._new_pair(
                first.sock,
                second.sock,
                (first.source, second.source),
                started=first.started,
                arrived=first.arrived,
                waiting_time=second.arrived - first.arrived,
            )
        )

    def _new_pair(
        self,
        first: socket.socket,
        second: socket.socket,
        sources: tuple[bytes | None, bytes | None],
        *,
        started: float,
        arrived: float,
        waiting_time: float,
    ) -> Pair:
        return Pair(
            first,
            second,
            started=started,
            arrived=arrived,
            waiting_time=waiting_time,
            pipes=self._pipes,
            turns=self._turns,
            on_over=self._pair_over,
            limits=self._limits,
            sources=sources,
        )

    def _limits_of_pairs(self) -> Limits | None:
        limits = Limits(self.options.max_pair_bytes, self.options.pair_rate, self._relay_pace)
        return None if limits == Limits() else limits

    def _pump(self, pair: Pair) -> None:
        self.pairs.add(pair)
        if self.stopping and self.siblings is not None and not self.siblings.alone:
            self._changed.set()  # `stop` is to see it on
        else:
            pair.start()

    def _pair_over(self, pair: Pair) -> None:
        self.pairs.discard(pair)
        moved = pair.moved
        self._finished_bytes += moved
        total_time = time.monotonic() - pair.arrived
        self._record(Record(pair.started, total_time, pair.waiting_time, moved, "happy"))
        if pair.cut_by is not None:
            self._bounds_met.note(pair.cut_by)
        self._closed(*pair.sources)

    # Handing on to siblings, and taking in from them (the `Household` of `siblings`)

    def _hand_on(self, client: Client, home: Link) -> None:
        if client.watcher is not None:
            self._stop_watching(client.sock)
        self._forget(client)
        home.hand_client(client)

    def _hand_on_pair(self, pair: Pair, sibling: Link) -> None:
        """Give a pair in mid-transfer to a sibling."""
        pair.detach()
        if pair not in self.pairs:
            return  # it has ended meanwhile, or somebody else has handed it on
        if not sibling.live:
            self._pump(pair)
            return
        self.pairs.discard(pair)
        self._finished_bytes += pair.moved  # as far as this worker is concerned
        self._stop_watching(pair.first)
        self._stop_watching(pair.second)
        sibling.hand_pair(pair)

    def _uproot(self, client: Client, home: Link) -> None:
        """Hand on a client that waits here and belongs elsewhere now."""
        self._leave_room(client)
        client.stage = Stage.SHAKING
        client.hops = 0
        self._hand_on(client, home)

    def take_in(self, client: Client) -> None:
        """A sibling has handed `client` on."""
        self._open += 1
        client.source = self._source_of_peer(client.sock)
        if self._has_no_room_for(client):
            self._finish(client, "lonely" if client.token else "errory")
            self._send_away(client)
            return
        self.take_back(client)

    def _has_no_room_for(self, client: Client) -> bool:
        """Whether `client`, just handed on, meets a bound here: a source can choose tokens that all live with us."""
        if client.source is not None and self._sources.has_too_many(client.source):
            self._bounds_met.note(Bound.PER_SOURCE)
            return True
        if self._open <= ROOM_FOR_HANDED_ON * self.options.max_connections:
            return False
        self._bounds_met.note(Bound.CROWDED)
        if not self._room:
            return True
        self._overdue(self._room.oldest())
        return False

    def take_back(self, client: Client) -> None:
        """A client is here anew."""
        if client.token:
            self._admit(client)
        elif self.stopping and self.siblings is not None and not self.siblings.alone:
            self._hand_on(client, self.siblings.any_home())
        elif self._given_up:
            self._overdue(client)
        else:
            self._deadlines.set(client, client.arrived + self.options.handshake_timeout)
            self._shake_hands(client)

    def take_in_pair(self, state: PairState, fds: Sequence[int]) -> None:
        """A sibling has handed on a pair in mid-transfer."""
        first, second = (socket.socket(fileno=fd) for fd in fds[:2])
        pipes = [Pipe(inlet, outlet) for inlet, outlet in zip(fds[2::2], fds[3::2], strict=True)]
        self._open += 2
        pair = self._new_pair(
            first,
            second,
            (self._source_of_peer(first), self._source_of_peer(second)),
            started=state.started,
            arrived=state.arrived,
            waiting_time=state.waiting_time,
        )
        pair.unpack(state, pipes)
        self._turns.moved += pair.moved
        self._pump(pair)

    def take_back_pair(self, pair: Pair) -> None:
        """A sibling could not take `pair`."""
        self._finished_bytes -= pair.moved
        self._pump(pair)

    def handed_on(self, client: Client) -> None:
        """A sibling has confirmed that `client` is its own now."""
        client.sock.close()
        self._closed(client.source)

    def handed_on_pair(self, pair: Pair) -> None:
        """A sibling has confirmed that `pair` is its own now."""
        pair.close()
        self._closed(*pair.sources)

    def siblings_changed(self) -> None:
        """Look again where everybody belongs, and who is a spare."""
        assert self.siblings is not None
        if not self.stopping:
            for client in self._room:
                home = self.siblings.home(client.token)
                if home is not None:
                    self._uproot(client, home)
                elif client.asked < self._last_match(client.token):
                    self._leave_room(client)
                    self._close_spare(client)
            if self._door is not None:
                self._door.shared = not self.siblings.alone
                self._door.take_turn()  # whose it is may be unclear now
        self._changed.set()

    def matched_elsewhere(self, token: bytes) -> None:
        """A sibling has matched two sides for `token`."""
        last_match = self._last_match(token)
        for client in self._room.all_for(token):
            if client.asked < last_match:
                self._leave_room(client)
                self._close_spare(client)

    def turn_at_the_door(self, passed_by: int) -> None:
        """A sibling has passed the door on to us."""
        assert self._door is not None
        if self.stopping or not self._door.has_room():
            if self._pass_the_door_on(passed_by + 1):
                return
            if self._is_full():
                self._bounds_met.note(Bound.CONNECTIONS)  # and so are all the others
        self._door.take_turn()

    def _pass_the_door_on(self, passed_by: int = 0) -> bool:
        return self.siblings is not None and self.siblings.pass_the_door_on(passed_by)

    def sibling_gone(self) -> None:
        """Write down at once what the relay is without it."""
        self._refresh_current()
        self._told = None  # and once more when it is sure to be gone: a process outlives its links by a little
        self._changed.set()

    def _stop_watching(self, sock: socket.socket) -> None:
        """Make the event loop's epoll forget a socket that lives on in another process. It would go on to report it
        when we close ours, since what it watches is the open connection and not our number for it: epoll(7)."""
        try:
            self._epoll.unregister(sock)
        except OSError:
            pass  # it was never watched

    # Ways to go

    def _refuse(self, client: Client, refusal: Refusal, *, left: bool) -> None:
        self._finish(client, "errory")
        if left:
            with contextlib.suppress(OSError):
                client.sock.send(refusal.value)
            self._close(client)
        else:
            self._send_away(client, refusal.value)

    def _finish(self, client: Client, mood: Mood) -> None:
        """Record a connection that ends without a partner."""
        self._record(Record(client.started, time.monotonic() - client.arrived, None, 0, mood))

    def _record(self, record: Record) -> None:
        assert self._recorder is not None
        self._recorder.record(record)
        if self._told is not None:
            self._told = (len(self.pairs), len(self._room))  # with each record goes what `current` is then

    def _send_away(self, client: Client, reply: bytes = b"") -> None:
        """Say `reply`, end the stream, and read on for a moment so that both arrive: a lingering close."""
        client.stage = Stage.LEAVING
        self._shaking.pop(client, None)
        try:
            if reply:
                client.sock.send(reply)
            client.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(client)
            return
        self._deadlines.clear(client)
        self._deadlines.set(client, time.monotonic() + LINGER_SECONDS)
        self._watch(client)

    def _discard(self, client: Client) -> None:
        try:
            count = client.sock.recv_into(_scrap)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        client.discarded += count
        if count == 0:
            self._close(client)
        elif client.discarded > LINGER_BYTES:
            client.watcher.stop()

    def _forget(self, client: Client) -> None:
        """Let go of a client, but not of its socket."""
        self._deadlines.clear(client)
        self._shaking.pop(client, None)
        if client.watcher is not None:
            client.watcher.stop()
            client.watcher.close()
            client.watcher = None

    def _close(self, client: Client) -> None:
        self._forget(client)
        client.sock.close()
        self._closed(client.source)

    def _closed(self, *sources: bytes | None) -> None:
        """Connections from `sources` are here no longer."""
        self._open -= len(sources)
        for source in sources:
            if source is not None:
                self._sources.remove(source)
        if self._open == 0:
            self._changed.set()
        assert self._door is not None
        self._door.reopen()

    # What happens by the clock

    def _every_second(self) -> None:
        now = time.monotonic()
        # Those whose handshake is not whole come last: one that is by now may be matched with somebody who waits.
        for client in sorted(self._deadlines.take_due(now), key=lambda client: client.stage is Stage.SHAKING):
            if client.stage is not Stage.SHAKING or self._still_says_nothing(client):
                self._overdue(client)
        self._sources.next_second()
        self._cut_idle_pairs(now)
        busy = self._share_the_rate()
        if self.siblings is not None:
            assert self._door is not None
            load = self._load.lately()
            self.siblings.every_second(busy, load if self._door.has_room() else FULL_LOAD)
            self._share_the_work(self.siblings, load)
            self._door.look_after_it()
        for line in self._bounds_met.lines(now):
            logger.warning("%s", line)
        connected_and_waiting = (len(self.pairs), len(self._room))
        if connected_and_waiting != self._told:
            self._told = connected_and_waiting
            self._refresh_current()

    def _share_the_rate(self) -> int:
        """Take what is ours of --relay-rate, by how many of the relay's transfers want to move something; returns how
        many of those are ours."""
        if self._relay_pace is None or self.options.relay_rate is None:
            return 0
        busy = sum(pair.was_busy() for pair in self.pairs)
        share = 1.0 if self.siblings is None else self.siblings.share(busy)
        self._relay_pace.rate = self.options.relay_rate * share
        self._relay_pace.sharers = max(1, busy)
        return busy

    def _share_the_work(self, siblings: Siblings, load: float) -> None:
        """Hand transfers on to a sibling that has less to do, if there is one."""
        link = siblings.idlest()
        if link is not None and not self.stopping:
            surplus = self._balance.surplus(self.pairs, load, link.load)
            if surplus:
                gevent.spawn(self._hand_on_pairs, surplus, link)

    def _hand_on_pairs(self, pairs: list[Pair], link: Link) -> None:
        for pair in pairs:
            self._hand_on_pair(pair, link)

    def _cut_idle_pairs(self, now: float) -> None:
        if now < self._next_idle_check:
            return
        self._next_idle_check = now + min(60.0, self.options.idle_timeout / 10)
        for pair in list(self.pairs):
            pair.cut_if_idle(now, self.options.idle_timeout)

    def _still_says_nothing(self, client: Client) -> bool:
        """Whether the rest of an overdue handshake has not come: what has come counts, however late we are to look."""
        self._shaking.pop(client, None)
        self._shake_hands(client)
        return client in self._shaking

    def _overdue(self, client: Client) -> None:
        if client.stage is Stage.SHAKING:
            self._refuse(client, Refusal.BAD_HANDSHAKE, left=False)
        elif client.stage is Stage.WAITING:
            self._leave_room(client)
            self._finish(client, "lonely")
            self._send_away(client)
        else:
            self._close(client)

    def _refresh_current(self, *, tick: bool = False) -> None:
        if self._recorder is not None:
            self._recorder.refresh_current(tick=tick)

    def _keep_current_fresh(self) -> None:
        while True:
            self._refresh_current(tick=True)
            gevent.sleep(CURRENT_SECONDS)
