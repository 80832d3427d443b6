"""The parts of relay-status that need no database: health, rates, readings."""

from __future__ import annotations

import dataclasses
import math

from relay.report.counters import numbers_of
from relay.report.paths import NOT_MEASURED, as_text, paths_of
from relay.report.tally import Sums
from relay.status.health import HELD_BACK_FOR, MISSING_FOR, REMEMBERED, Health, Staff, judge
from relay.status.observer import Seen
from relay.status.plots import nice_top
from relay.status.rates import DAY, HOUR, Rates
from relay.status.reading import Reading, Worker, together
from relay.transfer.path import PathCounts, Side, limit_of

NOTHING = Sums(0, 0, 0, 0, 0)
WORKER = Worker(pid=1, start="100", lives=True, connected=0, waiting=0, partial_bytes=0)
READING = Reading(
    at=1_000_000.0,
    connected=0,
    waiting=0,
    partial_bytes=0,
    refreshed=999_900,
    began=900_000,
    since_start=NOTHING,
    all_time=NOTHING,
    workers=(WORKER, dataclasses.replace(WORKER, pid=2)),
    counters={},
)


def health(reading: Reading | None, staff: Staff | None = None, now: float = 100.0, trouble: str = "") -> Health:
    """What is said of one database."""
    return judge([Seen("usage.sqlite", now, reading, trouble, None)], [staff or Staff()], now)


def with_gauges(**gauges: float) -> Reading:
    """A relay of one worker with these."""
    return dataclasses.replace(READING, workers=(dataclasses.replace(WORKER, gauges=gauges),))


# Health.


def test_a_relay_that_does_nothing_is_well() -> None:
    assert health(READING) == Health("The relay runs with 2 workers and is idle.", ())


def test_workers_that_do_not_come_back_are_missed_until_that_is_how_it_is() -> None:
    staff = Staff()
    for second in range(0, 60, 5):
        staff.note(second, 2)
    one = dataclasses.replace(READING, workers=(WORKER,))
    staff.note(60, 1)
    assert health(one, staff, 60 + MISSING_FOR - 1).is_well
    found = health(one, staff, 60 + MISSING_FOR)
    assert [complaint.kind for complaint in found.complaints] == ["missing"]
    assert found.state.startswith("Workers are missing: 1 run, there should be 2.")
    staff.note(90, 2)
    assert health(READING, staff, 200).is_well
    staff.note(100, 1)
    staff.note(91 + REMEMBERED, 1)
    assert health(one, staff, 91 + REMEMBERED).is_well


def test_a_worker_that_could_not_write_yet_is_not_missed_but_told_of_when_it_stays_so() -> None:
    staff = Staff(2)
    restarted = dataclasses.replace(READING, workers=(WORKER,), unwritten=1)
    staff.note(0, restarted.workers_running, restarted.unwritten)
    assert health(restarted, staff, MISSING_FOR - 1) == Health("The relay runs with 2 workers and is idle.", ())
    found = health(restarted, staff, MISSING_FOR)
    assert [complaint.kind for complaint in found.complaints] == ["kept"]
    assert found.state.startswith("A worker lives, and could not write")
    staff.note(20, 2)
    assert health(READING, staff, 100).is_well


def test_records_that_are_held_back_for_longer_than_a_moment_are_told_of_with_the_reason_that_can_be_seen() -> None:
    staff = Staff()
    holding = dataclasses.replace(READING, holding=1)
    staff.note(0, 2, holding=1)
    assert health(holding, staff, HELD_BACK_FOR / 2).is_well
    assert "held back, they cannot be written" in health(holding, staff, HELD_BACK_FOR).state
    full = dataclasses.replace(holding, disk_is_full=True)
    found = health(full, staff, HELD_BACK_FOR)
    assert [complaint.kind for complaint in found.complaints] == ["kept"]
    assert "no space is left" in found.state
    staff.note(10, 2, holding=0)
    assert health(READING, staff, 100).is_well


def test_a_disk_without_space_for_others_is_no_trouble_of_a_relay_that_holds_nothing_back() -> None:
    assert health(dataclasses.replace(READING, disk_is_full=True, holding=0)).is_well


