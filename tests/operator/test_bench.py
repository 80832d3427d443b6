"""The benchmark itself: its C programs compile without a warning, and a row of it runs from end to end.

No number is asserted here: what a goal says is measured by `make bench`, on a machine that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.needs import needs_a_compiler

HERE = Path(__file__).resolve().parents[2]
BENCH = HERE / "misc" / "bench"


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "run.py"), *words], capture_output=True, text=True, timeout=100, cwd=HERE
    )


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., dict[str, dict[str, list[float | None]]]]:
    """Measures some rows, small and short, of our relay and the C loop; gives every sample by figure and peer."""

    def measure(*names: str) -> dict[str, dict[str, list[float | None]]]:
        kept = tmp_path / "run.json"
        only = [word for name in names for word in ("--only", name)]
        done = bench("--quick", "--rounds", "1", "--peers", "relay,c", "--json", str(kept), *only)
        assert done.returncode == 0, done.stderr
        assert "FAILED" not in done.stderr, done.stderr
        series: dict[str, dict[str, list[float | None]]] = json.loads(kept.read_text())["series"]
        return series

    return measure


@needs_a_compiler
@pytest.mark.parametrize("program", ["load", "splice_relay", "frame_relay"])
def test_the_c_programs_of_the_benchmark_compile_without_a_warning(program: str, tmp_path: Path) -> None:
    flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread"]
    done = subprocess.run(
        ["cc", *flags, str(BENCH / f"{program}.c"), "-o", str(tmp_path / program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_a_compiler
def test_bulk_pairs_through_the_relay_are_measured_beside_the_splice_loop(
    quick: Callable[..., dict[str, dict[str, list[float | None]]]],
) -> None:
    series = quick("bulk-1")
    assert set(series["cpu-1"]) == {"relay", "C loop"}
    assert all(value and value > 0 for peer in series["cpu-1"].values() for value in peer)


@needs_a_compiler
def test_websocket_clients_are_measured_beside_the_loop_that_unmasks(
    quick: Callable[..., dict[str, dict[str, list[float | None]]]],
) -> None:
    series = quick("web-mixed", "web-to-web", "web-both", "web-idle")  # fails when a byte of payload is lost or doubled
    for figure in ("web-cpu-mixed", "web-cpu-to-web", "web-both-cpu"):
        assert set(series[figure]) == {"relay", "C loop"}
        assert all(value and value > 0 for peer in series[figure].values() for value in peer)
    assert set(series["web-idle"]) == {"relay", "C loop"}


@needs_a_compiler
def test_every_pair_that_the_benchmark_makes_is_found_in_the_relays_records(
    quick: Callable[..., dict[str, dict[str, list[float | None]]]],
) -> None:
    series = quick("recorded")  # fails when a record is missing, or one too many
    assert set(series["recorded-rate"]) == {"relay"}


@needs_a_compiler
def test_content_that_the_relay_passes_on_is_compared_by_its_hash(
    quick: Callable[..., dict[str, dict[str, list[float | None]]]],
) -> None:
    assert quick("content")["content"]["relay"] == [1.0]


def test_a_row_that_does_not_exist_is_refused_in_one_line() -> None:
    done = bench("--only", "no-such-row")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["bench: error: --only no-such-row: nothing is called so; see --list"]


@needs_a_compiler
def test_a_benchmark_without_a_relay_is_refused_in_one_line(tmp_path: Path) -> None:
    done = bench("--relay", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_what_frames_cost_is_measured_without_a_relay() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "frames.py"), "--quick"], capture_output=True, text=True, timeout=100, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "s/GiB" in line or "µs" in line]
    assert len(rows) == 13
    assert all(any(float(word) >= 0 for word in row.split() if word.replace(".", "").isdigit()) for row in rows)
