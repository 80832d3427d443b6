"""WebSocket frames, read and written, held against `websockets` without its I/O.

Invariants of `FrameReader`, for every stream of frames, good or not:

- payload, pings, ends of messages, Close and verdict are those of `websockets`, but for what this relay decides
  otherwise: text is not taken, a length has to be in its shortest form, and a Close counts inside a message as well;
- where the bytes are split, how many frames a call may read, and in how many processes it goes on, changes nothing;
- what it remembers is below 200 bytes.

And of `messages`: a client of `websockets` that takes 32768 bytes a message reads exactly the payload, and one
sendmsg(2) takes the buffers.
"""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import Frame
from websockets.protocol import Protocol, Side, State
from websockets.speedups import apply_mask

from relay.clients import frames
from relay.clients.frames import (
    INVALID_TEXT,
    MESSAGE_BYTES,
    MOST_FRAMES,
    MOST_PIECES,
    PROTOCOL_ERROR,
    UNSUPPORTED,
    Buffer,
    Close,
    FrameReader,
    FrameState,
    messages,
)
from relay.clients.masks import apply_mask_slowly, mask_function
from tests.support.client_frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, Sent, split, wire

IOV_MAX = 1024
"""Buffers that Linux takes in one sendmsg(2): limits.h, and sysconf(3)."""

BUFFER = 1 << 20


@dataclass
class Story:
    """What a stream of frames comes to."""

    payload: bytes = b""
    ends: list[int] = field(default_factory=list)  # of messages, by how much payload had come
    pings: list[bytes] = field(default_factory=list)
    closed: Close | None = None
    fault: int | None = None


def told_by_websockets(sent: Iterable[Sent]) -> Story:
    """The story as `websockets` tells it, and as this relay decides where that is something else."""
    story = Story()
    oracle = Protocol(Side.SERVER, state=State.OPEN, max_size=None)
    for frame in sent:
        tame = replace(frame, opcode=BINARY if frame.opcode == TEXT else frame.opcode, form=0)
        inside = oracle.current_size is not None
        if frame.opcode == CLOSE and inside and frame.final:
            oracle = Protocol(Side.SERVER, state=State.OPEN, max_size=None)
        oracle.receive_data(tame.wire)
        if frame.opcode == TEXT and oracle.parser_exc is None:
            story.fault = UNSUPPORTED
        elif frame.form > frame.shortest:
            story.fault = PROTOCOL_ERROR
        elif oracle.parser_exc is not None:
            assert oracle.close_sent is not None
            story.fault = int(oracle.close_sent.code)
        elif oracle.close_rcvd is not None:
            code = int(oracle.close_rcvd.code)
            story.closed = Close(None if code == 1005 else code, oracle.close_rcvd.reason)
        if story.fault or story.closed:
            return story
        (event,) = oracle.events_received()
        assert isinstance(event, Frame)
        if event.opcode is PING:
            story.pings.append(bytes(event.data))
        elif event.opcode is not PONG:
            story.payload += event.data
            if event.fin:
                story.ends.append(len(story.payload))
    return story


def told_by_the_relay(chunks: Iterable[Buffer], reader: FrameReader, *, moves: bool = False) -> Story:
    """The story as the relay reads it, frame by frame, when its bytes come in these chunks; `moves`: to another process
    before each of them."""
    story = Story()
    for chunk in chunks:
        if moves:
            reader = moved(reader)
        at = 0
        while at < len(chunk):
            taken = reader.read(chunk, at, len(chunk), most=1)
            assert at < taken.consumed <= len(chunk) or taken.fault
            at = taken.consumed
            story.payload += b"".join(taken.payload)
            if taken.message_over:
                story.ends.append(len(story.payload))
            if taken.ping is not None:
                story.pings.append(taken.ping)
            if taken.closed or taken.fault:
                story.closed = taken.closed
                story.fault = taken.fault.code if taken.fault else None
                return story
    return story


def moved(reader: FrameReader) -> FrameReader:
    """The reader in another process."""
    encoded = reader.state.encode()
    assert len(encoded) < 200
    arrived = FrameReader(FrameState.decode(encoded))
    assert arrived.state == reader.state
    return arrived


