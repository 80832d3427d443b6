"""The bookkeeping of the bounds, without a socket."""

from __future__ import annotations

import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from relay.clients.bounds import LOG_SECONDS, NEW_OF_SITE, Bound, BoundsMet, Sources
from relay.clients.sources import source_of


@given(
    most=st.integers(1, 4),
    most_new=st.integers(1, 6),
    events=st.lists(st.tuples(st.sampled_from(["come", "come", "go", "second"]), st.sampled_from([b"a", b"b"]))),
)
def test_a_source_has_at_most_its_share_and_is_forgotten_when_it_has_gone(
    most: int, most_new: int, events: list[tuple[str, bytes]]
) -> None:
    sources = Sources(most, most_new)
    here: Counter[bytes] = Counter()
    came: Counter[bytes] = Counter()
    for event, source in events:
        if event == "come":
            came[source] += 1
            bound = sources.refuses(source)
            if came[source] > most_new:
                assert bound is Bound.NEW_PER_SOURCE
            elif here[source] >= most:
                assert bound is Bound.PER_SOURCE
            else:
                assert bound is None
                sources.add(source)
                here[source] += 1
        elif event == "go" and here[source]:
            sources.remove(source)
            here[source] -= 1
        elif event == "second":
            sources.next_second()
            came.clear()
        assert len(sources) == len({source for source in b"ab" if here[bytes([source])] or came[bytes([source])]})
    for source, count in here.items():
        for _ in range(count):
            sources.remove(source)
    sources.next_second()
    assert len(sources) == 0


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(["192.0.2.1", *(f"2001:db8:{n // 2}:{n}::1" for n in range(4))])))
)
def test_the_networks_of_one_site_are_counted_together_too(events: list[tuple[bool, str]]) -> None:
    sources = Sources(1000, 1000)
    here: Counter[str] = Counter()
    for comes, host in events:
        if comes:
            sources.add(source_of(host))
            here[host] += 1
        elif here[host]:
            sources.remove(source_of(host))
            here[host] -= 1
    for host in [*here]:
        site = host.rpartition(":")[0].rpartition(":")[0].rpartition(":")[0]  # or "" for the one with IPv4
        together = sum(count for other, count in here.items() if other.startswith(f"{site}:" if site else host))
        assert sources.count_at_site(source_of(host)) == together
        assert sources.count(source_of(host)) == here[host]
    assert sources.count_at_site(None) == 0


def test_newcomers_of_one_site_are_bounded_together_and_one_network_of_it_keeps_no_other_out() -> None:
    sources = Sources(1000, 10)
    networks = [source_of(f"2001:db8:0:{number:x}::1") for number in range(20)]
    neighbour, elsewhere, household = source_of("2001:db8:0:ff::1"), source_of("2001:db8:1::1"), source_of("192.0.2.1")
    for _ in range(2):
        assert [sources.refuses(networks[0]) for _ in range(1000)] == [None] * 10 + [Bound.NEW_PER_SOURCE] * 990
        assert [sources.refuses(neighbour) for _ in range(10)] == [None] * 10
        came = [sources.refuses(network) for _ in range(10) for network in networks[1:]]
        assert came == [None] * (10 * NEW_OF_SITE - 20) + [Bound.NEW_PER_SOURCE] * (190 + 20 - 10 * NEW_OF_SITE)
        assert sources.refuses(elsewhere) is None
        assert sources.refuses(household) is None
        sources.next_second()


def test_a_source_whose_connections_siblings_hand_on_may_come_to_have_too_many() -> None:
    sources = Sources(2, 100)
    for expected in (False, False, True):
        sources.add(b"a")
        assert sources.has_too_many(b"a") is expected
    sources.remove(b"a")
    assert not sources.has_too_many(b"a")


def test_what_comes_from_a_worker_that_leaves_does_not_count_until_that_is_settled() -> None:
    sources = Sources(4, 100)
    for source in (b"many", b"few"):
        for _ in range(3):
            sources.add(source)
            sources.add_guest(source)
        for _ in range(3 if source == b"many" else 1):
            sources.add(source)
    assert not sources.has_its_share(b"many")
    sources.add(b"many")
    assert sources.has_its_share(b"many")
    sources.remove(b"many")
    assert not sources.has_its_share(b"many"), "guests are the last to go"
    assert not sources.has_its_share(b"few")
    assert sources.settle_guests() == [b"many"]
    assert sources.is_crowded(b"many")
    assert sources.has_its_share(b"few")
    assert not sources.has_its_share(b"many")
    sources.forget_guests(b"many")
    assert sources.has_its_share(b"many")
    assert sources.has_too_many(b"many")
    for _ in range(6):
        sources.remove(b"many")
    assert not sources.has_its_share(b"many")
    sources.forget_all_guests()
    assert sources.settle_guests() == []


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from(list(Bound)), st.integers(1, 1000))))
def test_the_log_says_each_bound_at_most_once_a_minute_and_forgets_no_time_it_was_met(
    events: list[tuple[int, Bound, int]],
) -> None:
    met = BoundsMet()
    noted: Counter[str] = Counter()
    said: Counter[str] = Counter()
    told_at: dict[str, int] = {}
    now = 0
    for passed, bound, times in [*events, (int(LOG_SECONDS), Bound.WAITING, 1)]:
        now += passed
        met.note(bound, times)
        noted[bound.value] += times
        for line in met.lines(now):
            words, count = re.fullmatch(r"(.*) \((\d+) since this was last said\)", line).groups()  # type: ignore[union-attr]
            assert now - told_at.get(words, -LOG_SECONDS) >= LOG_SECONDS
            told_at[words] = now
            said[words] += int(count)
    assert said == noted
    assert met.lines(now + LOG_SECONDS) == []


@given(st.sets(st.integers(0, 1500)), st.sampled_from([1, 60, 600]))
def test_where_times_are_blurred_the_log_speaks_at_moments_that_no_event_has_chosen(
    events: set[int], blur: int
) -> None:
    now = 1_000_003
    met, met_all_the_time = BoundsMet(blur, now), BoundsMet(blur, now)
    said = 0
    for second in range(2400):
        met_all_the_time.note(Bound.WAITING)
        if second in events:
            met.note(Bound.WAITING)
        lines, lines_in_any_case = met.lines(now + second), met_all_the_time.lines(now + second)
        assert not (lines_in_any_case and second < max(LOG_SECONDS, blur))
        for line in lines:
            assert lines_in_any_case
            said += int(line.rpartition(" (")[2].partition(" ")[0])
    assert said == len(events)


def test_every_bound_says_which_option_it_is_or_what_was_used_up() -> None:
    for bound in Bound:
        assert bound.value.startswith("--") or bound is Bound.EXHAUSTED
