"""What a distribution holds, and that its wheel runs where nothing else is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay import __version__
from tests.support.harness import (
    CHECKOUT,
    LISTENING,
    free_port,
    met,
    read_to_end,
    running,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)  # what is installed may have to be downloaded

NOT_SOURCE = (".git", ".venv", ".hypothesis", ".*_cache", "__pycache__", "build", "dist", "*.egg-info")


def run(command: list[str], cwd: Path, seconds: float = 300) -> str:
    """Run a program away from the checkout and return what it printed; AssertionError when it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@dataclass(frozen=True)
class Distribution:
    """The two files that `python -m build` made."""

    sdist: Path
    wheel: Path

    def sdist_names(self) -> set[str]:
        """Return the names in the sdist, without its top folder."""
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def wheel_names(self) -> set[str]:
        """Return the names in the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """An sdist of the checkout, and a wheel of that sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    # A copy, since building writes beside the sources. What a running relay keeps in var/ is played by two files.
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE, "var"))
    (source / "var").mkdir()
    shutil.copy(CHECKOUT / "var" / "README", source / "var")
    (source / "var" / "relay").mkdir()
    (source / "var" / "relay" / "usage.sqlite").touch()
    (source / "var" / "relay-0.log").touch()
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)], folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Distribution(sdist, wheel)


@pytest.fixture(scope="module")
def installed(distribution: Distribution) -> Iterator[Path]:
    """The wheel in an environment that held nothing; returns the environment's folder."""
    # Not below pytest's folder: supervisord's socket is in it, and the path of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="relay-installed-", dir="/tmp") as folder:
        place = Path(folder)
        run([sys.executable, "-m", "venv", str(place)], place)
        run([str(place / "bin" / "pip"), "install", "--quiet", str(distribution.wheel)], place)
        yield place


def test_a_module_that_was_removed_is_not_in_the_next_wheel_of_the_same_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE, "var", "tests", "docs"))
    removed = source / "relay" / "removed.py"
    removed.write_text('"""Of an earlier version."""\n')
    names: list[set[str]] = []
    for version in ("earlier", "later"):
        wheels = tmp_path / version
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        run([*pip, "--wheel-dir", str(wheels), str(source)], tmp_path)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names.append(set(archive.namelist()))
        removed.unlink(missing_ok=True)
    assert names[0] - names[1] == {"relay/removed.py"}
    assert not (source / "build").exists()


def test_the_sdist_holds_what_a_checkout_holds(distribution: Distribution) -> None:
    names = distribution.sdist_names()
    listed = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "setup.py",
        "setup.cfg",
        "pyproject.toml",
        "ruff.toml",
        ".ci/run",
    }
    for tree in ("relay", "etc", "tests", "docs", "misc"):
        files = [
            path for path in (CHECKOUT / tree).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".pyo")
        ]
        listed |= {str(path.relative_to(CHECKOUT)) for path in files if ".egg-info" not in str(path)}
    assert listed - names == set()


def test_no_distribution_holds_what_a_relay_wrote(distribution: Distribution) -> None:
    assert {name for name in distribution.sdist_names() if name.startswith("var/")} == {"var/README"}
    assert {name.rpartition("/")[2] for name in distribution.wheel_names() if "/var/" in name} == {"README"}


def test_the_wheel_holds_the_relay_and_its_configuration_but_no_tests(distribution: Distribution) -> None:
    names = distribution.wheel_names()
    assert {f"relay/{name}" for name in ("__init__.py", "cli.py", "server.py")} <= names
    share = f"relay_gevent-{__version__}.data/data/share/relay-gevent"
    assert {f"{share}/etc/supervisord.conf", f"{share}/var/README"} <= names
    assert [name for name in names if name.startswith("tests/")] == []


def test_the_installed_programs_know_their_version(installed: Path, tmp_path: Path) -> None:
    assert run([str(installed / "bin" / "relay-gevent"), "--version"], tmp_path) == f"relay-gevent {__version__}\n"
    assert "relay-usage" in run([str(installed / "bin" / "relay-usage"), "--help"], tmp_path)


def relay_one_transfer(port: int) -> None:
    sender, receiver = met(port)
    with sender, receiver:
        sender.sendall(b"from an installed relay")
        sender.shutdown(1)
        assert read_to_end(receiver) == b"from an installed relay"


def test_the_installed_relay_relays(installed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [str(installed / "bin" / "relay-gevent"), "--port", "0", "--interface", "127.0.0.1"]
    with running(command, log, cwd=tmp_path) as process:
        wait_until(lambda: LISTENING.search(log.read_text()) or process.poll() is not None, 10, "it listens")
        listening = LISTENING.search(log.read_text())
        assert listening is not None, log.read_text()
        relay_one_transfer(int(listening[2]))


@pytest.fixture
def installed_service(installed: Path, tmp_path: Path) -> Iterator[int]:
    """The installed relay under supervisord, with nothing on the PATH; returns its port."""
    port = free_port()
    share = installed / "share" / "relay-gevent"
    env = {"PATH": "/usr/bin:/bin", "RELAY_LISTEN": str(port), "RELAY_OPTIONS": "--interface 127.0.0.1"}
    log = tmp_path / "supervisord"
    command = [str(installed / "bin" / "supervisord"), "-n", "-c", str(share / "etc" / "supervisord.conf")]
    with running(command, log, env=env, cwd=tmp_path):
        worker = share / "var" / "relay-0.log"
        wait_until(lambda: worker.exists() and LISTENING.search(worker.read_text()), 15, f"it listens, see {log}")
        yield port


def test_supervisord_runs_the_installed_copy_with_the_installed_configuration(
    installed: Path, installed_service: int
) -> None:
    relay_one_transfer(installed_service)
    usage = installed / "share" / "relay-gevent" / "var" / "relay" / "usage.jsonl"
    wait_until(lambda: '"happy"' in usage.read_text(), 5, "the JSON line")