def test_a_worker_that_stands_still_is_told_of_when_it_stays_so_as_the_others_say() -> None:
    seen_by_other = dataclasses.replace(WORKER, pid=2, gauges={"silent_siblings": 1})
    reading = dataclasses.replace(READING, workers=(WORKER, seen_by_other))
    staff = Staff()
    staff.note(0, 2, silent=reading.silent)
    assert health(reading, staff, MISSING_FOR - 1).is_well
    found = health(reading, staff, MISSING_FOR)
    assert [complaint.kind for complaint in found.complaints] == ["silent"]
    assert found.state.startswith("A worker lives and does not answer the others")
    staff.note(20, 2, silent=READING.silent)
    assert health(READING, staff, 100).is_well
    gone = dataclasses.replace(reading, workers=(WORKER, dataclasses.replace(seen_by_other, lives=False)))
    assert gone.silent == 0, "what one said that is dead now is no news"


def test_as_many_workers_as_the_operator_wants_are_missed_from_the_beginning() -> None:
    staff = Staff(3)
    staff.note(0, 2)
    assert not health(READING, staff, MISSING_FOR).is_well
    staff.note(MISSING_FOR, 3)
    assert health(READING, staff, MISSING_FOR).is_well


def test_each_complaint_has_its_words() -> None:
    for reading, kind, words in (
        (None, "unreadable", "The database cannot be read: no such file."),
        (dataclasses.replace(READING, workers=()), "unheard", "The relay does not run"),
        (dataclasses.replace(READING, workers=(), refreshed=None), "unheard", "not heard of yet"),
        (dataclasses.replace(READING, workers=(), unwritten=1), "kept", "A worker lives, and could not write"),
        (dataclasses.replace(READING, refreshed=999_000), "unheard", "not heard of for more than ten minutes"),
        (with_gauges(connections=10, connections_limit=10), "full", "The relay is full"),
        (with_gauges(kept_records=3), "kept", "3 records are held back"),
        (dataclasses.replace(READING, disk_is_full=True), "kept", "no space is left"),
    ):
        found = health(reading, trouble="no such file")
        assert [complaint.kind for complaint in found.complaints] == [kind]
        assert words in found.state


def test_a_relay_with_a_place_left_in_one_worker_is_not_full() -> None:
    workers = [dataclasses.replace(WORKER, gauges={"connections": n, "connections_limit": 10}) for n in (10, 9)]
    assert health(dataclasses.replace(READING, workers=tuple(workers))).is_well


def test_a_reading_that_does_not_come_is_no_news_of_the_relay() -> None:
    seen = Seen("usage.sqlite", 100.0, READING, "", None)
    assert judge([seen], [Staff()], 105.0).is_well
    assert [one.kind for one in judge([seen], [Staff()], 130.0).complaints] == ["unreadable"]


# Readings.


def test_what_is_no_number_in_a_database_is_no_number_here() -> None:
    assert numbers_of('{"a": 1, "b": 2.5, "c": "x", "d": true, "e": null, "f": -1, "g": NaN, "h": Infinity}') == {
        "a": 1,
        "b": 2.5,
    }
    for nothing in (None, 7, b"{}", "", "[1]", "{", "null"):
        assert numbers_of(nothing) == {}


def test_readings_of_several_machines_add_up() -> None:
    one = dataclasses.replace(READING, connected=1, counters={"bytes": 10, "refused.x": 1})
    other = dataclasses.replace(READING, connected=2, counters={}, since_start=Sums(1, 5, 1, 0, 0), began=800_000)
    both = together([one, other])
    assert both is not None
    assert (both.connected, both.bytes, both.began, len(both.living)) == (3, 15, 800_000, 4)
    assert both.counters == {"bytes": 15, "refused.x": 1}
    assert together([]) is None


def test_workers_are_called_by_their_numbers_and_by_more_where_these_are_the_same() -> None:
    twins = [dataclasses.replace(WORKER, start=start) for start in ("100", "107")]
    workers = (*twins, dataclasses.replace(WORKER, pid=3), dataclasses.replace(WORKER, pid=3, lives=False))
    assert dataclasses.replace(READING, workers=workers).names == ["1 (start 100)", "1 (start 107)", "3"]


