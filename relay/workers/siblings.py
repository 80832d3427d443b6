"""The other workers of this relay: links to them, and what is handed on over these.

Each pair of workers keeps one link, a SEQPACKET connection in the run directory, opened by the one that came later.
A link that ends is a worker that has died, known at once. What is said is in `sibling_language`; who is home to a
token, in `homes`; whose turn it is to accept connections, in `door`; what becomes of a client that was handed here, or
comes back, the `Household` decides (see `server`).

Handing on never leaves a connection without an owner, nor with two:

- the sender keeps its copies of the sockets until the receiver has confirmed, and takes everything back when
  the link ends before that;
- the receiver confirms first and acts then;
- a worker that was stopped (SIGSTOP, a suspended machine) may find old parcels when it wakes. So a parcel is good for
  `PARCEL_GOOD_SECONDS` only, and the sender takes it back when it is older than `PARCEL_LOST_SECONDS`, which is more.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, Protocol

import gevent

from relay import __version__
from relay.clients.client import Client
from relay.mistakes import Mistake
from relay.transfer.pair import Pair
from relay.transfer.state import PairState
from relay.workers.homes import FILES, Homes
from relay.workers.language import (
    CONFIRMED,
    FAREWELL,
    HANDED_CLIENTS,
    HANDED_PAIR,
    LANGUAGE,
    LEAVING,
    MATCHED,
    READY,
    REFUSED,
    STILL_HERE,
    TURN_AT_THE_DOOR,
    Envelope,
    Greeting,
    HandedClient,
    Misunderstood,
    decode_answer,
    decode_clients,
    decode_envelope,
    decode_matched,
    decode_pair,
    decode_still_here,
    decode_turn,
    encode_answer,
    encode_matched,
    encode_still_here,
    encode_turn,
    kind_of,
)
from relay.workers.link import Link, Parcel
from relay.workers.run_dir import RunDir, same_user

PARCEL_GOOD_SECONDS = 1.0
"""How old a parcel may be when it is opened."""

PARCEL_LOST_SECONDS = 2.0
"""How old a parcel has to be before it is taken back from a sibling that is silent but may wake at any moment."""

SILENT_SECONDS = 3
"""A sibling that has said nothing for so long, although everybody says something each second, is passed over until it
speaks again, and what it has not confirmed is taken back. What counts are the seconds in which we have listened: after
having been stopped ourselves we must not take everybody else for dead."""

JOIN_SECONDS = 2.0
"""How long a newcomer waits for its siblings to welcome it."""

logger = logging.getLogger(__name__)


class Household(Protocol):
    """What this worker does with what comes to it."""

    def take_in(self, client: Client) -> None:
        """A sibling has handed this client on; it is ours now."""

    def take_back(self, client: Client) -> None:
        """A sibling could not take this client."""

    def take_in_pair(self, state: PairState, fds: Sequence[int]) -> None:
        """A sibling's pair is ours now, with its sockets and pipes in the order of `sibling_language.encode_pair`."""

    def take_back_pair(self, pair: Pair) -> None:
        """A sibling could not take this pair."""

    def handed_on(self, client: Client) -> None:
        """A sibling has taken this client over; our copy of its socket is to be closed."""

    def handed_on_pair(self, pair: Pair) -> None:
        """The same for a pair."""

    def siblings_changed(self) -> None:
        """Those who wait may belong elsewhere now, or be spares of a match made elsewhere. Somebody, perhaps we, has
        come, gone, fallen silent or woken; or it was not certain where somebody belongs."""

    def matched_elsewhere(self, token: bytes) -> None:
        """A sibling has matched two sides for `token`; whoever has asked for it here before is a spare."""

    def turn_at_the_door(self, passed_by: int) -> None:
        """It is our turn to accept connections; so many in a row had no room for any."""

    def sibling_gone(self) -> None:
        """A link has ended."""


