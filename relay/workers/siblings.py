"""The other workers of this relay: who is there, and what they say.

Each pair of workers keeps one link, a SEQPACKET connection in the run directory, opened by the one that came later.
A link that ends is a worker that has died, known at once. How links begin is in `gathering`; what is said, in
`language`; who is home to a token, in `tokens`; what is under way, in `parcels`; whose turn it is to accept
connections, in `relay.clients.door`; what becomes of all that, whoever is `AtHome` decides (see `household`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import gevent

from relay import __version__
from relay.mistakes import Mistake
from relay.process import log
from relay.process.discreet import discreet
from relay.process.one_by_one import do_it, one_by_one
from relay.transfer.pace import PARTS
from relay.transfer.slices import REST_SECONDS
from relay.workers.estate import Estate, Listeners
from relay.workers.gathering import Gathering
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
    Misunderstood,
    Standing,
    decode_answer,
    decode_matched,
    decode_still_here,
    decode_turn,
    encode_still_here,
    encode_turn,
    kind_of,
)
from relay.workers.link import Link, Parcel, readiest
from relay.workers.parcels import PARCEL_LOST_SECONDS, Parcels, Receiver, close_all
from relay.workers.run_dir import RunDir
from relay.workers.terms import disagreement
from relay.workers.tokens import Tokens

SILENT_SECONDS = 3
"""A sibling that has said nothing for so long, although everybody says something each second, is passed over until it
speaks again, and what it has not confirmed is taken back. What counts are the seconds in which we have listened: after
having been stopped ourselves we must not take everybody else for dead."""

SETTLE_SECONDS = 0.02
"""How often to look whether nothing is under way any more."""

ANSWER_SECONDS = 0.5
"""How long a worker that leaves waits for what the others answer: it takes a millisecond, where processors are free."""

MOMENT_SECONDS = 0.1
"""How long what is under way may take to arrive when this worker ends at once: it takes a few milliseconds, unless the
sibling does not run."""


class AtHome(Receiver, Protocol):
    """What this worker does with what comes to it, and with what it is told."""

    def siblings_changed(self) -> None:
        """Somebody, perhaps we, has come, gone, fallen silent or woken: those of whom it was not certain where they
        belong may belong elsewhere now, or be spares of a match made elsewhere."""

    def look_again(self, tokens: Mapping[bytes, None]) -> None:
        """Those who wait for these tokens may belong elsewhere by now, or be spares."""

    def was_absent(self) -> None:
        """The others may have done without us for a while: so may everybody who waits here."""

    def matched_elsewhere(self, token: bytes) -> None:
        """A sibling has matched two sides for `token`; whoever has asked for it here before is a spare."""

    def turn_at_the_door(self, passed_by: int) -> None:
        """It is our turn to accept connections; so many in a row had no room for any."""

    def sibling_gone(self) -> None:
        """A link has ended."""

    def sibling_is_well(self, *, is_new: bool) -> None:
        """A sibling has said how it is; `is_new` is whether that was the first time, and it takes part."""

    def standing(self) -> Standing:
        """How this worker is."""

    @property
    def is_filling(self) -> bool:
        """Whether it may soon have more than it should."""


class Siblings:
    """All links of this worker."""

    def __init__(self, run_dir: RunDir, terms: Callable[[], Mapping[str, str]], at_home: AtHome) -> None:
        self.links: set[Link] = set()
        self.unanswering = 0
        """How many workers did not answer in time when we joined."""
        self.leaving = False
        self._settling = False
        self._live: dict[int, Link] = {}  # those who can be home, by their process ids
        self._estate = Estate()
        self.tokens = Tokens(self._estate, self.links, self._live)
        self._parcels = Parcels(at_home, self._estate)
        self._gathering = Gathering(run_dir, self._new_link, self._greeting, self._warn)
        self._run_dir = run_dir
        self._terms = terms
        self._disagreement: str | None = None
        self._at_home = at_home
        self._last_second = time.monotonic()
        self._warned: set[str] = set()
        self._met: set[str] = set()
        """The names of those who have welcomed us."""

    # Coming and going

    def knock(self) -> Listeners:
        """Let the siblings know that we are about to join, so that one that leaves meanwhile waits for us.

        Returns what `join` does. Blocks for half a second at most, and for no lock.
        """
        for link in self._gathering.knock():
            self.links.discard(link)  # `join` tries again
            link.close()
        return self._estate.listeners

    def join(self) -> Listeners:
        """Find the siblings, under the run directory's lock, which is kept until `announce`.

        Returns the relay's listening sockets, as a sibling has given them.
        Blocks for a few seconds, and for the lock; raises Mistake.
        """
        self.unanswering = self._gathering.join(self._met)
        self._estate.make_homes(self._run_dir.path, first=not self._greeted())
        return self._estate.listeners

    def announce(self, *listeners: socket.socket | None) -> None:
        """Take part: the relay's `Listeners` are open here, and newcomers get them from us too."""
        self._estate.keep(*listeners)
        self._gathering.open()
        for link in self._greeted():
            link.say(READY)
            link.say(encode_still_here(self._at_home.standing()))
        self._gathering.unlock()
        pids = ", ".join(str(link.pid) for link in self._greeted())
        log.tell("joined the relay in %s: %s", self._run_dir.path, f"siblings {pids}" if pids else "the first worker")
        self._change()

    def leave(self) -> None:
        """Tell everybody that we leave: they send us nothing more once they have said farewell."""
        self.leaving = self.tokens.leaving = True
        for link in self._greeted():
            link.handed_clients = link.handed_pairs = 0  # from here on it is worth telling
            link.say(LEAVING)
        self._change()

    def wait_for_farewells(self) -> None:
        """Give those who can take something over a moment to say what room they have: as they last said it they may
        each have a hundred newcomers more by now, and the one that seems to have the most room would get nearly
        everything. Blocks the calling greenlet."""
        until = time.monotonic() + ANSWER_SECONDS
        while any(not link.said_farewell for link in self._live.values()) and time.monotonic() < until:
            gevent.sleep(REST_SECONDS)

    @property
    def hopes(self) -> bool:
        """Whether there may soon be somebody to hand things to: a newcomer is about to be ready, or a silent one may
        wake."""
        return any(not link.leaving and not link.live for link in self._greeted())

    @property
    def left(self) -> bool:
        """Whether, after `leave`, everybody who still answers has said farewell, and everything is in other hands."""
        return not any(link.busy or not (link.said_farewell or link.silent) for link in self._greeted())

    def settle(self, seconds: float = PARCEL_LOST_SECONDS) -> None:
        """Hand nothing on any more, and give what is under way so many seconds to arrive. What has not by then `close`
        has back."""
        self._settling = True
        self._live.clear()
        until = time.monotonic() + seconds
        while any(link.under_way for link in self.links) and time.monotonic() < until:
            gevent.sleep(SETTLE_SECONDS)

    def close(self) -> None:
        """End all links and leave the directory, whyever this worker ends. Then nothing is under way any more: it has
        arrived, or is ours again."""
        steps = (self._gathering.close, self._settle_soon, self._end_links, self._parcels.close)
        one_by_one(steps, do_it, "in leaving the siblings")

    def _settle_soon(self) -> None:
        self.settle(MOMENT_SECONDS)

    def _end_links(self) -> None:
        one_by_one([*self.links], self._end, "in ending a link")

    def _end(self, link: Link) -> None:
        self.links.discard(link)
        try:
            self._parcels.end(link)
            self._tell_what_was_handed_on(link)
        finally:
            link.close()

    def _tell_what_was_handed_on(self, link: Link) -> None:
        if self.leaving and link.handed_something:
            counts = (link.pid, link.handed_clients, link.handed_pairs)
            log.tell("handed to worker %d: clients without a partner %d, transfers %d", *counts)

    def _new_link(self, sock: socket.socket, pid: int, opened_by_sibling: bool) -> Link:
        link = Link(self, sock, pid, opened_by_sibling=opened_by_sibling)
        self.links.add(link)
        return link

    def _greeting(self) -> Greeting:
        return Greeting(self._run_dir.own_name, os.getpid(), __version__, LANGUAGE, self.leaving, self._terms())

    def _greeted(self) -> list[Link]:
        return [link for link in self.links if link.greeting is not None]

    # Who is there

    @property
    def alone(self) -> bool:
        """Whether there is nobody to hand anything to."""
        return not self._live

    @property
    def silent(self) -> int:
        """How many live, and have stopped answering."""
        return sum(link.silent for link in self._greeted())

    def any_with_room(self, connections: int) -> Link | None:
        """The live sibling that has room for so many connections and is the readiest for them; None if none has."""
        return readiest(self._live.values(), connections)

    def have_places(self) -> bool:
        """Whether one of those who answer has a place for a newcomer, as far as we know."""
        return any(link.places and link.seconds_unheard <= 1 for link in self._live.values())

    @property
    def live(self) -> Collection[Link]:
        """Those who can be home to tokens."""
        return self._live.values()

    def idlest(self, connections: int) -> Link | None:
        """The live sibling with places for so many connections that has the least to do; None if there is none."""
        prompt = [link for link in self._live.values() if link.prompt and link.has_places(connections)]
        return min(prompt, key=lambda link: link.load, default=None)

    def share(self, parts: int) -> float:
        """Which part is ours of a rate that all workers share, if our transfers want so many `PARTS` of an equal one.
        Who wants nothing has one all the same, for whoever comes. One that leaves moves on what it still holds."""
        own = max(parts, PARTS)
        return own / (own + sum(link.parts for link in self.links if not link.silent))

    def pass_the_door_on(self, passed_by: int = 0) -> bool:
        """Tell the next sibling that it is its turn to accept.

        False when the turn has come round and nobody has room, or when nobody is there.
        """
        if not self._live or passed_by > len(self._live):
            return False
        awake = [pid for pid, link in self._live.items() if link.seconds_unheard <= 1] or list(self._live)
        later = [pid for pid in awake if pid > os.getpid()]
        link = self._live[min(later or awake)]
        if self._at_home.is_filling:  # or it would know only in a second whom we have let in meanwhile
            link.say(encode_still_here(self._at_home.standing()))
        link.say(encode_turn(passed_by))
        return True

    def _change(self) -> None:
        """Somebody has come or gone: find out again who can be home."""
        unsent = [parcel for link in self.links for parcel in link.take_back_unsent()]
        self._live.clear()
        if not self._settling:
            self._live.update((link.pid, link) for link in self.links if link.live)
        self._at_home.siblings_changed()
        self._parcels.have_back(unsent)  # they were on their way to where they belonged before

    # What comes over the links (the `Correspondent` of `link`)

    def envelope(self) -> Envelope:
        """What goes on the next parcel."""
        return self._parcels.envelope()

    def came_back(self, parcel: Parcel) -> None:
        """What was to be handed on cannot be, and is ours again."""
        self._parcels.have_back([parcel])

    def heard(self, link: Link, packet: bytes, fds: list[int]) -> None:
        """A packet has come over `link`, with `fds` beside it."""
        try:
            if link.greeting is None:
                self._heard_greeting(link, Greeting.decode(packet), fds)
                return
            if link.silent:
                link.silent = False
                log.tell("worker %d answers again", link.pid)
                self._change()
            self._heard_sibling(link, packet, fds)
        except Misunderstood as error:
            self._warn("process %d in %s does not speak like a worker: %s", link.pid, self._run_dir.path, error)
            close_all(fds)
            self._parcels.end(link)  # it lives, and may have confirmed something
            self.lost(link)

    def _heard_greeting(self, link: Link, greeting: Greeting, fds: list[int]) -> None:
        newcomer = link.opened_by_sibling
        if not newcomer:
            self._met.add(greeting.name)
            self._agree(greeting)
            if self._estate.take(greeting.language, fds):
                self._at_home.was_absent()  # from the homes that count
        close_all(fds)
        if newcomer and not link.welcome(self._greeting(), self._estate.fds_for(greeting.language)):
            self.lost(link)
            return
        if greeting.language != LANGUAGE:
            log.tell(
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
        if not newcomer and self._gathering.is_open:  # it was too slow for `join`: catch up with `announce`
            link.say(READY)
            link.say(encode_still_here(self._at_home.standing()))
            self._change()

    def _agree(self, greeting: Greeting) -> None:
        """Find out whether we may be of one relay with a sibling that we have come to."""
        reason = disagreement(self._terms(), greeting.terms)
        if reason is not None and self._gathering.is_open:
            raise Misunderstood(reason)  # it was too slow for `join`
        self._disagreement = self._disagreement or reason

    def check_terms(self) -> None:
        """Raise Mistake if we must not be of one relay with those whom `join` has found."""
        if self._disagreement is not None:
            pids = ", ".join(str(link.pid) for link in self._greeted() if link.pid)  # 0: not to be seen from here
            named = f" (its workers: {pids})" if pids else ""
            raise Mistake(f"--run-dir {self._run_dir.path}: {self._disagreement}{named}")

    def _heard_sibling(self, link: Link, packet: bytes, fds: list[int]) -> None:
        kind = kind_of(packet)
        if kind == HANDED_CLIENTS:
            self._parcels.take_clients(link, packet, fds)
        elif kind == CONFIRMED:
            self._parcels.confirmed(link, decode_answer(packet))
        elif kind == HANDED_PAIR:
            self._parcels.take_pair(link, packet, fds)
        elif kind == REFUSED:
            self._parcels.refused(link, decode_answer(packet))
        elif kind == READY:
            link.ready = True
            link.say(encode_still_here(self._at_home.standing()))  # or it would know only in a second what room we have
            log.tell("worker %d has joined", link.pid)
            self._change()
        elif kind == LEAVING:
            link.leaving = True
            link.say(encode_still_here(self._at_home.standing()))  # see `wait_for_farewells`
            link.say(FAREWELL)
            self._change()
        elif kind == FAREWELL:
            link.said_farewell = True
            self._at_home.sibling_gone()
        elif kind == STILL_HERE:
            is_new = not link.has_said
            link.is_like(decode_still_here(packet))
            if is_new and link.live:
                for other in self.links:
                    other.is_replaced = other.is_replaced or other.leaving
            self._at_home.sibling_is_well(is_new=is_new and link.live)
        elif kind == MATCHED:
            self._at_home.matched_elsewhere(decode_matched(packet))
        elif kind == TURN_AT_THE_DOOR:
            self._at_home.turn_at_the_door(decode_turn(packet))
        else:
            raise Misunderstood(f"a message of the kind {kind!r}")

    def lost(self, link: Link) -> None:
        """A link has ended: what was under way over it is ours again."""
        if link.closed:
            return
        self.links.discard(link)
        self._parcels.take_back(link)
        link.close()
        if link.ready:
            log.tell("worker %d has left" if link.leaving else "worker %d has died", link.pid)
        self._tell_what_was_handed_on(link)
        self._change()
        self._at_home.sibling_gone()

    def is_unfit(self, link: Link, parcel: Parcel, error: Exception) -> None:
        """A parcel can never be sent over a link, and is ours again."""
        reason = discreet(f"{type(error).__name__}: {error}")
        self._warn("somebody cannot be handed on, and stays with this worker: %s", reason)
        self._parcels.is_unfit(link, parcel)

    # By the clock

    def every_second(self, standing: Standing) -> None:
        """Say that we are here, and how we are, notice who is not, and try again what did not work."""
        now = time.monotonic()
        if now - self._last_second > SILENT_SECONDS - 1:
            self._at_home.was_absent()  # we stood still
        self._last_second = now
        for link in list(self.links):
            # What has come counts, however late we are to read it.
            link.seconds_unheard = 0 if link.has_spoken() else link.seconds_unheard + 1
            link.keep_reading()
            if link.greeting is None:
                if link.opened_by_sibling and link.seconds_unheard > SILENT_SECONDS:
                    self.lost(link)  # somebody who does not introduce itself
                continue
            if link.seconds_unheard > SILENT_SECONDS:
                self._pass_over(link)
            elif not link.stuck:
                link.say(encode_still_here(standing))
            link.send_again()
        if self.tokens.saw_stranger:
            self.tokens.saw_stranger = not self._gathering.meet_strangers(self._names())
        if self.tokens.uncertain:
            self._at_home.look_again(self.tokens.to_look_at())
        if self._gathering.keep_to_be_found():
            self.tokens.saw_stranger = True

    def _names(self) -> set[str]:
        return {link.greeting.name for link in self.links if link.greeting is not None}

    def _pass_over(self, link: Link) -> None:
        if not link.silent:
            link.silent = True
            log.tell("worker %d does not answer; its siblings do without it until it does", link.pid)
            self._change()
        self._parcels.take_back(link, older_than=PARCEL_LOST_SECONDS)

    def _warn(self, text: str, *values: object) -> None:
        """Log a warning, but each only once."""
        if text not in self._warned:
            self._warned.add(text)
            log.tell(text, *values)
