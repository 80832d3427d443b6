"""Whether the ports of a relay are different ones."""

from __future__ import annotations

from itertools import combinations

from relay.clients.listening import resolve
from relay.mistakes import Mistake
from relay.options import Options


def check_ports(options: Options) -> None:
    """Raise Mistake where two endpoints are one port; one that serves both kinds of clients is none."""
    endpoints = [("--port" if options.upstream is None else "--websocket", options.port, options.interface)]
    for option, endpoint in (("--websocket", options.websocket), ("--health", options.health)):
        if endpoint is not None:
            endpoints.append((option, *endpoint))
    for (first, port, interface), (option, other, elsewhere) in combinations(endpoints, 2):
        if port != other or port == 0:
            continue
        address, another = (resolve(where, port)[1] for where in (interface, elsewhere))
        if address == another and option == "--websocket":
            continue
        if address == another or _all_of({address[0], another[0]}):
            raise Mistake(f"{option} {port}: {first} listens there already; choose another port")


def _all_of(hosts: set[str]) -> bool:
    """Whether one of these addresses to listen on stands for the others, too."""
    return "::" in hosts or ("0.0.0.0" in hosts and not any(":" in host for host in hosts))
