"""What a distribution holds, and that its wheel runs where nothing else is installed."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
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


def unlike_a_checkout(folder: Path) -> Path:
    """Copy the sources to a folder, as one in which a relay has run, and which is of another day and mode."""
    source = folder / "source"
    # A copy, since building writes beside the sources. What a running relay keeps in var/ is played by two files.
    shutil.copytree(CHECKOUT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE, "var"), copy_function=shutil.copy)
    (source / "var").mkdir()
    shutil.copy(CHECKOUT / "var" / "README", source / "var")
    (source / "var" / "relay").mkdir()
    (source / "var" / "relay" / "usage.sqlite").touch()
    (source / "var" / "relay-0.log").touch()
    return source


def build(source: Path, folder: Path, umask: str) -> Distribution:
    """Run `python -m build` under a umask, as of 2026-11-27."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    run(["sh", "-c", f'umask {umask}; SOURCE_DATE_EPOCH=1795737600 exec "$@"', "sh", *command], folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Distribution(sdist, wheel)


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """An sdist of the checkout, and a wheel of that sdist."""
    folder = tmp_path_factory.mktemp("build")
    return build(unlike_a_checkout(folder), folder, "022")


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
        ".dockerignore",
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
    assert {f"{share}/etc/supervisord.conf", f"{share}/var/README", "relay/py.typed"} <= names
    assert [name for name in names if name.startswith("tests/")] == []


def test_the_same_sources_make_the_same_bytes_whoever_builds_them(distribution: Distribution, tmp_path: Path) -> None:
    source = unlike_a_checkout(tmp_path)
    for path in source.rglob("*"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o700 if path.is_dir() or path.stat().st_mode & 0o100 else 0o600)
    again = build(source, tmp_path, "077")
    assert again.sdist_names() == distribution.sdist_names()
    assert again.wheel.read_bytes() == distribution.wheel.read_bytes()
    assert again.sdist.read_bytes() == distribution.sdist.read_bytes()


def test_twine_has_nothing_to_say(distribution: Distribution, tmp_path: Path) -> None:
    check = [sys.executable, "-m", "twine", "--no-color", "check", "--strict"]
    told = run([*check, str(distribution.sdist), str(distribution.wheel)], tmp_path)
    lines = re.findall(r": *PASSED", told)  # with a line end after the colon where the name is as long as a line
    assert (len(lines), told.count("WARNING")) == (2, 0), told


def metadata(distribution: Distribution) -> Message:
    """Return the wheel's METADATA."""
    with zipfile.ZipFile(distribution.wheel) as archive:
        return email.message_from_bytes(archive.read(f"relay_gevent-{__version__}.dist-info/METADATA"))


def test_the_extra_all_is_all_that_a_relay_can_make_use_of(distribution: Distribution) -> None:
    told = metadata(distribution)
    for_developers = {"test", "lint", "bench"}
    wanted = set(told.get_all("Provides-Extra", [])) - for_developers - {"all"}
    (all_of_them,) = [line for line in told.get_all("Requires-Dist", []) if line.endswith('extra == "all"')]
    assert set(all_of_them.partition("[")[2].partition("]")[0].split(",")) == wanted
    assert "websocket" in wanted


def test_the_version_is_told_in_one_place_and_the_changes_begin_with_it(distribution: Distribution) -> None:
    assert metadata(distribution)["Version"] == __version__
    heading = next(line for line in (CHECKOUT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert re.fullmatch(rf"## {re.escape(__version__)}, \d{{4}}-\d\d-\d\d", heading)


@pytest.mark.skipif(shutil.which("man") is None, reason="apt-get install man-db")
def test_every_program_has_a_manual_page_that_tells_all_its_options(installed: Path) -> None:
    pages = installed / "share" / "man" / "man1"
    programs = sorted(path.name for path in (installed / "bin").glob("relay-*"))
    assert programs == sorted(path.stem for path in pages.iterdir())
    for program in programs:
        told = subprocess.run(
            ["man", "--warnings", "--local-file", str(pages / f"{program}.1")],
            env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "200", "MANROFFOPT": "-c", "MAN_KEEP_FORMATTING": ""},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert told.stderr == ""
        text = re.sub(".\x08", "", told.stdout)  # bold, as a typewriter has it
        assert f"{program} - " in text
        helped = run([str(installed / "bin" / program), "--help"], installed)
        options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", helped, re.MULTILINE))
        assert options == set(re.findall(r"^ {7}(?:-\w, )?(--[\w-]+)", text, re.MULTILINE))
        assert options > {"--help"}


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
