"""All transfers of this worker: how they begin, what they have in common, and how they end."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence

import gevent

from relay.clients.bounds import Bound
from relay.clients.client import Client
from relay.clients.pings import Pings
from relay.clients.places import Places
from relay.options import Options
from relay.process import log
from relay.process.one_by_one import one_by_one
from relay.transfer.arrears import Arrears
from relay.transfer.limits import Limits, SharedPace
from relay.transfer.pair import Pair, Readers
from relay.transfer.path import LEAST_BYTES, PathCounts, look_at
from relay.transfer.pipes import PipePool
from relay.transfer.rest import Rest
from relay.transfer.slices import SLICE_SECONDS
from relay.transfer.state import PairState
from relay.transfer.turns import Turns
from relay.usage.record import Record, blur_size

PAIRS_AT_A_TIME = 1024
"""How many of the pairs that are to move to another process let go in one iteration of the event loop. All their
greenlets run in it: with thousands it would take tenths of a second."""

_MAKES_ROOM = (Bound.PLACES, Bound.IDLE)
"""Who is cut by one of these has taken nothing for long."""

LOOKS = 3
"""How often they are told to let go, at the most: one may fall quiet in the same iteration, and begin anew."""


class Pairs:
    """The pairs, their pipes and turns, and the limits that the operator has set for them.

    Args:
        options: the operator's limits.
        places: where the places of their connections go when they are over.
        record: takes the record of each that is over.
        pings: pings the sides that speak WebSocket.
    """

    def __init__(self, options: Options, places: Places, record: Callable[[Record], None], pings: Pings) -> None:
        self.moves_on: Callable[[], bool] = lambda: False
        """Whether a pair that is new here is about to be handed on, and so need not begin."""
        self.turns = Turns()
        self._rest = Rest(self.turns)
        self._options = options
        self._places = places
        places.look_who_has_left = self._rest.serve
        self._record = record
        self._pings = pings
        self._pairs: set[Pair] = set()
        self.arrears = Arrears(places)
        """What those that are over still owe."""
        self._pipes = PipePool(most=options.most_pipes)
        self._relay_pace = None if options.relay_rate is None else SharedPace(options.relay_rate)
        self._limits = self._limits_of_pairs()
        self._finished_bytes = 0
        self.paths = PathCounts() if options.measure_paths else None
        self.load: Callable[[], float] = lambda: 0.0
        """What part of a processor the event loop has wanted lately."""
        self._blurs = options.blur_usage is not None
        self.counted = 0
        """Bytes moved here since the beginning, as they may be told; as new as the last `count`."""
        self.held_bytes = 0
        """Bytes that rested in pairs at that time, as a rule since a receiver did not take them."""
        self._next_idle_check = 0.0

    def _limits_of_pairs(self) -> Limits | None:
        limits = Limits(self._options.max_pair_bytes, self._options.pair_rate, self._relay_pace)
        return None if limits == Limits() else limits

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        """All pairs; they may end meanwhile."""
        return iter([*self._pairs])

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._pairs

    @property
    def partal_bytes(self) -> int:
        """Bytes that pairs which are not over have moved; read on any thread."""
        return max(0, self.turns.moved - self._finished_bytes)

    def count(self) -> Iterator[None]:
        """Bring `counted` and `held_bytes` up to date, and see to it that all go on, one pair with each step."""
        held = 0
        for pair in self:
            if pair in self._pairs:
                self._count(pair)
                self._help(pair)
                held += sum(pump.held for pump in pair.pumps)
            yield
        self.held_bytes = held

    def _help(self, pair: Pair) -> None:
        """Have `pair` go on if it cannot by itself."""
        if pair.is_stranded:
            self._do(pair, pair.start_anew)

    def _count(self, pair: Pair) -> None:
        """Count what `pair` has moved since it was last counted, here or where it was before. Its size is rounded as in
        its record, and so the sum over all workers comes to the sum of what is recorded, wherever a pair has been."""
        size = blur_size(pair.moved) if self._blurs else pair.moved
        self.counted += size - pair.counted
        pair.counted = size

    # How a pair begins

    def glue(self, waited: Client, newcomer: Client) -> None:
        """Make a pair of two clients that match, and tell them so.

        Whatever goes wrong with it ends it, on record. If this raises all the same, there was none.
        """
        first, second = (waited, newcomer) if waited.arrived <= newcomer.arrived else (newcomer, waited)
        pair = self._new_pair(
            first.sock,
            second.sock,
            (first.source, second.source),
            started=first.started,
            arrived=first.arrived,
            waiting_time=second.arrived - first.arrived,
            readers=(first.speech.reader, second.speech.reader),
        )
        self._pairs.add(pair)
        try:
            for client in (waited, newcomer):
                client.stop_listening()
                try:
                    client.sock.send(client.speech.ok())
                except OSError:
                    pass  # it has just gone: the pair will see it
        except Exception:  # see `_fault_of`
            self._fault_of(pair)
        else:
            self.begin(pair)

    def carry(self, client: Client, upstream: socket.socket) -> None:
        """Make a pair of a gateway's client and its connection upstream."""
        self.begin(
            self._new_pair(
                client.sock,
                upstream,
                (client.source, None),
                started=client.started,
                arrived=client.arrived,
                waiting_time=0.0,
                readers=(client.speech.reader, None),
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
        readers: Readers,
    ) -> Pair:
        return Pair(
            first,
            second,
            started=started,
            arrived=arrived,
            waiting_time=waiting_time,
            pipes=self._pipes,
            turns=self.turns,
            rest=self._rest,
            on_over=self._over,
            limits=self._limits,
            sources=sources,
            readers=readers,
        )

    def begin(self, pair: Pair) -> None:
        """Let `pair` pump, or go on, unless it is about to move house; if something goes wrong, it is over."""
        self._pairs.add(pair)
        try:
            pair.on_ending = self._ending
            if pair.speaks_websocket:
                pair.be_pinged(self._pings)
            if not self.moves_on():
                pair.start()
        except Exception:  # see `_fault_of`
            self._fault_of(pair)

    def _fault_of(self, pair: Pair) -> None:
        """Report the exception that is being handled, and end the pair, which has no greenlet: it is ours, and whoever
        has brought it goes on with the others."""
        log.tell_mistake("a mistake with one transfer; it is ended")
        try:
            pair.give_up()
        except Exception:
            log.tell_mistake("another mistake in ending it")

    def begin_all(self) -> None:
        """Let those pump that were to move house: nobody is there to take them."""
        for pair in self:
            self.go_on(pair)

    def go_on(self, pair: Pair) -> None:
        """Let `pair` pump if it is still here and has let go of its sockets; if something goes wrong, it is over."""
        if pair in self._pairs and not pair.started_pumping:
            self._do(pair, pair.start)

    def _do(self, pair: Pair, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception:  # see `_fault_of`
            self._fault_of(pair)

    # Moving house

    def take_in(self, state: PairState, sides: Sequence[socket.socket], fds: Sequence[int]) -> None:
        """Go on with the pair of another worker, of these two `sides`; `fds` are what rests in it.

        Whatever goes wrong with it ends it, on record. If this raises all the same, there was none.
        """
        first, second = sides
        sources = (state.first_source, state.second_source)
        pair = self._new_pair(
            first,
            second,
            sources,
            started=state.started,
            arrived=state.arrived,
            waiting_time=state.waiting_time,
            readers=_readers(state),
        )
        for source in sources:
            self._places.take(source)
        self._pairs.add(pair)
        try:
            pair.unpack(state, fds)
        except Exception:  # the sender has closed its copies: nobody else can go on with it, or record it
            self._came_with(pair)
            self._fault_of(pair)
        else:
            self._came_with(pair)
            self.begin(pair)

    def _came_with(self, pair: Pair) -> None:
        """What `pair` has moved where it was before is not ours to count."""
        self.turns.moved += pair.moved
        pair.counted = blur_size(pair.moved) if self._blurs else pair.moved

    def let_go(self, pair: Pair) -> None:
        """`pair`, which was detached, is about to be somebody else's."""
        self._count(pair)
        pair.be_silent(self._pings)
        self._finished_bytes += pair.moved  # as far as this worker is concerned
        self._pairs.discard(pair)

    def movable(self, most: int | None = None, source: bytes | None = None) -> list[Pair]:
        """The pairs that can move to another process, or so many of them at the most, those at rest before the others;
        or only those with a side from `source`."""
        movable = [pair for pair in self._pairs if not pair.stays and (source is None or source in pair.sources)]
        if most is None or most >= len(movable):
            return movable
        at_rest = [pair for pair in movable if pair.greenlet is None]
        return (at_rest + [pair for pair in movable if pair.greenlet is not None])[:most]

    def letting_go(self, pairs: list[Pair]) -> Iterator[Pair]:
        """These pairs, for a greenlet that detaches each so that it can move to another process. Up to
        `PAIRS_AT_A_TIME` stand still until it comes to them.

        In the event loop's iterations in between everybody else has their turns. Were there one for each pair that lets
        go, in which all the others move something, a thousand would take as many seconds as they do turns.
        """
        pairs = sorted(pairs, key=lambda pair: pair.greenlet is None)
        while pairs:
            some, pairs = pairs[:PAIRS_AT_A_TIME], pairs[PAIRS_AT_A_TIME:]
            for _ in range(LOOKS):
                for pair in some:
                    if pair.greenlet is not None:  # who rests needs no iteration for it, and goes on until then
                        pair.detach_soon()
                until = _rested()
                if all(pair.greenlet is None for pair in some):
                    break
            for pair in some:
                if pair in self._pairs:
                    yield pair
                if time.monotonic() >= until:
                    until = _rested()

    def take_back(self, pair: Pair) -> None:
        """Nobody could take `pair`."""
        self._finished_bytes -= pair.moved
        self.begin(pair)

    def handed_on(self, pair: Pair) -> None:
        """`pair` is somebody else's now."""
        try:
            pair.close()
        finally:
            self._places.give_back(*pair.sources)

    # How it ends

    def _over(self, pair: Pair) -> None:
        self._pairs.discard(pair)
        try:
            self._count(pair)
            moved = pair.moved
            self._finished_bytes += moved
            total_time = time.monotonic() - pair.arrived
            self._record(Record(pair.started, total_time, pair.waiting_time, moved, "happy"))
            if pair.cut_by is not None:
                self._places.bounds_met.note(pair.cut_by)
        finally:
            self._places.give_back(*pair.sources)

    def _ending(self, pair: Pair) -> None:
        """`pair` is over, and its sockets are about to be closed."""
        if self.paths is not None:
            self._measure(pair)
        if pair.cut_by in _MAKES_ROOM or pair.waited_in_vain:
            self.arrears.refuse(pair.first)
            self.arrears.refuse(pair.second)
        else:
            first, second = pair.sources
            if self._options.upstream is not None:
                second = first  # whose connection upstream it is
            self.arrears.take_over([(pair.first, first), (pair.second, second)], pair.paid_by)

    def _measure(self, pair: Pair) -> None:
        """Count how good the paths of a pair were that is about to end."""
        if self.paths is None or pair.moved < LEAST_BYTES:
            return
        busiest = max(pair.pumps, key=lambda pump: pump.moved)
        sender, receiver = look_at(busiest.source), look_at(busiest.sink)
        if sender is not None and receiver is not None:
            seconds = time.monotonic() - pair.arrived - pair.waiting_time
            held_back = pair.part_held_back
            self.paths.note(sender, receiver, size=pair.moved, seconds=seconds, held_back=held_back, load=self.load())

    def cut_off(self) -> None:
        """End all pairs at once."""
        for pair in self:
            pair.detach_soon()  # all in one iteration of the event loop, or the others would pump on meanwhile
        gevent.sleep(0)
        one_by_one(self, self._cut_off, "in ending a transfer")

    def _cut_off(self, pair: Pair) -> None:
        try:
            pair.detach()
        finally:
            if pair in self._pairs:  # and has not ended by itself while it was detached
                self._do(pair, pair.give_up)

    def close(self) -> None:
        """Let go of what pairs share; there are none any more."""
        self._rest.close()
        self._pipes.close()
        if self._relay_pace is not None:
            self._relay_pace.close()

    # By the clock

    def cut_idle(self, now: float) -> Iterator[None]:
        """Cut pairs in which nothing moves, and see to it that the others go on, looking at one with each step; `now`
        in monotonic seconds."""
        if now < self._next_idle_check:
            return
        self._next_idle_check = now + min(60.0, self._options.idle_timeout / 10)
        for pair in self:
            if pair in self._pairs:
                if pair.idle_for(now) > self._options.idle_timeout:
                    pair.cut(Bound.IDLE)
                else:
                    self._help(pair)
            yield

    def every_second(self, now: float, share_of: Callable[[int], float]) -> int:
        """See to those at rest whose deadline has come, and take what is ours of --relay-rate; `now` in monotonic
        seconds.

        `share_of`, and what is returned, are those of `SharedPace.every_second`; 0 if there is no such rate.
        """
        self._rest.every_second(now)
        if self._relay_pace is None or self._options.relay_rate is None:
            return 0
        return self._relay_pace.every_second(self._options.relay_rate, share_of)


def _rested() -> float:
    """Let the event loop look after everybody else; returns until when (monotonic seconds) to go on after that. It is
    half as long as they took, which with thousands who move much is many times a slice."""
    began = time.monotonic()
    gevent.sleep(0)
    ended = time.monotonic()
    return ended + max(SLICE_SECONDS, (ended - began) / 2)


def _readers(state: PairState) -> Readers:
    """Where the frames of both sides are, of those that speak WebSocket."""
    if not state.first_frames and not state.second_frames:
        return None, None
    from relay.clients.frames import FrameReader, FrameState  # not before: most relays have no WebSocket

    first, second = (
        FrameReader(FrameState.decode(frames)) if frames else None
        for frames in (state.first_frames, state.second_frames)
    )
    return first, second
