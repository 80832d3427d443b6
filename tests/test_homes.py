"""Rendezvous hashing: balanced, agreed upon, and steady."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.homes import SLOTS, homes_among, seed_of, slot_of


@dataclass(frozen=True)
class Worker:
    """A worker as `relay.homes` sees it."""

    seed: int


names = st.text(alphabet="0123456789abcdef-", min_size=1, max_size=24)
workers = st.lists(names.map(lambda name: Worker(seed_of(name))), min_size=1, max_size=12, unique=True)
tokens = st.binary(min_size=32, max_size=32).map(lambda some: some.hex().encode())


@given(tokens)
def test_every_token_has_a_slot(token: bytes) -> None:
    assert 0 <= slot_of(token) < SLOTS
    assert slot_of(token.upper()) == slot_of(token)


def test_random_tokens_fall_into_all_slots_alike() -> None:
    found = Counter(slot_of(secrets.token_hex(32).encode()) for _ in range(100 * SLOTS))
    assert len(found) == SLOTS
    assert max(found.values()) < 200


@given(workers, st.randoms())
@settings(deadline=None, max_examples=30)
def test_workers_agree_whatever_order_they_know_each_other_in(some: list[Worker], chance: st.DataObject) -> None:
    shuffled = list(some)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert homes_among(some) == homes_among(shuffled)


@given(workers)
@settings(deadline=None, max_examples=30)
def test_only_the_slots_of_the_worker_that_goes_move(some: list[Worker]) -> None:
    before = homes_among(some)
    for gone in some[1:]:
        after = homes_among([worker for worker in some if worker != gone])
        assert all(old in (gone, new) for old, new in zip(before, after, strict=True))
        assert gone not in after


@given(workers, names)
@settings(deadline=None, max_examples=30)
def test_only_the_slots_that_a_newcomer_wins_move(some: list[Worker], name: str) -> None:
    newcomer = Worker(seed_of(name))
    if newcomer in some:
        return
    before, after = homes_among(some), homes_among([*some, newcomer])
    assert all(new in (old, newcomer) for old, new in zip(before, after, strict=True))


def test_each_worker_is_home_to_about_as_much_as_the_others() -> None:
    for count in range(2, 17):
        for _ in range(5):
            some = [Worker(seed_of(f"worker-{pid}-{secrets.token_hex(4)}")) for pid in range(4000, 4000 + count)]
            share = Counter(homes_among(some))
            assert len(share) == count
            assert min(share.values()) > 0.5 * SLOTS / count
            assert max(share.values()) < 1.6 * SLOTS / count


def test_a_seed_depends_on_the_name_alone() -> None:
    assert seed_of("worker-1-00000000") == seed_of("worker-1-00000000")
    assert seed_of("worker-1-00000000") != seed_of("worker-1-00000001")
