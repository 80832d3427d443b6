"""A token lives with the worker where its first client waits, and the kernel tells all the others."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest

from relay.workers.homes import BYTES_OF_A_TOKEN, FILES, PLACES_OF_A_TOKEN, Homes, _first_place_of_match
from tests.support.harness import new_token, open_fds
from tests.support.homes_worker import HomesWorker
from tests.support.kernel_view import locks

Start = Callable[[int], list[HomesWorker]]


@pytest.fixture
def homes() -> Iterator[Homes]:
    """Homes that this process has made, and is home to nothing in."""
    made = Homes.make()
    yield made
    made.close()


@pytest.fixture
def start(homes: Homes) -> Iterator[Start]:
    """Start so many processes that have `homes`; all end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda number: [stack.enter_context(HomesWorker(homes.fds)) for _ in range(number)]


def all_locks(worker: HomesWorker, homes: Homes) -> int:
    """How many ranges of bytes a process has locked in all files; it knows these by the same numbers as we do."""
    return sum(locks(worker.pid, fd) for fd in homes.fds)


def test_who_settles_first_is_the_home_and_everybody_learns_that(start: Start) -> None:
    first, second, third = start(3)
    token = new_token()
    assert first.settle(token) == (first.pid, True)
    for other in (second, third, second):
        assert other.settle(token) == (first.pid, True)


def test_a_token_that_was_given_up_is_free_for_the_next(start: Start) -> None:
    first, second = start(2)
    token = new_token()
    first.settle(token)
    first.give_up(token)
    assert second.holder(token) is None
    assert second.settle(token) == (second.pid, True)
    assert first.settle(token) == (second.pid, True)


def test_to_settle_twice_is_to_settle_once(start: Start, homes: Homes) -> None:
    first, second = start(2)
    token = new_token()
    for _ in range(3):
        assert first.settle(token) == (first.pid, True)
        assert second.settle(token) == (first.pid, True)
    assert (all_locks(first, homes), all_locks(second, homes)) == (1, 0)
    first.give_up(token)
    assert all_locks(first, homes) == 0
    assert second.settle(token) == (second.pid, True)


def test_nobody_gives_up_what_another_is_home_to(start: Start) -> None:
    first, second = start(2)
    token, never_settled = new_token(), new_token()
    first.settle(token)
    second.give_up(token, never_settled)
    assert second.settle(token) == (first.pid, True)


def test_the_holder_is_another_worker_and_never_oneself(start: Start) -> None:
    first, second = start(2)
    token = new_token()
    assert (first.holder(token), second.holder(token)) == (None, None)
    first.settle(token)
    assert (first.holder(token), second.holder(token)) == (None, first.pid)
    # Also when it is home with a byte that is not the first.
    second.absent(first.pid)
    assert second.settle(token) == (second.pid, False)
    assert (first.holder(token), second.holder(token)) == (second.pid, first.pid)
    first.give_up(token)
    assert (first.holder(token), second.holder(token)) == (second.pid, None)


def test_to_ask_for_the_holder_makes_nobody_home(start: Start, homes: Homes) -> None:
    first, second = start(2)
    token = new_token()
    assert first.holder(token) is None
    assert all_locks(first, homes) == 0
    assert second.settle(token) == (second.pid, True)


def test_the_homes_of_a_worker_that_is_killed_are_free_at_once(start: Start) -> None:
    killed, second, third = start(3)
    tokens = [new_token() for _ in range(300)]
    killed.ask("settle", *tokens)
    second.start("settle", *tokens)
    assert set(second.settled()) == {(killed.pid, True)}
    killed.kill()
    assert second.holder(tokens[0]) is None
    second.start("settle", *tokens)
    assert second.settled() == [(second.pid, True)] * 300
    third.start("settle", *tokens)
    assert third.settled() == [(second.pid, True)] * 300


def test_a_token_whose_home_is_absent_has_another_for_the_time_being(start: Start) -> None:
    absent, second, third = start(3)
    token, of_its_own = new_token(), new_token()
    absent.settle(token)
    for present in (second, third):
        present.absent(absent.pid)
    assert second.settle(token) == (second.pid, False)
    assert second.settle(token) == (second.pid, False)
    assert third.settle(token) == (second.pid, True)
    assert second.settle(of_its_own) == (second.pid, True)


def test_when_the_absent_one_lets_go_the_home_for_the_time_being_becomes_certain(start: Start) -> None:
    absent, second, third = start(3)
    token = new_token()
    absent.settle(token)
    second.absent(absent.pid)
    assert second.settle(token) == (second.pid, False)
    absent.give_up(token)
    assert second.settle(token) == (second.pid, True)
    for other in (absent, third):
        assert other.settle(token) == (second.pid, True)
    second.give_up(token)  # all of its bytes
    assert third.settle(token) == (third.pid, True)


