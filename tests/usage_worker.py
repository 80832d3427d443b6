"""A process that records as a worker of the relay does, told what to do on its stdin; the tests of usage start several.

with UsageWorker("--usage-db", path) as worker:
    worker.ask("record 5000 1000 happy")    # how many, bytes each, mood
    worker.ask("current 1 2 3")             # connected, waiting, partal_bytes
    worker.ask("refresh")                   # or tick
    worker.ask("close 10")                  # answers how many records were not written
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from relay.usage.record import Current, Mood, Record
from relay.usage.recorder import Recorder, UsageError, open_recorder

MOODS: dict[str, Mood] = {"happy": "happy", "lonely": "lonely", "errory": "errory"}
CHECKOUT = Path(__file__).resolve().parent.parent


class UsageWorker:
    """One such process. `ask` returns its answer, which comes when the command was carried out or queued.

    Args:
        options: --usage-db PATH, --log-fd N, --blur-usage SECONDS.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(self, *options: str, pass_fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.usage_worker", *options],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )
        self.warnings = ""

    def ask(self, command: str) -> str:
        """Send a command and return the answer; without a command, the answer to its start."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if command:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """End it with SIGKILL and take its status, so that not even a zombie is left."""
        self.process.kill()
        self.end()

    def end(self) -> int:
        """Wait for its end and keep what it said on stderr; return the exit status."""
        _, self.warnings = self.process.communicate(timeout=30)
        return self.process.returncode

    def __enter__(self) -> UsageWorker:
        answer = self.ask("")
        if answer != "ready":
            self.end()
            raise AssertionError(f"the worker did not start: {self.warnings}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.kill()


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
    print("ready", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        print(_obey(recorder, held, command, words), flush=True)


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
