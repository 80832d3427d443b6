"""The command line of misc/rolling-restart; what it does is in test_supervisor."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.harness import CHECKOUT

PROGRAM = CHECKOUT / "misc" / "rolling-restart"
CONF = str(CHECKOUT / "etc" / "supervisord.conf")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it, where it finds no supervisord; whatever its exit status."""
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=30, check=False, cwd="/")


@pytest.mark.parametrize("before", [(), ("--lose-records",), (CONF,)])
def test_it_says_how_it_is_used(before: tuple[str, ...]) -> None:
    asked = run(*before, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith("Restart the workers of a relay under supervisor one after another")
    assert "Usage: misc/rolling-restart [--lose-records] [supervisord.conf [GROUP]]\n" in asked.stdout
    assert "set -eu" not in asked.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "etc/supervisord.conf: no such file"),
        (["nosuch.conf"], "nosuch.conf: no such file"),
        ([""], "an argument is empty"),
        (["--lose-record", CONF], "--lose-record: there is no such option"),
        ([CONF, "-x"], "-x: there is no such option"),
        ([CONF, "relay", "more"], "more: there is no third argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments: list[str], complaint: str) -> None:
    refused = run(*arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"rolling-restart: error: {complaint}"), refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[CONF, "--lose-records"], ["--lose-records", CONF, "relay"]])
def test_the_option_may_stand_anywhere(arguments: list[str]) -> None:
    refused = run(*arguments)
    assert refused.returncode == 1
    assert refused.stderr.startswith("rolling-restart: cannot tell which workers run; supervisorctl -c ")