masks = st.binary(min_size=4, max_size=4)
lengths = st.sampled_from([0, 1, 2, 3, 5, 16, 125, 126, 127, 1000, 65535, 65536, 70000])
payloads = st.binary(max_size=20) | st.builds(
    lambda seed, length: (seed * length)[:length], st.binary(min_size=1), lengths
)
small = st.binary(max_size=125)
controls = st.builds(Sent, opcode=st.sampled_from([PING, PONG]), payload=small, mask=masks)
reasons = st.text(max_size=30).map(str.encode)
codes = st.sampled_from([1000, 1001, 1002, 1003, 1007, 1011, 1012, 1014, 3000, 4999])
good_closes = st.builds(
    lambda payload, mask: Sent(CLOSE, payload, mask=mask),
    st.just(b"") | st.builds(lambda code, reason: code.to_bytes(2, "big") + reason, codes, reasons),
    masks,
)


@st.composite
def good_messages(draw: st.DrawFn) -> list[Sent]:
    """A binary message in fragments, with control frames between them."""
    sent: list[Sent] = []
    parts = draw(st.lists(payloads, min_size=1, max_size=4))
    for place, part in enumerate(parts):
        sent += draw(st.lists(controls, max_size=2))
        sent.append(Sent(CONT if place else BINARY, part, place == len(parts) - 1, mask=draw(masks)))
    return sent


good_streams = st.builds(
    lambda told, end: [*itertools.chain.from_iterable(told), *end],
    st.lists(good_messages(), max_size=6),
    st.lists(good_closes, max_size=1),
)

sound_frames = st.builds(
    Sent,
    opcode=st.sampled_from([BINARY, CONT, TEXT, PING, PONG, CLOSE]),
    payload=payloads | small,
    final=st.booleans(),
    mask=masks,
)
flaws = st.sampled_from([{}, {}, {"reserved": 1}, {"reserved": 4}, {"mask": None}, {"form": 16}, {"form": 64}])
any_frames = st.builds(
    lambda sent, flaw, opcode: replace(sent, opcode=sent.opcode if opcode is None else opcode, **flaw),
    sound_frames,
    flaws,
    st.none() | st.integers(0, 15),
)
wrong_closes = st.builds(lambda payload: Sent(CLOSE, payload), st.binary(min_size=1, max_size=6))
any_streams = st.builds(
    lambda before, wrong, after: [*itertools.chain.from_iterable(before), *wrong, *after],
    st.lists(good_messages(), max_size=2),
    st.lists(any_frames | any_frames | wrong_closes | good_closes, min_size=1, max_size=3),
    good_messages(),
)
places = st.lists(st.integers(0, 1 << 20), max_size=8)


# Reading, beside `websockets`.


@given(good_streams, places, st.booleans())
def test_good_frames_are_read_as_websockets_reads_them(sent: list[Sent], cuts: list[int], moves: bool) -> None:
    story = told_by_the_relay(split(wire(sent), cuts), FrameReader(), moves=moves)
    assert story == told_by_websockets(sent)
    assert story.fault is None


@given(any_streams, places, st.booleans())
@example([Sent(BINARY, b"x", False), Sent(CLOSE, b"\x03\xe8")], [], True)
@example([Sent(TEXT, bytes(200), form=64)], [1, 2, 3], True)
@example([Sent(TEXT, b"x", mask=None)], [], False)
@example([Sent(CLOSE, b"\x03\xe8\xff", form=16)], [], False)
def test_arbitrary_frames_get_the_verdict_of_websockets(sent: list[Sent], cuts: list[int], moves: bool) -> None:
    assert told_by_the_relay(split(wire(sent), cuts), FrameReader(), moves=moves) == told_by_websockets(sent)


@given(good_streams | any_streams, st.integers(1, 10), st.sampled_from([bytes, bytearray, memoryview]))
def test_frames_read_many_at_a_time_come_to_the_same(
    sent: list[Sent], most: int, kind: Callable[[bytes], Buffer]
) -> None:
    expected = told_by_websockets(sent)
    stream = kind(b"before" + wire(sent) + b"behind")
    reader, at, payload, pings = FrameReader(), 6, b"", []
    end = len(stream) - 6
    while True:
        taken = reader.read(stream, at, end, most)
        payload += b"".join(taken.payload)
        pings += [taken.ping] if taken.ping is not None else []
        if taken.closed or taken.fault or taken.consumed == end:
            break
        at = taken.consumed
    assert payload == expected.payload
    assert taken.closed == expected.closed
    assert (taken.fault and taken.fault.code) == expected.fault
    assert pings[-1:] == expected.pings[-1:]


