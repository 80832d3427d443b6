"""Fixtures that all tests share, and the rule that a run which must be complete skips nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.harness import SHAPES, Relay, Service, relay_of
from tests.support.usage_disk import disk_of

NO_SKIPS = "RELAY_TESTS_NO_SKIPS"

# On a machine that does other things as well, how long an example takes says nothing about the relay.
settings.register_profile("relay", deadline=None)
settings.load_profile("relay")


@pytest.fixture
def relay_factory(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    """Start relays with the arguments of `Relay` save the folder: each gets one of its own. All end with the test."""
    with contextlib.ExitStack() as stack:
        number = 0

        def start(*options: str, **settings: object) -> Relay:
            nonlocal number
            folder = tmp_path / f"relay{number}"
            folder.mkdir()
            number += 1
            return stack.enter_context(Relay(folder, *options, **settings))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Whatever a test opens is closed at its end, what came last first."""
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, which is soon full."""
    with disk_of("1m", tmp_path) as disk:
        yield disk


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """One worker that records to JSON lines and to the database, unblurred."""
    with Relay(tmp_path, recording=True) as started:
        yield started


@pytest.fixture(params=SHAPES)
def any_relay_factory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start one recording relay, with the options and `nofile` of the call: once as a single worker and once as two
    that share a run directory."""
    with contextlib.ExitStack() as stack:
        yield lambda *options, **settings: stack.enter_context(relay_of(request.param, tmp_path, *options, **settings))


@pytest.fixture
def any_relay(any_relay_factory: Callable[..., Service]) -> Service:
    """A recording relay, once as a single worker and once as two that share a run directory."""
    return any_relay_factory()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that has to be complete (RELAY_TESTS_NO_SKIPS=1, as .ci/run sets it) when a test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(NO_SKIPS) == "1" and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line(f"\n{NO_SKIPS}=1, but tests were skipped: the run fails", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
