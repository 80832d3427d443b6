"""The parts of relay-usage that need no database: percentiles, days, units, the table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from array import array
from collections.abc import Iterator
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.report import periods
from relay.report.database import Now
from relay.report.export import as_csv, as_json
from relay.report.layout import Screen, bar, table
from relay.report.spread import RUN_LENGTH, Spread, percentile, runs_of, sort_runs, spread_of
from relay.report.summing_up import Report, sum_up
from relay.report.tally import Sums, Tally, Values, spreads
from relay.report.units import duration, size

DAY = date(2026, 11, 20).toordinal()
NOON = 1795176000  # 2026-11-20 12:00 UTC


def nearest_rank(values: list[float], percent: int) -> float:
    """Return the percentile as its definition says."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


@given(
    st.lists(st.lists(st.integers(0, 20) | st.floats(0, 1e6), max_size=30), max_size=8).filter(any),
    st.sampled_from([1, 50, 95, 100]),
)
def test_a_percentile_over_runs_is_the_one_over_all_their_values(runs: list[list[float]], percent: int) -> None:
    everything = [value for run in runs for value in run]
    assert percentile([sorted(run) for run in runs], percent) == nearest_rank(everything, percent)


def test_there_is_no_spread_of_nothing() -> None:
    assert spread_of([]) is None
    assert spread_of([array("d")]) is None
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_more_values_than_one_run_holds_are_sorted_in_several() -> None:
    count = RUN_LENGTH * 2 + 10
    values = array("q", range(count, 0, -1))
    sort_runs(values)
    runs = runs_of(values)
    assert [len(run) for run in runs] == [RUN_LENGTH, RUN_LENGTH, 10]
    assert spread_of(runs) == Spread(median=count // 2, p95=math.ceil(count * 0.95))


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    """Put the process into a time zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


ZONES = ["Europe/Berlin", "Asia/Kathmandu", "America/St_Johns", "Australia/Lord_Howe", "UTC"]


@pytest.mark.parametrize("zone", ZONES, indirect=True)
@pytest.mark.usefixtures("zone")
def test_every_moment_is_on_its_local_day() -> None:
    for moment in range(NOON, NOON + 400 * 86400, 8999):
        assert periods.day_of(moment, utc=False) == date.fromtimestamp(moment).toordinal()


@pytest.mark.parametrize("zone", ZONES, indirect=True)
@pytest.mark.usefixtures("zone")
def test_the_offsets_of_a_stretch_are_those_of_each_moment_in_it() -> None:
    first, last = NOON, NOON + 800 * 86400
    changes = periods.offsets(first, last, utc=False)
    for moment in range(first, last, 8999):
        told = [change.seconds for change in changes if change.since <= moment][-1]
        assert told == time.localtime(moment).tm_gmtoff
    for change in changes[1:]:
        assert time.localtime(change.since - 1).tm_gmtoff != change.seconds


@pytest.mark.parametrize("zone", ["Pacific/Auckland"], indirect=True)
@pytest.mark.usefixtures("zone")
def test_days_in_utc_do_not_ask_for_the_local_zone() -> None:
    assert periods.day_of(NOON, utc=True) == DAY
    assert periods.day_of(NOON, utc=False) == DAY + 1
    assert periods.offsets(0, NOON, utc=True) == [periods.Offset(0, 0)]


def test_weeks_begin_on_monday_and_months_on_the_first() -> None:
    assert periods.label(periods.first_day(DAY, "week"), "week") == "2026-W47"
    assert date.fromordinal(periods.first_day(DAY, "week")).isoformat() == "2026-11-16"
    assert date.fromordinal(periods.last_day(periods.first_day(DAY, "week"), "week")).isoformat() == "2026-11-22"
    assert date.fromordinal(periods.first_day(DAY, "month")).isoformat() == "2026-11-01"
    assert date.fromordinal(periods.last_day(periods.first_day(DAY, "month"), "month")).isoformat() == "2026-11-30"
    assert [periods.label(day, "month") for day in periods.latest(3, date(2026, 1, 31).toordinal(), "month")] == [
        "2025-11",
        "2025-12",
        "2026-01",
    ]


def test_a_time_that_no_calendar_has_is_confined() -> None:
    assert periods.day_of(-1e300, utc=True) == periods.EPOCH_DAY
    assert periods.day_of(1e300, utc=True) == date(2100, 1, 1).toordinal()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (10_000, "10 kB"),
        (999_499, "999 kB"),
        (999_999, "1.00 MB"),
        (1_050_000_000, "1.05 GB"),
        (148_583_366_410_000, "149 TB"),
        (2 * 10**15, "2 PB"),
    ],
)
def test_sizes_are_in_powers_of_ten(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00014, "0.14 ms"),
        (0.2144, "214 ms"),
        (0.9997, "1.00 s"),
        (1, "1 s"),
        (46.78, "46.8 s"),
        (59.96, "1m00s"),
        (185.4, "3m05s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (86399, "1d00h"),
        (183600, "2d03h"),
    ],
)
def test_times_are_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def tally(sizes: list[int], lonely: int = 0, errory: int = 0) -> Tally:
    """Return a day with transfers of these sizes, each of which waited 2 s and took 10."""
    counts = len(sizes)
    values = Values(array("q", sizes), array("d", [2.0] * counts), array("d", [10.0] * counts))
    counted = Tally(values=values)
    counted.settle()
    counted.add_unpaired("lonely", lonely, 0)
    counted.add_unpaired("errory", errory, 0)
    return counted


def test_a_week_is_the_sum_of_its_days_and_its_percentiles_are_over_all_of_them() -> None:
    days = {DAY - 1: tally([10, 20], lonely=1), DAY: tally([30], errory=2), DAY - 7: tally([1000])}
    (week,) = sum_up(days, "week", 1, DAY)
    assert week.sums == Sums(connections=6, bytes=60, happy=3, lonely=1, errory=2)
    assert week.spreads.size == Spread(median=20, p95=30)


def test_the_last_days_include_the_empty_ones_and_all_leaves_them_out() -> None:
    days = {DAY - 3: tally([10])}
    assert [period.sums.connections for period in sum_up(days, "day", 5, DAY)] == [0, 1, 0, 0, 0]
    assert [period.first for period in sum_up(days, "day", None, DAY)] == [DAY - 3]


def test_a_mood_of_the_future_is_a_connection_of_no_known_mood() -> None:
    counted = tally([])
    counted.add_unpaired("puzzled", 3, 5)
    assert counted.sums() == Sums(connections=3, bytes=15, happy=0, lonely=0, errory=0)


def report(*days: Tally, refreshed: int | None = NOON - 120) -> Report:
    """Return a report at noon of the day, the last of the days given."""
    counted = {DAY - len(days) + 1 + number: day for number, day in enumerate(days)}
    told = sum_up(counted, "day", len(days) or 1, DAY) if days else []
    total = Sums(
        *(
            sum(getattr(day.sums(), name) for day in days)
            for name in ("connections", "bytes", "happy", "lonely", "errory")
        )
    )
    return Report(
        paths=("usage.sqlite",),
        made=NOON,
        zone="UTC",
        now=Now(connected=1, waiting=2, partial_bytes=30_000, refreshed=refreshed),
        since_start=total,
        all_time=total,
        spreads=spreads(day.values for day in days),
        span="day",
        periods=told,
    )


def test_the_table_tells_everything_and_is_plain_for_a_pipe() -> None:
    text = table(report(tally([10_000, 30_000], lonely=3)), Screen())
    assert "now: 1 pair connected, 2 waiting, 30 kB under way (refreshed 2m00s ago)" in text
    assert "2026-11-20" in text
    assert "40 kB" in text
    assert text.isascii()
    assert "#" not in text


def test_the_table_says_when_nobody_refreshes_it() -> None:
    assert "not refreshed for 11m40s" in table(report(refreshed=NOON - 700), Screen())
    assert "never refreshed" in table(report(refreshed=None), Screen())
    assert "but refreshed 1h00m from now, by a clock that was wrong" in table(report(refreshed=NOON + 3600), Screen())
    assert "(refreshed 0 s ago)" in table(report(refreshed=NOON + 2), Screen())


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 300])
def test_the_table_keeps_to_the_width_of_the_terminal(width: int) -> None:
    lines = table(
        report(tally([10_000] * 500, lonely=300, errory=7), tally([5])), Screen(width, blocks=True)
    ).splitlines()
    assert max(map(len, lines)) <= max(width, 75)
    assert any("█" in line for line in lines) == (width >= 80)


def test_bars_are_as_long_as_the_connections_and_parted_by_mood() -> None:
    screen = Screen(width=80, blocks=False)
    assert bar(Sums(100, 0, 50, 30, 20), 100, 20, screen) == "#" * 10 + "=" * 6 + "-" * 4
    assert bar(Sums(50, 0, 50, 0, 0), 100, 20, screen) == "#" * 10
    assert bar(Sums(1, 0, 0, 0, 1), 1_000_000, 20, screen) == "-"
    assert bar(Sums(0, 0, 0, 0, 0), 100, 20, screen) == ""


def test_colours_come_only_when_asked_for() -> None:
    told = report(tally([1]))
    assert "\x1b[" in table(told, Screen(100, colours=True))
    assert "\x1b[" not in table(told, Screen(100, colours=False))


def test_json_and_csv_say_the_same() -> None:
    told = report(tally([10_000, 30_000], lonely=3), tally([]))
    document = json.loads(as_json(told))
    rows = list(csv.DictReader(io.StringIO(as_csv(told))))
    assert document["now"] == {
        "connected": 1,
        "waiting": 2,
        "partial_bytes": 30_000,
        "refreshed": NOON - 120,
        "stale": False,
    }
    assert document["all_time"]["size"] == {"median": 10_000, "p95": 30_000}
    assert [row["span"] for row in rows] == ["now", "since_start", "all_time", "day", "day"]
    first = document["periods"][0]
    assert rows[3]["period"] == first["period"] == "2026-11-19"
    assert rows[3]["connections"] == str(first["connections"]) == "5"
    assert float(rows[3]["waiting_time_p95"]) == first["waiting_time"]["p95"] == 2.0
    assert document["periods"][1]["size"] is None
    assert rows[4]["size_median"] == ""
