"""What the workers of one relay must have in common, or what they record and allow would be inexact, and a newcomer
could not be reached: pure but for the names of this process's namespaces and of the database's folder.

A newcomer compares what its siblings say with its own, and does not join a relay that differs. A term that either side
does not know is none: workers of other versions may have more, or fewer. Every option is a term, but those that are
named here as what may differ.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Final

from relay.clients.sources import canonical
from relay.options import Options
from relay.process.dataclass import asdict

NETWORK = "network namespace"
PROCESSES = "process namespace"
CLOCKS = "time namespace"
DATABASE_FOLDER = "folder of --usage-db"

_NAMESPACES = {NETWORK: "net", PROCESSES: "pid", CLOCKS: "time"}
"""What cannot be shared otherwise: listening sockets, process ids, and the monotonic clock, by which times travel."""


MAY_DIFFER: Final = {
    "port": "is compared where the listening socket is handed on",
    "interface": "as the port",
    "run_dir": "is the same directory, under whatever name",
    "congestion_control": "changes with a rolling restart",
    "health": "is the sibling's where that is the same, and opened where not; may change with a rolling restart",
    "ping_interval": "is noticed by nobody but proxies in between",
    "grace": "is how the worker itself stops",
    "handshake_timeout": "is the patience of the worker that a client is with, and may change with a rolling restart",
    "wait_timeout": "as the patience for a handshake",
    "idle_timeout": "as the patience for a handshake",
    "max_connections": "is each worker's own, and follows from its limit of file descriptors",
    "most_held": "as the most connections",
    "most_pipes": "as the most connections",
    "max_handshakes": "is each worker's own",
    "max_waiting": "is each worker's own, and follows from the most connections unless it is given",
    "max_waiting_per_token": "is each worker's own",
    "max_per_source": "is compared where it is given, with `bounds_loopback`",
    "max_new_per_source": "as the connections of a source",
    "log_path": "is each worker's own, as the descriptor is",
    "measure_paths": "counts more, and changes no record",
    "check": "is of no worker that runs",
    "own_interfaces": "is how the interfaces were given, and not which",
}
"""Options, by their names in `Options`, that are no terms, each with the reason."""

_NAMED: Final = {
    "log_fd": "--log-fd or --log-stdout",
    "bounds_loopback": "--max-per-source or --max-new-per-source",
}
"""What the operator knows an option as, if that is not its name in `Options`."""

_WRITTEN: Final[Mapping[str, Callable[[Options], object]]] = {
    "usage_db": lambda options: None if options.usage_db is None else os.path.realpath(options.usage_db),
    "log_fd": lambda options: None if options.log_fd is None else "given",
    "websocket": lambda options: None if options.websocket is None else _endpoint(*options.websocket),
    "bounds_loopback": lambda options: (
        f"{options.max_per_source} and {options.max_new_per_source}" if options.bounds_loopback else None
    ),
}
"""How the value of an option is written, if not as it is."""


def _endpoint(port: int | str, interface: str) -> str:
    """An endpoint in one spelling, whichever the operator has chosen."""
    address, *zone = interface.partition("%")
    return f"{canonical(address) or address}{''.join(zone)} port {port}"


def _in_one_spelling(name: str, term: str) -> str:
    """A term as this version writes it: workers of earlier ones, which are still there during an upgrade, tell some as
    the operator has spelled them."""
    if name == "--websocket" and " port " in term:
        interface, _, port = term.rpartition(" port ")
        return _endpoint(port, interface)
    return ",".join(map(str.strip, term.split(","))) if name == "--upstream" else term


def terms_of(options: Options) -> dict[str, str]:
    """The terms of this worker; for an option its value as an operator would write it, “none” without.

    Of the database they say where it is now: a worker that runs follows its path, as when its folder has moved to
    another disk, with a link in its place.
    """
    terms = {
        _NAMED.get(name) or "--" + name.replace("_", "-"): _write(name, options)
        for name in asdict(options)
        if name not in MAY_DIFFER
    }
    for name, kind in _NAMESPACES.items():
        try:
            status = os.stat(f"/proc/self/ns/{kind}")
        except OSError:
            continue  # no /proc: not known
        terms[name] = f"{status.st_dev}:{status.st_ino}"
    if options.usage_db is not None:
        with contextlib.suppress(OSError):  # it is not there: the database says so
            status = os.stat(os.path.dirname(os.path.realpath(options.usage_db)))
            terms[DATABASE_FOLDER] = f"{status.st_dev}:{status.st_ino}"
    return terms


def _write(name: str, options: Options) -> str:
    value = _WRITTEN[name](options) if name in _WRITTEN else getattr(options, name)
    if value is True:
        return "given"
    return "none" if value is None or value is False else str(value)


def _same_database(own: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether two names are of one file: in the same folder, whatever way leads there, it has the same name."""
    folders = own.get(DATABASE_FOLDER), others.get(DATABASE_FOLDER)
    if None in folders or folders[0] != folders[1]:
        return False
    return os.path.basename(own["--usage-db"]) == os.path.basename(others["--usage-db"])


def disagreement(own: Mapping[str, str], others: Mapping[str, str]) -> str | None:
    """What keeps a worker with terms of its `own` out of a relay with those of the `others`: a line for the operator,
    without the name of the run directory; None if nothing does."""
    for name, value in own.items():
        other = _in_one_spelling(name, others.get(name, value))
        if other == value or (name == "--usage-db" and _same_database(own, others)):
            continue
        if name in _NAMESPACES:
            return (
                f"its relay runs in another {name}, as in another container; "
                "give each container a run directory of its own, on no volume that they share"
            )
        if name == DATABASE_FOLDER:
            return (
                "its relay's --usage-db is another file of that name, as in another container; "
                "give each container a run directory of its own, or both the volume on which the database is"
            )
        return (
            f"its relay has {name} {other}, not {value}; start this worker with the same, "
            "or stop all workers to change it"
        )
    return None
