"""A token lives with the worker where its first client waits, and all others can tell."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.workers import buckets
from relay.workers.buckets import ROOTS, SLOTS, root_of
from relay.workers.homes import FILES, PLACES, Homes
from relay.workers.matches import PLACES_OF_A_TOKEN
from tests.support.harness import new_token, open_fds
from tests.support.home_table import buckets_in_use, entries
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


def entries_of(worker: HomesWorker, homes: Homes) -> int:
    """How many places of tokens a process has."""
    return entries(homes.fds[0], worker.pid)


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
    assert (entries_of(first, homes), entries_of(second, homes)) == (1, 0)
    first.give_up(token)
    assert entries_of(first, homes) == 0
    assert second.settle(token) == (second.pid, True)


def test_a_worker_knows_what_it_is_home_to_for_certain(start: Start, homes: Homes) -> None:
    (other,) = start(1)
    ours, theirs, nobodys = (new_token().encode() for _ in range(3))
    assert homes.settle(ours, lambda pid: True) == (os.getpid(), True)
    other.settle(theirs.decode())
    assert [homes.is_ours(token) for token in (ours, theirs, nobodys)] == [True, False, False]
    assert homes.settle(theirs, lambda pid: False) == (os.getpid(), False), "for the time being"
    assert not homes.is_ours(theirs)
    homes.give_up(ours)
    assert not homes.is_ours(ours)


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
    # Also when it is home at a place that is not the first.
    second.absent(first.pid)
    assert second.settle(token) == (second.pid, False)
    assert (first.holder(token), second.holder(token)) == (second.pid, first.pid)
    first.give_up(token)
    assert (first.holder(token), second.holder(token)) == (second.pid, None)


def test_a_match_gives_the_token_up_and_tells_of_another_home_there_may_be(start: Start) -> None:
    first, second = start(2)
    token, contested = new_token(), new_token()
    first.settle(token)
    assert first.match(token, time.monotonic()) is None
    assert second.settle(token) == (second.pid, True)
    assert first.match(token, time.monotonic()) == second.pid
    first.settle(contested)
    second.absent(first.pid)
    assert second.settle(contested) == (second.pid, False)
    assert first.match(contested, time.monotonic()) == second.pid, "at a further place"
    assert second.match(contested, time.monotonic()) is None


def test_to_ask_for_the_holder_makes_nobody_home(start: Start, homes: Homes) -> None:
    first, second = start(2)
    token = new_token()
    assert first.holder(token) is None
    assert entries_of(first, homes) == 0
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
    second.give_up(token)  # all of its places
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


def test_a_token_outlasts_as_many_absent_homes_as_it_has_places(start: Start, homes: Homes) -> None:
    *absent, second, third = start(PLACES + 2)
    token = new_token()
    for number, worker in enumerate(absent):
        worker.absent(*(other.pid for other in absent[:number]))
        assert worker.settle(token) == (worker.pid, number == 0)
    # All places are taken: whoever comes is home to it, and knows that others may be, too.
    for worker in (second, third):
        worker.absent(*(other.pid for other in absent))
        assert worker.settle(token) == (worker.pid, False)
        assert entries_of(worker, homes) == 0
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
    assert open_fds(first.pid) == before - FILES - 2  # one is mapped, and of the other it has a description of its own
    second.start("settle", *tokens)
    assert second.settled() == [(second.pid, True)] * 50


def test_everybody_knows_when_a_token_was_last_matched(start: Start) -> None:
    first, second, third = start(3)
    token, other = new_token(), new_token()
    assert first.last_match(token) == second.last_match(token) == 0.0
    now = time.monotonic()
    first.match(token, now)
    for worker in (first, second, third):
        assert abs(worker.last_match(token) - now) < 1e-6
        assert worker.last_match(other) == 0.0
    second.match(token, now + 1.5)
    first.kill()
    assert abs(third.last_match(token) - now - 1.5) < 1e-6
    (newcomer,) = start(1)
    assert abs(newcomer.last_match(token) - now - 1.5) < 1e-6


def test_a_match_is_forgotten_only_for_later_ones_in_its_places(homes: Homes) -> None:
    now = time.monotonic()
    tokens = [new_token().encode() for _ in range(4000)]
    for number, token in enumerate(tokens):
        homes.match(token, now + number)
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
        group = groups.setdefault(homes._matches.first_place_of(homes._number_of(token)), [])
        group.append(token)
        if len(group) == count:
            return group


def test_of_those_with_the_same_places_the_one_matched_longest_ago_is_forgotten(homes: Homes) -> None:
    now = time.monotonic()
    tokens = in_one_group(homes, PLACES_OF_A_TOKEN + 1)
    for number, token in enumerate(tokens[:-1]):
        homes.match(token, now + number)
    homes.match(tokens[0], now + 10)  # once more, in its own place
    found = [homes.last_match(token) - now for token in tokens[:-1]]
    assert found == pytest.approx([10, *range(1, PLACES_OF_A_TOKEN)])
    homes.match(tokens[-1], now + 11)
    assert [token for token in tokens if not homes.last_match(token)] == [tokens[1]]


def test_half_a_match_is_none(homes: Homes) -> None:
    # Another worker may be writing into the same place while we read.
    for half in (slice(0, 8), slice(8, 16)):
        token = new_token().encode()
        place = homes._matches.first_place_of(homes._number_of(token))
        homes.match(token, time.monotonic())
        assert homes.last_match(token) > 0
        match = bytearray(homes._memory[place : place + 16])
        match[half] = os.urandom(8)
        homes._memory[place : place + 16] = bytes(match)
        assert homes.last_match(token) == 0.0


def test_homes_cannot_be_made_without_file_descriptors(start: Start) -> None:
    (worker,) = start(1)
    # What was open already when it failed is closed again: else the last time would fail, too.
    assert worker.ask("make-with-few-fds") == "EMFILE EMFILE EMFILE EMFILE made"


def test_three_that_settle_the_same_tokens_at_the_same_time_agree_on_one_home_for_each(start: Start) -> None:
    workers = start(3)
    tokens = [new_token() for _ in range(2000)]
    orders = [random.sample(tokens, len(tokens)) for _ in workers]
    for worker, order in zip(workers, orders, strict=True):
        worker.start("settle", *order)
    said = [dict(zip(order, worker.settled(), strict=True)) for worker, order in zip(workers, orders, strict=True)]
    # One may have been kept from running in the middle of a change; then the others ask again, and whoever was told of
    # a home that was one for the time being hears of the right one with what it is handed.
    doubtful = {token for answers in said for token, (_, certain) in answers.items() if not certain}
    assert len(doubtful) < 120
    for worker, answers in zip(workers, said, strict=True):
        answers.update((token, worker.settle(token)) for token in doubtful)
    assert said[0] == said[1] == said[2]
    assert {pid for pid, _ in said[0].values()} <= {worker.pid for worker in workers}
    assert all(certain for _, certain in said[0].values())
    # And once more: nobody has become home to anything that somebody else was home to.
    for worker in workers:
        worker.start("settle", *tokens)
    assert all(worker.settled() == [said[0][token] for token in tokens] for worker in workers)


class Kept:
    """What the table should say of one token: for each of its places, who has it."""

    def __init__(self) -> None:
        self.places: list[int | None] = [None] * PLACES

    def settle(self, pid: int, absent: set[int]) -> tuple[int, bool]:
        for number, owner in enumerate(self.places):
            if owner in (None, pid):
                self.places[number] = pid
                return pid, number == 0
            if owner not in absent:
                assert owner is not None
                return owner, True
        return pid, False

    def give_up(self, pid: int) -> None:
        self.places = [None if owner == pid else owner for owner in self.places]


def test_whatever_comes_and_goes_the_table_says_who_is_home(start: Start, homes: Homes) -> None:
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
            assert workers[pid].holder(token) in (set(kept[token].places) - {pid, None} or {None}), what
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
        held = [one.places.count(pid) for one in kept.values()]
        worker.give_up(*(token for token, number in zip(kept, held, strict=True) if number))
        assert entries_of(worker, homes) == 0


def test_random_tokens_fall_into_all_roots_alike(homes: Homes) -> None:
    keys = [homes._first_place_of(new_token().encode()) for _ in range(3200)]
    for found in (Counter(root_of(key) % 32 for key in keys), Counter(root_of(key) * 32 // ROOTS for key in keys)):
        assert min(found[group] for group in range(32)) > 40  # six standard deviations
        assert max(found.values()) < 160
    # And the places of a token into different ones.
    assert all(len({root_of(key + place) for place in range(PLACES)}) == PLACES for key in keys)


def test_to_ask_for_many_tokens_costs_no_memory(start: Start, homes: Homes) -> None:
    (worker,) = start(1)
    worker.ask("busy", 1000)
    sizes = [(status.st_size, status.st_blocks) for status in map(os.fstat, homes.fds)]
    assert int(worker.ask("busy", 60_000)) < 1 << 20
    assert [(status.st_size, status.st_blocks) for status in map(os.fstat, homes.fds)] == sizes
    assert entries_of(worker, homes) == 0


def test_a_home_has_one_place_for_a_token_and_none_for_one_that_was_given_up(start: Start, homes: Homes) -> None:
    (worker,) = start(1)
    tokens = [new_token() for _ in range(500)]
    worker.ask("settle", *tokens)
    assert entries_of(worker, homes) == 500
    worker.give_up(*tokens[:200])
    assert entries_of(worker, homes) == 300
    worker.give_up(*tokens)
    assert entries_of(worker, homes) == 0


def test_however_many_tokens_a_worker_is_home_to_the_kernel_keeps_no_list_of_them(start: Start, homes: Homes) -> None:
    workers = start(3)
    for worker in workers:
        worker.ask("settle", *(new_token() for _ in range(3000)))
    assert [entries_of(worker, homes) for worker in workers] == [3000] * 3
    assert [locks(worker.pid, homes.fds[0]) for worker in workers] == [0] * 3
    lives = Path("/proc/locks").read_text().count(f":{os.fstat(homes.fds[1]).st_ino} ")
    assert lives == 4  # each worker's, and ours


def in_one_root(homes: Homes, count: int) -> list[str]:
    """So many tokens whose first places are in one bucket, or below it."""
    roots: dict[int, list[str]] = {}
    while True:
        token = new_token()
        tokens = roots.setdefault(root_of(homes._first_place_of(token.encode())), [])
        tokens.append(token)
        if len(tokens) == count:
            return tokens


def test_a_bucket_that_is_full_has_more_below_it(start: Start, homes: Homes) -> None:
    first, second = start(2)
    tokens = in_one_root(homes, SLOTS + 3)
    first.start("settle", *tokens)
    assert first.settled() == [(first.pid, True)] * len(tokens)
    assert buckets_in_use(homes.fds[0]) == ROOTS + 4
    second.start("settle", *tokens)
    assert second.settled() == [(first.pid, True)] * len(tokens)
    first.give_up(*tokens[:-1])
    second.start("settle", *tokens)
    assert second.settled() == [(second.pid, True)] * (len(tokens) - 1) + [(first.pid, True)]
    assert buckets_in_use(homes.fds[0]) == ROOTS + 4


def test_what_the_dead_have_left_in_a_full_bucket_makes_room(start: Start, homes: Homes) -> None:
    killed, second, third = start(3)
    *tokens, one_more, another = in_one_root(homes, SLOTS + 2)
    killed.ask("settle", *tokens[1:])
    second.settle(tokens[0])
    killed.kill()
    for token in (one_more, another):
        assert third.settle(token) == (third.pid, True)
    assert second.settle(one_more) == (third.pid, True)
    assert third.settle(tokens[0]) == (second.pid, True)
    assert buckets_in_use(homes.fds[0]) == ROOTS


def test_without_memory_for_one_more_a_token_is_at_home_at_another_place(
    start: Start, homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other,) = start(1)
    *tokens, one_more = in_one_root(homes, SLOTS + 1)
    other.ask("settle", *tokens)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        Homes.make()
    assert homes.settle(one_more.encode(), lambda _: True) == (os.getpid(), False)
    other.ask("no-more-memory")
    assert other.settle(one_more) == (os.getpid(), True)
    other.give_up(tokens[3])
    assert homes.settle(one_more.encode(), lambda _: True) == (os.getpid(), True)
    assert other.settle(one_more) == (os.getpid(), True)
    homes.give_up(one_more.encode())
    assert other.settle(one_more) == (other.pid, True)


def test_a_worker_that_stands_still_in_the_middle_of_a_change_stops_nobody(start: Start) -> None:
    stopped, first, second = start(3)
    token, settled_before = new_token(), new_token()
    first.settle(settled_before)
    with stopped.inside(token):
        assert first.settle(token) == (first.pid, False)
        assert second.settle(token) == (first.pid, True)
        assert second.holder(token) == first.pid
        first.give_up(token)
        assert second.settle(token) == (second.pid, False)
        assert first.settle(token) == (second.pid, True)
    assert second.settle(token) == (second.pid, True)
    with stopped.inside(settled_before):
        assert second.settle(settled_before) == (first.pid, True)
        assert first.settle(settled_before) == (first.pid, True)
        first.give_up(settled_before)  # which needs nobody's leave
        assert second.settle(settled_before) == (second.pid, False)
    assert first.settle(settled_before) == (first.pid, True)
    assert second.settle(settled_before) == (first.pid, True)


def test_who_waited_for_one_that_stands_still_does_not_wait_again(
    start: Start, homes: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stopped,) = start(1)
    yields: list[None] = []
    monkeypatch.setattr("os.sched_yield", lambda: yields.append(None))
    monkeypatch.setattr(buckets, "STUCK_SECONDS", 60.0)
    token, *others = in_one_root(homes, 5)
    with stopped.inside(token):
        homes.settle(token.encode(), lambda _: True)
        waited = len(yields)
        assert waited > 0
        for other in others:
            assert homes.settle(other.encode(), lambda _: True) == (os.getpid(), False)
        assert len(yields) == waited
    assert homes.settle(token.encode(), lambda _: True) == (os.getpid(), True)


def test_a_worker_that_is_killed_in_the_middle_of_a_change_keeps_nobody_out(start: Start) -> None:
    killed, first, second = start(3)
    token = new_token()
    with killed.inside(token):
        assert first.settle(token) == (first.pid, False)
        killed.kill()
        assert first.settle(token) == (first.pid, True)
        assert second.settle(token) == (first.pid, True)


def test_a_worker_may_die_after_any_store_and_every_token_can_still_be_settled(start: Start, homes: Homes) -> None:
    first, second = start(2)
    others = in_one_root(homes, SLOTS + 5)
    stores = 0
    while True:
        (dying,) = start(1)
        (dead,) = start(1)
        dead.ask("settle", *others[:3])
        dead.kill()
        first.ask("settle", *others[3:SLOTS])
        dying.ask("die-at-store", stores)
        # It takes what a dead one had, free slots, what the dead have left, and then the bucket has to grow.
        dying.start("settle", others[0], *others[SLOTS:])
        try:
            dying.answer()
            dying.give_up(others[0])
        except (AssertionError, BrokenPipeError):
            pass  # it has died
        else:
            dying.kill()
            break
        dying.end()
        for one, other in ((first, second), (second, first)):
            for token in [*others[:3], *others[SLOTS:]]:
                assert one.settle(token) == (one.pid, True), f"after {stores} stores"
                assert other.settle(token) == (one.pid, True)
                one.give_up(token)
        for token in others[3:SLOTS]:
            assert second.settle(token) == (first.pid, True)
        first.give_up(*others)
        stores += 1
    assert stores > 8


def test_workers_that_are_killed_at_any_moment_leave_no_token_that_two_are_home_to(start: Start, homes: Homes) -> None:
    tokens = [new_token() for _ in range(60)]
    first, second = start(2)
    for _ in range(12):
        (victim,) = start(1)
        for worker in (first, second, victim):
            worker.start("come-and-go", 400, *tokens)
        time.sleep(random.random() * 0.05)  # somewhere in the middle
        victim.kill()
        for worker in (first, second):
            assert worker.answer() == "done"
        for worker in (first, second):
            worker.ask("settle", *tokens)  # of some it may not have been certain
        first.start("settle", *tokens)
        said = first.settled()
        assert set(said) <= {(first.pid, True), (second.pid, True)}
        second.start("settle", *tokens)
        assert second.settled() == said
        first.give_up(*tokens)
        second.give_up(*tokens)
        assert entries_of(first, homes) == entries_of(second, homes) == 0


def test_nobody_loses_its_life_with_a_spare_file_descriptor(start: Start) -> None:
    first, second = start(2)
    token = new_token()
    first.settle(token)
    first.ask("close-spares")
    assert second.settle(token) == (first.pid, True)


def test_another_process_with_the_same_id_is_somebody_else(start: Start, homes: Homes) -> None:
    # We play it: process ids come round.
    (other,) = start(1)
    token = new_token()
    with contextlib.closing(Homes([os.dup(fd) for fd in homes.fds])) as before:
        assert before.settle(token.encode(), lambda _: True) == (os.getpid(), True)
        assert other.settle(token) == (os.getpid(), True)
    assert other.settle(token) == (other.pid, True)
