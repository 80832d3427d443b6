"""A network of hosts: two fronts with HAProxy as it is shipped, two relay machines, two hosts of clients.

    front1 .1   front2 .2   relay1 .11   relay2 .12   client1 .21   client2 .22     all in 192.0.2.0/24, on one switch

The two hosts of clients cannot reach each other. On the first, the public relay's name is that of the first front, on
the second that of the second. A relay machine has a relay of two workers and a gateway of two. Needs root and HAProxy.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.harness import CHECKOUT, Workers, query, running, wait_until
from tests.support.namespaces import Host, run_ip
from tests.support.page import Page
from tests.support.proxies import HAPROXY, make_certificate, state_of, tell
from tests.support.wormholes import PUBLIC_RELAY

NETWORK = "192.0.2"  # TEST-NET-1 (RFC 5737): nobody's
NUMBERS = {"front1": 1, "front2": 2, "relay1": 11, "relay2": 12, "client1": 21, "client2": 22}
FRONTS, RELAYS, CLIENTS = ("front1", "front2"), ("relay1", "relay2"), ("client1", "client2")
SERVERS = ("relay1", "relay2", "gateway1", "gateway2")
TCP_PORT, WEB_PORT, HEALTH_PORT, WEB_HEALTH_PORT, TLS_PORT = 4001, 4002, 4003, 4004, 443
UNBOUNDED = ("--max-per-source", "5000", "--max-new-per-source", "5000")


def address_of(name: str) -> str:
    """The address of a host."""
    return f"{NETWORK}.{NUMBERS[name]}"


@dataclass
class Machines:
    """Everything, running."""

    folder: Path
    hosts: dict[str, Host]
    relays: dict[str, Workers]
    gateways: dict[str, Workers]
    fronts: dict[str, subprocess.Popen[bytes]]

    def dial(self, client: str, front: str, port: int = TCP_PORT) -> socket.socket:
        """A connection from a host of clients to a front; every call on it fails after ten seconds."""
        there = (address_of(front), port)
        return self.hosts[client].make_there(lambda: socket.create_connection(there, 10))

    def dial_web(self, client: str, front: str) -> Page:
        """A WebSocket over TLS."""
        return Page.over_tls(self.dial(client, front, TLS_PORT), self.folder / "cert.pem")

    def tell(self, front: str, words: str) -> str:
        """Say something to a running HAProxy, and return its answer."""
        return tell(self.folder / f"{front}.sock", words)

    def tell_all(self, words: str) -> None:
        """The same to each that runs; there must be nothing to object."""
        for front, process in self.fronts.items():
            if process.poll() is None:
                assert self.tell(front, words).strip() == "", words

    def state(self, front: str, server: str) -> str:
        """What a front thinks of a server: UP, DRAIN, DOWN, …"""
        return state_of(self.folder / f"{front}.sock", server)

    def has_found_all(self, front: str) -> bool:
        """Whether a front takes all servers for well."""
        return all(self.state(front, server) == "UP" for server in SERVERS)

    def connected(self, relay: str) -> int:
        """How many transfers a machine has, as its database says."""
        rows = query(self.relays[relay].usage_db, "SELECT connected FROM current")
        return int(rows[0][0])

    def moods(self) -> dict[str, int]:
        """The rows of both databases together, by mood."""
        found: dict[str, int] = {}
        for relay in self.relays.values():
            for mood, count in query(relay.usage_db, "SELECT result, count(*) FROM usage GROUP BY 1"):
                found[mood] = found.get(mood, 0) + count
        return found

    def bytes_recorded(self) -> int:
        """Of the largest transfer that has a row."""
        sql = "SELECT coalesce(max(bytes), 0) FROM usage"
        return max(int(query(relay.usage_db, sql)[0][0]) for relay in self.relays.values())

    def relay_usage(self) -> str:
        """What relay-usage says of both together, as CSV."""
        databases = [str(relay.usage_db) for relay in self.relays.values()]
        command = [sys.executable, "-m", "relay.report.cli", "--csv", *databases]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=30).stdout


@contextlib.contextmanager
def network() -> Iterator[dict[str, Host]]:
    """The hosts, on a switch; removed at the end."""
    prefix = f"rg{secrets.token_hex(3)}"
    switch = Host(f"{prefix}-switch")
    hosts = {name: Host(f"{prefix}-{name}") for name in NUMBERS}
    for client, front in zip(CLIENTS, FRONTS, strict=True):
        hosts[client].names[PUBLIC_RELAY] = address_of(front)
    with contextlib.ExitStack() as stack:
        for host in (switch, *hosts.values()):
            stack.callback(host.remove)
            host.create()
        run_ip("-n", switch.name, "link", "add", "br0", "type", "bridge")
        run_ip("-n", switch.name, "link", "set", "br0", "up")
        for name, host in hosts.items():
            run_ip("-n", switch.name, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            run_ip("-n", switch.name, "link", "set", name, "master", "br0", "up")
            if name in CLIENTS:  # they reach everybody but each other
                run_ip("-n", switch.name, "link", "set", name, "type", "bridge_slave", "isolated", "on")
            run_ip("-n", host.name, "address", "add", f"{address_of(name)}/24", "dev", "eth0")
            run_ip("-n", host.name, "link", "set", "eth0", "up")
        yield hosts


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """Start everything, and return once both fronts have found both relays and both gateways."""
    make_certificate(folder)
    shipped = (CHECKOUT / "etc" / "haproxy" / "relay-gevent.cfg").read_text()
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network())
        whole = Machines(folder, hosts, {}, {}, {})
        fronts = ",".join(map(address_of, FRONTS))
        upstream = ",".join(f"{address_of(front)}:{TCP_PORT}" for front in FRONTS)
        for name in RELAYS:
            inside, address = hosts[name].inside, address_of(name)
            for kind, of_kind in (("relay", whole.relays), ("gateway", whole.gateways)):
                (folder / f"{name}-{kind}").mkdir()
                health = HEALTH_PORT if kind == "relay" else WEB_HEALTH_PORT
                options = ["--trusted-proxies", fronts, *UNBOUNDED, "--grace", "3", "--health", str(health)]
                options += (
                    ["--proxy-protocol"]
                    if kind == "relay"
                    else ["--websocket", f"tcp:{WEB_PORT}:interface={address}", "--upstream", upstream, "--send-proxy"]
                )
                workers = Workers(
                    folder / f"{name}-{kind}", *options, interface=address, inside=inside, recording=kind == "relay"
                )
                workers.port = TCP_PORT
                of_kind[name] = stack.enter_context(workers)
        for name in FRONTS:
            text = shipped
            for old, new in (
                ("maxconn 20000", "maxconn 4000"),
                ("sc0_conn_rate gt 500", "sc0_conn_rate gt 50000"),  # there are but two hosts of clients
                ("/run/haproxy/relay-gevent.sock", str(folder / f"{name}.sock")),
                ("/etc/haproxy/relay.example.org.pem", str(folder / "both.pem")),
            ):
                assert old in text, old
                text = text.replace(old, new)
            configuration = folder / f"{name}.cfg"
            configuration.write_text(text)
            command = [*hosts[name].inside, HAPROXY, "-db", "-L", name, "-f", str(configuration)]
            whole.fronts[name] = stack.enter_context(running(command, folder / f"{name}.log"))
        for front in FRONTS:
            log = folder / f"{front}.log"
            wait_until((folder / f"{front}.sock").exists, 20, f"{front} runs: {log.read_text()}")
            wait_until(partial(whole.has_found_all, front), 20, f"{front} has found everybody")
        yield whole
