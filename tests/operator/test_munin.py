"""The munin plugins, run by munin's own munin-run, on the database that a relay is writing to."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from relay.usage.schema import open_database
from tests.support.current import wait_for_current
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Service,
    connect,
    handshake,
    met,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.supervised import ORDINARY_USER, interpreter_for

ORDINARY_GROUP = pwd.getpwnam(ORDINARY_USER).pw_gid
PLUGIN = CHECKOUT / "misc" / "munin" / "relay_"
GRAPHS = ["connected", "bytes", "moods", "since_start", "all_time", "volume"]
MUNIN_RUN = shutil.which("munin-run") or "/usr/sbin/munin-run"

pytestmark = pytest.mark.skipif(not os.path.exists(MUNIN_RUN), reason="apt-get install munin-node")


class Munin:
    """A munin node's plugins and their configuration, in a folder of their own."""

    def __init__(self, folder: Path, database: Path, *settings: str) -> None:
        self.services = folder / "plugins"
        self.settings = folder / "plugin-conf.d"
        self.services.mkdir(parents=True)
        self.settings.mkdir()
        for graph in GRAPHS:
            (self.services / f"relay_{graph}").symlink_to(PLUGIN)
        shipped = (PLUGIN.parent / "plugin-conf.d" / "relay-gevent").read_text()
        configured = [
            line.replace("/var/lib/relay-gevent/var/relay/usage.sqlite", str(database))
            for line in shipped.splitlines()
            if not line.startswith("group ")  # there is no such group here
        ]
        # munin-run, as root, would become munin's own user, who may not look into this folder.
        configured += ["[relay_*]", f"user {getpass.getuser()}"]
        (self.settings / "relay-gevent").write_text("\n".join([*configured, *settings]) + "\n")

    def run(self, graph: str, *argument: str) -> subprocess.CompletedProcess[str]:
        """Run a plugin through munin-run."""
        command = [MUNIN_RUN, "--ignore-systemd-properties", "--servicedir", str(self.services)]
        command += ["--sconfdir", str(self.settings), f"relay_{graph}", *argument]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    def fetch(self, graph: str) -> dict[str, str]:
        """Return what a plugin says of its fields' values."""
        result = self.run(graph)
        assert result.returncode == 0, result.stderr
        words = (line.split() for line in result.stdout.splitlines())
        return {name.removesuffix(".value"): value for name, value in words}

    def config(self, graph: str) -> dict[str, str]:
        """Return what a plugin says of its graph."""
        result = self.run(graph, "config")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def finish_a_transfer(relay: Service, size: int) -> None:
    """Send `size` bytes through the relay, and end."""
    left, right = met(relay.port)
    with left, right:
        left.sendall(b"x" * size)
        read_exactly(right, size)


def test_every_plugin_tells_of_the_transfers_made(any_relay: Service, tmp_path: Path) -> None:
    munin = Munin(tmp_path / "munin", any_relay.usage_db)
    finish_a_transfer(any_relay, 1000)
    finish_a_transfer(any_relay, 234)
    with connect(any_relay.port) as lonely:
        lonely.sendall(handshake(new_token(), new_side()))
        wait_until(lambda: any_relay.rows("current")[0]["waiting"] == 1, what="a client that waits")
    with connect(any_relay.port) as wrong:
        wrong.sendall(b"GET / HTTP/1.1\r\n")
        read_to_end(wrong)
    any_relay.wait_for_rows("usage", 4)
    left, right = met(any_relay.port)
    with left, right, connect(any_relay.port) as waiting:
        waiting.sendall(handshake(new_token(), new_side()))
        wait_for_current(any_relay, 1, 1)
        assert munin.fetch("connected") == {"connected": "1", "waiting": "1"}
    moods = {"happy": "2", "lonely": "1", "errory": "1"}
    if any_relay.wait_for_rows("usage", 6):
        moods = {"happy": "3", "lonely": "2", "errory": "1"}
    for graph in ("moods", "since_start", "all_time"):
        assert munin.fetch(graph) == moods
    assert munin.fetch("volume") == {"since_start": "1234", "all_time": "1234"}
    assert munin.fetch("bytes") == {"bytes": "1234"}


def test_every_plugin_describes_its_graph(relay: Relay, tmp_path: Path) -> None:
    munin = Munin(tmp_path / "munin", relay.usage_db)
    for graph in GRAPHS:
        config = munin.config(graph)
        assert config["graph_category"] == "network"
        assert config["graph_title"].startswith("Transit relay: ")
        assert {name.removesuffix(".label") for name in config if name.endswith(".label")} == set(munin.fetch(graph))
    assert munin.config("bytes")["bytes.type"] == "DERIVE"
    assert munin.config("bytes")["bytes.min"] == "0"
    assert munin.config("moods")["errory.type"] == "DERIVE"
    assert munin.config("connected")["connected.type"] == "GAUGE"


def test_warning_and_critical_levels_come_from_the_environment(relay: Relay, tmp_path: Path) -> None:
    levels = ["[relay_connected]", "env.waiting_warning 500", "env.waiting_critical 2000", "env.critical 9000"]
    config = Munin(tmp_path / "munin", relay.usage_db, *levels).config("connected")
    assert config["waiting.warning"] == "500"
    assert config["waiting.critical"] == "2000"
    assert config["connected.critical"] == "9000"
    assert "connected.warning" not in config