def test_when_the_absent_one_comes_back_it_is_the_home_again_for_everybody(start: Start) -> None:
    absent, second, third = start(3)
    token = new_token()
    absent.settle(token)
    for present in (second, third):
        present.absent(absent.pid)
        present.settle(token)
    for present in (second, third):
        present.absent()
        assert present.settle(token) == (absent.pid, True)
    second.give_up(token)
    assert absent.settle(token) == (absent.pid, True)
    assert third.settle(token) == (absent.pid, True)


def test_a_token_outlasts_as_many_absent_homes_as_it_has_bytes(start: Start, homes: Homes) -> None:
    *absent, second, third = start(BYTES_OF_A_TOKEN + 2)
    token = new_token()
    for number, worker in enumerate(absent):
        worker.absent(*(other.pid for other in absent[:number]))
        assert worker.settle(token) == (worker.pid, number == 0)
    # All bytes are taken: whoever comes is home to it, and knows that others may be, too.
    for worker in (second, third):
        worker.absent(*(other.pid for other in absent))
        assert worker.settle(token) == (worker.pid, False)
        assert all_locks(worker, homes) == 0
        assert worker.holder(token) in [other.pid for other in absent]
    absent[2].give_up(token)
    assert second.settle(token) == (second.pid, False)
    assert third.settle(token) == (second.pid, True)
    absent[0].kill()
    assert third.settle(token) == (third.pid, True)
    assert second.settle(token) == (third.pid, True)


def test_tokens_that_differ_by_the_case_of_one_letter_are_different_tokens(start: Start) -> None:
    first, second = start(2)
    lower = "deadbeef" * 8
    for at in range(len(lower)):
        other = lower[:at] + lower[at].upper() + lower[at + 1 :]
        assert first.settle(lower) == (first.pid, True)
        assert second.settle(other) == (second.pid, True)
        assert first.settle(other) == (second.pid, True)
        first.give_up(lower)
        assert first.settle(other) == (second.pid, True)
        second.give_up(other)


def test_whoever_has_the_files_has_the_same_homes(start: Start) -> None:
    said = {worker.ask("made") for worker in start(3)}
    assert len(said) == 1
    (other,) = said
    with contextlib.closing(Homes.make()) as later:
        made, key = other.split()
        assert float(made) < later.made
        assert int(key) != later._key


def test_homes_that_were_closed_are_no_longer_held(start: Start) -> None:
    first, second = start(2)
    tokens = [new_token() for _ in range(50)]
    first.ask("settle", *tokens)
    second.ask("settle", *tokens)
    before = open_fds(first.pid)
    first.ask("close")
    assert open_fds(first.pid) == before - FILES - 1  # the table is in a file, too
    second.start("settle", *tokens)
    assert second.settled() == [(second.pid, True)] * 50


def test_everybody_knows_when_a_token_was_last_matched(start: Start) -> None:
    first, second, third = start(3)
    token, other = new_token(), new_token()
    assert first.last_match(token) == second.last_match(token) == 0.0
    now = time.monotonic()
    first.note_match(token, now)
    for worker in (first, second, third):
        assert abs(worker.last_match(token) - now) < 1e-6
        assert worker.last_match(other) == 0.0
    second.note_match(token, now + 1.5)
    first.kill()
    assert abs(third.last_match(token) - now - 1.5) < 1e-6
    (newcomer,) = start(1)
    assert abs(newcomer.last_match(token) - now - 1.5) < 1e-6


def test_a_match_is_forgotten_only_for_later_ones_in_its_places(homes: Homes) -> None:
    now = time.monotonic()
    tokens = [new_token().encode() for _ in range(4000)]
    for number, token in enumerate(tokens):
        homes.note_match(token, now + number)
    found = [homes.last_match(token) for token in tokens]
    assert all(when == 0.0 or abs(when - now - number) < 1e-6 for number, when in enumerate(found))
    # 65 536 places in groups of four: that a fifth of 4000 comes into one happens in one of eleven runs.
    assert found.count(0.0) < 4
    assert [homes.last_match(new_token().encode()) for _ in range(4000)] == [0.0] * 4000


def in_one_group(homes: Homes, count: int) -> list[bytes]:
    """So many tokens that have their places for matches in common."""
    groups: dict[int, list[bytes]] = {}
    while True:
        token = new_token().encode()
        group = groups.setdefault(_first_place_of_match(homes._number_of(token)), [])
        group.append(token)
        if len(group) == count:
            return group


def test_of_those_with_the_same_places_the_one_matched_longest_ago_is_forgotten(homes: Homes) -> None:
    now = time.monotonic()
    tokens = in_one_group(homes, PLACES_OF_A_TOKEN + 1)
    for number, token in enumerate(tokens[:-1]):
        homes.note_match(token, now + number)
    homes.note_match(tokens[0], now + 10)  # once more, in its own place
    found = [homes.last_match(token) - now for token in tokens[:-1]]
    assert found == pytest.approx([10, *range(1, PLACES_OF_A_TOKEN)])
    homes.note_match(tokens[-1], now + 11)
    assert [token for token in tokens if not homes.last_match(token)] == [tokens[1]]


