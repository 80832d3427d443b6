"""Each row of the protocol's table over real sockets: what the client reads, how its stream ends, what is recorded.

Everything here runs against one worker and against two that are one relay, each with blur and without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.cli import read_options
from relay.clients import farewell, listening
from relay.clients.handshake import Refusal
from relay.options import Options
from relay.transfer import ending, pipes
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Service,
    Workers,
    connect,
    handshake,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    relay_of,
    reset,
    shake_hands,
    stopped,
)
from tests.support.kernel_view import relays_end, wait_until_read
from tests.support.ledger import Ended, Ledger

BLUR = 3600
JUNK = bytes(range(256)) * 400  # 100 kB
SETTINGS = [("one-worker", None), ("one-worker", BLUR), ("two-workers", None), ("two-workers", BLUR)]
SETTING_IDS = ["one-worker", "one-worker-blurred", "two-workers", "two-workers-blurred"]


def running(setting: tuple[str, int | None], folder: Path, *options: str) -> Relay | Workers:
    """A recording relay: one worker or two, blurred or not."""
    shape, blur = setting
    if blur is not None:
        options += ("--blur-usage", str(blur))
    return relay_of(shape, folder, *options)


@pytest.fixture(scope="module", params=SETTINGS, ids=SETTING_IDS)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, int | None]]:
    """One relay of each setting for all tests here that leave it as they found it."""
    with running(request.param, tmp_path_factory.mktemp("protocol")) as service:
        yield service, request.param[1]


@pytest.fixture
def ledger(shared: tuple[Service, int | None]) -> Ledger:
    """What is recorded from here on."""
    return Ledger(*shared)


@pytest.fixture
def call(shared: tuple[Service, int | None]) -> Iterator[Callable[..., socket.socket]]:
    """Connect to the relay and say something; what is still open is closed at the end."""
    with contextlib.ExitStack() as stack:

        def connected(said: bytes = b"") -> socket.socket:
            client = stack.enter_context(connect(shared[0].port))
            if said:
                client.sendall(said)
            return client

        yield connected


Call = Callable[..., socket.socket]


def wait_until_waiting(ledger: Ledger, *clients: socket.socket) -> None:
    """Return when the relay has read the whole handshakes of `clients`, and so lets them wait."""
    for client in clients:
        wait_until_read(ledger.service, client)


def matched(call: Call) -> tuple[socket.socket, socket.socket]:
    """Two sides of one transfer that have read their `ok`."""
    first, second = call(), call()
    shake_hands(first, second)
    return first, second


# Both sides gave a good handshake: `ok`, the partner's bytes, happy.


@pytest.mark.parametrize(
    "sides", [("1" * 16, "2" * 16), ("a" * 16, None), (None, "b" * 16), (None, None)], ids=lambda sides: ""
)
def test_two_that_match_get_ok_and_each_others_bytes(
    ledger: Ledger, call: Call, sides: tuple[str | None, str | None]
) -> None:
    token = new_token()
    first = call(handshake(token, sides[0]))
    wait_until_waiting(ledger, first)
    second = call(handshake(token, sides[1]))
    assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
    first.sendall(b"hello")
    assert read_exactly(second, 5) == b"hello"
    second.sendall(b"goodbye")
    assert read_exactly(first, 7) == b"goodbye"
    first.close()
    assert read_to_end(second) == b""
    second.close()
    ledger.expect(Ended("happy", 12, blurred=10_000))


def test_a_pair_that_moves_nothing_is_happy(ledger: Ledger, call: Call) -> None:
    first, second = matched(call)
    second.close()
    assert read_to_end(first) == b""
    first.close()
    ledger.expect(Ended("happy", 0, blurred=0))


def test_the_bytes_of_both_directions_are_counted(ledger: Ledger, call: Call) -> None:
    first, second = matched(call)
    sent = os.urandom(1_234_567)
    first.sendall(sent)
    assert hashlib.sha256(read_exactly(second, len(sent))).digest() == hashlib.sha256(sent).digest()
    second.sendall(b"received")
    assert read_exactly(first, 8) == b"received"
    first.close()
    assert read_to_end(second) == b""
    second.close()
    ledger.expect(Ended("happy", 1_234_575, blurred=2_000_000))


def test_a_pair_that_ends_with_a_reset_is_happy(ledger: Ledger, call: Call) -> None:
    first, second = matched(call)
    first.sendall(b"hello")
    assert read_exactly(second, 5) == b"hello"
    reset(first)
    with contextlib.suppress(ConnectionResetError):
        assert read_to_end(second, seconds=5) == b""
    ledger.expect(Ended("happy", 5, blurred=10_000))


def test_current_tells_of_those_who_wait_and_of_pairs(ledger: Ledger, call: Call) -> None:
    token = new_token()
    first = call(handshake(token, new_side()))
    ledger.wait_for_current(connected=0, waiting=1)
    second = call(handshake(token, new_side()))
    ledger.wait_for_current(connected=1, waiting=0)
    first.close()
    assert read_to_end(second) == b"ok\n"
    second.close()
    ledger.expect(Ended("happy"))


def test_current_tells_of_a_pair_made_right_after_another_was_over(ledger: Ledger, call: Call) -> None:
    first, second = matched(call)
    ledger.wait_for_current(connected=1, waiting=0)
    first.close()
    second.close()
    ledger.wait_for_one_more()
    first, second = matched(call)
    ledger.wait_for_current(connected=1, waiting=0)
    first.close()
    second.close()
    ledger.expect(Ended("happy"), Ended("happy"))


def test_each_of_many_pairs_is_recorded(ledger: Ledger, call: Call) -> None:
    pairs = [matched(call) for _ in range(20)]
    for number, (first, second) in enumerate(pairs):
        first.sendall(bytes([number]))
        assert read_exactly(second, 1) == bytes([number])
        first.close()
        assert read_to_end(second) == b""
        second.close()
    ledger.expect(*[Ended("happy", 1, blurred=10_000)] * 20)


# A good handshake, and then nobody: end of stream, lonely.


def test_a_client_that_leaves_before_its_partner_came_is_lonely(ledger: Ledger, call: Call) -> None:
    leaving, half_closing, resetting = (call(handshake(new_token(), new_side())) for _ in range(3))
    wait_until_waiting(ledger, leaving, half_closing, resetting)
    leaving.close()
    half_closing.shutdown(socket.SHUT_WR)
    reset(resetting)
    assert read_to_end(half_closing) == b""
    ledger.expect(*[Ended("lonely")] * 3)


def test_a_client_that_has_left_is_not_matched_any_more(ledger: Ledger, call: Call) -> None:
    token = new_token()
    gone = call(handshake(token, new_side()))
    wait_until_waiting(ledger, gone)
    gone.close()
    first = call(handshake(token, new_side()))
    wait_until_waiting(ledger, first)
    second = call(handshake(token))
    assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
    first.close()
    assert read_to_end(second) == b""
    second.close()
    ledger.expect(Ended("lonely"), Ended("happy"))


@pytest.mark.parametrize("setting", SETTINGS, ids=SETTING_IDS)
def test_whoever_takes_too_long_is_sent_away(tmp_path: Path, setting: tuple[str, int | None]) -> None:
    with running(setting, tmp_path, "--handshake-timeout", "1.5", "--wait-timeout", "2.5") as service:
        ledger = Ledger(service, setting[1])
        began = time.monotonic()
        with connect(service.port) as waiting:
            waiting.sendall(handshake(new_token()))
            with connect(service.port) as silent, connect(service.port) as slow:
                slow.sendall(handshake(new_token())[:-1])
                assert read_to_end(silent) == b"bad handshake\n"
                assert read_to_end(slow) == b"bad handshake\n"
            assert time.monotonic() - began >= 1.5
            assert read_to_end(waiting) == b""
            assert 2.5 <= time.monotonic() - began < 8
        ledger.expect(Ended("errory"), Ended("lonely"))  # who never said a byte is a health check


@pytest.mark.parametrize("setting", SETTINGS, ids=SETTING_IDS)
def test_when_the_relay_stops_those_who_wait_read_end_of_stream(
    tmp_path: Path, setting: tuple[str, int | None]
) -> None:
    with running(setting, tmp_path) as service:
        ledger = Ledger(service, setting[1])
        with connect(service.port) as waiting, connect(service.port) as spare, connect(service.port) as shaking:
            token, side = new_token(), new_side()
            waiting.sendall(handshake(token, side))
            spare.sendall(handshake(token, side))
            shaking.sendall(b"please")
            wait_until_waiting(ledger, waiting, spare, shaking)
            ledger.wait_for_current(connected=0, waiting=2)
            with ThreadPoolExecutor(1) as aside:
                stopped = aside.submit(service.stop)
                assert read_to_end(waiting) == read_to_end(spare) == b""
                assert read_to_end(shaking) == b"bad handshake\n"
                for client in (waiting, spare, shaking):
                    client.close()
                assert stopped.result() == 0
        ledger.expect(Ended("lonely"), Ended("lonely"), Ended("errory"))


@pytest.mark.parametrize("how", ["leaves", "speaks"])
@pytest.mark.parametrize("before", [False, True], ids=["right-after", "right-before"])
def test_one_that_leaves_or_speaks_as_its_partners_handshake_comes_is_not_matched(
    ledger: Ledger, call: Call, how: str, before: bool
) -> None:
    token = new_token()
    going = call(handshake(token, new_side()))
    staying = call(handshake(token, new_side())[:-1])
    wait_until_read(ledger.service, going)
    wait_until_read(ledger.service, staying)
    with stopped(*ledger.service.living()):  # so that the relay finds both at once
        if not before:
            staying.sendall(b"\n")
        if how == "leaves":
            going.shutdown(socket.SHUT_WR)
        else:
            going.sendall(b"hello?")
        if before:
            staying.sendall(b"\n")
    assert read_to_end(going) == (b"" if how == "leaves" else b"impatient\n")
    going.close()
    partner = call(handshake(token))
    assert read_exactly(partner, 3) == read_exactly(staying, 3) == b"ok\n"
    partner.close()
    assert read_to_end(staying) == b""
    staying.close()
    ledger.expect(Ended("lonely" if how == "leaves" else "errory"), Ended("happy"))


def test_a_handshake_that_comes_while_the_relay_stands_still_is_not_too_late(tmp_path: Path) -> None:
    with Relay(tmp_path, "--handshake-timeout", "1.5", recording=True) as relay:
        ledger = Ledger(relay)
        token = new_token()
        with connect(relay.port) as first, connect(relay.port) as second, connect(relay.port) as slow:
            for client in (first, second, slow):
                client.sendall(handshake(token, new_side())[:-1])
                wait_until_read(ledger.service, client)
            with stopped(relay):
                first.sendall(b"\n")
                second.sendall(b"\n")
                time.sleep(3)
            assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
            assert read_to_end(slow) == b"bad handshake\n"
        ledger.expect(Ended("happy"), Ended("errory"))


# Spares: several connections of one side.


def test_equal_sides_do_not_match_and_the_one_that_came_last_is_matched(ledger: Ledger, call: Call) -> None:
    token, side = new_token(), new_side()
    spares = []
    for _ in range(4):
        spares.append(call(handshake(token, side)))
        wait_until_waiting(ledger, spares[-1])
    ledger.wait_for_current(connected=0, waiting=4)
    other = call(handshake(token, new_side()))
    assert read_exactly(other, 3) == b"ok\n"
    *others, last = spares
    assert read_exactly(last, 3) == b"ok\n"
    for spare in others:
        assert read_to_end(spare) == b""
        spare.close()
    other.sendall(b"for the last")
    assert read_exactly(last, 12) == b"for the last"
    other.close()
    assert read_to_end(last) == b""
    last.close()
    ledger.expect(Ended("happy", 12, blurred=10_000), *[Ended("lonely")] * 3)


def test_a_spare_that_comes_after_the_match_waits_and_ends_lonely(ledger: Ledger, call: Call) -> None:
    token, side = new_token(), new_side()
    first = call(handshake(token, side))
    second = call(handshake(token, new_side()))
    assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
    late = call(handshake(token, side))
    wait_until_waiting(ledger, late)
    late.shutdown(socket.SHUT_WR)
    assert read_to_end(late) == b""
    first.close()
    assert read_to_end(second) == b""
    second.close()
    ledger.expect(Ended("happy"), Ended("lonely"))


def test_of_one_too_many_for_a_token_the_oldest_is_sent_away_and_the_others_wait_on(ledger: Ledger, call: Call) -> None:
    token, side = new_token(), new_side()
    crowd = [call(handshake(token, side)) for _ in range(Options().max_waiting_per_token)]
    wait_until_waiting(ledger, *crowd)
    ledger.wait_for_current(connected=0, waiting=len(crowd))
    newest = call(handshake(token, side))
    assert read_to_end(crowd[0]) == b""
    other = call(handshake(token))
    assert read_exactly(other, 3) == b"ok\n"
    other.close()
    assert read_to_end(newest) == b"ok\n"
    newest.close()
    assert [read_to_end(client) for client in crowd[1:]] == [b""] * (len(crowd) - 1)
    for client in crowd:
        client.close()
    ledger.expect(Ended("happy"), *[Ended("lonely")] * len(crowd))


# Bytes that can no longer become a handshake.


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"please relay " + b"0" * 63 + b"\n",
        b"please relay " + b"0" * 65,
        b"please relay " + b"0" * 64 + b" for side " + b"0" * 17,
        b"please relay " + b"0" * 64 + b"\r\n",
        b"Please relay " + b"0" * 64 + b"\n",
        b"please relay " + b"g" * 64 + b"\n",
        JUNK,
        handshake("0" * 64)[:-1] + JUNK,
    ],
    ids=[
        "newline",
        "http",
        "tls",
        "short-token",
        "long-token",
        "long-side",
        "crlf",
        "capital",
        "digit",
        "junk",
        "more",
    ],
)
def test_what_cannot_become_a_handshake_is_refused(ledger: Ledger, call: Call, said: bytes) -> None:
    client = call(said)
    assert read_to_end(client) == b"bad handshake\n"
    client.close()
    ledger.expect(Ended("errory"))


def test_a_refusal_arrives_though_the_client_goes_on_talking(ledger: Ledger, call: Call) -> None:
    client = call(JUNK)
    wait_until_read(ledger.service, client)
    client.sendall(JUNK)
    client.sendall(JUNK)
    wait_until_read(ledger.service, client)
    assert read_to_end(client) == b"bad handshake\n"
    client.close()
    ledger.expect(Ended("errory"))


# The client left before its handshake was whole.


@pytest.mark.parametrize("begun", [b"", b"please relay ", handshake("0" * 64)[:-1]], ids=["nothing", "begun", "nearly"])
def test_a_client_that_ends_its_stream_before_its_handshake_is_whole_is_refused(
    ledger: Ledger, call: Call, begun: bytes
) -> None:
    client = call(begun)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == b"bad handshake\n"
    client.close()
    ledger.expect(*[Ended("errory")] * bool(begun))  # without a byte, from this machine, it is a health check


@pytest.mark.parametrize("begun", [b"", b"please relay "], ids=["nothing", "begun"])
def test_a_client_that_is_gone_before_its_handshake_is_whole_is_recorded(
    ledger: Ledger, call: Call, begun: bytes
) -> None:
    closing, resetting = call(begun), call(begun)
    wait_until_read(ledger.service, resetting)
    closing.close()
    reset(resetting)
    ledger.expect(*[Ended("errory")] * (2 if begun else 0))


# Anything between handshake and `ok`.


@pytest.mark.parametrize("more", [b"x", b"\n", b"ok\n", JUNK], ids=["a-byte", "newline", "ok", "junk"])
@pytest.mark.parametrize("side", [None, "5" * 16], ids=["without-side", "with-side"])
def test_speaking_in_the_packet_of_the_handshake_is_impatient(
    ledger: Ledger, call: Call, side: str | None, more: bytes
) -> None:
    client = call(handshake(new_token(), side) + more)
    assert read_to_end(client) == b"impatient\n"
    client.close()
    ledger.expect(Ended("errory"))


@pytest.mark.parametrize("more", [b"x", JUNK], ids=["a-byte", "junk"])
def test_speaking_while_waiting_is_impatient(ledger: Ledger, call: Call, more: bytes) -> None:
    client = call(handshake(new_token(), new_side()))
    wait_until_waiting(ledger, client)
    client.sendall(more)
    assert read_to_end(client) == b"impatient\n"
    client.close()
    ledger.expect(Ended("errory"))


def test_an_impatient_client_is_not_matched(ledger: Ledger, call: Call) -> None:
    token = new_token()
    impatient = call(handshake(token, new_side()))
    wait_until_waiting(ledger, impatient)
    impatient.sendall(b"hurry up")
    partner = call(handshake(token, new_side()))
    assert read_to_end(impatient) == b"impatient\n"
    impatient.close()
    wait_until_waiting(ledger, partner)
    partner.shutdown(socket.SHUT_WR)
    assert read_to_end(partner) == b""
    partner.close()
    ledger.expect(Ended("errory"), Ended("lonely"))


# The port.


def test_ipv4_and_ipv6_clients_meet_on_one_port(tmp_path: Path) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with Relay(tmp_path, interface="::") as relay:
        token = new_token()
        with connect(relay.port, "127.0.0.1") as four, connect(relay.port, "::1") as six:
            four.sendall(handshake(token, new_side()))
            six.sendall(handshake(token, new_side()))
            assert read_exactly(four, 3) == read_exactly(six, 3) == b"ok\n"
            four.sendall(b"from four")
            assert read_exactly(six, 9) == b"from four"


def test_both_sides_have_nodelay_and_notice_a_dead_peer_within_minutes(ledger: Ledger, call: Call) -> None:
    tcp = socket.IPPROTO_TCP
    for client in matched(call):
        with relays_end(ledger.service.pids, client) as end:
            assert end.getsockopt(tcp, socket.TCP_NODELAY) == 1
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, probes, pause = (
                end.getsockopt(tcp, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT, socket.TCP_KEEPINTVL)
            )
            assert idle + probes * pause <= 300


def test_the_docs_name_the_times_and_limits_that_are_kept() -> None:
    text = " ".join((CHECKOUT / "docs" / "protocol.md").read_text().split())
    options = read_options([])
    for promise in [
        f"whole line | {options.handshake_timeout:g} s |",
        f"the partner's | {options.wait_timeout / 3600:g} h |",
        f"told to stop | {options.grace:g} s |",
        f"a transfer, silent | {ending.HALF_CLOSED_SECONDS:g} s |",
        f"nothing moves | {options.idle_timeout / 3600:g} h |",
        f"with one token | {options.max_waiting_per_token} |",
        f"sends nothing for {ending.HALF_CLOSED_SECONDS:g} seconds",
        f"reads up to {farewell.LINGER_BYTES >> 10} KiB more",
        f"closes after about {farewell.LINGER_SECONDS:g} seconds",
        f"at most {pipes.PIPE_BYTES >> 20} MiB in each direction",
        f"after {listening.KEEPALIVE_IDLE_SECONDS} seconds of silence",
        (
            f"{['four', 'five', 'six'][listening.KEEPALIVE_PROBES - 4]} probes, "
            f"{listening.KEEPALIVE_PROBE_SECONDS} seconds apart"
        ),
        f"nothing acknowledged for {['four', 'five', 'six'][int(ending.DEAD_SECONDS // 60) - 4]} minutes",
    ]:
        assert promise in text, promise
    for refusal in Refusal:
        assert f"`{refusal.value.decode().strip()}\\n`, end of stream" in text
