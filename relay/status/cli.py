"""The command line of `relay-status`."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relay import __version__
from relay.mistakes import Mistake
from relay.process.command_line import NotUnderstood, read_command_line
from relay.process.program import fail, fail_for_lack_of_memory, get_ready
from relay.process.signals import be_ready_for_signals, end_by_signal

USAGE = """relay-status, relay-gevent seen live: a page, numbers for Prometheus and for other programs.

Usage:
  relay-status [options] (--usage-db PATH)...

  --usage-db PATH   The file that the relay's --usage-db names; given several times, for relays on several machines,
                    all together. It is only read; it may be missing, and the relay may be running or not.
  --port PORT       TCP port; 0 picks a free one, and the log says which [default: 4080]
  --interface ADDR  Address to listen on. On loopback it answers only to who calls it localhost or by an address; on
                    others, to everybody [default: 127.0.0.1]
  --workers N       How many workers the relay should have; with fewer, /healthz complains. Without it, as many as it
                    had at a time in the last ten minutes.
  --help            Show this.
  --version         Show the version.

/ is the page, /metrics is for Prometheus, /status.json for other programs, and /healthz says 200, or 503 and why.
"""

LOG_FORMAT = "%(asctime)s relay-status[%(process)d] %(message)s"

logger = logging.getLogger("relay")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, understood."""

    databases: tuple[Path, ...]
    port: int
    interface: str
    workers: int | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run `relay-status` with the arguments `argv`; without them, as the program, with those of the process.

    Exit status: 0 after an orderly end, 2 after a mistake, told in one line on stderr.
    """
    try:
        if argv is None:
            be_ready_for_signals()
            get_ready()
        options = read_options(sys.argv[1:] if argv is None else argv)
        logging.basicConfig(format=LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO)
        _serve(options)
    except Mistake as mistake:
        fail("relay-status", mistake)
    except (MemoryError, ImportError, RuntimeError) as error:
        fail_for_lack_of_memory("relay-status", error)
    except KeyboardInterrupt:
        sys.exit(130)


def read_options(arguments: Sequence[str]) -> Options:
    """Understand the command line; prints and exits with status 0 for --help and --version.

    Raises Mistake.
    """
    try:
        given = read_command_line(USAGE, arguments, f"relay-status {__version__}")
    except NotUnderstood as refusal:
        complaint = str(refusal) or "give one --usage-db PATH or several, and the options of the help"
        raise Mistake(f"{complaint}; see relay-status --help") from None
    if importlib.util.find_spec("prometheus_client") is None:
        raise Mistake("it needs the package prometheus-client: pip install 'relay-gevent[status]'")
    if "" in given["--usage-db"]:
        raise Mistake("--usage-db: its value is empty; give a path")
    databases = [Path(path) for path in given["--usage-db"]]
    for number, path in enumerate(databases):
        if _real(path) in {_real(other) for other in databases[:number]}:
            raise Mistake(f"--usage-db {path}: it is given twice")
    return Options(
        tuple(databases),
        _whole("--port", given["--port"], 0, 65535),
        given["--interface"],
        None if given["--workers"] is None else _whole("--workers", given["--workers"], 1, 10_000),
    )


def _real(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except OSError:
        raise Mistake(f"--usage-db {path}: the folder in which this was started is gone; give a whole path") from None


def _whole(option: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise Mistake(f"{option} {text}: give a whole number from {least} to {most}")
    return int(text)


def _serve(options: Options) -> None:
    from gevent.event import Event

    from relay.status.routes import Application
    from relay.status.server import Server, listen
    from relay.status.view import Lookout

    listener = listen(options.interface, options.port)
    lookout = Lookout(options.databases, options.workers)
    host, port = listener.getsockname()[:2]
    only_own = ipaddress.ip_address(host).is_loopback
    server = Server(listener, Application(lambda plots: lookout.view(plots=plots), only_own=only_own))
    ended = Event()
    end_by_signal(ended.set)
    lookout.start()
    server.start()
    logger.info("the status page is at http://%s:%d/", f"[{host}]" if ":" in host else host, port)
    ended.wait()
    server.stop(timeout=0)
    lookout.close()
    logger.info("stopped")


if __name__ == "__main__":
    main()
