"""In a rootless container clients may all come from its own address: then the log says so, once, at no exact time."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from pathlib import Path

import pytest

from relay.clients.places import in_user_namespace
from tests.support import namespaces
from tests.support.harness import Relay, connect, wait_until

SAID = "came from this container's own address"
IN_A_CONTAINER = ("unshare", "--user", "--map-root-user")


@pytest.fixture
def host(stack: contextlib.ExitStack) -> namespaces.Host:
    """A host with the address that slirp4netns gives a container."""
    if reason := namespaces.not_allowed():
        pytest.skip(reason)
    if shutil.which("unshare") is None:
        pytest.skip("a user namespace is made with unshare(1): apt-get install util-linux")
    host = namespaces.Host(f"rg{secrets.token_hex(4)}-rootless")
    stack.callback(host.remove)
    host.create()
    namespaces.run_ip("-n", host.name, "address", "add", "10.0.2.100/32", "dev", "lo")
    return host


def relay_with_own_clients(
    host: namespaces.Host, folder: Path, stack: contextlib.ExitStack, *options: str, rootless: bool
) -> Relay:
    inside = [*host.inside, *(IN_A_CONTAINER if rootless else ())]
    relay = stack.enter_context(Relay(folder, *options, interface="0.0.0.0", inside=inside))
    for address in ("127.0.0.1", "10.0.2.100", "10.0.2.100"):
        stack.enter_context(host.make_there(lambda address=address: connect(relay.port, address)))  # type: ignore[misc]
        assert (SAID in relay.log_text()) <= (address != "127.0.0.1")
    return relay


def test_the_log_says_once_that_a_client_came_from_the_containers_own_address(
    host: namespaces.Host, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    relay = relay_with_own_clients(host, tmp_path, stack, rootless=True)
    wait_until(lambda: SAID in relay.log_text(), what="the log says so")
    relay.stop()
    assert relay.log_text().count(SAID) == 1
    assert "(1 since" in relay.log_text()
    assert "10.0.2.100" not in relay.log_text()


def test_where_times_are_blurred_it_is_not_said_when_that_was(
    host: namespaces.Host, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    blurred = ("--blur-usage", "600", "--usage-db", str(tmp_path / "usage.sqlite"))
    relay = relay_with_own_clients(host, tmp_path, stack, *blurred, "--grace", "0", rootless=True)
    with pytest.raises(AssertionError):
        wait_until(lambda: SAID in relay.log_text(), 3)
    relay.stop()
    assert relay.log_text().count(SAID) == 1


def test_on_a_machine_of_its_own_nothing_is_said(
    host: namespaces.Host, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    if in_user_namespace():
        pytest.skip("this machine is a rootless container itself")
    relay = relay_with_own_clients(host, tmp_path, stack, rootless=False)
    relay.stop()
    assert SAID not in relay.log_text()
