"""Everything about the distribution is in setup.cfg, except the list of files that an installed copy finds beside its
programs: `<prefix>/share/relay-gevent/` mirrors etc/, var/ and parts of misc/, and that list is read from the tree.
"""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build

SHARE = "share/relay-gevent"
SHARED = ("etc", "var", "misc/munin", "misc/rolling-restart", "misc/import-twisted-usage")
# A checkout that is in use keeps its logs and its database in var/: only the file that explains them is shipped.
SHIPPED_FROM_VAR = {"README"}


def shared_files() -> list[tuple[str, Sequence[str]]]:
    """Return setuptools' (target folder, files) pairs, one for each folder of SHARED."""
    top = Path(__file__).parent
    folders: dict[str, list[str]] = {}
    for name in SHARED:
        for path in sorted([top / name, *(top / name).rglob("*")]):
            shipped = path.is_file() and "__pycache__" not in path.parts
            if not shipped or (name == "var" and path.name not in SHIPPED_FROM_VAR):
                continue
            relative = path.relative_to(top)
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


setup(data_files=shared_files(), cmdclass={"build": BuildElsewhere})
