"""The blur: what may be known of a transfer from what is written about it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.usage.record import Record, blur, blur_size
from tests.support.usage_records import records, sizes


@pytest.mark.parametrize(
    ("size", "blurred"),
    [
        (0, 0),
        (1, 10_000),
        (10_000, 10_000),
        (10_001, 20_000),
        (999_999, 1_000_000),
        (1_000_000, 1_000_000),
        (1_000_001, 2_000_000),
        (999_999_999, 1_000_000_000),
        (1_000_000_000, 1_000_000_000),
        (1_050_000_000, 1_100_000_000),
    ],
)
def test_a_size_is_rounded_up_to_the_step_of_its_range(size: int, blurred: int) -> None:
    assert blur_size(size) == blurred


@given(sizes)
def test_a_blurred_size_is_the_next_multiple_of_the_step_and_never_below_the_size(size: int) -> None:
    step = 10_000 if size < 10**6 else 10**6 if size < 10**9 else 10**8
    assert blur_size(size) % step == 0
    assert 0 <= blur_size(size) - size < step


@given(sizes)
def test_blurring_a_size_twice_is_blurring_it_once(size: int) -> None:
    assert blur_size(blur_size(size)) == blur_size(size)


@given(sizes, sizes)
def test_a_larger_size_is_never_blurred_to_a_smaller_one(one: int, other: int) -> None:
    assert blur_size(min(one, other)) <= blur_size(max(one, other))


@given(records, st.integers(min_value=1, max_value=10**6))
def test_a_blurred_start_is_the_whole_multiple_of_the_seconds_below_the_true_one(record: Record, seconds: int) -> None:
    started = blur(record, seconds).started
    assert isinstance(started, int)
    assert started % seconds == 0
    assert 0 <= math.floor(record.started) - started < seconds


@given(records, st.integers(min_value=1, max_value=10**6))
def test_blur_hides_the_start_and_the_size_and_nothing_else(record: Record, seconds: int) -> None:
    blurred = blur(record, seconds)
    assert blurred.total_bytes == blur_size(record.total_bytes)
    assert (blurred.total_time, blurred.waiting_time, blurred.mood) == (
        record.total_time,
        record.waiting_time,
        record.mood,
    )
    assert blur(blurred, seconds) == blurred


@given(records)
def test_without_blur_a_record_stays_as_it_is(record: Record) -> None:
    assert blur(record, None) == record