def test_the_magic_markers_and_suggestions_are_what_munin_node_configure_looks_for(
    relay: Relay, tmp_path: Path
) -> None:
    text = PLUGIN.read_text()
    assert "#%# family=auto" in text
    assert "#%# capabilities=autoconf suggest" in text
    munin = Munin(tmp_path / "munin", relay.usage_db)
    (munin.services / "relay_").symlink_to(PLUGIN)
    assert munin.run("", "suggest").stdout.split() == GRAPHS
    assert munin.run("", "autoconf").stdout == "yes\n"


def test_values_are_unknown_ten_minutes_after_the_last_refresh(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    munin = Munin(tmp_path / "munin", path)
    with closing(open_database(str(path))) as database:
        for table, values in (("current", "1, 2, 3"), ("since_reboot", "4, 5, 6, 7, 8"), ("all_time", "4, 5, 6, 7, 8")):
            database.execute(f"INSERT INTO {table} VALUES ({values})")
        database.execute("INSERT INTO refreshed VALUES (NULL)")
        assert munin.fetch("connected") == {"connected": "U", "waiting": "U"}
        database.execute("UPDATE refreshed SET at = ?", (int(time.time()) - 590,))
        assert munin.fetch("connected") == {"connected": "1", "waiting": "2"}
        for seconds in (-601, 3600):  # the latter by a clock that was wrong then
            database.execute("UPDATE refreshed SET at = ?", (int(time.time()) + seconds,))
            for graph in GRAPHS:
                assert set(munin.fetch(graph).values()) == {"U"}


def test_a_missing_database_gives_unknown_values_and_autoconf_says_no(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    munin = Munin(tmp_path / "munin", path)
    assert munin.run("connected", "autoconf").stdout == f"no ({path} does not exist)\n"
    assert munin.run("connected", "autoconf").returncode == 0
    for graph in GRAPHS:
        assert set(munin.fetch(graph).values()) == {"U"}
        assert munin.config(graph)
    assert f"{path} does not exist" in munin.run("connected").stderr
    assert os.listdir(tmp_path) == ["munin"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start the plugin as somebody else")
def test_a_folder_that_may_not_be_entered_is_not_called_a_missing_database() -> None:
    # Not below pytest's folder, which nobody else may enter at all.
    with tempfile.TemporaryDirectory(prefix="rg-munin-", dir="/tmp") as above:
        Path(above).chmod(0o755)
        shut = Path(above) / "var"
        shut.mkdir(mode=0o750)
        path = shut / "usage.sqlite"
        open_database(str(path)).close()
        plugin = Path(above) / "relay_connected"
        shutil.copy(PLUGIN, plugin)
        done = subprocess.run(
            [interpreter_for(ORDINARY_USER), str(plugin), "autoconf"],
            env={"database": str(path)},
            user=ORDINARY_USER,
            group=ORDINARY_GROUP,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    reason = f"{path}: no permission to enter its folder; give the plugin a group or a user that may"
    assert (done.stdout, done.stderr, done.returncode) == (f"no ({reason})\n", "", 0)


def test_a_locked_database_gives_unknown_values(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    munin = Munin(tmp_path / "munin", path)
    open_database(str(path)).close()
    # Under WAL no writer can lock readers out; a program that changes the journal mode can.
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        result = munin.run("connected")
        assert result.returncode == 0
        assert result.stdout == "connected.value U\nwaiting.value U\n"
        assert "locked" in result.stderr
        assert munin.run("connected", "autoconf").stdout == f"no ({path}: database is locked)\n"


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE usage (x)")
    munin = Munin(tmp_path / "munin", path)
    assert munin.run("connected", "autoconf").stdout == f"no ({path} is not a usage database of relay-gevent)\n"
    assert munin.fetch("connected") == {"connected": "U", "waiting": "U"}
    path.write_text("not a database at all, but long enough to be taken for the header of one" * 10)
    assert munin.run("connected", "autoconf").stdout.startswith(f"no ({path}: ")


def test_nothing_is_left_beside_a_database_that_nobody_has_open(tmp_path: Path) -> None:
    path = tmp_path / "relay" / "usage.sqlite"
    path.parent.mkdir()
    open_database(str(path)).close()
    munin = Munin(tmp_path / "munin", path)
    for graph in GRAPHS:
        munin.fetch(graph)
    assert os.listdir(path.parent) == ["usage.sqlite"]


def test_a_wrong_name_says_which_are_right(tmp_path: Path) -> None:
    munin = Munin(tmp_path / "munin", tmp_path / "usage.sqlite")
    (munin.services / "relay_everything").symlink_to(PLUGIN)
    result = munin.run("everything")
    assert result.returncode != 0
    assert "relay_connected" in result.stderr


def test_the_plugin_needs_only_the_system_s_python() -> None:
    system = "/usr/bin/python3"
    if not os.path.exists(system):
        pytest.skip("apt-get install python3")
    result = subprocess.run([system, "-I", "-S", str(PLUGIN), "suggest"], capture_output=True, text=True, check=True)
    assert result.stdout.split() == GRAPHS