@given(st.lists(st.binary(max_size=9) | st.builds(lambda sent: sent.wire[:200], any_frames), max_size=5), places)
def test_where_arbitrary_bytes_are_split_changes_nothing(pieces: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(pieces)
    whole = told_by_the_relay([stream], FrameReader())
    assert told_by_the_relay(split(stream, cuts), FrameReader(), moves=True) == whole
    assert told_by_the_relay(split(stream, range(len(stream))), FrameReader()) == whole


EVERYTHING = [
    Sent(BINARY, b"one message"),
    Sent(PING, b"are you there"),
    Sent(BINARY, b"a message ", False),
    Sent(PONG, bytes(125)),
    Sent(CONT, bytes(range(256)) * 3, False, mask=b"\x01\x02\x03\x04"),
    Sent(PING),
    Sent(CONT, b"", False),
    Sent(CONT, bytes(70000), mask=b"\xf0\xe1\xd2\xc3"),
    Sent(BINARY),
    Sent(CLOSE, b"\x03\xe8" + "done \u2713".encode()),
]


def test_a_transfer_moves_to_another_process_at_every_byte() -> None:
    stream = wire(EVERYTHING)
    expected = told_by_websockets(EVERYTHING)
    assert expected.closed == Close(1000, "done \u2713")
    assert told_by_the_relay(split(stream, range(len(stream))), FrameReader(), moves=True) == expected


def test_a_transfer_moves_once_at_any_byte() -> None:
    stream = wire([sent for sent in EVERYTHING if len(sent.payload) < 1000])
    expected = told_by_the_relay([stream], FrameReader())
    for place in range(1, len(stream)):
        assert told_by_the_relay([stream[:place], stream[place:]], FrameReader(), moves=True) == expected, place


NO_STATES = {
    "nothing": b"",
    "cut-short": FrameState(left=1).encode()[:-1],
    "a-frame-and-another": FrameState(left=1, part=b"\x82").encode(),
    "a-whole-header": FrameState(part=b"\x82\x81mask").encode(),
    "a-whole-ping": FrameState(part=Sent(PING, b"x").wire).encode(),
    "too-long-a-frame": FrameState(left=1 << 63).encode(),
    "too-long-a-part": FrameState(part=bytes(131)).encode(),
}


@pytest.mark.parametrize("encoded", NO_STATES)
def test_what_no_reader_remembers_is_refused(encoded: str) -> None:
    with pytest.raises(ValueError, match=r"state|unpack"):
        FrameState.decode(NO_STATES[encoded])


@given(st.binary(max_size=200), st.binary(max_size=300))
def test_from_any_state_a_reader_can_go_on(encoded: bytes, stream: bytes) -> None:
    try:
        state = FrameState.decode(encoded)
    except ValueError:
        return
    assert FrameState.decode(state.encode()) == state
    whole = told_by_the_relay([stream], FrameReader(state))
    assert told_by_the_relay(split(stream, range(len(stream))), FrameReader(state)) == whole


# The verdicts, one by one.

VERDICTS = {
    "text": (Sent(TEXT, b"please relay"), UNSUPPORTED),
    "text-in-fragments": (Sent(TEXT, b"please", False), UNSUPPORTED),
    "no-mask": (Sent(BINARY, b"x", mask=None), PROTOCOL_ERROR),
    "reserved-bit-1": (Sent(BINARY, b"x", reserved=4), PROTOCOL_ERROR),
    "reserved-bit-2": (Sent(BINARY, b"x", reserved=2), PROTOCOL_ERROR),
    "reserved-bit-3": (Sent(PING, b"x", reserved=1), PROTOCOL_ERROR),
    "unknown-data-opcode": (Sent(0x3, b"x"), PROTOCOL_ERROR),
    "unknown-control-opcode": (Sent(0xB, b"x"), PROTOCOL_ERROR),
    "fragmented-ping": (Sent(PING, b"x", False), PROTOCOL_ERROR),
    "fragmented-close": (Sent(CLOSE, b"\x03\xe8", False), PROTOCOL_ERROR),
    "long-ping": (Sent(PING, bytes(126)), PROTOCOL_ERROR),
    "long-close": (Sent(CLOSE, b"\x03\xe8" + bytes(124)), PROTOCOL_ERROR),
    "continuation-of-nothing": (Sent(CONT, b"x"), PROTOCOL_ERROR),
    "length-in-16-bits-that-has-7": (Sent(BINARY, bytes(125), form=16), PROTOCOL_ERROR),
    "length-in-64-bits-that-has-16": (Sent(BINARY, bytes(65535), form=64), PROTOCOL_ERROR),
    "close-of-one-byte": (Sent(CLOSE, b"\x03"), PROTOCOL_ERROR),
    "close-999": (Sent(CLOSE, (999).to_bytes(2, "big")), PROTOCOL_ERROR),
    "close-1004": (Sent(CLOSE, (1004).to_bytes(2, "big")), PROTOCOL_ERROR),
    "close-1005": (Sent(CLOSE, (1005).to_bytes(2, "big")), PROTOCOL_ERROR),
    "close-1006": (Sent(CLOSE, (1006).to_bytes(2, "big")), PROTOCOL_ERROR),
    "close-1015": (Sent(CLOSE, (1015).to_bytes(2, "big")), PROTOCOL_ERROR),
    "close-2999": (Sent(CLOSE, (2999).to_bytes(2, "big")), PROTOCOL_ERROR),
    "close-5000": (Sent(CLOSE, (5000).to_bytes(2, "big")), PROTOCOL_ERROR),
    "reason-that-is-not-utf-8": (Sent(CLOSE, b"\x03\xe8\xff"), INVALID_TEXT),
    "reason-cut-short": (Sent(CLOSE, b"\x03\xe8\xe2\x9c"), INVALID_TEXT),
    "reason-with-a-surrogate": (Sent(CLOSE, b"\x03\xe8\xed\xa0\x80"), INVALID_TEXT),
}


@pytest.mark.parametrize("wrong", VERDICTS)
def test_a_wrong_frame_ends_it_and_what_came_before_counts(wrong: str) -> None:
    sent, code = VERDICTS[wrong]
    for before in ([], [Sent(BINARY, b"before"), Sent(PING, b"here")]):
        stream = wire([*before, sent, Sent(BINARY, b"behind")])
        taken = FrameReader().read(stream, 0, len(stream))
        assert taken.fault is not None
        assert (taken.fault.code, taken.closed) == (code, None)
        assert b"".join(taken.payload) == (b"before" if before else b"")
        assert taken.ping == (b"here" if before else None)


def test_a_new_message_inside_another_is_wrong() -> None:
    for opcode in (BINARY, TEXT):
        stream = wire([Sent(BINARY, b"begun", False), Sent(PING), Sent(opcode, b"new")])
        taken = FrameReader().read(stream, 0, len(stream))
        assert taken.fault is not None
        assert taken.fault.code == PROTOCOL_ERROR
        assert taken.payload == [b"begun"]


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1])
def test_a_length_of_2_to_the_63_is_wrong(length: int) -> None:
    taken = FrameReader().read(b"\x82\xff" + length.to_bytes(8, "big") + b"mask", 0, 14)
    assert taken.fault is not None
    assert taken.fault.code == PROTOCOL_ERROR


