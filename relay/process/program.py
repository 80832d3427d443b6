"""What every program of this distribution does around its own work, whatever it was started with.

The process may have been started for somebody else's purposes: without standard streams, with variables for other
programs, with warnings that are errors, without docstrings (PYTHONOPTIMIZE=2: so a usage is a constant and no
docstring). A program begins with `get_ready`, reads its command line (`command_line`), prints with `say`, and ends with
`fail` when the operator has made a mistake.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import sys
import warnings
from typing import NoReturn

from relay.mistakes import Mistake
from relay.process.memory import lack_behind

STANDARD_FDS = (0, 1, 2)


_FOREIGN = ("GEVENT", "PURE_PYTHON", "WEBSOCKETS_")
"""How the names of variables begin that make other libraries of those that the relay was built on and tried with:
another event loop or a backend that is not epoll, C replaced by Python, a thread that watches, other limits of headers.
Some values end the start, and whoever set one did not mean the relay."""


def get_ready() -> frozenset[int]:
    """Make this process fit for work; to be called before anything is opened.

    Returns those of the descriptors 0, 1 and 2 that were closed, so that nobody can have meant anything by them.

    Raises:
        Mistake: there is no descriptor to be had.
    """
    closed = _open_standard_fds()
    _open_standard_streams()
    _leave_no_core()
    # In development mode the warnings are wanted, but even then none ends a program (PYTHONWARNINGS=error).
    warnings.simplefilter("default" if sys.flags.dev_mode else "ignore")
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    return closed


def _open_standard_fds() -> frozenset[int]:
    """Put something at each of the descriptors 0, 1 and 2 that is closed. Otherwise a socket or the database would get
    the number, and what is meant for stderr would be written there."""
    closed = frozenset(fd for fd in STANDARD_FDS if not _is_open(fd))
    for _ in closed:
        _open_nothing()  # at the lowest number that is free
    return closed


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _open_nothing() -> int:
    """A descriptor that nothing comes out of and that keeps nothing."""
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:
        pass
    try:
        return os.open(__file__, os.O_PATH)  # no /dev here; reading and writing fail, as on a closed one
    except OSError as error:
        raise Mistake(f"no file descriptor is to be had: {os.strerror(error.errno or 0)}") from None


def _leave_no_core() -> None:
    """Have the kernel write no core file should this process ever die of a fault: all that is in memory would be on the
    disk, such as the tokens and addresses of clients.

    One byte, and not none: then a program that takes cores from the kernel, such as systemd-coredump, gets nothing
    either, though no other limit counts for those (fs/coredump.c). The hard limit stays, so that who looks for a defect
    may ask for a core of the running process (prlimit(1)).
    """
    with contextlib.suppress(OSError, ValueError):  # refused: what the operator's own limit allows is left
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (1 if hard == resource.RLIM_INFINITY else min(1, hard), hard))


def _open_standard_streams() -> None:
    """Have a stream for the log, and both in an encoding in which a line is a line.

    Where standard output was closed there is no `sys.stdout`, which `say` tells.
    """
    if sys.stderr is None:
        # Without a buffer: what could not be written would be tried again at the end of the process.
        unbuffered = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(unbuffered, "utf-8", "backslashreplace", write_through=True)
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if "\n".encode(stream.encoding) != b"\n":
            stream.reconfigure(encoding="utf-8")  # PYTHONIOENCODING=utf-16 was not meant for us
        stream.reconfigure(errors="backslashreplace")  # what the encoding has no sign for ends no program


def say(text: str) -> None:
    """Print `text` to standard output, all of it; when its reader is gone (`| head`), what is left is not missed.

    Raises:
        Mistake: it cannot be written, and why.
    """
    if sys.stdout is None:
        raise Mistake("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What the stream still holds would be tried once more at the end of the process, with a traceback.
        os.dup2(_open_nothing(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            raise Mistake(f"cannot write to standard output: {os.strerror(error.errno or 0)}") from None


def fail_for_lack_of_memory(program: str, error: Exception) -> NoReturn:
    """End with one line where a lack of memory, or of threads, is behind the error; raise it where it is another."""
    lack = lack_behind(error)
    if lack is None:
        raise error
    fail(program, Mistake(lack))


def fail(program: str, mistake: Exception) -> NoReturn:
    """Tell the operator what is wrong, in one line on stderr, and end with status 2."""
    # A value that the operator gave may hold anything, and this is one line.
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(mistake))
    with contextlib.suppress(OSError):  # a full disk under stderr: the status says it
        print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
