"""A process that has the homes of all tokens as a worker of the relay does, told what to do on its stdin.

    homes = Homes.make()
    with HomesWorker(homes.fds) as worker:
        worker.settle(token)        # (the home's process id, whether that is certain)
        worker.holder(token)        # a process id, or None
        worker.absent(other.pid)    # from now on it takes these, and no others, for workers that cannot be home
        worker.give_up(token)

Locks belong to a process, so one test needs several of these.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from relay.workers.homes import Homes
from tests.support.told_process import ToldProcess, obey_stdin


class HomesWorker(ToldProcess):
    """One such process."""

    def __init__(self, fds: Sequence[int]) -> None:
        super().__init__("tests.support.homes_worker", [str(fd) for fd in fds], fds)

    def absent(self, *pids: int) -> None:
        """From now on take these, and no others, for workers that cannot be home."""
        self.ask("absent", *pids)

    def settle(self, token: str) -> tuple[int, bool]:
        """`Homes.settle`."""
        pid, certain = self.ask("settle", token).split(":")
        return int(pid), certain == "True"

    def settled(self) -> list[tuple[int, bool]]:
        """The answer to a `start` of ``settle`` with several tokens."""
        answers = [answer.split(":") for answer in self.answer().split()]
        return [(int(pid), certain == "True") for pid, certain in answers]

    def holder(self, token: str) -> int | None:
        """`Homes.holder`."""
        said = self.ask("holder", token)
        return None if said == "None" else int(said)

    def note_match(self, token: str, when: float) -> None:
        """`Homes.note_match`."""
        self.ask("note-match", token, repr(when))

    def last_match(self, token: str) -> float:
        """`Homes.last_match`."""
        return float(self.ask("last-match", token))

    def give_up(self, *tokens: str) -> None:
        """`Homes.give_up` of each."""
        self.ask("give-up", *tokens)


def main() -> None:
    """Be such a process."""
    homes = Homes([int(word) for word in sys.argv[1:]])
    absent: set[int] = set()
    obey_stdin(lambda command, words: _obey(homes, absent, command, words))


def _obey(homes: Homes, absent: set[int], command: str, words: list[str]) -> str:
    tokens = [word.encode() for word in words]
    if command == "settle":
        settled = [homes.settle(token, lambda pid: pid not in absent) for token in tokens]
        return " ".join(f"{pid}:{certain}" for pid, certain in settled)
    if command == "holder":
        return str(homes.holder(tokens[0]))
    if command == "last-match":
        return repr(homes.last_match(tokens[0]))
    if command == "note-match":
        homes.note_match(tokens[0], float(words[1]))
    elif command == "give-up":
        for token in tokens:
            homes.give_up(token)
    elif command == "absent":
        absent.clear()
        absent.update(map(int, words))
    elif command == "made":
        return f"{homes.made} {homes._key}"
    elif command == "close":
        homes.close()
    elif command == "busy":
        return _come_and_go(homes, int(words[0]))
    elif command == "make-with-few-fds":
        return _make_with_few_fds()
    return "done"


def _come_and_go(homes: Homes, number: int) -> str:
    """Be home to so many tokens, one after another, and ask for as many that nobody is home to; says how many bytes of
    memory that took."""
    before = _resident_bytes()
    for _ in range(number):
        token = os.urandom(32).hex().encode()
        assert homes.holder(token) is None
        assert homes.settle(token, lambda _: True) == (os.getpid(), True)
        homes.give_up(token)
    return str(_resident_bytes() - before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _make_with_few_fds() -> str:
    """The error that it takes when only ten more files can be open."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, highest + 10))
    try:
        Homes.make()
    except OSError as error:
        return type(error).__name__ + " " + str(error.errno)
    return "none"


if __name__ == "__main__":
    main()