def test_the_counts_of_paths_end_in_what_to_do() -> None:
    assert paths_of({"bytes": 1}) is None
    assert as_text(None) == f"{NOT_MEASURED}\n"
    counts = PathCounts()
    assert as_text(paths_of(counts.counters())) == f"{NOT_MEASURED}\n"
    near = Side(rtt=0.002, busy=0.1, window_shut=0.0, resent=0.0, out_of_order=0.0)
    busy = Side(rtt=0.2, busy=9.0, window_shut=0.0, resent=0.02, out_of_order=0.0)
    for _ in range(3):
        counts.note(near, busy, size=10_000_000, seconds=10, held_back=0, load=0.1)
    counts.note(busy, near, size=10_000_000, seconds=10, held_back=0, load=0.1)
    text = as_text(paths_of(counts.counters()))
    assert "75% of 4 transfers were limited by the path" in text
    assert "--congestion-control bbr" in text
    for line in ("path 3", "sender 1", "receiver 0", "3 ms 4", "300 ms 4", "3 % 3", "0 % 1", "1 MB/s 4"):
        assert line in [" ".join(each.split()) for each in text.splitlines()], line


def test_what_limited_a_transfer_follows_from_what_the_kernel_saw() -> None:
    def limit(held_back: float = 0, load: float = 0.1, **sides: float) -> str:
        quiet = Side(rtt=None, busy=0, window_shut=0, resent=0, out_of_order=sides.get("out_of_order", 0))
        receiver = Side(None, sides.get("busy", 0), sides.get("window_shut", 0), 0, 0)
        return limit_of(quiet, receiver, seconds=10, held_back=held_back, load=load)

    assert limit() == "sender"
    assert limit(out_of_order=0.02) == "path"
    assert limit(busy=9) == "path"
    assert limit(busy=9, window_shut=8) == "receiver"
    assert limit(busy=9, window_shut=8, held_back=0.6) == "relay"
    assert limit(load=0.95) == "relay"


def test_bytes_relayed_never_go_back_when_workers_begin_to_count_them() -> None:
    seen = []
    for counters, recorded in (({}, 100), ({"bytes": 0}, 100), ({"bytes": 50}, 120), ({"bytes": 500}, 130)):
        reading = dataclasses.replace(READING, counters=counters, since_start=Sums(1, recorded, 1, 0, 0))
        seen.append(reading.bytes)
    assert seen == [100, 100, 120, 500]


# Rates.


def rates_of(per_second: float, seconds: int, step: int = 5) -> Rates:
    """So many bytes a second for so long."""
    rates = Rates()
    for second in range(0, seconds + 1, step):
        rates.note(second, per_second * second, second, 1, 2)
    return rates


def test_a_steady_rate_is_that_rate_over_each_time_that_is_known() -> None:
    rates = rates_of(1000, 2 * HOUR)
    for seconds in (10, 60, 300, 900, HOUR):
        assert rates.bytes_per_second(seconds) == 1000
    assert rates.bytes_per_second(DAY) is None
    assert rates_of(1000, DAY + 60).bytes_per_second(DAY) == 1000


def test_a_service_that_starts_anew_is_no_rate_below_zero() -> None:
    rates = Rates()
    for second, moved in ((0, 1000), (5, 2000), (10, 500), (15, 1000)):
        rates.note(second, moved, 0, 0, 0)
    assert rates.bytes_per_second(10) == 100


def test_a_plot_shows_when_something_moved_and_where_nobody_looked() -> None:
    rates = Rates()
    for second in range(0, 301, 5):
        rates.note(second, 100 * min(second, 100), 0, int(second <= 100), 0)
    points = rates.points(600, 10)
    assert [point.rate for point in points] == [None] * 5 + [100, *([points[6].rate]), 0, 0, 0]
    assert [point.pairs for point in points[5:]] == [1, 1, 0, 0, 0]
    assert points[0].ago == 600


def test_what_is_remembered_has_a_bound() -> None:
    rates = rates_of(1, 3 * DAY)
    assert len(rates._fine) + len(rates._coarse) < 2200


def test_the_scale_of_a_plot_ends_at_1_2_or_5() -> None:
    for value, top in ((0, 1), (0.3, 0.5), (1, 1), (1.01, 2), (3, 5), (7, 10), (4e6, 5e6), (1e9, 1e9)):
        assert math.isclose(nice_top(value), top), value