def test_half_a_match_is_none(homes: Homes) -> None:
    # Another worker may be writing into the same place while we read.
    for half in (slice(0, 8), slice(8, 16)):
        token = new_token().encode()
        place = _first_place_of_match(homes._number_of(token))
        homes.note_match(token, time.monotonic())
        assert homes.last_match(token) > 0
        match = bytearray(homes._table[place : place + 16])
        match[half] = os.urandom(8)
        homes._table[place : place + 16] = bytes(match)
        assert homes.last_match(token) == 0.0


def test_homes_cannot_be_made_without_file_descriptors(start: Start) -> None:
    (worker,) = start(1)
    assert worker.ask("make-with-few-fds") == f"OSError {errno.EMFILE}"


def test_three_that_settle_the_same_tokens_at_the_same_time_agree_on_one_home_for_each(start: Start) -> None:
    workers = start(3)
    tokens = [new_token() for _ in range(2000)]
    orders = [random.sample(tokens, len(tokens)) for _ in workers]
    for worker, order in zip(workers, orders, strict=True):
        worker.start("settle", *order)
    said = [dict(zip(order, worker.settled(), strict=True)) for worker, order in zip(workers, orders, strict=True)]
    assert said[0] == said[1] == said[2]
    assert {pid for pid, _ in said[0].values()} <= {worker.pid for worker in workers}
    assert all(certain for _, certain in said[0].values())
    # And once more: nobody has become home to anything that somebody else was home to.
    for worker in workers:
        worker.start("settle", *tokens)
    assert all(worker.settled() == [said[0][token] for token in tokens] for worker in workers)


class Kept:
    """What the files should say of one token: for each of its bytes, who has it."""

    def __init__(self) -> None:
        self.bytes: list[int | None] = [None] * BYTES_OF_A_TOKEN

    def settle(self, pid: int, absent: set[int]) -> tuple[int, bool]:
        for number, owner in enumerate(self.bytes):
            if owner in (None, pid):
                self.bytes[number] = pid
                return pid, number == 0
            if owner not in absent:
                assert owner is not None
                return owner, True
        return pid, False

    def give_up(self, pid: int) -> None:
        self.bytes = [None if owner == pid else owner for owner in self.bytes]


def test_whatever_comes_and_goes_the_files_say_who_is_home(start: Start, homes: Homes) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    workers = {worker.pid: worker for worker in start(3)}
    absent: dict[int, set[int]] = {pid: set() for pid in workers}
    kept = {new_token(): Kept() for _ in range(30)}
    for step in range(6000):
        what = f"seed {seed}, step {step}"
        pid = chance.choice(list(workers))
        token = chance.choice(list(kept))
        action = chance.choices(["settle", "give up", "holder", "absent", "kill"], [50, 25, 15, 9, 0.2])[0]
        if action == "settle":
            assert workers[pid].settle(token) == kept[token].settle(pid, absent[pid]), what
        elif action == "give up":
            workers[pid].give_up(token)
            kept[token].give_up(pid)
        elif action == "holder":
            assert workers[pid].holder(token) in (set(kept[token].bytes) - {pid, None} or {None}), what
        elif action == "absent":
            absent[pid] = {other for other in workers if other != pid and chance.random() < 0.3}
            workers[pid].absent(*absent[pid])
        else:
            workers.pop(pid).kill()
            del absent[pid]
            for one in kept.values():
                one.give_up(pid)
            (newcomer,) = start(1)
            workers[newcomer.pid], absent[newcomer.pid] = newcomer, set()
    for pid, worker in workers.items():
        held = [one.bytes.count(pid) for one in kept.values()]
        worker.give_up(*(token for token, number in zip(kept, held, strict=True) if number))
        assert all_locks(worker, homes) == 0


def test_random_tokens_fall_into_all_files_alike(start: Start, homes: Homes) -> None:
    (worker,) = start(1)
    worker.ask("settle", *(new_token() for _ in range(100 * FILES)))
    found = [locks(worker.pid, fd) for fd in homes.fds]
    assert sum(found) == 100 * FILES
    assert min(found) > 40  # six standard deviations
    assert max(found) < 160


def test_to_ask_for_many_tokens_costs_no_memory(start: Start, homes: Homes) -> None:
    (worker,) = start(1)
    worker.ask("busy", 1000)
    sizes = [(status.st_size, status.st_blocks) for status in map(os.fstat, homes.fds)]
    assert int(worker.ask("busy", 60_000)) < 1 << 20
    assert [(status.st_size, status.st_blocks) for status in map(os.fstat, homes.fds)] == sizes
    assert all_locks(worker, homes) == 0


def test_a_home_holds_one_lock_for_a_token_and_none_for_one_that_was_given_up(start: Start, homes: Homes) -> None:
    (worker,) = start(1)
    tokens = [new_token() for _ in range(500)]
    worker.ask("settle", *tokens)
    assert all_locks(worker, homes) == 500
    worker.give_up(*tokens[:200])
    assert all_locks(worker, homes) == 300
    worker.give_up(*tokens)
    assert all_locks(worker, homes) == 0
