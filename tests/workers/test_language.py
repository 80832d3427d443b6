"""What workers say to each other survives the way, and what no worker would say is recognised."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.process.dataclass import replace
from relay.transfer.state import PairState, Past, PumpState
from relay.workers.language import (
    CLIENTS_PER_PACKET,
    CONFIRMED,
    HANDED_CLIENTS,
    HANDED_PAIR,
    LANGUAGE,
    LARGEST_PACKET,
    MATCHED,
    REFUSED,
    Envelope,
    Greeting,
    HandedClient,
    Misunderstood,
    Standing,
    decode_answer,
    decode_clients,
    decode_envelope,
    decode_matched,
    decode_pair,
    decode_still_here,
    encode_answer,
    encode_clients,
    encode_matched,
    encode_pair,
    encode_still_here,
    kind_of,
)

seconds = st.floats(min_value=0, max_value=1e10)
words = st.integers(min_value=0, max_value=2**64 - 1)
envelopes = st.builds(Envelope, serial=words, sent=seconds)
tokens = st.binary(min_size=32, max_size=32).map(lambda some: some.hex().encode())
sides = st.none() | st.binary(min_size=8, max_size=8).map(lambda some: some.hex().encode())
shaken = st.builds(
    HandedClient,
    started=seconds,
    arrived=seconds,
    asked=seconds,
    token=tokens,
    side=sides,
    received=st.just(b""),
    hops=st.integers(0, 300),
    is_given=st.booleans(),
    packed_speech=st.binary(max_size=300),
)
shaking = st.builds(
    HandedClient,
    started=seconds,
    arrived=seconds,
    asked=seconds,
    token=st.just(b""),
    side=st.none(),
    received=st.binary(max_size=103),
    hops=st.integers(0, 300),
    is_given=st.booleans(),
    packed_speech=st.binary(max_size=300),
)
counts = st.integers(min_value=0, max_value=2**50)
empty = st.builds(
    PumpState,
    moved=counts,
    held=st.just(0),
    over=st.booleans(),
    splices=st.booleans(),
    rest=st.just(b""),
)
beside = st.builds(
    PumpState,
    moved=counts,
    held=st.integers(1, 1 << 20),
    over=st.booleans(),
    splices=st.booleans(),
    rest=st.just(b""),
    fds=st.sampled_from([1, 2]),
    unread=st.integers(0, 1 << 20),
    owed=st.integers(0, 1 << 20),
    ends=st.booleans(),
    discards=st.booleans(),
)
copied = st.binary(min_size=1, max_size=300).flatmap(
    lambda rest: st.builds(
        PumpState, moved=counts, held=st.just(len(rest)), over=st.just(False), splices=st.booleans(), rest=st.just(rest)
    )
)
pumps = empty | beside | copied
pairs = st.builds(
    PairState,
    started=seconds,
    arrived=seconds,
    waiting_time=seconds,
    there=pumps,
    back=pumps,
    first_frames=st.binary(max_size=143),
    second_frames=st.binary(max_size=143),
    past=st.builds(Past, moved=counts, idle_since=seconds, wasted=counts, framing=counts),
)
greetings = st.builds(
    Greeting,
    name=st.text(max_size=40),
    pid=st.integers(1, 2**22),
    version=st.text(max_size=20),
    language=st.integers(1, 1000),
    leaving=st.booleans(),
)


@given(greetings)
def test_a_greeting_arrives_as_it_was_meant(greeting: Greeting) -> None:
    assert Greeting.decode(greeting.encode()) == greeting


@given(greetings, st.dictionaries(st.text(max_size=8), st.integers()))
def test_a_greeting_of_a_later_version_is_understood(greeting: Greeting, more: dict[str, int]) -> None:
    said = json.loads(greeting.encode())
    said["relay-gevent"] = {**more, **said["relay-gevent"]}
    assert Greeting.decode(json.dumps({**more, **said}).encode()) == greeting


def test_the_form_of_a_greeting_never_changes() -> None:
    greeting = Greeting("worker-7-0a1b2c3d", 7, "1.0.0", LANGUAGE)
    assert json.loads(greeting.encode()) == {
        "relay-gevent": {
            "name": "worker-7-0a1b2c3d",
            "pid": 7,
            "version": "1.0.0",
            "language": LANGUAGE,
            "leaving": False,
            "terms": {},
        }
    }


@given(envelopes, st.lists(shaken | shaking, max_size=CLIENTS_PER_PACKET))
def test_clients_arrive_as_they_were_handed_on_with_one_hop_more(
    envelope: Envelope, clients: list[HandedClient]
) -> None:
    packet = encode_clients(envelope, clients)
    assert len(packet) <= LARGEST_PACKET
    assert kind_of(packet) == HANDED_CLIENTS
    assert decode_envelope(packet) == envelope
    for client in clients:
        client.hops = min(client.hops + 1, 127)
    assert decode_clients(packet) == clients


@given(tokens)
def test_a_match_arrives_as_it_was_told(token: bytes) -> None:
    packet = encode_matched(token)
    assert kind_of(packet) == MATCHED
    assert decode_matched(packet) == token


@given(envelopes, pairs)
def test_a_pair_arrives_as_it_was_handed_on(envelope: Envelope, pair: PairState) -> None:
    packet = encode_pair(envelope, pair)
    assert kind_of(packet) == HANDED_PAIR
    assert decode_envelope(packet) == envelope
    assert decode_pair(packet) == pair


def test_the_largest_pair_fits_a_packet() -> None:
    rest = bytes(64 << 10)
    pump = PumpState(moved=2**50, held=len(rest), over=False, splices=False, rest=rest)
    pair = PairState(1e10 / 3, 1e10 / 3, 1e10 / 3, pump, pump)
    assert len(encode_pair(Envelope(2**64 - 1, 1e10 / 3), pair)) <= LARGEST_PACKET


@given(pairs)
def test_beside_a_pair_travel_its_sockets_and_what_holds_its_bytes(pair: PairState) -> None:
    ends_of_pipes_and_files = [pump.fds for pump in (pair.there, pair.back) if pump.held and not pump.rest]
    assert pair.fds == 2 + sum(ends_of_pipes_and_files)


@given(st.sampled_from([CONFIRMED, REFUSED]), words)
def test_an_answer_names_its_parcel(kind: bytes, serial: int) -> None:
    packet = encode_answer(kind, serial)
    assert kind_of(packet) == kind
    assert decode_answer(packet) == serial


def understand(packet: bytes) -> None:
    """Read a packet in every way there is; nothing but Misunderstood may come of it."""
    kind_of(packet)
    for decode in (Greeting.decode, decode_envelope, decode_clients, decode_pair, decode_answer):
        with contextlib.suppress(Misunderstood):
            decode(packet)


@given(st.binary(max_size=200))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"relay-gevent": {"name": "x", "pid": Infinity, "version": "", "language": 1}}')
@example(b'{"relay-gevent": {"name": "x", "pid": ' + b"1" * 5000 + b', "version": "", "language": 1}}')
@example(b'{"relay-gevent": [1]}')
@example(b"\xff\xfe{")
def test_garbage_is_misunderstood_and_nothing_else(packet: bytes) -> None:
    understand(packet)


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(greetings, st.sampled_from(["name", "pid", "version", "language", "leaving"]), anything)
def test_a_greeting_with_something_else_in_a_field_is_read_or_misunderstood(
    greeting: Greeting, field: str, value: object
) -> None:
    said = json.loads(greeting.encode())
    said["relay-gevent"][field] = value
    understand(json.dumps(said).encode())


@given(envelopes, pairs, st.data())
def test_a_pair_that_is_cut_short_or_goes_on_too_long_is_misunderstood(
    envelope: Envelope, pair: PairState, choice: st.DataObject
) -> None:
    packet = encode_pair(envelope, pair)
    as_before = len(encode_pair(envelope, pair, with_past=False))
    cut = choice.draw(st.integers(0, len(packet) - 1).filter(lambda cut: cut != as_before))
    for wrong in (packet[:cut], packet + b"x"):
        with pytest.raises(Misunderstood):
            decode_pair(wrong)


@given(envelopes, pairs)
def test_workers_of_before_say_and_are_told_nothing_of_a_pair_s_past(envelope: Envelope, pair: PairState) -> None:
    assert decode_pair(encode_pair(envelope, pair, with_past=False)) == replace(pair, past=Past())
    assert decode_still_here(encode_still_here(Standing(16, 0.5, 10, 20))).reads_past
    assert not decode_still_here(struct.pack("!cIfIII", b".", 1, 0.5, 10, 20, 16)).reads_past


@given(envelopes, pairs, st.data())
def test_a_pair_in_which_a_byte_is_wrong_still_brings_what_it_holds_or_is_misunderstood(
    envelope: Envelope, pair: PairState, choice: st.DataObject
) -> None:
    packet = bytearray(encode_pair(envelope, pair))
    packet[choice.draw(st.integers(0, len(packet) - 1))] ^= choice.draw(st.integers(1, 255))
    try:
        understood = decode_pair(bytes(packet))
    except Misunderstood:
        return
    assert all(len(pump.rest) in (0, pump.held) for pump in (understood.there, understood.back))


@given(envelopes, st.lists(shaken | shaking, min_size=1, max_size=5), st.data())
def test_clients_that_are_cut_short_are_misunderstood(
    envelope: Envelope, clients: list[HandedClient], choice: st.DataObject
) -> None:
    packet = encode_clients(envelope, clients)
    whole = len(encode_clients(envelope, clients[:-1]))
    cut = choice.draw(st.integers(whole + 1, len(packet) - 1))
    with pytest.raises(Misunderstood):
        decode_clients(packet[:cut])


@given(st.integers(0, 1 << 24), st.floats(0, 10, width=32), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_how_a_worker_is_survives(parts: int, load: float, room: int, places: int) -> None:
    for spare in (None, (room, -places), (-room, places)):
        standing = Standing(parts, load, room, places, spare=spare)
        assert decode_still_here(encode_still_here(standing)) == standing


def test_a_worker_of_before_and_one_of_now_mean_the_same_by_a_part_of_a_rate() -> None:
    """It counts transfers, and reads nothing behind that: of those that were restarted, its own had a thirteenth."""
    before = struct.Struct("!cIfII")
    _, wanted, *_ = before.unpack_from(encode_still_here(Standing(4 * 16, 0.5, 10, 20)))
    assert wanted == 4
    _, wanted, *_ = before.unpack_from(encode_still_here(Standing(1, 0.5, 10, 20)))
    assert wanted == 1
    assert decode_still_here(before.pack(b".", 4, 0.5, 10, 20)) == Standing(
        4 * 16, 0.5, 10, 20, reads_past=False, makes_claims=False
    )
    with pytest.raises(Misunderstood):
        decode_still_here(before.pack(b".", 4, 0.5, 10, 20) + b"x")
