"""A Debian of one's own: a small system of this machine's release, from the mirror that this machine uses.

Making it takes most of a minute, so it is made once and kept in pytest's cache; of tests that run side by side, the
first makes it and the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT

PACKAGES = "ca-certificates,curl,python3-venv"
"""What it has besides the least. Documentation and translations are left out."""

_LEFT_OUT = ("doc", "info", "locale", "man")


def not_allowed() -> str:
    """Return why no Debian can be made here, or an empty string when one can."""
    if os.geteuid() != 0:
        return "making a Debian needs root"
    if shutil.which("mmdebstrap") is None:
        return "apt-get install mmdebstrap"
    if not codename():
        return "this is no Debian, so nobody knows from where to make one"
    return ""


def codename() -> str:
    """Return the name of this machine's Debian release; empty where it is something else."""
    release = Path("/etc/os-release")
    lines = release.read_text().splitlines() if release.exists() else []
    told = dict(line.split("=", 1) for line in lines if "=" in line)
    return told.get("VERSION_CODENAME", "").strip('"') if told.get("ID") == "debian" else ""


def mirror() -> str:
    """Return where this machine's apt has Debian from; empty for mmdebstrap's own choice."""
    asked = [
        "apt-get",
        "indextargets",
        "--format",
        "$(LABEL) $(CODENAME) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    wanted = ["Debian", codename(), "main"]
    return next((line.split()[3] for line in told.splitlines() if line.split()[:3] == wanted), "")


def _kept(config: pytest.Config) -> Path:
    """Where to keep what takes a minute to make: in pytest's cache, or where that would be when it is turned off."""
    cache: pytest.Cache | None = getattr(config, "cache", None)
    folder = CHECKOUT / ".pytest_cache" / "d" / "debian" if cache is None else cache.mkdir("debian")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _makers_turn(config: pytest.Config) -> Iterator[Path]:
    """One at a time looks at what is kept, and makes what is missing; yields where it is kept."""
    kept = _kept(config)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield kept


def debian(config: pytest.Config) -> Path:
    """Return the archive of the system, which is made when it is not in the cache; skip the test where it cannot be."""
    reason = not_allowed()
    if reason:
        pytest.skip(reason)
    with _makers_turn(config) as kept:
        archive = kept / f"{codename()}-{_digest(PACKAGES)}.tar"
        if not archive.exists():
            _make_debian(archive)
    return archive


def _make_debian(archive: Path) -> None:
    being_made = archive.with_suffix(f".{os.getpid()}.tar")
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT]
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", *left_out]
    source = [mirror()] if mirror() else []
    done = subprocess.run(
        [*command, codename(), str(being_made), *source], capture_output=True, text=True, timeout=500, check=False
    )
    if done.returncode != 0:
        being_made.unlink(missing_ok=True)
        pytest.skip(f"mmdebstrap cannot make a Debian here: {done.stderr.strip()[-500:]}")
    being_made.rename(archive)


def wheels(config: pytest.Config) -> Path:
    """Return a folder of wheels of all that the relay needs, and of what builds it, for that system's Python, which is
    of this machine's release; not of the relay itself. Kept in pytest's cache while setup.cfg asks for the same."""
    wanted = f"{sys.version_info}{(CHECKOUT / 'setup.cfg').read_text().partition('[options.extras_require]')}"
    with _makers_turn(config) as kept:
        folder = kept / f"wheels-{_digest(wanted)}"
        if not folder.exists():
            _make_wheels(folder)
    return folder


def _make_wheels(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as above:
        source, made = Path(above) / "source", Path(above) / "wheels"
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "docs", "tests", "var", "dist")
        shutil.copytree(CHECKOUT, source, ignore=unwanted)
        (source / "var").mkdir()
        pip = [f"{above}/venv/bin/pip", "wheel", "--quiet", "--wheel-dir", str(made), "setuptools", "wheel", ".[all]"]
        for command in (["/usr/bin/python3", "-m", "venv", f"{above}/venv"], pip):
            done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        for wheel in made.glob("relay_gevent-*"):
            wheel.unlink()
        being_copied = folder.with_suffix(f".{os.getpid()}")
        shutil.copytree(made, being_copied)
        being_copied.rename(folder)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
