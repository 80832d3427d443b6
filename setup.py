"""Everything about the distribution is in setup.cfg, except the list of files that an installed copy finds beside its
programs: `<prefix>/share/relay-gevent/` mirrors etc/, var/ and parts of misc/, and that list is read from the tree.
"""

from collections.abc import Sequence
from pathlib import Path

from setuptools import setup

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


setup(data_files=shared_files())
