"""The handshake: what is one, what can still become one, and what never will, to the byte.

Invariants of `read_handshake`, a pure function of all that a client has sent:

- every proper prefix of a good line needs more, and the line itself is a `Handshake`;
- at each place, a byte that no good line has there is refused at once, before anything follows it;
- what was refused as a bad handshake stays refused whatever follows;
- a good line with anything behind it is impatient.
"""

from __future__ import annotations

import contextlib
import socket
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.clients.handshake import LONGEST, Handshake, Refusal, read_handshake
from tests.support.harness import Relay, connect, handshake, new_side, new_token, read_exactly, read_to_end, wait_until
from tests.support.kernel_view import relays_end, unread, wait_until_read

HEX = string.hexdigits.encode()
TOKEN_END = len(b"please relay ") + 64

tokens = st.text(string.hexdigits, min_size=64, max_size=64)
sides = st.none() | st.text(string.hexdigits, min_size=16, max_size=16)
lines = st.builds(handshake, tokens, sides)

LINES = pytest.mark.parametrize(
    "line",
    [handshake("0123456789abcdefABCDEF" + "7" * 42), handshake("f" * 64, "0123456789abcDEF")],
    ids=["without-side", "with-side"],
)


def may_follow(begun: bytes) -> bytes:
    """The bytes that may come after `begun`, a proper prefix of a good line: the grammar once more, byte by byte."""
    for fixed, digits in ((b"please relay ", 64), (b" for side ", 16)):
        if len(begun) < len(fixed):
            return fixed[len(begun) : len(begun) + 1]
        begun = begun[len(fixed) :]
        if len(begun) < digits:
            return HEX
        begun = begun[digits:]
        if not begun and digits == 64:
            return b"\n "
    return b"\n"


@given(tokens, sides)
def test_a_good_line_is_a_handshake_with_its_token_and_side(token: str, side: str | None) -> None:
    verdict = read_handshake(handshake(token, side))
    assert verdict == Handshake(token.encode(), None if side is None else side.encode())


@given(lines)
def test_every_beginning_of_a_good_line_needs_more(line: bytes) -> None:
    assert [read_handshake(line[:count]) for count in range(len(line))] == [None] * len(line)


@LINES
def test_a_byte_out_of_place_is_refused_at_that_very_byte(line: bytes) -> None:
    for place in range(len(line)):
        begun = line[:place]
        allowed = may_follow(begun)
        assert line[place] in allowed
        for byte in range(256):
            verdict = read_handshake(begun + bytes([byte]))
            if byte not in allowed:
                assert verdict is Refusal.BAD_HANDSHAKE, (begun, byte)
            elif byte == ord("\n"):
                assert isinstance(verdict, Handshake), (begun, byte)
            else:
                assert verdict is None, (begun, byte)


def judged_byte_by_byte(sent: bytes) -> str:
    """What the grammar says of `sent`: the obvious model, one byte after another."""
    for place in range(len(sent)):
        if sent[place] not in may_follow(sent[:place]):
            return "bad"
        if sent[place] == ord("\n"):
            return "whole" if place + 1 == len(sent) else "impatient"
    return "more"


def judged_by_the_relay(sent: bytes) -> str:
    verdict = read_handshake(sent)
    if verdict is None:
        return "more"
    if isinstance(verdict, Handshake):
        return "whole"
    return "impatient" if verdict is Refusal.IMPATIENT else "bad"


@given(
    st.binary(max_size=2 * LONGEST)
    | st.builds(lambda line, at, rest: line[:at] + rest, lines, st.integers(0, LONGEST), st.binary(max_size=LONGEST))
)
def test_arbitrary_bytes_are_judged_as_the_grammar_says(sent: bytes) -> None:
    assert judged_by_the_relay(sent) == judged_byte_by_byte(sent)


@given(st.binary(max_size=LONGEST), st.binary(max_size=LONGEST))
def test_what_was_refused_stays_refused_whatever_follows(sent: bytes, more: bytes) -> None:
    if read_handshake(sent) is Refusal.BAD_HANDSHAKE:
        assert read_handshake(sent + more) is Refusal.BAD_HANDSHAKE


@given(lines, st.binary(min_size=1))
def test_anything_behind_the_line_is_impatient(line: bytes, more: bytes) -> None:
    assert read_handshake(line + more) is Refusal.IMPATIENT


@given(lines)
def test_no_line_is_longer_than_the_longest(line: bytes) -> None:
    assert len(line) <= LONGEST


# The same over real sockets.


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """One worker for all tests of this module."""
    folder: Path = tmp_path_factory.mktemp("handshake")
    with Relay(folder, recording=True) as started:
        yield started


@LINES
def test_every_split_of_a_handshake_in_two_works(relay: Relay, line: bytes) -> None:
    form = line[TOKEN_END:]
    with contextlib.ExitStack() as stack:
        halves: list[tuple[socket.socket, socket.socket, bytes]] = []
        for at in range(1, len(line)):
            whole = handshake(new_token())[:TOKEN_END] + form
            split, partner = (stack.enter_context(connect(relay.port)) for _ in range(2))
            split.sendall(whole[:at])
            partner.sendall(whole[:TOKEN_END] + b"\n")
            halves.append((split, partner, whole[at:]))
        for split, _, _ in halves:
            wait_until_read(relay, split)
        for split, _, rest in halves:
            split.sendall(rest)
        for split, partner, _ in halves:
            assert read_exactly(split, 3) == b"ok\n"
            assert read_exactly(partner, 3) == b"ok\n"


@LINES
def test_a_handshake_sent_one_byte_at_a_time_works(relay: Relay, line: bytes) -> None:
    whole = handshake(new_token())[:TOKEN_END] + line[TOKEN_END:]
    with connect(relay.port) as slow, connect(relay.port) as partner:
        partner.sendall(whole[:TOKEN_END] + b"\n")
        slow.sendall(whole[:1])
        with relays_end(relay.pids, slow) as end:
            for byte in whole[1:]:
                wait_until(lambda: unread(end) == 0, what="the relay reads one byte")
                slow.sendall(bytes([byte]))
        assert read_exactly(slow, 3) == b"ok\n"
        assert read_exactly(partner, 3) == b"ok\n"


@pytest.mark.parametrize("place", [0, 6, 12, 13, 45, 76, 77, 79, 86, 87, 102, 103])
def test_a_wrong_byte_is_answered_without_waiting_for_another(relay: Relay, place: int) -> None:
    line = handshake(new_token(), new_side())
    with connect(relay.port) as client:
        if place:
            client.sendall(line[:place])
            wait_until_read(relay, client)
        client.sendall(b"!")
        assert read_to_end(client) == b"bad handshake\n"


def test_a_wrong_byte_disturbs_nobody_else(relay: Relay) -> None:
    token = new_token()
    with connect(relay.port) as waiting, connect(relay.port) as wrong, connect(relay.port) as partner:
        waiting.sendall(handshake(token, new_side()))
        wrong.sendall(handshake(token, new_side())[:-1] + b" \n")
        assert read_to_end(wrong) == b"bad handshake\n"
        partner.sendall(handshake(token, new_side()))
        assert read_exactly(waiting, 3) == b"ok\n"
        assert read_exactly(partner, 3) == b"ok\n"
