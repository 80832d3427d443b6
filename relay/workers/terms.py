"""What the workers of one relay must have in common, or what they record and allow would be inexact, and a newcomer
could not be reached: pure but for the names of this process's namespaces and of the database's folder.

A newcomer compares what its siblings say with its own, and does not join a relay that differs. A term that either side
does not know is none: workers of other versions may have more, or fewer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from relay.options import Options

NETWORK = "network namespace"
PROCESSES = "process namespace"
CLOCKS = "time namespace"
DATABASE_FOLDER = "folder of --usage-db"

_NAMESPACES = {NETWORK: "net", PROCESSES: "pid", CLOCKS: "time"}
"""What cannot be shared otherwise: listening sockets, process ids, and the monotonic clock, by which times travel."""


def terms_of(options: Options) -> dict[str, str]:
    """The terms of this worker; for an option its value as an operator would write it, “none” without."""
    usage_db = None if options.usage_db is None else os.path.realpath(options.usage_db)
    settings: dict[str, object] = {
        "--blur-usage": options.blur_usage,
        "--usage-db": usage_db,
        "--log-fd or --log-stdout": None if options.log_fd is None else "given",
        "--max-pair-bytes": options.max_pair_bytes,
        "--pair-rate": options.pair_rate,
        "--websocket": None if options.websocket is None else "{1} port {0}".format(*options.websocket),
        "--upstream": options.upstream,
        "--relay-rate": options.relay_rate,
        "--max-per-source or --max-new-per-source": (
            f"{options.max_per_source} and {options.max_new_per_source}" if options.bounds_loopback else None
        ),
        "--trusted-proxies": options.trusted_proxies,
        "--proxy-protocol": "given" if options.proxy_protocol else None,
    }
    terms = {name: "none" if value is None else str(value) for name, value in settings.items()}
    for name, kind in _NAMESPACES.items():
        try:
            status = os.stat(f"/proc/self/ns/{kind}")
        except OSError:
            continue  # no /proc: not known
        terms[name] = f"{status.st_dev}:{status.st_ino}"
    if usage_db is not None:
        with contextlib.suppress(OSError):  # it is not there: the database says so
            status = os.stat(os.path.dirname(usage_db))
            terms[DATABASE_FOLDER] = f"{status.st_dev}:{status.st_ino}"
    return terms


def disagreement(own: Mapping[str, str], others: Mapping[str, str]) -> str | None:
    """What keeps a worker with terms of its `own` out of a relay with those of the `others`: a line for the operator,
    without the name of the run directory; None if nothing does."""
    for name, value in own.items():
        other = others.get(name, value)
        if other == value:
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
