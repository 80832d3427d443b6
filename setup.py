"""Everything about the distribution is in setup.cfg, except what is read from the tree: the files that an installed
copy finds beside its programs, `<prefix>/share/relay-gevent/`, which mirrors etc/, var/ and parts of misc/; and the
manual pages, which are made from the help texts. And except that the same commit makes the same bytes, wherever built.
"""

import atexit
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.sdist import sdist

TOP = Path(__file__).resolve().parent
sys.path.insert(0, str(TOP / "misc"))

# setuptools' own; it is there by this name once setuptools is imported, in every Python.
from distutils.command.install_data import install_data  # noqa: E402

import man_pages  # noqa: E402

SHARE = "share/relay-gevent"
SHARED = ("etc", "var", "misc/munin", "misc/rolling-restart", "misc/central-log", "misc/import-twisted-usage")
# A checkout that is in use keeps its logs and its database in var/: only the file that explains them is shipped.
SHIPPED_FROM_VAR = {"README"}


def shared_files() -> list[tuple[str, Sequence[str]]]:
    """Return setuptools' (target folder, files) pairs, one for each folder of SHARED."""
    folders: dict[str, list[str]] = {}
    for name in SHARED:
        for path in sorted([TOP / name, *(TOP / name).rglob("*")]):
            shipped = path.is_file() and "__pycache__" not in path.parts
            if not shipped or (name == "var" and path.name not in SHIPPED_FROM_VAR):
                continue
            relative = path.relative_to(TOP)
            folders.setdefault(f"{SHARE}/{relative.parent}", []).append(str(relative))
    return list(folders.items())


class BuildElsewhere(build):
    """Build in a folder that is new and does not stay. In the build/ that setuptools makes beside the sources, modules
    that a later version no longer has would lie until that one is installed, and be installed with it."""

    def initialize_options(self) -> None:
        """Begin with that folder in place of build/."""
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="relay-gevent-build-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


class InstallWithPages(install_data):
    """Put the manual pages beside the other files."""

    def run(self) -> None:
        """Install the files, and make the pages where they belong."""
        super().run()
        self.outfiles += map(str, man_pages.write_pages(Path(self.install_dir) / "share" / "man" / "man1"))


class SameBytes(sdist):
    """Make an archive that says nothing of who made it, when and where: owner, times and modes are always the same."""

    def run(self) -> None:
        """Make the archive, and then again from what is in it."""
        super().run()
        for name in self.archive_files:
            if name.endswith(".tar.gz"):
                say_nothing_of_the_maker(Path(name))


def say_nothing_of_the_maker(archive: Path) -> None:
    """Write the archive again, in order, and without what differs from one maker to another."""
    when = int(os.environ["SOURCE_DATE_EPOCH"])
    same = io.BytesIO()
    with (
        tarfile.open(archive) as made,
        gzip.GzipFile("", "wb", mtime=when, fileobj=same) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.PAX_FORMAT) as again,
    ):
        for member in sorted(made.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = when, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            again.addfile(member, made.extractfile(member) if member.isfile() else None)
    archive.write_bytes(same.getvalue())


def settle_time_and_modes() -> None:
    """Have all that is built be of one time, the commit's or, in an unpacked sdist, that of its files; and readable for
    all, whatever the builder's umask. https://reproducible-builds.org/specs/source-date-epoch/ has the variable."""
    os.umask(0o022)
    if "SOURCE_DATE_EPOCH" not in os.environ:
        asked = ["git", "-C", str(TOP), "log", "-1", "--format=%ct"]
        told = ""
        if (TOP / ".git").exists() and shutil.which("git"):
            told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        os.environ["SOURCE_DATE_EPOCH"] = told or str(int(Path(__file__).stat().st_mtime))


settle_time_and_modes()
setup(
    data_files=shared_files(),
    cmdclass={"build": BuildElsewhere, "install_data": InstallWithPages, "sdist": SameBytes},
)
