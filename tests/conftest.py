"""Fixtures that all tests share; the order and the turns of tests that run side by side; and the rule that a run which
must be complete skips nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.harness import SHAPES, Relay, Service, relay_of
from tests.support.neighbours import turn
from tests.support.usage_disk import disk_of

NO_SKIPS = "RELAY_TESTS_NO_SKIPS"
CRASHED = pytest.StashKey[list[str]]()

# On a machine that does other things as well, how long an example takes says nothing about the relay.
settings.register_profile("relay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
def open_folder() -> Iterator[Path]:
    """A folder in which every user may make files. Not below pytest's, which each run of pytest closes to others."""
    with tempfile.TemporaryDirectory(prefix="rg-open-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


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


def side_by_side(config: pytest.Config) -> bool:
    """Whether this process is one of several of pytest-xdist, which run the tests."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test begin when it is its turn. Around all else: fixtures have their test's turn, and pytest-timeout does
    not count how long it was waited for."""
    if not side_by_side(item.config):
        return (yield)
    with turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, files that take longest come first, so that nobody waits for them at the end."""
    if side_by_side(config):
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:  # noqa: ANN401
    """Remember that a process of pytest-xdist ended before its time, whichever tests it had still to run."""
    if error is not None:
        node.config.stash.setdefault(CRASHED, []).append(f"{node.gateway.id}: {error}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of which a process has crashed, and one that has to be complete (RELAY_TESTS_NO_SKIPS=1, as .ci/run
    sets it) when a test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    wrong = [f"a process of tests has crashed, {what}" for what in session.config.stash.get(CRASHED, [])]
    if os.environ.get(NO_SKIPS) == "1" and reporter.stats.get("skipped"):
        wrong.append(f"{NO_SKIPS}=1, but tests were skipped")
    if wrong:
        reporter.write_line(f"\n{'; '.join(wrong)}: the run fails", red=True)
    if wrong and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
