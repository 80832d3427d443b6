"""Fixtures that all tests share, and the rule that a run which must be complete skips nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.harness import Relay, Service, Workers

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
def relay(tmp_path: Path) -> Iterator[Relay]:
    """One worker that records to JSON lines and to the database, unblurred."""
    with Relay(tmp_path, recording=True) as started:
        yield started


@pytest.fixture(params=["one-worker", "two-workers"])
def any_relay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """A recording relay, once as a single worker and once as two that share a run directory."""
    if request.param == "one-worker":
        with Relay(tmp_path, recording=True) as relay:
            yield relay
        return
    with Workers(tmp_path, count=2) as workers:
        yield workers


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that has to be complete (RELAY_TESTS_NO_SKIPS=1, as .ci/run sets it) when a test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get(NO_SKIPS) == "1" and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line(f"\n{NO_SKIPS}=1, but tests were skipped: the run fails", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