def test_a_wrong_beginning_is_seen_at_its_second_byte() -> None:
    taken = FrameReader().read(b"\x81\xff", 0, 2)
    assert taken.fault is not None
    assert taken.fault.code == UNSUPPORTED


@pytest.mark.parametrize("code", [1000, 1003, 1007, 1014, 3000, 4999])
def test_a_close_is_told_with_its_code_and_reason(code: int) -> None:
    stream = wire([Sent(BINARY, b"last"), Sent(CLOSE, code.to_bytes(2, "big") + b"bye"), Sent(BINARY, b"too late")])
    taken = FrameReader().read(stream, 0, len(stream))
    assert (taken.closed, taken.fault, taken.payload) == (Close(code, "bye"), None, [b"last"])


def test_a_close_inside_a_message_is_a_close() -> None:
    stream = wire([Sent(BINARY, b"half", False), Sent(CLOSE)])
    taken = FrameReader().read(stream, 0, len(stream))
    assert (taken.closed, taken.fault, taken.payload) == (Close(None), None, [b"half"])


def test_of_several_pings_the_latest_is_answered() -> None:
    stream = wire([Sent(PING, b"1"), Sent(BINARY, b"x"), Sent(PING, b"2"), Sent(PONG, b"3")])
    assert FrameReader().read(stream, 0, len(stream)).ping == b"2"


# How much is held, and how much is done at a time.


