"""One worker: puts its parts together, starts, ticks and stops.

It decides nothing about a single client. Newcomers come through the `door` to the `reception`, from there to the
`matching`, from there to the `pairs`, or to the `farewell`; and the `household` hands them to other workers.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from relay.clients.bounds import BoundsMet
from relay.clients.client import EventLoop
from relay.clients.congestion import take_over
from relay.clients.door import Door, is_at, open_port
from relay.clients.farewell import Farewell
from relay.clients.matching import Matching
from relay.clients.pings import Pings
from relay.clients.places import Places
from relay.clients.reception import Reception
from relay.clients.speech import Speech
from relay.mistakes import Mistake
from relay.options import Options
from relay.process import log
from relay.process.dataclass import dataclass
from relay.process.one_by_one import do_it, one_by_one
from relay.transfer.eviction import Eviction
from relay.transfer.pairs import Pairs
from relay.transfer.slices import see_to_all
from relay.usage.record import Current, Record
from relay.usage.recorder import Recorder
from relay.usage.told import Description
from relay.usage.whereabouts import Whereabouts
from relay.workers.departure import Departure
from relay.workers.telling import Telling

if TYPE_CHECKING:
    from relay.clients.health_port import HealthPort
    from relay.workers.household import Household

CURRENT_SECONDS = 300.0
"""How often the `current` table is refreshed when nothing else does it."""

TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Ports:
    """The listening sockets: the `plain` one, on which there may be WebSocket, too (`shared`), one for `web`, and one
    for `health` checks."""

    plain: socket.socket
    web: socket.socket | None = None
    health: socket.socket | None = None
    shared: bool = False


class Relay:
    """One worker: everything between the listening socket and the usage records."""

    def __init__(self, options: Options) -> None:
        self.options = options
        loop = gevent.get_hub().loop
        self._bounds_met = BoundsMet(options.blur_usage, time.monotonic())
        self._places = Places(options, self._bounds_met, self._place_is_free)
        self._farewell = Farewell(loop, self._places, self._record)
        self._pings = Pings(options.ping_interval)
        self.pairs = Pairs(options, self._places, self._record, self._pings)
        self._matching = self._make_matching(loop)
        self._reception = Reception(loop, options, self._places, self._farewell, self._matching.admit)
        if options.upstream is not None:
            self._places.promised = lambda: len(self._reception)
        self._eviction = Eviction(
            self._places,
            self._farewell,
            self._reception,
            self._matching,
            self.pairs,
            is_awaited=self._is_awaited,
            is_room_elsewhere=self._is_room_elsewhere,
            on_ready=self._reopen_door,
        )
        self._changed = Event()
        self._household = None if options.run_dir is None else self._make_household(options.run_dir)
        self._departure = Departure(
            self._household,
            places=self._places,
            reception=self._reception,
            matching=self._matching,
            pairs=self.pairs,
            grace=options.grace,
            changed=self._changed,
            close_door=self._close_door,
        )
        self._door: Door | None = None
        self._health: HealthPort | None = None
        self._recorder: Recorder | None = None
        self._database: Whereabouts | None = None
        self._telling = Telling(
            places=self._places,
            reception=self._reception,
            matching=self._matching,
            farewell=self._farewell,
            pairs=self.pairs,
            bounds_met=self._bounds_met,
            kept=lambda: 0 if self._recorder is None else self._recorder.kept_lines(),
            silent=lambda: 0 if self._household is None else self._household.siblings.silent,
            refresh=self._refresh_current,
        )
        self._tick = loop.timer(TICK_SECONDS, TICK_SECONDS)
        self._wake = loop.async_()
        self._current_greenlet: gevent.Greenlet | None = None
        self._due_are_looked_after: gevent.Greenlet | None = None
        self._stopping = False

    def _make_matching(self, loop: EventLoop) -> Matching:
        parts = (self.options, self._places, self._farewell, self._pings)
        if self.options.upstream is None:
            return Matching(loop, *parts, self.pairs.glue)
        from relay.clients.gateway import Gateway  # not before: it speaks WebSocket

        return Gateway(loop, *parts, self.pairs.carry)

    def _make_household(self, run_dir: str) -> Household:
        # Not before: a worker that is alone has 0.5 MB more without them.
        from relay.workers.household import Household
        from relay.workers.run_dir import RunDir
        from relay.workers.terms import terms_of

        return Household(
            RunDir(run_dir),
            partial(terms_of, self.options),
            places=self._places,
            reception=self._reception,
            matching=self._matching,
            pairs=self.pairs,
            farewell=self._farewell,
            on_change=self._changed.set,
            on_gone=self._sibling_gone,
        )

    def current(self) -> Current:
        """This worker's share of the `current` table, at once and from any thread."""
        return Current(len(self.pairs), len(self._matching), self.pairs.partal_bytes)

    def describe(self) -> Description:
        """What else it tells of itself, as lately known; from any thread."""
        return self._telling.described

    # Starting

    def knock(self) -> None:
        """Let the siblings know that we are about to come, and hear whether we may, before anything is waited for.

        Raises Mistake.
        """
        if self._household is not None:
            port, *_ = self._household.siblings.knock()
            if port is not None:
                self._check_place(port, self.options.interface, self.options.port)
            self._household.siblings.check_terms()

    def find_ports(self) -> Ports:
        """The relay's listening sockets: a sibling's, or, where there are none, new ones.

        Whose congestion control is this worker's, whatever the siblings had chosen: so a new choice comes with the
        first worker of a rolling restart.

        Raises Mistake, also when the siblings listen elsewhere than this worker was told to.
        """
        options = self.options
        port = web_port = health_port = None
        if self._household is not None:
            port, web_port, health_port = self._household.siblings.join()
        is_gateway = options.upstream is not None
        listener = self._port(port, options.interface, options.port, "--websocket" if is_gateway else "--port")
        if self._household is not None:
            self._household.siblings.check_terms()
        try:
            health = self._health_port(health_port)
            if options.websocket is None:
                return Ports(listener, health=health)
            number, interface = options.websocket
            if number == options.port and is_at(listener, interface, number):
                return Ports(listener, health=health, shared=True)
            return Ports(listener, self._port(web_port, interface, number, "--websocket"), health)
        except BaseException:
            listener.close()
            raise

    def _health_port(self, given: socket.socket | None) -> socket.socket | None:
        """Where health checks are answered: at a sibling's listening socket, if that is where they should be, so that a
        check finds whoever answers."""
        if self.options.health is None:
            return None
        number, interface = self.options.health
        if given is not None and is_at(given, interface, number):
            return given
        named_by = self.options.interface_named_by("--health")
        return open_port(interface, number, option="--health", named_by=named_by, by_each_worker=True)

    def _port(self, listener: socket.socket | None, interface: str, port: int, option: str) -> socket.socket:
        """`listener`, which a sibling has given, if it is where it should be, or a new one."""
        if listener is None:
            return self._open_port(interface, port, option)
        self._check_place(listener, interface, port)
        take_over(listener, self.options.congestion_control)
        return listener

    def _check_place(self, listener: socket.socket, interface: str, port: int) -> None:
        if not is_at(listener, interface, port):
            address, number = listener.getsockname()[:2]
            raise Mistake(
                f"--run-dir {self.options.run_dir}: its relay listens on {address} port {number}, not on "
                f"{interface} port {port}; give each relay a run directory of its own"
            )

    def _open_port(self, interface: str, port: int, option: str) -> socket.socket:
        try:
            named_by = self.options.interface_named_by(option)
            return open_port(interface, port, self.options.congestion_control, option=option, named_by=named_by)
        except Mistake as mistake:
            unanswering = 0 if self._household is None else self._household.siblings.unanswering
            if not unanswering:
                raise
            raise Mistake(
                f"--run-dir {self.options.run_dir}: {unanswering} of its workers do not answer; "
                f"wait until they run again, or end them ({mistake})"
            ) from None

    def start(self, ports: Ports, recorder: Recorder) -> None:
        """Begin to accept from `ports`, and to record with `recorder`."""
        self._recorder = recorder
        if self.options.usage_db is not None:
            self._database = Whereabouts(self.options.usage_db)
        if ports.health is not None:
            from relay.clients.health_port import HealthPort  # not before: its pool of greenlets takes 0.6 MB

            self._health = HealthPort(ports.health)
        upstream = self.options.upstream
        if ports.web is None and not ports.shared and upstream is None:
            self._door = self._make_door(ports.plain)
        else:
            from relay.clients.web import Web, either  # not before: most relays have no WebSocket
            from relay.transfer import limited_framed

            limited_framed.get_ready()
            speech = Web if upstream is not None else either if ports.shared else None
            self._door = self._make_door(ports.plain, speech)
            if ports.web is not None:
                self._door.twin = self._make_door(ports.web, Web)
                self._door.twin.twin = self._door
        self._tick.start(self._every_second)
        self._current_greenlet = gevent.spawn(self._keep_current_fresh)
        self._door.start()
        address, port = ports.plain.getsockname()[:2]
        log.tell("listening on %s port %d", address, port)
        if ports.web is not None:
            assert self._door.twin is not None
            self._door.twin.start()
            address, port = ports.web.getsockname()[:2]
        if ports.web is not None or ports.shared:
            log.tell("WebSocket on %s port %d", address, port)
        elif upstream is not None:
            log.tell("WebSocket on %s port %d, carried to %s", address, port, upstream)
        if self._health is not None:
            self._health.start()
            address, port = self._health.address[:2]
            log.tell("health checks on %s port %d", address, port)
        if self._household is not None:
            self._household.open(self._door, ports.plain, ports.web, ports.health)

    def _make_door(self, listener: socket.socket, speech: Callable[[], Speech] | None = None) -> Door:
        """A door for clients that speak plainly, or that each get such a speech of their own."""
        accepted = self._reception.accepted

        def admit(sock: socket.socket, address: tuple[Any, ...]) -> None:
            assert speech is not None
            accepted(sock, address, speech())

        return Door(
            listener,
            accepted if speech is None else admit,
            self._is_full,
            self.pairs.turns.busy,
            self._pass_the_door_on,
            self._bounds_met.note,
        )

    def _is_awaited(self) -> bool:
        return self._door is not None and self._door.is_awaited()

    def _is_full(self) -> bool:
        return self._places.is_full() and not self._eviction.is_ready()

    def _is_room_elsewhere(self) -> bool:
        return self._household is not None and self._household.siblings.have_places()

    def _pass_the_door_on(self) -> bool:
        return self._household is not None and self._household.siblings.pass_the_door_on()

    # Stopping

    def wait_until_ended(self) -> None:
        """Block the calling greenlet until `stop` has done its work."""
        self._departure.wait()

    def stop(self) -> None:
        """End in good order, in the calling greenlet; called a second time, end at once."""
        if self._stopping:
            self._departure.end_at_once()
            return
        self._stopping = True
        one_by_one([self.pairs.arrears.close], do_it, "in leaving to the kernel what is owed")
        for line in [] if self._recorder is None else self._recorder.held_back():
            log.tell("%s", line)  # at once: an orderly end is no client's doing
        assert self._door is not None
        one_by_one([self._door.retire], do_it, "in closing the door")
        self._departure.depart()

    def _close_door(self) -> None:
        if self._health is not None:
            self._health.close()
        if self._door is not None:
            self._door.close()
            if self._door.twin is not None:
                self._door.twin.close()

    def close(self) -> None:
        """Cut off what is still here, record it, and let go of everything; however far `start` has come."""
        steps = (
            self._close_door,
            self._tick.stop,
            self._wake.stop,
            self._tell_bounds,
            self._eviction.close,
            self._stop_greenlets,
            self._close_household,
            self._matching.cut_off,
            self._reception.cut_off,
            self._cut_pairs_off,  # not before: it takes a while, and nobody is left now who could become one meanwhile
            self._farewell.close_all,
            self.pairs.arrears.close,
            self._telling.close,
            self.pairs.close,
        )
        one_by_one(steps, do_it, "at the end")

    def _tell_bounds(self) -> None:
        for line in self._bounds_met.lines(math.inf):
            log.tell(line)

    def _stop_greenlets(self) -> None:
        for greenlet in (self._current_greenlet, self._due_are_looked_after):
            if greenlet is not None:
                gevent.kill(greenlet)

    def _close_household(self) -> None:
        if self._household is not None:
            self._household.close()

    def _cut_pairs_off(self) -> None:
        if self.pairs:
            log.tell("cutting off %d transfers that have not finished", len(self.pairs))
        self.pairs.cut_off()

    # What happens meanwhile

    def _place_is_free(self) -> None:
        if self._places.taken == 0:
            self._changed.set()
        self._reopen_door()

    def _reopen_door(self) -> None:
        if self._door is not None:
            self._door.reopen()

    def _record(self, record: Record) -> None:
        assert self._recorder is not None
        self._recorder.record(record)
        self._telling.recorded()

    def _sibling_gone(self) -> None:
        """Write down at once what the relay is without it."""
        self._refresh_current()
        self._telling.forget()  # and once more when it is sure to be gone: a process outlives its links by a little
        self._changed.set()

    def _every_second(self) -> None:
        now = time.monotonic()
        self._hear_signals()
        if not self._due_are_looked_after:
            self._due_are_looked_after = gevent.spawn(self._look_after_who_is_due)
        self._places.next_second()
        one_by_one((self._door, self._health), _keep_open, "in opening a port again")
        if self._household is None:
            self.pairs.every_second(now, lambda parts: 1.0)
        else:
            self._household.every_second(self.pairs.every_second(now, self._household.siblings.share))
        if not self._stopping:
            self._eviction.every_second()
        for line in self._bounds_met.lines(now):
            log.tell(line)
        if self._database is not None and self._database.is_another():
            self._refresh_current()
        self._telling.every_second(now)

    def _hear_signals(self) -> None:
        """Have the loop's own pipe watched, by which it hears of signals and threads. When the kernel refuses to watch
        anything for a moment, libev stops that, too; a watcher that is started begins it anew, and what is sent over it
        has the loop look whether a signal has come meanwhile."""
        self._wake.stop()
        self._wake.start(int)  # which does nothing
        self._wake.send()

    def _look_after_who_is_due(self) -> None:
        """End what has taken too long, and ping those to whom nothing was said."""
        now = time.monotonic()
        for see_to in (
            self._farewell.see_off,
            self._matching.see_off,
            # Those whose handshake is not whole come later: one that is by now may be matched with somebody who waits.
            self._reception.see_off,
            self._pings.ping,
            self.pairs.cut_idle,
            self.pairs.arrears.collect,
        ):
            see_to_all(partial(see_to, now), "with one of those whose time has come")

    def _refresh_current(self, *, tick: bool = False) -> None:
        if self._recorder is not None:
            self._recorder.refresh_current(tick=tick)

    def _keep_current_fresh(self) -> None:
        while True:
            self._refresh_current(tick=True)
            gevent.sleep(CURRENT_SECONDS)


def _keep_open(port: Door | HealthPort | None) -> None:
    if port is not None:
        port.keep_open()
