"""Variables that somebody has set for another program, and what a process inherits besides.

The relay serves all the same, or ends with one line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from relay import __version__
from tests.support.harness import CHECKOUT, Relay, connect, free_port, handshake, new_token, wait_until
from tests.support.hostile import honest_transfer
from tests.support.supervised import ORDINARY_USER, supervised

Start = Callable[..., Relay]

VARIABLES = [
    "PYTHONOPTIMIZE=1",
    "PYTHONOPTIMIZE=2",
    "PYTHONWARNINGS=error",
    "PYTHONWARNINGS=default",
    "PYTHONDEVMODE=1",
    "PYTHONIOENCODING=utf-16",
    "PYTHONIOENCODING=ascii:strict",
    "PYTHONUNBUFFERED=",
    "PYTHONHASHSEED=0",
    "PYTHONFAULTHANDLER=1",
    "PYTHONINSPECT=1",
    "PYTHONSAFEPATH=1",
    "PURE_PYTHON=1",
    "GEVENT_BACKEND=poll",
    "GEVENT_BACKEND=select",
    "GEVENT_BACKEND=nonsense",
    "GEVENT_LOOP=libuv",
    "GEVENT_LOOP=libev-cffi",
    "GEVENT_LOOP=nonsense",
    "GEVENT_LOOP=",
    "GEVENT_RESOLVER=ares",
    "GEVENT_RESOLVER=nonsense",
    "GEVENT_THREADPOOL=nonsense",
    "GEVENT_THREADPOOL_SIZE=many",
    "GEVENT_FILE=nonsense",
    "GEVENT_MONITOR_THREAD_ENABLE=perhaps",
    "GEVENT_MAX_BLOCKING_TIME=long",
    "GEVENT_TRACK_GREENLET_TREE=perhaps",
    "GEVENT_SUPPORT=True",
    "LIBEV_FLAGS=1",
    "LANG=xx_YY.nonsense",
    "LC_ALL=nonsense",
    "TZ=nonsense",
    "TMPDIR=/nonexistent",
    "SQLITE_TMPDIR=/nonexistent",
    "LISTEN_FDS=1",
    "NOTIFY_SOCKET=/nonexistent",
    "RELAY_PORT=tcp://10.96.0.12:4001",
]


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_for_another_program_changes_nothing(relay_factory: Start, variable: str) -> None:
    name, _, value = variable.partition("=")
    relay = relay_factory("--grace", "5", recording=True, env={name: value})
    honest_transfer(relay.port)
    relay.wait_for_records(1)
    assert relay.stop() == 0
    assert [row["result"] for row in relay.rows("usage")] == ["happy"]
    last_words = [line.split("] ")[1] for line in relay.log_text().splitlines()]
    assert last_words[1:] == ["stopping: 0 transfers have 5 seconds to finish", "stopped"]


@pytest.mark.parametrize(
    "variable", ["WEBSOCKETS_MAX_LOG_SIZE=x", "WEBSOCKETS_MAX_NUM_HEADERS=0", "WEBSOCKETS_MAX_LINE_LENGTH=long"]
)
def test_nor_does_one_that_is_for_another_program_with_websockets(relay_factory: Start, variable: str) -> None:
    name, _, value = variable.partition("=")
    port = free_port()
    relay = relay_factory("--websocket", f"tcp:{port}:interface=127.0.0.1", env={name: value})
    honest_transfer(relay.port)
    with connect(port) as client:
        client.sendall(UPGRADE)
        assert client.recv(12) == b"HTTP/1.1 101"


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: relay.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def test_it_needs_no_variable_at_all(relay_factory: Start) -> None:
    relay = relay_factory(recording=True, inside=["env", "-i", f"PYTHONPATH={CHECKOUT}"])
    honest_transfer(relay.port)
    relay.wait_for_records(1)


def run(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of the relay's with this Python to its end."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


PROGRAMS: dict[str, list[str | Path]] = {
    "relay-gevent": ["-m", "relay"],
    "relay-usage": ["-m", "relay.report.cli"],
    "relay-status": ["-m", "relay.status.cli"],
    "import-twisted-usage": [CHECKOUT / "misc" / "import-twisted-usage"],
    "soak.py": [CHECKOUT / "misc" / "soak.py"],
    "siege.py": [CHECKOUT / "misc" / "siege.py"],
    "fuzz.py": [CHECKOUT / "misc" / "fuzz.py"],
    "run.py": [CHECKOUT / "misc" / "bench" / "run.py"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_itself_without_docstrings(program: str) -> None:
    if program == "run.py":
        pytest.importorskip("matplotlib", reason="what the benchmark needs: make .venv/.bench")
    helped = run([*PROGRAMS[program], "--help"], {"PYTHONOPTIMIZE": "2"})
    assert (helped.returncode, helped.stderr) == (0, "")
    assert program in helped.stdout


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["4001"], ["--grace"], ["--grace", "1", "--grace", "2"]], ids=" ".join
)
def test_a_mistake_is_told_without_docstrings_too(arguments: list[str]) -> None:
    plain, stripped = (run([*PROGRAMS["relay-gevent"], *arguments], {"PYTHONOPTIMIZE": level}) for level in "02")
    assert (stripped.returncode, stripped.stderr) == (plain.returncode, plain.stderr)
    assert stripped.stderr.startswith("relay-gevent: error: ")


@pytest.mark.parametrize("warnings", ["default", "error", "always"])
@pytest.mark.parametrize("program", ["relay-gevent", "relay-usage", "relay-status", "import-twisted-usage"])
def test_nothing_is_said_of_what_python_thinks_of_a_library(tmp_path: Path, program: str, warnings: str) -> None:
    # Nothing has been compiled yet, and nothing will be kept: as with each start in a folder that is read-only.
    fresh = {"PYTHONWARNINGS": warnings, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    helped = run([*PROGRAMS[program], "--help"], fresh)
    assert (helped.returncode, helped.stderr) == (0, "")


# What is not there.


def test_a_folder_that_is_gone_is_a_mistake_only_when_something_in_it_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    at_gone = ["/bin/sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(gone)]
    command = [sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1"]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    for option in ["--usage-db", "--run-dir"]:
        ended = subprocess.run(
            [*at_gone, *command, option, "here"], env=env, capture_output=True, text=True, timeout=30, check=False
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"relay-gevent: error: {option} here: ")
        assert ended.stderr.count("\n") == 1
    with Relay(tmp_path, inside=at_gone, recording=True) as relay:
        honest_transfer(relay.port)


@pytest.mark.parametrize("umask", ["0777", "0277", "0077", "0000"])
def test_the_run_directory_is_for_its_user_whatever_the_umask(tmp_path: Path, umask: str) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root's powers are taken away with setpriv(1): apt-get install util-linux")
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    inside = ["/bin/sh", "-c", 'umask "$0" && exec "$@"', umask, *powerless]
    run_dir = tmp_path / "run"
    options = ("--run-dir", str(run_dir))
    with Relay(tmp_path, *options, inside=inside, name="first") as first:
        assert run_dir.stat().st_mode & 0o777 == 0o700
        with Relay(tmp_path, *options, inside=inside, name="second", port=first.port) as second:
            wait_until(lambda: f"worker {second.pid} has joined" in first.log_text(), what="it is let in")
            honest_transfer(first.port)


def test_a_run_directory_in_which_nothing_can_be_made_is_a_mistake(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    (run_dir / "lock").mkdir()
    ended = run([*PROGRAMS["relay-gevent"], "--port", "0", "--interface", "127.0.0.1", "--run-dir", run_dir])
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"relay-gevent: error: --run-dir {run_dir}: ")
    assert ended.stderr.count("\n") == 1


def in_mounts_of_its_own(script: str) -> list[str]:
    """What to put before a command so that it sees what `script` has mounted, which nobody else does."""
    prefix = ["unshare", "--mount", "/bin/sh", "-c"]
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount, and not in every container: run the tests as root")
    return [*prefix, f'set -e; {script}; exec "$@"', "sh"]


def test_it_needs_no_folder_for_temporary_files(tmp_path: Path) -> None:
    closed = "mount --bind $d $d && mount -o remount,bind,ro $d"  # what is there, such as this checkout, stays
    tried = f"for d in /tmp /var/tmp /usr/tmp /dev/shm; do test ! -d $d || {{ {closed}; }}; done"
    # What the test itself needs may be below /tmp; the relay gets it where it is not.
    inside = in_mounts_of_its_own(f"mount --bind {tmp_path} /mnt; cd /proc; {tried}")
    relay = Relay(tmp_path, "--usage-db", "/mnt/usage.sqlite", "--run-dir", "/mnt/run", inside=inside)
    with relay:
        honest_transfer(relay.port)
        wait_until(lambda: [row["result"] for row in relay.rows("usage")] == ["happy"], what="the row")
    with_usage = [*inside, sys.executable, *map(str, PROGRAMS["relay-usage"]), "--json", "/mnt/usage.sqlite"]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    told = subprocess.run(with_usage, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    importing = [*inside, sys.executable, str(PROGRAMS["import-twisted-usage"][0]), "/mnt/none", "/mnt/usage.sqlite"]
    told = subprocess.run(importing, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert told.returncode == 2
    assert "name one in TMPDIR" in told.stderr
    assert told.stderr.count("\n") == 1


NO_PROC = "mount -t tmpfs none /proc"


def test_a_worker_that_is_alone_needs_no_proc(tmp_path: Path) -> None:
    with Relay(tmp_path, "--websocket", "0", inside=in_mounts_of_its_own(NO_PROC), recording=True) as relay:
        for size in (300_000, 3_000_000):
            honest_transfer(relay.port, size)
        assert [record["mood"] for record in relay.wait_for_records(2)] == ["happy"] * 2
        assert len(relay.wait_for_rows("usage", 2)) == 2


def test_without_proc_a_run_directory_is_a_mistake_that_names_it(tmp_path: Path) -> None:
    inside = in_mounts_of_its_own(NO_PROC)
    command = [*inside, sys.executable, "-m", "relay", "--port", "0", "--run-dir", str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert told.returncode == 2
    assert told.stderr.endswith("workers find each other with the help of /proc; mount it, or run one alone\n")
    assert told.stderr.count("\n") == 1


HIDING = "mount -t proc -o hidepid=2 proc /proc"


def test_workers_find_each_other_where_proc_hides_all_others(tmp_path: Path) -> None:
    options = ("--run-dir", str(tmp_path / "run"), "--usage-db", str(tmp_path / "usage.sqlite"))
    with (
        Relay(tmp_path, *options, name="first") as first,
        Relay(tmp_path, *options, name="hidden", port=first.port, inside=in_mounts_of_its_own(HIDING)) as hidden,
    ):
        wait_until(lambda: f"worker {hidden.pid} has joined" in first.log_text(), what="it is let in")
        for _ in range(4):
            honest_transfer(first.port)
        with connect(first.port) as waiting:
            waiting.sendall(handshake(new_token()))
            wait_until(lambda: first.rows("current")[0]["waiting"] == 1, what="its share counts")
            assert len(first.rows("worker_share")) == 2


def test_supervisord_of_root_starts_a_relay_of_another_user_where_proc_hides_root() -> None:
    hiding = in_mounts_of_its_own(HIDING)
    with supervised(relay_user=ORDINARY_USER, started=False) as service:
        service.python = [*hiding, *service.python]
        service.start()
        honest_transfer(service.port)
        assert all(len(log.read_text().splitlines()) < 5 for log in service.worker_logs()), service.logs()


def test_the_version_is_told_everywhere(tmp_path: Path) -> None:
    for variable in VARIABLES:
        name, _, value = variable.partition("=")
        if name != "PYTHONINSPECT":
            told = run([*PROGRAMS["relay-gevent"], "--version"], {name: value})
            assert (told.returncode, told.stdout, told.stderr) == (0, f"relay-gevent {__version__}\n", ""), variable
