"""The relay as an operator starts it: supervisord with the shipped etc/supervisord.conf, as root and as another user.

The configuration is the shipped file, unchanged but for `user=` where a test asks for it, in a copy of the folders etc/
and var/; RELAY_LISTEN, RELAY_WEBSOCKET and RELAY_OPTIONS, which it reads, differ. The relay's own code is beside it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.harness import CHECKOUT, LISTENING, free_port, wait_until

ORDINARY_USER = "nobody"
RELAY_NEEDS = ("gevent", "greenlet", "zope", "docopt", "supervisor", "websockets", "prometheus_client")


class Supervised:
    """A folder with etc/ and var/, supervisord started from it, and supervisorctl to ask it.

    Args:
        home: the folder; made ready here.
        user: who runs supervisord, when the test's own user does not; its needs are copied to where it can read them.
        relay_user: who the relay runs as, when it is not whoever runs supervisord; the same is done for it.
        options: of the relay, beside those that the configuration gives it.
    """

    def __init__(self, home: Path, user: str | None = None, relay_user: str | None = None, options: str = "") -> None:
        self.home = home
        self.user = user
        self.python = [sys.executable]
        self.port = free_port()
        self.web_port = free_port()
        self.status_port = free_port()
        self.conf = home / "etc" / "supervisord.conf"
        self.var = home / "var"
        self.relay_folder = self.var / "relay"
        self.conf.parent.mkdir()
        self.var.mkdir()
        (home / "bin").mkdir()
        shutil.copy(CHECKOUT / "etc" / "supervisord.conf", self.conf)
        path = [str(CHECKOUT)]
        other = user or relay_user
        if other is not None:
            self.python = [interpreter_for(other)]
            path = [str(home / "lib")]
            copy_what_the_relay_needs(home / "lib")
        if relay_user is not None:
            self.conf.write_text(self.conf.read_text().replace("\n;user=relay\n", f"\nuser={relay_user}\n"))
            self.relay_folder.mkdir()
            shutil.chown(self.relay_folder, relay_user)
        # Where relay-gevent is not installed beside the interpreter, the PATH has it.
        for name, module in (("relay-gevent", "relay"), ("relay-status", "relay.status.cli")):
            program = home / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {self.python[0]} -m {module} "$@"\n')
            program.chmod(0o755)
        self.env = {
            "HOME": str(home),
            "PATH": f"{home / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": ":".join(path),
            "RELAY_LISTEN": str(self.port),
            "RELAY_WEBSOCKET": str(self.web_port),
            "RELAY_STATUS_LISTEN": str(self.status_port),
            "RELAY_OPTIONS": f"--interface 127.0.0.1 {options}",
        }
        if user is not None:
            for owned in (home, *home.rglob("*")):
                shutil.chown(owned, user)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a python command line as the user, in the home's environment."""
        done = subprocess.run(
            [*self.python, *arguments],
            env=self.env,
            cwd=self.home,
            user=self.user,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{arguments}: {done.stdout}{done.stderr}{self.logs()}"
        return done

    def start(self) -> None:
        """Run `supervisord -c etc/supervisord.conf`, which goes on in the background, and wait for the relay."""
        self.run("-m", "supervisor.supervisord", "-c", str(self.conf))
        wait_until(lambda: all(state == "RUNNING" for state in self.states()), 20, f"every worker runs: {self.logs()}")
        wait_until(lambda: len(self.listening()) == len(self.states()), 10, f"every worker listens: {self.logs()}")

    def complaint(self) -> str:
        """Start it, which must not go well, and return what the first worker says of why."""
        self.run("-m", "supervisor.supervisord", "-c", str(self.conf))
        log = self.var / "relay-0.log"
        wait_until(lambda: log.exists() and "\n" in log.read_text(), 20, self.logs())
        return log.read_text().splitlines()[0]

    def control(self, *words: str, check: bool = True) -> str:
        """Run supervisorctl and return what it printed."""
        return self.run("-m", "supervisor.supervisorctl", "-c", str(self.conf), *words, check=check).stdout

    def rolling_restart(self, *words: str) -> None:
        """Run the shipped misc/rolling-restart, which has to go well."""
        done = self.try_rolling_restart(*words)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.logs()}"

    def try_rolling_restart(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run it, however it goes; `words` as in `begin_rolling_restart`."""
        begun = self.begin_rolling_restart(*words)
        try:
            output, errors = begun.communicate(timeout=60)
        finally:
            begun.kill()
        return subprocess.CompletedProcess(begun.args, begun.returncode, output, errors)

    def begin_rolling_restart(self, *words: str) -> subprocess.Popen[str]:
        """Run it beside the test, with a supervisorctl of this home's on the PATH.

        Args:
            words: its options, and after these the group.
        """
        control = self.home / "bin" / "supervisorctl"
        control.write_text(f'#!/bin/sh\nexec {self.python[0]} -m supervisor.supervisorctl "$@"\n')
        control.chmod(0o755)
        options = [word for word in words if word.startswith("-")]
        group = [word for word in words if not word.startswith("-")]
        command = [str(CHECKOUT / "misc" / "rolling-restart"), *options, str(self.conf), *group]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def states(self) -> list[str]:
        """Return the state of each worker, as supervisorctl tells it."""
        return [line.split()[1] for line in self.control("status", "relay:*", check=False).splitlines()]

    def pids(self) -> list[int]:
        """Return the process id of each running worker."""
        return [int(pid) for pid in re.findall(r"pid (\d+)", self.control("status", "relay:*", check=False))]

    def supervisord_pid(self) -> int:
        """Return what the pid file says."""
        return int((self.var / "supervisord.pid").read_text())

    def worker_logs(self) -> list[Path]:
        """Return the log file of each worker."""
        return sorted(self.var.glob("relay-*.log"))

    def log_lines(self) -> list[str]:
        """Return all lines that the workers have logged."""
        return [line for log in self.worker_logs() for line in log.read_text().splitlines()]

    def listening(self) -> list[str]:
        """Return the lines that say that a worker listens; one that was restarted has two."""
        return [line for line in self.log_lines() if LISTENING.search(line)]

    def logs(self) -> str:
        """Return supervisord's and the workers' logs, for a failure's message."""
        files = [self.var / "supervisord.log", *self.worker_logs()]
        return "\n".join(f"\n== {file.name}\n{file.read_text()}" for file in files if file.exists())

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Return the rows of a query on the usage database."""
        uri = f"file:{quote(str(self.relay_folder / 'usage.sqlite'))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            return database.execute(sql).fetchall()

    def end(self) -> None:
        """End supervisord, by its own process id, and with it the relay."""
        if not (self.var / "supervisord.pid").exists():
            return
        pid = self.supervisord_pid()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_running(pid), 40, f"supervisord ends: {self.logs()}")


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def interpreter_for(user: str) -> str:
    """Return a Python of the test's own version that `user` may run; skip the test when there is none."""
    version = "import sys; print(sys.version_info[:2])"
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [candidate, "-c", version], user=user, cwd="/", capture_output=True, text=True, check=False
            )
            if done.stdout.strip() == str(sys.version_info[:2]):
                return candidate
    pytest.skip(f"apt-get install python3 (no Python {sys.version_info[:2]} that {user} may run)")