@pytest.mark.parametrize("size", [300 << 20, (1 << 63) - 1])
def test_a_frame_passes_as_it_comes_whatever_its_length(size: int) -> None:
    mask = b"\x01\x02\x03\x04"
    reader = FrameReader()
    head = b"\x82\xff" + size.to_bytes(8, "big") + mask
    assert reader.read(head, 0, len(head)).payload == []
    buffer = bytearray(BUFFER)
    passed = 0
    for chunk in itertools.cycle([BUFFER, BUFFER - 1, BUFFER - 3, 1, 2, 5]):
        count = min(chunk, size - passed)
        (piece,) = reader.read(buffer, 0, count).payload
        assert len(piece) == count
        assert piece[:8] == (mask * 3)[passed % 4 :][: min(8, count)]
        passed += count
        if passed == min(size, 300 << 20) or passed > 300 << 20:
            break
        assert len(reader.state.encode()) < 20
    if passed == size:
        assert reader.state == FrameState()
        rest = Sent(BINARY, b"and on").wire
        assert reader.read(rest, 0, len(rest)).payload == [b"and on"]
    else:
        assert reader.state.left == size - passed


def test_no_frame_is_ever_kept() -> None:
    mask_function()
    reader = FrameReader()
    buffer = bytearray(BUFFER)
    reader.read(b"\x82\xff" + (64 << 20).to_bytes(8, "big") + b"mask", 0, 14)
    tracemalloc.start()
    try:
        for _ in range(64):
            reader.read(buffer, 0, BUFFER)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 64 << 10
    assert peak < 3 * BUFFER


