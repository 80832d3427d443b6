"""Hosts of one's own: network namespaces in which a direct connection between two clients is impossible.

    relay host ---- client A          each line is one veth with a network of its own,
         \\--------- client B          and the relay's host forwards nothing

Needs root and a kernel that allows it; `allowed()` says why not, for a test to skip with. Everything that is made here
(namespaces, veths, `/etc/netns/NAME/`) has names that no other run uses, and is removed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NETNS_FILES = Path("/etc/netns")  # `ip netns exec NAME` mounts the files in NAME/ over those of /etc, see ip-netns(8)
CLONE_NEWNET = 0x40000000  # <sched.h>


def run_ip(*arguments: str) -> None:
    """Run ip(8); AssertionError with what it said when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def not_allowed() -> str:
    """Return why network namespaces cannot be used here, or an empty string when they can."""
    if shutil.which("ip") is None:
        return "network namespaces need ip(8): apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces with veths between them need root"
    name = f"rg{secrets.token_hex(4)}-try"
    try:
        run_ip("netns", "add", name)
    except AssertionError as refused:
        return f"network namespaces are not allowed here: {refused}"
    run_ip("netns", "delete", name)
    return ""


@dataclass
class Host:
    """One network namespace.

    Attributes:
        name: its name, as ip(8) knows it.
        names: what /etc/hosts says in it, besides localhost.
    """

    name: str
    names: dict[str, str] = field(default_factory=dict)

    @property
    def inside(self) -> list[str]:
        """What to put before a command so that it runs on this host."""
        return ["ip", "netns", "exec", self.name]

    def make_there(self, make: Callable[[], T]) -> T:
        """Make a socket, or a process, on this host: it belongs to the namespace of the thread that makes it, and may
        be used here.

        Raises what `make` raises.
        """
        made: list[T] = []
        failed: list[Exception] = []

        def go_and_make() -> None:
            with Path(f"/run/netns/{self.name}").open() as namespace:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                made.append(make())
            except Exception as error:  # whatever it is, it is for the caller
                failed.append(error)

        thread = threading.Thread(target=go_and_make)
        thread.start()
        thread.join()
        for error in failed:
            raise error
        return made[0]

    def create(self) -> None:
        """Make the namespace, with loopback up, nothing forwarded, and no name server."""
        files = NETNS_FILES / self.name
        while not files.exists():
            with contextlib.suppress(FileNotFoundError):  # another test has just removed the folder above
                files.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{address} {name}" for name, address in self.names.items())]
        (files / "hosts").write_text("\n".join(lines) + "\n")
        (files / "resolv.conf").write_text("# no name server: nothing outside is asked\n")
        run_ip("netns", "add", self.name)
        run_ip("-n", self.name, "link", "set", "lo", "up")
        # A new namespace may inherit the first one's setting.
        forwarding = ["sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_forward"]
        subprocess.run([*self.inside, *forwarding], timeout=20, check=True)

    def remove(self) -> None:
        """Undo `create`; what runs on the host must have ended."""
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, timeout=20, check=False)
        shutil.rmtree(NETNS_FILES / self.name, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds other namespaces' files
            NETNS_FILES.rmdir()


@dataclass(frozen=True)
class Network:
    """The relay's host, two clients' hosts, and their addresses; the relay's is the same for both clients."""

    relay: Host
    clients: tuple[Host, Host]
    relay_address: str
    client_addresses: tuple[str, str]


@contextlib.contextmanager
def three_hosts(relay_name: str) -> Iterator[Network]:
    """Make the network drawn above; on the clients, `relay_name` is a host name of the relay. Remove it at the end."""
    prefix = f"rg{secrets.token_hex(4)}"
    # TEST-NET-1 to -3 (RFC 5737): nobody's addresses, so nothing real can be reached by mistake.
    relay_address, networks = "192.0.2.1", ("198.51.100", "203.0.113")
    relay = Host(f"{prefix}-relay")
    clients = (Host(f"{prefix}-a", {relay_name: relay_address}), Host(f"{prefix}-b", {relay_name: relay_address}))
    with contextlib.ExitStack() as stack:
        for host in (relay, *clients):
            stack.callback(host.remove)
            host.create()
        run_ip("-n", relay.name, "address", "add", f"{relay_address}/32", "dev", "lo")
        for number, (client, network) in enumerate(zip(clients, networks, strict=True)):
            veth = f"client{number}"
            run_ip("-n", relay.name, "link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", client.name)
            run_ip("-n", relay.name, "address", "add", f"{network}.1/24", "dev", veth)
            run_ip("-n", client.name, "address", "add", f"{network}.2/24", "dev", "eth0")
            run_ip("-n", relay.name, "link", "set", veth, "up")
            run_ip("-n", client.name, "link", "set", "eth0", "up")
            run_ip("-n", client.name, "route", "add", f"{relay_address}/32", "via", f"{network}.1")
        yield Network(relay, clients, relay_address, (f"{networks[0]}.2", f"{networks[1]}.2"))


class NotAllowed(Exception):
    """This machine does not let the test make what it needs; the message says what."""


@contextlib.contextmanager
def machine_without_network(folder: Path, names: dict[str, str]) -> Iterator[list[str]]:
    """Make a machine that has only its loopback, and yield what to put before a command so that it runs there.

    An ordinary user may do this where the kernel allows user namespaces to all.

    Args:
        folder: takes the files that stand in for those of /etc.
        names: host name to address, for its /etc/hosts.

    Raises:
        NotAllowed: when the kernel, or a missing program, refuses.
    """
    hosts = folder / "hosts"
    hosts.write_text(
        "\n".join(["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]) + "\n"
    )
    as_root = os.geteuid() == 0
    missing = [program for program in ("unshare", "nsenter", "ip") if shutil.which(program) is None]
    if missing:
        raise NotAllowed(f"apt-get install util-linux iproute2 (there is no {missing[0]})")
    unshare = ["unshare", "--net", "--mount", *([] if as_root else ["--user", "--map-root-user"])]
    prepare = 'ip link set lo up && mount --bind "$0" /etc/hosts && echo ready && exec cat'
    # `cat` ends when the test closes its stdin, or dies; the namespaces go with the last process in them.
    with subprocess.Popen(
        [*unshare, "sh", "-c", prepare, str(hosts)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        said = holder.stdout.readline().strip()
        if said != "ready":
            raise NotAllowed(f"a network namespace of its own is not allowed here: {said}")
        user = "" if as_root else "--user --preserve-credentials"
        # A process that enters has to find its folder again, there.
        enter = (
            f"""exec nsenter --target {holder.pid} --net --mount {user} sh -c 'cd "$0" && exec "$@"' "$(pwd)" "$@" """
        )
        try:
            yield ["sh", "-c", enter, "sh"]
        finally:
            holder.terminate()
