"""What each signal means to a worker: it ends in good order, or nothing happens. None kills it with its records.

============================  =========================================================================================
SIGTERM, SIGINT, SIGQUIT,     somebody wants it to end (supervisor, Ctrl-C, Ctrl-\\, a container's STOPSIGNAL, a
SIGABRT                       watchdog). Once more, and it ends at once. abort() itself still ends as it always does
SIGPWR                        the power fails, or a container is told so: end while there is time
SIGALRM                       `alarm N; exec` ahead of it: its time is over
SIGXCPU                       so is its processor time (RLIMIT_CPU); comes each second until the hard limit, so a
                              further one changes nothing
SIGTSTP, SIGCONT              keep their meaning: Ctrl-Z suspends it, and its siblings do without it meanwhile
SIGCHLD                       as ever; there are no children
SIGBUS, SIGFPE, SIGILL,       nothing when sent by hand. When memory is really not what it should be they kill it, since
SIGSEGV, SIGSYS, SIGTRAP      such a process must write no record: blocked signals do both. Where Python's faulthandler
                              is on (PYTHONFAULTHANDLER, PYTHONDEVMODE) they are its own
all others                    nothing. SIGHUP, SIGUSR1 and SIGUSR2 ask other programs to reopen a log or read a file
                              again, which the relay does unasked. SIGTTIN and SIGTTOU would stop it for a line in the
                              log when it is in a terminal's background. SIGPIPE and SIGXFSZ come with an error that is
                              handled where it is met. SIGVTALRM, SIGPROF, SIGIO and the real-time signals are sent by
                              what their receiver has set up, and it has set up nothing
SIGKILL, SIGSTOP              cannot be caught
============================  =========================================================================================
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Callable
from types import FrameType

BY_SOMEBODY = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT})
BY_THE_SYSTEM = frozenset({signal.SIGPWR, signal.SIGALRM, signal.SIGXCPU})
FAULTS = frozenset({signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP})
KEPT = frozenset({signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD})

LAST_LOOK_SECONDS = 0.001
"""How long the loop is let run for the signals that it has been told of and has not looked at."""


def be_ready_for_signals() -> None:
    """Ignore what means nothing, and end silently at once, with status 0, when told to: as long as there is nothing to
    put in order. To be called on the main thread."""
    ending = BY_SOMEBODY | BY_THE_SYSTEM
    for number in signal.valid_signals() - ending - FAULTS - KEPT:
        with contextlib.suppress(OSError):  # a sandbox refuses it: then it is as ever
            signal.signal(number, signal.SIG_IGN)
    for number in ending:
        with contextlib.suppress(OSError):
            # Not by an exception: that could come out anywhere, and be swallowed or end as a traceback.
            signal.signal(number, _leave)
    with contextlib.suppress(OSError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)  # whoever started us may have had them blocked
        if not faulthandler.is_enabled():
            signal.pthread_sigmask(signal.SIG_BLOCK, FAULTS)  # in each thread that is started from now on, too


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)


def end_by_signal(stop: Callable[[], None]) -> Ending:
    """From now on let the signals that end something call `stop`, in a greenlet of the event loop: the first of them,
    and each that somebody sends once more."""
    import gevent

    ending = Ending(stop)
    for number in BY_SOMEBODY:
        gevent.signal_handler(number, ending.by_somebody)
    for number in BY_THE_SYSTEM:
        gevent.signal_handler(number, ending.by_the_system)
    return ending


class Ending:
    """What the signals that end something have come to: made by `end_by_signal`.

    Args:
        stop: is called by the first of them, and by each that somebody sends once more.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._begun = False
        self._told = False
        self._is_urgent = False

    def by_somebody(self) -> None:
        """Somebody wants the end, or wants it at once."""
        self._is_urgent, self._told = self._told, True
        if self._is_urgent or not self._begun:
            self._begun = True
            self._stop()

    def by_the_system(self) -> None:
        """The time is over; how often that is said means nothing."""
        if not self._begun:
            self._begun = True
            self._stop()

    def go_on_without_loop(self, hurry: Callable[[], None]) -> None:
        """The event loop has come to its end, and more is to be done: from now on let `hurry` be called in the place of
        `stop`, in the middle of whatever the main thread does, by what somebody sends once more; at once if that has
        been. To be called on the greenlet that waited for the end."""
        import gevent

        self._stop = hurry
        self._begun = True
        if self._is_urgent:
            hurry()
        for number in BY_SOMEBODY:
            with contextlib.suppress(OSError):
                signal.signal(number, lambda number, frame: self.by_somebody())
        gevent.sleep(LAST_LOOK_SECONDS)  # what came just before is with the loop still, which would not run again

    def is_over(self) -> None:
        """Everything is done. Python would give these signals their own meaning again before it is gone, and whoever
        sends one once more be told that it was killed."""
        for number in BY_SOMEBODY:
            with contextlib.suppress(OSError):
                signal.signal(number, signal.SIG_IGN)