@pytest.mark.parametrize("sent", [Sent(BINARY, b"x"), Sent(BINARY), Sent(PING, bytes(125))], ids=["1", "0", "ping"])
def test_a_buffer_full_of_small_frames_is_read_in_several_calls(sent: Sent) -> None:
    count = BUFFER // len(sent.wire)
    stream = sent.wire * count
    reader, at, calls, payload = FrameReader(), 0, 0, b""
    while at < len(stream):
        taken = reader.read(stream, at, len(stream))
        assert taken.consumed - at <= MOST_FRAMES * len(sent.wire)
        assert len(taken.payload) <= 1
        payload += b"".join(taken.payload)
        at = taken.consumed
        calls += 1
    assert calls == -(-count // MOST_FRAMES)
    assert payload == (sent.payload * count if sent.opcode == BINARY else b"")


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=3))
def test_a_full_buffer_gives_no_more_pieces_than_one_write_takes(sizes: list[int]) -> None:
    buffer = bytearray()
    for size in itertools.cycle(sizes):
        frame = Sent(BINARY, bytes(size)).wire
        if len(buffer) + len(frame) > BUFFER:
            break
        buffer += frame
    taken = FrameReader().read(buffer, 0, len(buffer))
    assert len(taken.payload) <= MOST_PIECES
    assert len(messages(taken.payload)) <= IOV_MAX


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's heap")
def test_the_heap_is_not_given_back_and_paged_in_again_for_each_turn() -> None:
    done = subprocess.run([sys.executable, "-c", PAGED], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 1000


PAGED = f"""
import resource
from relay.clients.frames import FrameReader
reader = FrameReader()
buffer = bytearray({BUFFER})
for at in range(0, 15 * 65550, 65550):
    buffer[at : at + 14] = b"\\x82\\xff" + (65536).to_bytes(8, "big") + b"mask"
for turn in range(100):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert len(reader.read(buffer, 0, 15 * 65550).payload) == 15
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Masks.


@given(st.binary(max_size=2100), masks, st.integers(0, 2100), st.integers(0, 2100))
def test_the_mask_in_python_is_that_in_c(payload: bytes, mask: bytes, begin: int, end: int) -> None:
    expected = apply_mask(payload[begin:end], mask)
    for kind in (bytes, bytearray, memoryview):
        unmasked = apply_mask_slowly(kind(payload)[begin:end], mask)
        assert isinstance(unmasked, bytes)
        assert unmasked == expected


@pytest.mark.parametrize("length", [*range(20), 999, 1000, 1001, 1002, 1003, 65535, 65536])
def test_the_mask_in_python_is_right_for_every_length(length: int) -> None:
    payload = bytes(range(256)) * (length // 256 + 1)
    mask = b"\x00\x80\xff\x7f"
    assert apply_mask_slowly(payload[:length], mask) == bytes(
        byte ^ mask[place % 4] for place, byte in enumerate(payload[:length])
    )


def test_the_mask_is_taken_off_in_c_where_websockets_is_installed() -> None:
    assert mask_function() is not apply_mask_slowly
    assert mask_function()(memoryview(bytearray(b"masked"))[1:], b"\0\0\0\x01") == b"askdd"


@given(good_streams, places)
def test_without_the_c_function_frames_are_read_all_the_same(sent: list[Sent], cuts: list[int]) -> None:
    reader = FrameReader()
    reader._apply_mask = apply_mask_slowly
    assert told_by_the_relay(split(wire(sent), cuts), reader) == told_by_websockets(sent)


def test_the_package_around_the_mask_is_not_imported() -> None:
    script = (
        "import sys; before = set(sys.modules); from relay.clients import frames, line, websocket\n"
        "print([name for name in sys.modules if name.startswith('websockets')])\n"
        "frames.FrameReader(); print([name for name in sys.modules if name.startswith('websockets')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[]", "['websockets.speedups']"]


# Writing.


def client() -> Protocol:
    """A client that ends the connection at a message of more than `MESSAGE_BYTES`."""
    return Protocol(Side.CLIENT, state=State.OPEN, max_size=MESSAGE_BYTES)


def read_by_the_client(stream: bytes) -> list[Frame]:
    reader = client()
    reader.receive_data(stream)
    assert reader.parser_exc is None
    return [event for event in reader.events_received() if isinstance(event, Frame)]


pieces_of_payload = st.lists(
    st.sampled_from([0, 1, 4, 125, 126, 127, 16424, 16384, 16385, 32767, 32768, 32769, 65536, 100_000]), max_size=12
)


@given(pieces_of_payload, st.integers(0, 255))
def test_a_client_reads_the_payload_in_messages_of_at_most_32768_bytes(sizes: list[int], seed: int) -> None:
    pattern = bytes((seed + place * 7) % 251 for place in range(251))
    pieces = [(pattern[at:] + pattern * (size // 251 + 1))[:size] for at, size in enumerate(sizes)]
    read = read_by_the_client(b"".join(messages(pieces)))
    assert b"".join(bytes(frame.data) for frame in read) == b"".join(pieces)
    assert all(frame.opcode is BINARY and frame.fin and 0 < len(frame.data) <= MESSAGE_BYTES for frame in read)
    assert len(read) <= 2 * sum(sizes) // MESSAGE_BYTES + 1


def test_a_megabyte_is_one_write_and_nothing_of_it_is_copied() -> None:
    buffer = bytearray(BUFFER)
    buffers = messages([memoryview(buffer)])
    assert len(buffers) == 2 * BUFFER // MESSAGE_BYTES <= IOV_MAX
    assert all(isinstance(slice_, memoryview) and slice_.obj is buffer for slice_ in buffers[1::2])
    assert all(header == b"\x82\x7e\x80\x00" for header in buffers[::2])


def test_nothing_is_no_message() -> None:
    assert messages([]) == messages([b"", memoryview(b"")]) == []


@pytest.mark.parametrize("size", [1, 125, 126, MESSAGE_BYTES])
def test_a_reply_is_one_message(size: int) -> None:
    (read,) = read_by_the_client(frames.message(bytes(size)))
    assert (read.opcode, read.fin, len(read.data)) == (BINARY, True, size)


@pytest.mark.parametrize("payload", [b"", b"are you there", bytes(125)])
def test_a_ping_is_answered_and_a_pong_passed_over(payload: bytes) -> None:
    reader = client()
    reader.receive_data(frames.ping(payload) + frames.pong(payload))
    (answer,) = reader.data_to_send()
    assert told_by_the_relay([answer], FrameReader()) == Story()
    ping, pong = reader.events_received()
    assert isinstance(ping, Frame)
    assert isinstance(pong, Frame)
    assert (ping.opcode, ping.data, pong.opcode, pong.data) == (PING, payload, PONG, payload)


@pytest.mark.parametrize(
    "told", [Close(None), Close(1000), Close(1001, "the relay stops"), Close(4999, "\u2713" * 41)], ids=repr
)
def test_a_close_is_read_by_the_client_and_answered_with_the_same(told: Close) -> None:
    reader = client()
    reader.receive_data(frames.close(told))
    assert reader.close_rcvd is not None
    assert (int(reader.close_rcvd.code), reader.close_rcvd.reason) == (told.code or 1005, told.reason)
    (answer,) = reader.data_to_send()
    assert told_by_the_relay([answer], FrameReader()).closed == told


@pytest.mark.parametrize("wrong", VERDICTS)
def test_every_verdict_can_be_told_to_the_client(wrong: str) -> None:
    sent, code = VERDICTS[wrong]
    fault = FrameReader().read(sent.wire, 0, len(sent.wire)).fault
    assert fault is not None
    reader = client()
    reader.receive_data(frames.close(fault))
    assert reader.close_rcvd is not None
    assert (int(reader.close_rcvd.code), reader.close_rcvd.reason) == (code, fault.reason)
    assert fault.reason