class Siblings:
    """All links of this worker, and which of those at their ends is home to a token."""

    def __init__(self, run_dir: RunDir, household: Household) -> None:
        self.links: set[Link] = set()
        self.unanswering = 0
        """How many workers did not answer in time when we joined."""
        self.leaving = False
        self.alone = True
        """Whether there is nobody to hand anything to."""
        self._run_dir = run_dir
        self._household = household
        self._serial = 0
        self._port: socket.socket | None = None
        self._homes: Homes | None = None
        self._live: dict[int, Link] = {}  # those who can be home, by their process ids
        self._unsettled = False
        self._last_second = time.monotonic()
        self._saw_stranger = False
        self._refused: list[Parcel] = []
        self._turn = 0
        self._warned: set[str] = set()
        self._visits: Any = None
        self._own_socket: socket.socket | None = None

    # Coming and going

    def join(self) -> socket.socket | None:
        """Find the siblings, under the run directory's lock, which is kept until `announce`.

        Returns the relay's listening socket as a sibling has given it, or None when there is nobody to give one.
        Blocks for up to `JOIN_SECONDS`, and for the lock; raises Mistake.
        """
        self._run_dir.lock()
        self._own_socket = self._run_dir.listen()
        visited = [
            (sock, Link(self, sock, same_user(sock) or 0, opened_by_sibling=False))
            for sock in self._run_dir.connect_to_all()
        ]
        for sock, link in visited:
            self.links.add(link)
            self._greet(sock)
        deadline = time.monotonic() + JOIN_SECONDS
        waiting = select.poll()
        for sock, _ in visited:
            waiting.register(sock, select.POLLIN)
        unanswered = {sock.fileno(): link for sock, link in visited}
        while unanswered and (left := deadline - time.monotonic()) > 0:
            for fd, _ in waiting.poll(left * 1000):
                waiting.unregister(fd)
                unanswered.pop(fd).read()
        self.unanswering = len(unanswered)
        return self._port

    def _greet(self, sock: socket.socket) -> None:
        try:
            sock.send(self._greeting().encode())
        except OSError:
            pass  # it has just gone, which reading finds out

    def _greeting(self) -> Greeting:
        return Greeting(self._run_dir.own_name, os.getpid(), __version__, LANGUAGE, self.leaving)

    def announce(self, listener: socket.socket) -> None:
        """Take part: the relay's port is open here, and newcomers get `listener` from us too.

        Raises Mistake.
        """
        self._port = listener
        if self._homes is None:
            self._homes = self._make_homes()
        self._visit_from_now_on()
        for link in self._greeted():
            link.say(READY)
        self._run_dir.unlock()
        pids = ", ".join(str(link.pid) for link in self._greeted())
        logger.info(
            "joined the relay in %s: %s", self._run_dir.path, f"siblings {pids}" if pids else "the first worker"
        )
        self._change()

    def _make_homes(self) -> Homes:
        try:
            if not self._greeted():
                return Homes.make()
            reason = errno.EMFILE  # those of a sibling did not all arrive
        except OSError as error:
            reason = error.errno or 0
        advice = "raise the limit (ulimit -n)" if reason in (errno.EMFILE, errno.ENFILE) else "see memfd_create(2)"
        raise Mistake(f"--run-dir {self._run_dir.path}: {os.strerror(reason)}; {advice}")

    def _visit_from_now_on(self) -> None:
        assert self._own_socket is not None
        self._visits = gevent.get_hub().loop.io(self._own_socket.fileno(), 1)
        self._visits.start(self._visited)

    def leave(self) -> None:
        """Tell everybody that we leave: they send us nothing more once they have said farewell."""
        self.leaving = True
        for link in self._greeted():
            link.handed_clients = link.handed_pairs = 0  # from here on it is worth telling
            link.say(LEAVING)
        self._change()

    @property
    def hopes(self) -> bool:
        """Whether there may soon be somebody to hand things to: a newcomer is about to be ready, or a silent one may
        wake."""
        return any(not link.leaving and not link.live for link in self._greeted())

    @property
    def left(self) -> bool:
        """Whether, after `leave`, everybody who still answers has said farewell, and everything is in other hands."""
        return not any(link.busy or not (link.said_farewell or link.silent) for link in self._greeted())

    def close(self) -> None:
        """End all links and leave the directory."""
        self._run_dir.remove_own_socket()
        self._run_dir.unlock()
        if self._visits is not None:
            self._visits.stop()
            self._visits.close()
            self._visits = None
        if self._own_socket is not None:
            self._own_socket.close()
        for link in list(self.links):
            self._tell_what_was_handed_on(link)
            link.close()
        self.links.clear()

    def _tell_what_was_handed_on(self, link: Link) -> None:
        if self.leaving and (link.handed_clients or link.handed_pairs):
            logger.info(
                "handed to worker %d: clients without a partner %d, transfers %d",
                link.pid,
                link.handed_clients,
                link.handed_pairs,
            )

    # Homes

    def home(self, token: bytes) -> Link | None:
        """The sibling that is home to `token`, or None when we are, or when nobody else could be.

        Unless we leave, asking makes us its home when nobody is: until `give_up`. So it does a worker on its own, since
        somebody may have come of whom it has not heard yet.
        """
        if self.leaving:
            return None if self.alone else self.heir(token)
        assert self._homes is not None
        pid, certain = self._homes.settle(token, self._can_be_home)
        if not certain:
            self._unsettled = True
        return self._live.get(pid)

    def _can_be_home(self, pid: int) -> bool:
        if pid in self._live:
            return True
        if all(link.pid != pid for link in self.links):
            self._saw_stranger = True
        return False

    def heir(self, token: bytes) -> Link:
        """The live sibling to which those who wait for `token` go when we leave, all to the same; there is one."""
        assert self._homes is not None
        holder = self._homes.holder(token)
        if holder in self._live:
            return self._live[holder]
        links = list(self._live.values())
        return links[int(token[:8], 16) % len(links)]

    def give_up(self, token: bytes) -> None:
        """Be home to `token` no longer: nobody waits for it here."""
        if self._homes is not None:
            self._homes.give_up(token)

    def matched(self, token: bytes) -> None:
        """Two sides have just been matched for `token` here, and nobody waits for it any more. While workers come and
        go another one can be home to it, too; who waits there is a spare."""
        assert self._homes is not None
        self._homes.note_match(token, time.monotonic())
        self._homes.give_up(token)
        if self.links and self._homes.holder(token) is not None:
            for link in self._greeted():
                link.say(encode_matched(token))

    def last_match(self, token: bytes) -> float:
        """When a worker last matched two sides for `token`, in monotonic seconds; 0 if that is forgotten."""
        return 0.0 if self._homes is None else self._homes.last_match(token)

    def ask_again(self) -> None:
        """Somebody waits here who may belong elsewhere: look again within a second."""
        self._unsettled = True

    def any_home(self) -> Link:
        """Some live sibling, another one each time; there is one (see `alone`)."""
        links = list(self._live.values())
        self._turn += 1
        return links[self._turn % len(links)]

    def idlest(self) -> Link | None:
        """The live sibling that has the least to do, as far as we know; None if nobody is there."""
        prompt = [link for link in self._live.values() if link.prompt]
        return min(prompt, key=lambda link: link.load, default=None)

    def pass_the_door_on(self, passed_by: int = 0) -> bool:
        """Tell the next sibling that it is its turn to accept.

        False when the turn has come round and nobody has room, or when nobody is there.
        """
        if not self._live or passed_by > len(self._live):
            return False
        awake = [pid for pid, link in self._live.items() if link.seconds_unheard <= 1] or list(self._live)
        later = [pid for pid in awake if pid > os.getpid()]
        self._live[min(later or awake)].say(encode_turn(passed_by))
        return True

    def _change(self) -> None:
        """Somebody has come or gone: find out again who can be home."""
        unsent = [parcel for link in self.links for parcel in link.take_back_unsent()]
        self._live = {link.pid: link for link in self.links if link.live}
        self.alone = not self._live
        self._household.siblings_changed()
        self._have_back(unsent)  # they were on their way to where they belonged before

    def share(self, pairs: int) -> float:
        """Which part of the relay's transfers are ours, if we have so many; of something that all workers share."""
        own = max(pairs, 1)
        return own / (own + sum(link.pairs for link in self._live.values()))

    def _greeted(self) -> list[Link]:
        return [link for link in self.links if link.greeting is not None]

    # What comes over the links

    def envelope(self) -> Envelope:
        """What goes on the next parcel."""
        self._serial += 1
        return Envelope(self._serial, time.monotonic())

    def _visited(self) -> None:
        assert self._own_socket is not None
        try:
            sock, _ = self._own_socket.accept()
        except OSError:
            self._visits.stop()  # without a file descriptor left it would be called all the time, until the next second
            return
        pid = same_user(sock)
        if pid is None:
            sock.close()
            self._warn("somebody of another user has knocked at %s and was not let in", self._run_dir.path)
            return
        self.links.add(Link(self, sock, pid, opened_by_sibling=True))

    def heard(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """A packet has come over `link`, with `fds` beside it."""
        try:
            if link.greeting is None:
                self._heard_greeting(link, Greeting.decode(packet), fds)
                return
            if link.silent:
                link.silent = False
                logger.info("worker %d answers again", link.pid)
                self._change()
            self._heard_sibling(link, packet, fds)
        except Misunderstood as error:
            self._warn("process %d in %s does not speak like a worker: %s", link.pid, self._run_dir.path, error)
            _close_all(fds)
            self.lost(link)

    def _heard_greeting(self, link: Link, greeting: Greeting, fds: list[int]) -> None:
        newcomer = link.opened_by_sibling
        if not newcomer:
            self._take_what_is_shared(greeting.language, fds)
        _close_all(fds)
        if newcomer and not link.welcome(self._greeting(), self._fds_for(greeting.language)):
            self.lost(link)
            return
        if greeting.language != LANGUAGE:
            logger.warning(
                "worker %d is relay-gevent %s, which speaks another language: each finishes what it holds by itself",
                link.pid,
                greeting.version,
            )
            self.lost(link)
            return
        link.greeting = greeting
        link.leaving = greeting.leaving
        link.ready = not newcomer
        if link.leaving:
            link.say(FAREWELL)
        if not newcomer and self._visits is not None:  # it was too slow for `join`: catch up with `announce`
            link.say(READY)
            self._change()

    def _fds_for(self, language: int) -> list[int]:
        """What a newcomer of that language gets."""
        listener = [] if self._port is None or self._port.fileno() < 0 else [self._port.fileno()]
        homes = self._homes.fds if self._homes is not None and language == LANGUAGE else ()
        return [*homes, *listener]

    def _take_what_is_shared(self, language: int, fds: list[int]) -> None:
        """A sibling has given us the files of its homes and the listening socket; what is left in `fds` is not needed.

        To close homes that are ours already releases our locks. But when we have any, `_change` follows.
        """
        if self._port is None and len(fds) > (FILES if language == LANGUAGE else 0):
            self._port = socket.socket(fileno=fds.pop())
        if language != LANGUAGE or len(fds) < FILES:
            return
        try:
            homes = Homes(fds[:FILES])
        except OSError:
            return  # no file descriptor left to map them
        if self._homes is None:
            self._homes = homes
        elif homes.made < self._homes.made:  # it was too slow for `join`, so that we took ourselves for the first
            self._homes.close()
            self._homes = homes
        else:
            homes.close()
        del fds[:FILES]

    def _heard_sibling(self, link: Link, packet: bytes, fds: list[int]) -> None:
        kind = kind_of(packet)
        if kind == HANDED_CLIENTS:
            self._take_clients(link, packet, fds)
        elif kind == CONFIRMED:
            self._confirmed(link, decode_answer(packet))
        elif kind == HANDED_PAIR:
            self._take_pair(link, packet, fds)
        elif kind == REFUSED:
            parcel = link.unconfirmed.pop(decode_answer(packet), None)
            if parcel is not None:
                self._refused.append(parcel)
        elif kind == READY:
            link.ready = True
            logger.info("worker %d has joined", link.pid)
            self._change()
        elif kind == LEAVING:
            link.leaving = True
            link.say(FAREWELL)
            self._change()
        elif kind == FAREWELL:
            link.said_farewell = True
            self._household.sibling_gone()
        elif kind == STILL_HERE:
            link.pairs, link.load = decode_still_here(packet)
        elif kind == MATCHED:
            self._household.matched_elsewhere(decode_matched(packet))
        elif kind == TURN_AT_THE_DOOR:
            self._household.turn_at_the_door(decode_turn(packet))
        else:
            raise Misunderstood(f"a message of the kind {kind!r}")

    def _take_clients(self, link: Link, packet: bytes, fds: list[int]) -> None:
        envelope = decode_envelope(packet)
        clients = decode_clients(packet)
        if not self._accepts(link, envelope, complete=len(clients) == len(fds)):
            _close_all(fds)
            return
        assert self._port is not None
        for handed, fd in zip(clients, fds, strict=True):
            sock = socket.socket(self._port.family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fd)
            self._household.take_in(_client_from(handed, sock))

    def _take_pair(self, link: Link, packet: bytes, fds: list[int]) -> None:
        envelope = decode_envelope(packet)
        state = decode_pair(packet)
        if not self._accepts(link, envelope, complete=len(fds) == state.fds):
            _close_all(fds)
            return
        self._household.take_in_pair(state, fds)

    def _accepts(self, link: Link, envelope: Envelope, *, complete: bool) -> bool:
        """Confirm or refuse a parcel. Once it is confirmed it is ours, and the sender closes its copies."""
        # To confirm later than now would be too late: the sender might take it back meanwhile. To refuse never is.
        if complete and time.monotonic() - envelope.sent <= PARCEL_GOOD_SECONDS and link.confirm(envelope.serial):
            return True
        link.say(encode_answer(REFUSED, envelope.serial))  # too old, or no file descriptor was left for all that came
        return False

    def _confirmed(self, link: Link, serial: int) -> None:
        parcel = link.unconfirmed.pop(serial, None)
        if parcel is None:
            return
        if parcel.pair is not None:
            link.handed_pairs += 1
            self._household.handed_on_pair(parcel.pair)
        link.handed_clients += len(parcel.clients)
        for client in parcel.clients:
            self._household.handed_on(client)

    def lost(self, link: Link) -> None:
        """A link has ended: what was under way over it is ours again."""
        if link.closed:
            return
        self.links.discard(link)
        parcels = link.take_back_unsent() + link.take_back()
        link.close()
        if link.ready:
            logger.info("worker %d has left" if link.leaving else "worker %d has died", link.pid)
        self._tell_what_was_handed_on(link)
        self._change()
        self._have_back(parcels)
        self._household.sibling_gone()

    def _have_back(self, parcels: list[Parcel]) -> None:
        for parcel in parcels:
            if parcel.pair is not None:
                self._household.take_back_pair(parcel.pair)
            for client in parcel.clients:
                self._household.take_back(client)

    # By the clock

    def every_second(self, pairs: int, load: float) -> None:
        """Say that we are here, with so many transfers and such a load, notice who is not, and try again what did not
        work."""
        now = time.monotonic()
        if now - self._last_second > SILENT_SECONDS - 1:
            self._unsettled = True  # we stood still, and others may have done without us
        self._last_second = now
        for link in list(self.links):
            link.read_all()  # what has come counts, however late we are to read it
        for link in list(self.links):
            link.seconds_unheard += 1
            if link.greeting is None:
                if link.opened_by_sibling and link.seconds_unheard > SILENT_SECONDS:
                    self.lost(link)  # somebody who does not introduce itself
                continue
            if link.seconds_unheard > SILENT_SECONDS:
                self._pass_over(link)
            elif not link.stuck:
                link.say(encode_still_here(pairs, load))
            link.send_again()
        refused, self._refused = self._refused, []
        self._have_back(refused)
        if self._saw_stranger:
            self._saw_stranger = False
            self._meet_strangers()
        if self._unsettled:
            self._unsettled = False
            self._household.siblings_changed()
        self._keep_to_be_found()

    def _pass_over(self, link: Link) -> None:
        if not link.silent:
            link.silent = True
            logger.warning("worker %d does not answer; its siblings do without it until it does", link.pid)
            self._change()
        self._have_back(link.take_back_unsent() + link.take_back(older_than=PARCEL_LOST_SECONDS))

    def _meet_strangers(self) -> None:
        """Link to workers that we have not met: one of us could not be found, or not be answered, when we joined."""
        known = {link.greeting.name for link in self._greeted() if link.greeting is not None}
        try:
            found = self._run_dir.connect_to_all(known)
        except OSError:
            self._saw_stranger = True  # no file descriptor left; try again in a second
            return
        for sock in found:
            self.links.add(Link(self, sock, same_user(sock) or 0, opened_by_sibling=False))
            self._greet(sock)

    def _keep_to_be_found(self) -> None:
        """Make our socket again when somebody has removed it, or the run directory."""
        if self._visits is None:
            return
        if not self._run_dir.lost_own_socket():
            if not self._visits.active:
                self._visits.start(self._visited)
            return
        try:
            own_socket = self._run_dir.renew()
        except (OSError, Mistake) as error:
            self._warn("the run directory is gone, and cannot be made again: %s", error)
            return
        self._visits.stop()
        self._visits.close()
        assert self._own_socket is not None
        self._own_socket.close()
        self._own_socket = own_socket
        self._visit_from_now_on()
        self._saw_stranger = True  # somebody may have come meanwhile, and not have found us
        logger.warning("made our socket in %s again; somebody had removed it", self._run_dir.path)

    def _warn(self, text: str, *values: object) -> None:
        """Log a warning, but each only once."""
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text, *values)


def _client_from(handed: HandedClient, sock: socket.socket) -> Client:
    client = Client(sock, handed.started, handed.arrived)
    client.asked, client.token, client.side = handed.asked, handed.token, handed.side
    client.received, client.hops = handed.received, handed.hops
    return client


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
