"""The handshake line of a WebSocket client, however it is spread over frames and messages.

Invariants of `Line`:

- a line with its newline is read however it is split, except that a message which is exactly a line without its newline
  is one, so that what follows it is impatient;
- what it makes of a stream does not depend on how its bytes are split, nor on the process that hears them.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from relay.clients.frames import UNSUPPORTED, Close, FrameReader, FrameState
from relay.clients.handshake import LONGEST, Handshake, Refusal, read_handshake
from relay.clients.line import Line
from tests.support.client_frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, Sent, split, wire
from tests.support.harness import handshake

TOKEN = "0123456789abcdef" * 4
SIDE = "fedcba9876543210"
OLD = handshake(TOKEN)
NEW = handshake(TOKEN, SIDE)
GOOD = {OLD: Handshake(TOKEN.encode(), None), NEW: Handshake(TOKEN.encode(), SIDE.encode())}

LINES = pytest.mark.parametrize("line", [OLD, NEW], ids=["without-side", "with-side"])


def judge(chunks: Iterable[bytes], *, moves: bool = False) -> Handshake | Refusal | None:
    """What the relay makes of a client that sends these; `moves`: and is handed on before each of them."""
    line, frames = Line(), FrameReader()
    for chunk in chunks:
        if moves:
            line = Line(line.received, split=line.split)
            frames = FrameReader(FrameState.decode(frames.state.encode()))
        line.hear(frames, chunk)
        assert len(line.received) <= LONGEST + 1
    return read_handshake(line.received)


def in_messages(*payloads: bytes) -> bytes:
    return wire(Sent(BINARY, payload) for payload in payloads)


@LINES
def test_a_line_is_one_message(line: bytes) -> None:
    assert judge([in_messages(line)]) == GOOD[line]


@LINES
def test_the_end_of_a_message_ends_the_line(line: bytes) -> None:
    assert judge([in_messages(line[:-1])]) == GOOD[line]


@LINES
def test_a_line_without_newline_may_come_in_fragments(line: bytes) -> None:
    fragments = [Sent(BINARY, line[:20], False), Sent(PING, b"?"), Sent(CONT, line[20:-1], False), Sent(CONT)]
    assert judge([wire(fragments[:-1])]) is None
    assert judge([wire(fragments)]) == GOOD[line]


@LINES
def test_a_line_may_be_spread_over_two_messages_at_any_place(line: bytes) -> None:
    for place in range(len(line) + 1):
        if line[:place] + b"\n" in GOOD:  # that is a line already, and what follows is not waited for
            assert judge([in_messages(line[:place], line[place:])]) is Refusal.IMPATIENT
        else:
            assert judge([in_messages(line[:place], line[place:])]) == GOOD[line], place


@LINES
def test_a_line_may_come_as_a_message_for_each_byte(line: bytes) -> None:
    stream = in_messages(*(bytes([byte]) for byte in line))
    assert judge([stream]) == GOOD[line]
    assert judge(split(stream, range(len(stream))), moves=True) == GOOD[line]
    assert judge([in_messages(*(bytes([byte]) for byte in line[:-1]))]) is None


@LINES
def test_empty_messages_and_control_frames_are_nothing(line: bytes) -> None:
    nothing = [Sent(BINARY), Sent(PING, b"x"), Sent(PONG), Sent(BINARY, b"", False), Sent(CONT)]
    assert judge([wire([*nothing, Sent(BINARY, line[:-1]), *nothing])]) == GOOD[line]


@LINES
def test_anything_after_the_line_is_impatient(line: bytes) -> None:
    for stream in (
        in_messages(line + b"x"),
        in_messages(line, b"x"),
        in_messages(line[:-1], b"x"),
        in_messages(line[:-1], b"\n"),
        in_messages(line, bytes(1 << 20)),
        wire([Sent(BINARY, line, False), Sent(CONT, b"x")]),
    ):
        assert judge([stream]) is Refusal.IMPATIENT
        assert judge([stream[:90], stream[90:]], moves=True) is Refusal.IMPATIENT


def test_a_wrong_byte_is_refused_in_the_middle_of_its_frame() -> None:
    stream = Sent(BINARY, b"please delay" + bytes(100_000)).wire
    assert judge([stream[: 14 + 7]]) is None
    assert judge([stream[: 14 + 8]]) is Refusal.BAD_HANDSHAKE


def test_no_more_is_kept_than_decides() -> None:
    line, frames = Line(), FrameReader()
    for _ in range(10):
        line.hear(frames, in_messages(bytes(100_000)))
    assert len(line.received) == LONGEST + 1


@LINES
def test_a_close_after_the_line_is_told_and_the_line_counts(line: bytes) -> None:
    heard, frames = Line(), FrameReader()
    taken = heard.hear(
        frames, wire([Sent(BINARY, line), Sent(PING, b"1"), Sent(CLOSE, b"\x03\xe8"), Sent(BINARY, b"x")])
    )
    assert read_handshake(heard.received) == GOOD[line]
    assert (taken.closed, taken.ping, taken.fault) == (Close(1000), b"1", None)


def test_a_text_message_is_told_and_is_no_line() -> None:
    heard, frames = Line(), FrameReader()
    taken = heard.hear(frames, wire([Sent(PING, b"1"), Sent(TEXT, NEW)]))
    assert taken.fault is not None
    assert (taken.fault.code, taken.ping, heard.received) == (UNSUPPORTED, b"1", b"")


fragments = st.lists(st.lists(st.binary(max_size=30), max_size=4), max_size=4)


@given(
    st.sampled_from([OLD, NEW]), st.lists(st.tuples(st.integers(0, 110), st.booleans())), st.lists(st.integers(0, 2000))
)
@example(NEW, [(77, False), (77, True)], [])
def test_how_a_line_is_framed_and_split_changes_nothing(
    line: bytes, cuts: list[tuple[int, bool]], places: list[int]
) -> None:
    ends = dict(sorted((place % len(line), final) for place, final in cuts if place % len(line)))
    first = next((place for place, final in ends.items() if final), None)
    assume(first is None or line[:first] + b"\n" not in GOOD)
    sent, begin, opcode = [], 0, BINARY
    for end, final in {**ends, len(line): True}.items():
        sent.append(Sent(opcode, line[begin:end], final))
        begin, opcode = end, BINARY if final else CONT
    stream = wire(sent)
    assert judge([stream]) == GOOD[line]
    assert judge(split(stream, places), moves=True) == GOOD[line]


@given(fragments, st.lists(st.integers(0, 2000)))
def test_arbitrary_messages_are_judged_by_their_bytes(told: list[list[bytes]], places: list[int]) -> None:
    sent = [
        Sent(CONT if place else BINARY, part, place == len(parts) - 1)
        for parts in told
        for place, part in enumerate(parts)
    ]
    stream = wire(sent)
    payload = b"".join(part for parts in told for part in parts)
    assert judge([stream]) == judge(split(stream, places), moves=True) == read_handshake(payload)
