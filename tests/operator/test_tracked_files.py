"""What every file of the repository keeps to, whatever is in it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.support.harness import CHECKOUT

MARKERS = tuple(sign.encode() * 7 for sign in "<|>")
"""What git puts before a name where two changes of the same lines meet; between the two it is seven "=" alone."""


def tracked() -> list[str]:
    """The names of all files that git knows; skips where there is no git or no checkout of its."""
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        pytest.skip("this is no checkout of git's, or there is no git: apt-get install git")
    # It may belong to another user than who runs the tests.
    command = ["git", "-c", f"safe.directory={CHECKOUT}", "-C", str(CHECKOUT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    return [name for name in listed.decode().split("\0") if name]


def is_marker(line: bytes) -> bool:
    """Whether git leaves such a line where it could not merge."""
    return line.startswith(tuple(marker + b" " for marker in MARKERS)) or line.rstrip(b"\r") in (*MARKERS, b"=" * 7)


def test_no_file_holds_what_git_leaves_where_it_could_not_merge() -> None:
    names = tracked()
    assert "docs/rsyslog.md" in names
    found = []
    for name in names:
        path = CHECKOUT / name
        if path.is_file():  # removed and not yet committed, or a link to nowhere
            lines = path.read_bytes().split(b"\n")
            found += [f"{name}:{number}" for number, line in enumerate(lines, 1) if is_marker(line)]
    assert found == []


def test_the_head_of_each_folder_of_the_relay_says_what_all_its_modules_are_for() -> None:
    unnamed = []
    for head in (CHECKOUT / "relay").glob("*/__init__.py"):
        words = set(re.findall(r"\w+", head.read_text()))
        modules = {module.stem for module in head.parent.glob("*.py")} - {"__init__", "__main__"}
        unnamed += [f"{head.parent.name}/{name}" for name in modules - words]
    assert unnamed == []
