"""The address to listen on, in every spelling."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from pathlib import Path

import pytest

from relay.clients.door import is_at, open_port
from relay.mistakes import Mistake
from relay.process.addresses import bind
from tests.support import namespaces
from tests.support.harness import Relay, connect, free_port, wait_until

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")

SPELLINGS = {
    "::": ["::", "::0", "0::", "0:0:0:0:0:0:0:0", "0000:0000:0000:0000:0000:0000:0000:0000", "0::0", "::0.0.0.0"],
    "::1": ["::1", "0::1", "0:0:0:0:0:0:0:1", "::0001", "::0.0.0.1"],
    "127.0.0.1": ["127.0.0.1", "127.1", "127.0.1", "0x7f.1", "2130706433", "::ffff:127.0.0.1", "::FFFF:7f00:1"],
    "0.0.0.0": ["0.0.0.0", "0", "0.0", "0x0", "::ffff:0.0.0.0", "::ffff:0:0"],
}
EACH = [(address, spelling) for address, spellings in SPELLINGS.items() for spelling in spellings]


def reaches(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


@needs_ipv6
@pytest.mark.parametrize(("address", "spelling"), EACH)
def test_every_spelling_of_an_address_is_that_address(address: str, spelling: str) -> None:
    with open_port(spelling, 0) as listener:
        host, port = listener.getsockname()[:2]
        assert host == address
        reached = {there for there in ("127.0.0.1", "::1") if reaches(there, port)}
        assert reached == {"::": {"127.0.0.1", "::1"}, "0.0.0.0": {"127.0.0.1"}}.get(address, {address})


@needs_ipv6
@pytest.mark.parametrize(("address", "spelling"), EACH)
def test_a_worker_recognizes_what_a_sibling_opened_by_another_spelling(address: str, spelling: str) -> None:
    with open_port(address, 0) as listener:
        port = listener.getsockname()[1]
        assert is_at(listener, spelling, port)
        assert is_at(listener, spelling, 0)
        assert not is_at(listener, spelling, port ^ 1)
        for other in SPELLINGS.keys() - {address}:
            assert not is_at(listener, other, port)


def test_a_machine_without_ipv6_listens_on_every_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    for spelling in SPELLINGS["::"]:
        with open_port(spelling, 0) as listener:
            host, port = listener.getsockname()
            assert host == "0.0.0.0"
            assert reaches("127.0.0.1", port)
            for other in SPELLINGS["::"]:
                assert is_at(listener, other, port)


def test_the_same_address_on_another_link_is_another_one() -> None:
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    host = namespaces.Host(f"rg{secrets.token_hex(4)}-links")
    links = ("one", "other")
    places: list[bool] = []

    def listen_on_the_first() -> socket.socket:
        listener = open_port(f"fe80::1%{links[0]}", 0)
        places.extend(is_at(listener, f"fe80::1%{link}", 0) for link in links)
        return listener

    try:
        host.create()
        namespaces.run_ip("-n", host.name, "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for link in links:
            namespaces.run_ip("-n", host.name, "link", "set", link, "up")
            namespaces.run_ip("-n", host.name, "address", "add", "fe80::1/64", "dev", link, "nodad")
        host.make_there(listen_on_the_first).close()
    finally:
        host.remove()
    assert places == [True, False]


@pytest.mark.parametrize("interface", ["", " ", "::%lo", "[::]", "::/0", "0.0.0.0/0", "localhost", "::g", "1.2.3.4.5"])
def test_what_is_no_address_is_a_mistake(interface: str) -> None:
    with pytest.raises(Mistake, match="--interface"):
        open_port(interface, 0)


@needs_ipv6
def test_a_relay_on_another_spelling_of_every_address_serves_both_families(tmp_path: Path) -> None:
    with Relay(tmp_path, interface="::0") as relay:
        for host in ("127.0.0.1", "::1"):
            connect(relay.port, host).close()
        assert f"listening on :: port {relay.port}" in relay.log_text()


@needs_ipv6
def test_workers_of_one_relay_may_spell_its_address_differently(tmp_path: Path) -> None:
    port = free_port()
    shared = ("--run-dir", str(tmp_path / "run"))
    with contextlib.ExitStack() as stack:
        for number, interface in enumerate(("::", "0:0:0:0:0:0:0:0", "::0")):
            folder = tmp_path / str(number)
            folder.mkdir()
            stack.enter_context(Relay(folder, *shared, interface=interface, port=port))
        connect(port, "127.0.0.1").close()


@needs_ipv6
@pytest.mark.parametrize("endpoint", ["tcp:{}:interface=\\:\\:", "tcp:{}:interface=0\\:\\:0"])
def test_the_port_for_websocket_may_be_the_same_one_in_another_spelling(tmp_path: Path, endpoint: str) -> None:
    port = free_port()
    with Relay(tmp_path, "--websocket", endpoint.format(port), interface="::0", port=port) as relay:
        wait_until(lambda: f"WebSocket on :: port {port}\n" in relay.log_text())


@needs_ipv6
def test_the_port_for_websocket_may_have_the_same_number_at_another_address(tmp_path: Path) -> None:
    port = free_port()
    with Relay(tmp_path, "--websocket", rf"tcp:{port}:interface=\:\:1", port=port) as relay:
        wait_until(lambda: f"WebSocket on ::1 port {port}\n" in relay.log_text())
        assert f"listening on 127.0.0.1 port {port}\n" in relay.log_text()


def test_a_system_that_lets_nobody_ask_whether_an_address_is_of_many_lets_the_relay_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Asking(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("relay.process.addresses.socket.socket", Asking)
    with Asking() as listener:
        bind(listener, ("127.0.0.1", 0))
        with pytest.raises(OSError, match="Cannot assign"):
            bind(listener, ("224.0.0.1", 0))
    monkeypatch.undo()
    with socket.socket() as another, pytest.raises(OSError, match="Cannot assign"):
        bind(another, ("255.255.255.255", 0))
