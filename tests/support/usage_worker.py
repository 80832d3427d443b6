"""A process that records as a worker of the relay does, told what to do on its stdin; the tests of usage start several.

with UsageWorker("--usage-db", path) as worker:
    worker.ask("record 5000 1000 happy")    # how many, bytes each, mood
    worker.ask("current 1 2 3")             # connected, waiting, partal_bytes
    worker.ask("refresh")                   # or tick
    worker.ask("close 10")                  # answers how many records were not written
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from relay.usage.record import Current, Mood, Record
from relay.usage.recorder import Recorder, UsageError, open_recorder
from tests.support.told_process import ToldProcess, obey_stdin

MOODS: dict[str, Mood] = {"happy": "happy", "lonely": "lonely", "errory": "errory"}


class UsageWorker(ToldProcess):
    """One such process. An answer comes when the command was carried out or queued.

    Args:
        options: --usage-db PATH, --log-fd N, --blur-usage SECONDS.
        pass_fds: file descriptors that it inherits.
        inside: what comes before its command, such as `unshare --pid`.
    """

    def __init__(self, *options: str, pass_fds: tuple[int, ...] = (), inside: Sequence[str] = ()) -> None:
        super().__init__("tests.support.usage_worker", options, pass_fds, inside)


def main() -> None:
    """Be such a process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--usage-db")
    parser.add_argument("--log-fd", type=int)
    parser.add_argument("--blur-usage", type=int)
    given = parser.parse_args()
    held = [Current(0, 0, 0)]
    try:
        recorder = open_recorder(
            usage_db=given.usage_db,
            log_fd=given.log_fd,
            blur_seconds=given.blur_usage,
            current=lambda: held[0],
            warn=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    obey_stdin(lambda command, words: _obey(recorder, held, command, words))


def _obey(recorder: Recorder, held: list[Current], command: str, words: list[str]) -> str:
    if command == "record":
        mood = MOODS[words[2]]
        for _ in range(int(words[0])):
            recorder.record(Record(time.time(), 1.5, 0.25, int(words[1]), mood))
    elif command == "current":
        held[0] = Current(*(int(word) for word in words))
    elif command in ("refresh", "tick"):
        recorder.refresh_current(tick=command == "tick")
    elif command == "close":
        return str(recorder.close(float(words[0])))
    return "done"


if __name__ == "__main__":
    main()
