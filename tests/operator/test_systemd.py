"""The systemd unit: nothing for systemd-analyze to complain about, and as little in reach of the relay as documented.

That the relay runs under all of it was tried with a systemd of its own; docs/systemd.md says how.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import CHECKOUT

UNIT = CHECKOUT / "etc" / "systemd" / "relay-gevent.service"
DOCUMENTATION = CHECKOUT / "docs" / "systemd.md"
SUPERVISORD = "/opt/relay-gevent/bin/supervisord"

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="apt-get install systemd")


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze; whatever its exit status."""
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The shipped unit, with a supervisord that is there: it is not installed where the unit expects it."""
    path = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert SUPERVISORD in text
    path.write_text(text.replace(SUPERVISORD, sys.executable))
    return path


def test_verify_has_nothing_to_say(unit: Path) -> None:
    result = analyze("verify", "--man=no", unit)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    # It may complain about other units of this machine.
    assert UNIT.name not in result.stderr


def test_the_documented_security_score_is_the_real_one(unit: Path) -> None:
    documented = re.search(r"exposure level of (\d\.\d)", DOCUMENTATION.read_text())
    assert documented is not None
    result = analyze("security", "--offline=yes", "--no-pager", unit)
    if "unrecognized option" in result.stderr or "Unknown" in result.stderr:
        pytest.skip("systemd 250 or newer is needed for --offline")
    found = re.search(r"Overall exposure level for \S+: (\d\.\d)", result.stdout)
    assert found is not None, result.stderr
    # Another version of systemd weighs differently; it is never much.
    assert float(found[1]) <= float(documented[1]) + 0.5


def test_it_runs_as_a_user_of_its_own_in_the_foreground() -> None:
    settings = dict(
        line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")
    )
    assert settings["User"] == "relay-gevent"
    assert "--nodaemon" in settings["ExecStart"]
    assert settings["CapabilityBoundingSet"] == settings["AmbientCapabilities"] == ""
    assert settings["ProtectSystem"] == "strict"
