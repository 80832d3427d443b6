"""A Debian of one's own: a small system of this machine's release, from the mirror that this machine uses.

Making it takes most of a minute, so it is made once and kept in pytest's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = "ca-certificates,python3-venv"
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


def debian(config: pytest.Config) -> Path:
    """Return the archive of the system, which is made when it is not in the cache; skip the test where it cannot be."""
    reason = not_allowed()
    if reason:
        pytest.skip(reason)
    assert config.cache is not None
    archive = config.cache.mkdir("debian") / f"{codename()}.tar"
    if not archive.exists():
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
    return archive
