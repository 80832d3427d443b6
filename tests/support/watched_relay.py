"""`relay-gevent`, watched from inside: `python -m tests.support.watched_relay [options of relay-gevent]`.

The folder that `WATCH_FOLDER` in the environment names gets two files from each such process:

- `inside-PID`, on SIGUSR1: how many greenlets and threads there are.
- `standstills-PID`: a JSON line for each time that its event loop was away from its sockets for longer than
  `LONGEST_SECONDS`, from the first accepted connection on until the relay ends: see `Standstill`.

Two detectors look. gevent's own is told of each switch between greenlets, and knows which one has not let go of the
loop since it was last asked; it is asked here, and not turned on by gevent.config, since its report takes longer to
write than many a standstill. But what is called by the loop itself, as most of a relay is, runs in no greenlet, and
gevent looks away then. So two watchers around the loop's epoll_wait measure each of its iterations, whoever took the
time, and with it how long it waited for another thread to let go of the interpreter.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import gevent
import greenlet  # type: ignore[import-untyped]
from gevent._tracer import GreenletTracer

from relay.server import Ports, Relay
from relay.usage.recorder import Recorder

LONGEST_SECONDS: Final = 0.05
"""What the loop may be away from its sockets."""

LOOKS = 2
"""How often, in that time, somebody looks where it stands."""

_FIRST, _LAST = 2, -2
"""Of libev's priorities."""


@dataclass(frozen=True)
class Standstill:
    """A time in which the event loop looked at no socket.

    `seconds` in all. In that time, and while it was there last, its threads were ready to run for `unprocessed` but had
    no processor: the machine was busy, and the relay could do nothing about it. That is of all threads, since one that
    has the interpreter and no processor keeps the loop from running, too. `seen` is where it stood, and `by_gevent` the
    greenlet that gevent found to blame.
    """

    seconds: float
    unprocessed: float
    seen: str
    by_gevent: str

    @property
    def own(self) -> float:
        """Seconds that the relay took itself or waited for something."""
        return self.seconds - self.unprocessed


def standstills(folder: Path) -> list[Standstill]:
    """What all the watched relays of a folder have told so far, of those that were not for want of a processor."""
    return [one for one in all_told(folder) if one.own > LONGEST_SECONDS]


def all_told(folder: Path) -> list[Standstill]:
    """The same, whatever they were for."""
    return [
        Standstill(**json.loads(line))
        for path in sorted(folder.glob("standstills-*"))
        for line in path.read_text().splitlines()
    ]


class LoopWatch:
    """Both detectors of one process; to be made by the thread of the loop that is watched."""

    def __init__(self, folder: Path) -> None:
        self._told = (folder / f"standstills-{os.getpid()}").open("a", buffering=1)
        self._thread_id = threading.get_ident()
        self._schedstats: list[int] = []
        self._hub = gevent.get_hub()
        self._back: float | None = None  # when the loop last came back from its sockets; None: it is there, or not yet
        self._unprocessed = 0.0  # since each thread was started
        self._seen = self._by_gevent = ""
        loop = self._hub.loop
        self._watchers = [loop.check(), loop.prepare()]

    def start(self) -> None:
        """Begin to watch, for as long as the process lives or until `stop`."""
        check, prepare = self._watchers
        check.priority, prepare.priority = _FIRST, _LAST
        check.start(self._comes_back)
        prepare.start(self._goes)
        tracer = GreenletTracer()
        threading.Thread(target=self._look, args=[tracer], name="looks at the loop", daemon=True).start()
        tasks = os.listdir("/proc/self/task")
        self._schedstats = [os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY) for task in tasks]

    def stop(self) -> None:
        """The rest of the process is no event loop's business."""
        for watcher in self._watchers:
            watcher.stop()
        self._back = None

    def _comes_back(self) -> None:
        # The loop takes the time as soon as it is back, and then waits for the interpreter.
        late = max(0.0, time.time() - self._hub.loop.now())
        self._seen = self._by_gevent = ""
        self._back = time.monotonic() - late

    def _goes(self) -> None:
        back, self._back = self._back, None
        seconds = 0.0 if back is None else time.monotonic() - back
        before, self._unprocessed = self._unprocessed, sum(map(_waited_for_a_processor, self._schedstats))
        if seconds > LONGEST_SECONDS:
            one = Standstill(seconds, self._unprocessed - before, self._seen, self._by_gevent)
            self._told.write(json.dumps(asdict(one)) + "\n")

    def _look(self, tracer: GreenletTracer) -> None:
        while True:
            for _ in range(LOOKS):
                time.sleep(LONGEST_SECONDS / LOOKS)
                back = self._back
                if back is not None and time.monotonic() - back > LONGEST_SECONDS / 2:
                    frame = sys._current_frames().get(self._thread_id)  # none at the very end of the process
                    self._seen = "".join(traceback.format_stack(frame)) if frame is not None else ""
            if found := tracer.did_block_hub(self._hub):
                self._by_gevent = str(found[1])


def _waited_for_a_processor(schedstat: int) -> float:
    """Seconds since a thread was started; sched-stats in the kernel's documentation."""
    try:
        return int(os.pread(schedstat, 100, 0).split()[1]) / 1e9
    except ProcessLookupError:
        return 0.0  # it has ended


def _tell_what_is_inside(folder: Path) -> None:
    gc.collect()
    alive = sum(isinstance(thing, greenlet.greenlet) and not thing.dead for thing in gc.get_objects())
    new = folder / f"inside-{os.getpid()}.new"
    new.write_text(f"{alive} {threading.active_count()}")
    new.rename(folder / f"inside-{os.getpid()}")


def main() -> None:
    """Run `relay-gevent` with the arguments of this process."""
    from relay.__main__ import main as run

    folder = Path(os.environ["WATCH_FOLDER"])
    start, wait_until_ended = Relay.start, Relay.wait_until_ended

    def tell(number: int, frame: FrameType | None) -> None:
        _tell_what_is_inside(folder)

    def start_watched(self: Relay, ports: Ports, recorder: Recorder) -> None:
        start(self, ports, recorder)
        signal.signal(signal.SIGUSR1, tell)  # which means nothing to a relay
        watch.append(LoopWatch(folder))
        watch[0].start()

    def wait_until_ended_watched(self: Relay) -> None:
        wait_until_ended(self)
        watch[0].stop()

    watch: list[LoopWatch] = []
    Relay.start, Relay.wait_until_ended = start_watched, wait_until_ended_watched  # type: ignore[method-assign]
    run()


if __name__ == "__main__":
    main()
