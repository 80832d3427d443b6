"""Whether the ports of a relay are different ones, at addresses that are some."""

from __future__ import annotations

from itertools import combinations

from relay.mistakes import Mistake
from relay.options import Options
from relay.process.addresses import resolve


def check_ports(options: Options) -> None:
    """Raise Mistake where two endpoints are one port, unless it serves both kinds of clients; or one is no address."""
    endpoints = [
        (option, port, resolve(interface, port, options.interface_named_by(option))[1])
        for option, port, interface in options.endpoints()
    ]
    for (first, port, address), (option, other, another) in combinations(endpoints, 2):
        if port != other or port == 0:
            continue
        if address == another and option == "--websocket":
            continue
        if address == another or _all_of({address[0], another[0]}):
            raise Mistake(f"{option} {port}: {first} listens there already; choose another port")


def _all_of(hosts: set[str]) -> bool:
    """Whether one of these addresses to listen on stands for the others, too."""
    return "::" in hosts or ("0.0.0.0" in hosts and not any(":" in host for host in hosts))
