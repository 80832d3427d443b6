"""A function applied to each of many items, in several processes at once.

They are forked, so there is nothing to import anew; the process must have no thread. They end with it, whatever ends
it: Ctrl-C, which a terminal sends to all of them, is this process's alone. That one of them may be killed, as where
memory is short, is noticed. multiprocessing's own pool waits for ever for what a killed process had in hand, and after
a Ctrl-C now and then.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Generator, Sequence
from typing import Any, BinaryIO, TypeVar

A = TypeVar("A")
R = TypeVar("R")


class ProcessDied(Exception):
    """One of the processes has ended before its work."""


def apply(function: Callable[[A], R], items: Sequence[A], processes: int) -> Generator[R, None, None]:
    """Yield the result of `function` for each of the `items`, in their order. Results are handed from process to
    process, so `pickle` has to know them. An exception of the function's is raised here.

    Raises:
        OSError: so many processes are not to be had; then nothing has been yielded.
        ProcessDied: one of them has.
    """
    pids: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, pids)
        pipes: list[BinaryIO] = []
        for number in range(processes):
            pipes.append(stack.enter_context(_fork(function, items[number::processes], pipes, pids)))
        for number in range(len(items)):
            yield _result(pipes[number % processes])


def _result(pipe: BinaryIO) -> Any:  # noqa: ANN401  # whatever was put in at the other end
    try:
        error, result = pickle.load(pipe)
    except (EOFError, pickle.UnpicklingError):
        raise ProcessDied from None
    if error is not None:
        raise error
    return result


def _fork(function: Callable[[A], R], items: Sequence[A], others: Sequence[BinaryIO], pids: list[int]) -> BinaryIO:
    """Start a process that works on the items one by one, and add it to `pids`; return the end of its pipe at which the
    results come out. The `others` are those ends of pipes from other processes."""
    reading, writing = os.pipe()
    # Ctrl-C is kept back: the new process must not know it, and this one not forget the new process for it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        pid = os.fork()
        if not pid:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                os.close(reading)
                for other in others:
                    os.close(other.fileno())  # or their writers would not notice that this process's parent has gone
                with contextlib.suppress(OSError), open(writing, "wb") as pipe:
                    _work(function, items, pipe)
            finally:
                os._exit(0)
        pids.append(pid)
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return open(reading, "rb")


def _work(function: Callable[[A], R], items: Sequence[A], pipe: BinaryIO) -> None:
    for item in items:
        try:
            done = None, function(item)
        except Exception as error:  # whatever it is, it is for the process that has asked
            pickle.dump((error, None), pipe)
            return
        pickle.dump(done, pipe)
        pipe.flush()


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it holds nothing: it only reads
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