def copy_what_the_relay_needs(target: Path) -> None:
    """Copy the relay and the packages it imports to a folder that any user may read."""
    target.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(CHECKOUT / "relay", target / "relay", ignore=unwanted)
    for name in RELAY_NEEDS:
        found = importlib.util.find_spec(name)
        assert found is not None, f"{name} is not installed"
        if found.submodule_search_locations:
            for place in found.submodule_search_locations:
                shutil.copytree(place, target / name, ignore=unwanted, dirs_exist_ok=True)
        else:
            assert found.origin is not None
            shutil.copy(found.origin, target)


@contextlib.contextmanager
def supervised(
    user: str | None = None,
    relay_user: str | None = None,
    name: str = "relay",
    *,
    started: bool = True,
    options: str = "",
) -> Iterator[Supervised]:
    """Start supervisord and the relay in a new folder; end both and remove the folder.

    Args:
        user, relay_user, options: as for `Supervised`.
        name: what the folder is called.
        started: whether to start it; otherwise the test does, or has something else done in the folder.
    """
    # Not below pytest's folder, which only its own user may enter.
    with tempfile.TemporaryDirectory(prefix="rg-", dir="/tmp") as above:
        Path(above).chmod(0o755)
        home = Path(above) / name
        home.mkdir()
        service = Supervised(home, user, relay_user, options)
        try:
            if started:
                service.start()
            yield service
        finally:
            service.end()
