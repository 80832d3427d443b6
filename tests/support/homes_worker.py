"""A process that has the homes of all tokens as a worker of the relay does, told what to do on its stdin.

    homes = Homes.make()
    with HomesWorker(homes.fds) as worker:
        worker.settle(token)        # (the home's process id, whether that is certain)
        worker.holder(token)        # a process id, or None
        worker.absent(other.pid)    # from now on it takes these, and no others, for workers that cannot be home
        worker.give_up(token)
        with worker.inside(token):  # meanwhile it stands still in the middle of changing something there
            ...

Locks belong to a process, so one test needs several of these.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from relay.workers.buckets import root_of
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

    @contextlib.contextmanager
    def inside(self, token: str) -> Iterator[None]:
        """While it stands still in the middle of changing a token's first place. It may be killed there."""
        self.ask("enter", token)
        yield
        if self.process.returncode is None:
            self.ask("leave", token)

    def match(self, token: str, when: float) -> int | None:
        """`Homes.match`."""
        said = self.ask("match", token, repr(when))
        return None if said == "None" else int(said)

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
    if command == "match":
        return str(homes.match(tokens[0], float(words[1])))
    if command == "give-up":
        for token in tokens:
            homes.give_up(token)
    elif command == "absent":
        absent.clear()
        absent.update(map(int, words))
    elif command == "made":
        return f"{homes.made} {homes._key}"
    elif command == "close":
        homes.close()
    elif command in ("enter", "leave"):
        kind = fcntl.LOCK_EX if command == "enter" else fcntl.LOCK_UN
        fcntl.lockf(homes.fds[0], kind, 1, root_of(homes._first_place_of(tokens[0])))
    elif command == "close-spares":
        for fd in homes.fds:
            os.close(os.dup(fd))
    elif command == "no-more-memory":
        os.posix_fallocate = _refuse
    elif command == "die-at-store":
        homes._buckets._words = _Dying(homes._buckets._words, int(words[0]))  # type: ignore[assignment]
    elif command == "come-and-go":
        for token in random.choices([word.encode() for word in words[1:]], k=int(words[0])):
            homes.settle(token, lambda pid: pid not in absent)
            if random.random() < 0.7:
                homes.give_up(token)
    elif command == "busy":
        return _come_and_go(homes, int(words[0]))
    elif command == "make-with-few-fds":
        return _make_with_few_fds()
    return "done"


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Dying:
    """Words of the memory; with the store after so many the process is no more."""

    def __init__(self, words: memoryview, stores: int) -> None:
        self._words = words
        self._stores = stores

    def __getitem__(self, word: int) -> int:
        return int(self._words[word])

    def __setitem__(self, word: int, value: int) -> None:
        if not self._stores:
            os.kill(os.getpid(), signal.SIGKILL)
        self._stores -= 1
        self._words[word] = value


def _come_and_go(homes: Homes, number: int) -> str:
    """Be home to so many tokens, one after another, and ask for as many that nobody is home to; says how many bytes of
    memory of its own that took."""
    before = _own_bytes()
    for _ in range(number):
        token = os.urandom(32).hex().encode()
        assert homes.holder(token) is None
        assert homes.settle(token, lambda _: True) == (os.getpid(), True)
        homes.give_up(token)
    return str(_own_bytes() - before)


def _own_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _make_with_few_fds() -> str:
    """What comes of it, each time, when no more file can be open, one, two and so on; a homes' own are four."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    spare = []
    with contextlib.suppress(OSError):
        while True:
            spare.append(os.dup(0))
    said = []
    for _ in range(5):
        try:
            Homes.make().close()
            said.append("made")
        except OSError as error:
            said.append(errno.errorcode[error.errno or 0])
        os.close(spare.pop())
    for fd in spare:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return " ".join(said)


if __name__ == "__main__":
    main()
