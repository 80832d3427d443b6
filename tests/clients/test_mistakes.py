"""A mistake of the relay's own with one client is that client's trouble, and the log does not say whom it was with."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import traceback
from pathlib import Path

import pytest

from relay.process.discreet import discreet
from tests.support.harness import (
    Relay,
    connect,
    free_port,
    handshake,
    met,
    new_side,
    new_token,
    read_to_end,
    wait_until,
)
from tests.support.mistaken_relay import mistakes
from tests.support.web import dial_web, read_to_close

MISTAKEN = "tests.support.mistaken_relay"


def tells_of_nobody(log: str, *clients: socket.socket) -> bool:
    """Whether a log with a traceback names neither the addresses of these clients nor a token."""
    body = log.partition("Traceback")[2]
    ports = [str(client.getsockname()[1]) for client in clients]
    return (
        bool(body)
        and "127.0.0.1" not in body
        and not any(port in body for port in ports)
        and not re.search(r"[0-9a-f]{16}", body)
    )


@pytest.mark.parametrize(
    "function",
    [
        "relay.clients.reception:Reception.accepted",
        "relay.clients.origins:Origins.let_in",
        "relay.clients.reception:Reception._hear_out",
        "relay.clients.places:Places.admits",
    ],
)
def test_a_mistake_with_one_newcomer_keeps_nobody_out_and_leaves_no_address(tmp_path: Path, function: str) -> None:
    with Relay(tmp_path, env=mistakes(function, calls=3), program=MISTAKEN) as relay, contextlib.ExitStack() as stack:
        relay.tracebacks_expected = True
        unlucky = [stack.enter_context(connect(relay.port)) for _ in range(3)]
        for client in unlucky:
            client.sendall(handshake(new_token(), new_side()))
        began = time.monotonic()
        for client in unlucky:
            with contextlib.suppress(ConnectionError):
                assert read_to_end(client) == b""
        met(relay.port, stack=stack)
        assert time.monotonic() - began < 5
        wait_until(lambda: relay.log_text().count("Traceback") == 3, what="three mistakes in the log")
        assert tells_of_nobody(relay.log_text(), *unlucky), relay.log_text()


def test_a_mistake_with_one_client_of_a_gateway_sends_that_one_away_and_the_next_one_is_carried(tmp_path: Path) -> None:
    port = free_port()
    wrong = mistakes("relay.clients.upstream:Upstream.in_turn")
    with Relay(tmp_path, recording=True) as relay, contextlib.ExitStack() as stack:
        options = ("--websocket", f"tcp:{port}:interface=127.0.0.1", "--upstream", f"127.0.0.1:{relay.port}")
        gateway = Relay(tmp_path, *options, port=port, name="gateway", env=wrong, program=MISTAKEN)
        stack.enter_context(gateway)
        gateway.tracebacks_expected = True
        unlucky, next_one = (stack.enter_context(dial_web(port)) for _ in range(2))
        unlucky.send(handshake(new_token(), new_side()))
        messages, told = read_to_close(unlucky)
        assert (messages, told and told.code) == ([], 1000)
        next_one.send(handshake(new_token(), new_side()))
        wait_until(lambda: relay.row("current")[1] == 1, what="it waits upstream")
        assert gateway.log_text().count("Traceback") == 1


def test_a_mistake_with_a_health_check_keeps_none_from_an_answer_and_leaves_no_address(tmp_path: Path) -> None:
    port = free_port()
    wrong = mistakes("gevent.server:StreamServer.do_handle", "gevent:Timeout.start")
    with Relay(tmp_path, "--health", f"{port}", env=wrong, program=MISTAKEN) as relay:
        relay.tracebacks_expected = True
        for answer in (b"", b"", b"HTTP/1.1 200"):
            with connect(port) as check:
                check.sendall(b"GET / HTTP/1.1\r\n\r\n")
                with contextlib.suppress(ConnectionError):
                    assert read_to_end(check)[:12] == answer
        wait_until(lambda: relay.log_text().count("Traceback") == 2, what="two mistakes in the log")
        assert tells_of_nobody(relay.log_text()), relay.log_text()


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "('192.0.2.7', 51825)",
        "2001:db8::7",
        "::ffff:192.0.2.7",
        "fe80::1%eth0",
        "b'\\xc0\\x00\\x02\\x07'",
        'b"abcd\'"',
        "'192.0.2.7' does not appear to be an IPv4 or IPv6 address",
        "5d" * 32,
        "123456ab" * 8,
        "'" + "5d" * 8 + "'",
    ],
)
def test_what_an_exception_says_of_an_address_or_a_token_is_not_told(text: str) -> None:
    try:
        raise KeyError(0) from ValueError(text)
    except KeyError:
        told = discreet(traceback.format_exc())
    assert "ValueError: " in told
    assert "KeyError: 0" in told
    said = told.partition("ValueError: ")[2].partition("\n")[0]
    assert said in ("…", "(…, …)", "…%eth0", "… does not appear to be an IPv4 or IPv6 address")


def test_what_an_exception_says_of_the_code_is_told() -> None:
    try:
        None.listen  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError:
        told = discreet(traceback.format_exc())
    assert told.rstrip().endswith("AttributeError: 'NoneType' object has no attribute 'listen'")
    assert "None.listen" in told
