"""A privileged process opens no name in a folder of an unprivileged one.

supervisord's files are in var/, the relay's in var/relay/; where supervisord is root's and the relay is not, only the
latter is the relay's user's. Whoever has an earlier layout, or another one in which root could be led astray, is told.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.usage.schema import open_database
from tests.support.harness import CHECKOUT, wait_until
from tests.support.hostile import honest_transfer
from tests.support.supervised import ORDINARY_USER, Supervised, supervised

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may run the relay as another user than supervisord")


@pytest.fixture
def service_of_root() -> Iterator[Supervised]:
    """supervisord as root, the relay as an ordinary user."""
    with supervised(relay_user=ORDINARY_USER) as started:
        yield started


def as_the_relay(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell's command line in `folder` as the relay's user."""
    return subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, user=ORDINARY_USER, capture_output=True, text=True, check=False
    )


@only_root
def test_no_file_of_roots_is_in_a_folder_of_the_relays(service_of_root: Supervised) -> None:
    service = service_of_root
    honest_transfer(service.port)
    wait_until(lambda: service.query("SELECT result FROM usage") == [("happy",)], 5, "the row")
    relay = pwd.getpwnam(ORDINARY_USER).pw_uid
    owners = {pid: Path(f"/proc/{pid}").stat().st_uid for pid in (service.supervisord_pid(), *service.pids())}
    assert sorted(owners.values()) == [0, relay, relay]
    for folder in (path for path in (service.home, *service.home.rglob("*")) if path.is_dir()):
        owner = folder.stat().st_uid
        assert owner in (0, relay)
        if owner == relay:
            assert folder.is_relative_to(service.relay_folder)
            assert {path.lstat().st_uid for path in folder.iterdir()} == {relay}
    for fd in Path(f"/proc/{service.supervisord_pid()}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            assert not Path(os.readlink(fd)).is_relative_to(service.relay_folder)


@only_root
def test_root_is_led_nowhere_by_links_in_the_relays_folder(service_of_root: Supervised, tmp_path: Path) -> None:
    service = service_of_root
    target = tmp_path / "target"
    target.write_text("root's\n")
    names = ["relay-0.log", "relay-0.log.1", "relay-1.log", "supervisord.log", "supervisord.pid", "supervisor.sock"]
    for name in names:
        # Nothing of root's can be replaced, and whatever is put where the relay may write is not looked at.
        assert as_the_relay(f"ln -sf {target} {name}", service.var).returncode != 0, name
        assert as_the_relay(f"ln -sf {target} {name}", service.relay_folder).returncode == 0
    assert as_the_relay("mv relay relay.old", service.var).returncode != 0
    service.control("clear", "relay:relay-0")
    service.control("restart", "relay:*")
    wait_until(lambda: service.control("tail", "relay:relay-1", "stderr"), 5, "what a worker says")
    service.end()
    assert target.read_text() == "root's\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def told(service: Supervised) -> str:
    """Start what cannot run, and return the one line that a worker gives as the reason."""
    service.run("-m", "supervisor.supervisord", "-c", str(service.conf))
    error = "relay-gevent: error: "
    wait_until(lambda: [line for line in service.log_lines() if line.startswith(error)], 10, "the line in the log")
    service.control("stop", "relay:*", check=False)
    lines = set(service.log_lines())
    assert len(lines) == 1, lines
    return lines.pop().removeprefix(error)


@only_root
def test_root_does_not_write_into_a_folder_of_the_relays_user() -> None:
    with supervised(relay_user=ORDINARY_USER, started=False) as service:
        shutil.chown(service.var, ORDINARY_USER)
        assert "give that one var, and the relay only var/relay" in told(service)
        shutil.chown(service.var, 0)
        service.control("start", "relay:*")
        wait_until(lambda: len(service.listening()) == 2, 10, "both listen")
        honest_transfer(service.port)


@only_root
@pytest.mark.parametrize("there", ["missing", "of another user"])
def test_a_folder_that_the_relay_needs_is_named(there: str) -> None:
    with supervised(relay_user=ORDINARY_USER, started=False) as service:
        if there == "missing":
            service.relay_folder.rmdir()
        else:
            shutil.chown(service.relay_folder, 0)
        user = pwd.getpwnam(ORDINARY_USER).pw_uid
        line = told(service)
        assert line.startswith("var/relay ")
        assert f"the user that the relay runs as, {user}" in line


@only_root
def test_the_documented_steps_to_a_relay_of_another_user_make_one() -> None:
    page = (CHECKOUT / "docs" / "running.md").read_text()
    section = page.partition("### supervisord as root, the relay as a user of its own\n")[2].partition("\n#")[0]
    steps = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    assert [step for step in steps if "~" in step] == []  # root's home is for nobody else
    steps = [step for step in steps if not step.startswith("useradd ")]
    assert steps[-1] == "supervisord -c /srv/relay/etc/supervisord.conf"
    with supervised(relay_user=ORDINARY_USER, started=False) as service:
        shutil.rmtree(service.conf.parent)
        shutil.rmtree(service.var)
        group = grp.getgrgid(pwd.getpwnam(ORDINARY_USER).pw_gid).gr_name
        installed = service.home / "installed"  # without what a relay of this checkout has written
        shutil.copytree(CHECKOUT / "etc", installed / "etc")
        (installed / "var").mkdir()
        shutil.copy(CHECKOUT / "var" / "README", installed / "var")
        here = "\n".join(steps[:-1]).replace("/opt/relay-gevent/share/relay-gevent", str(installed))
        here = here.replace("-o relay -g relay", f"-o {ORDINARY_USER} -g {group}")
        here = here.replace("/user=relay/", f"/user={ORDINARY_USER}/").replace("/srv/relay", str(service.home))
        subprocess.run(["/bin/sh", "-ec", f"umask 077\n{here}"], check=True)  # as a hardened machine's root has it
        assert service.relay_folder.stat().st_mode & 0o777 == 0o750
        service.start()
        honest_transfer(service.port)
        relay = pwd.getpwnam(ORDINARY_USER).pw_uid
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in service.pids()} == {relay}


@only_root
def test_a_folder_that_the_relays_user_may_not_enter_is_told_of_as_documented() -> None:
    page = " ".join((CHECKOUT / "docs" / "running.md").read_text().split())
    assert "`supervisor: couldn't chdir to …: EACCES`" in page
    with supervised(relay_user=ORDINARY_USER, started=False) as service:
        service.home.chmod(0o700)
        service.run("-m", "supervisor.supervisord", "-c", str(service.conf))
        wait_until(service.log_lines, 10, "what the worker's log says")
        assert re.search(r"^supervisor: couldn't chdir to .*: EACCES$", service.log_lines()[0])


def test_a_program_that_is_not_found_is_named() -> None:
    with supervised(started=False) as service:
        (service.home / "bin" / "relay-gevent").unlink()
        # A python that has no relay-gevent beside it.
        link = service.home / "bin" / "python"
        link.symlink_to(os.path.realpath(service.python[0]))
        service.env["PYTHONPATH"] += ":" + ":".join(path for path in PATH_OF_PACKAGES if path)
        service.python = [str(link)]
        assert told(service).startswith(
            "relay-gevent is neither beside the python that runs supervisord nor on the PATH"
        )


PATH_OF_PACKAGES = [str(Path(os.path.realpath(os.__file__)).parent), str(Path(pytest.__file__).parents[1])]


# From an earlier version.


def earlier(service: Supervised, *names: str) -> None:
    """Make some of the files of an earlier version, which had all of them in var/."""
    if "usage.sqlite" in names:
        with contextlib.closing(open_database(str(service.var / "usage.sqlite"))) as database:
            database.execute("INSERT INTO usage VALUES (1.0, 2.0, 3.0, 4, 'happy')")
            database.commit()
    if "usage.jsonl" in names:
        (service.var / "usage.jsonl").write_text('{"started": 1.0}\n')
    (service.var / "run").mkdir(mode=0o700)


@pytest.mark.parametrize("names", [["usage.sqlite", "usage.jsonl"], ["usage.sqlite"], ["usage.jsonl"]], ids=" ".join)
def test_what_an_earlier_version_kept_is_moved_and_not_begun_anew(names: list[str]) -> None:
    with supervised(started=False) as service:
        earlier(service, *names)
        before = {name: (service.var / name).read_bytes() for name in names}
        line = told(service)
        assert line.startswith(f"var/{names[0]} is where an earlier version kept it; ")
        assert "move var/usage* to var/relay" in line
        assert not service.relay_folder.exists()
        assert {name: (service.var / name).read_bytes() for name in names} == before
        service.end()
        # As docs/running.md has it.
        steps = "mkdir var/relay && mv var/usage* var/relay/ && rm -r var/run"
        subprocess.run(["/bin/sh", "-c", steps], cwd=service.home, check=True)
        for log in service.worker_logs():
            log.unlink()
        service.start()
        honest_transfer(service.port)
        rows = 1 + ("usage.sqlite" in names)
        wait_until(lambda: service.query("SELECT count(*) FROM usage") == [(rows,)], 5, "the rows, old and new")


def test_the_documented_steps_are_those_that_were_tried() -> None:
    page = (CHECKOUT / "docs" / "running.md").read_text()
    for step in ["mkdir var/relay", "mv var/usage* var/relay/", "rm -r var/run", "chown root:root var"]:
        assert f"    {step}\n" in page


# What else knows where the files are.


def test_everything_that_is_shipped_looks_where_the_relay_writes() -> None:
    conf = (CHECKOUT / "etc" / "supervisord.conf").read_text()
    assert "cd ./var/relay" in conf
    folder = "/var/lib/relay-gevent/var/relay"
    for name, file in {
        "etc/logrotate.d/relay-gevent": "usage.jsonl",
        "etc/rsyslog.d/relay-gevent.conf": "usage*.jsonl",
        "misc/munin/relay_": "usage.sqlite",
        "misc/munin/plugin-conf.d/relay-gevent": "usage.sqlite",
        "docs/munin.md": "usage.sqlite",
        "docs/moving.md": "usage.sqlite",
        "docs/relay-usage.md": "usage.sqlite",
    }.items():
        text = (CHECKOUT / name).read_text()
        assert f"{folder}/{file}" in text, name
        assert "relay-gevent/var/usage" not in text, name


def test_logrotate_gives_root_up_before_it_looks_into_the_relays_folder() -> None:
    rotation = (CHECKOUT / "etc" / "logrotate.d" / "relay-gevent").read_text()
    (lines,) = re.findall(r"^/var/lib/relay-gevent/\S+ \{$(.*?)^\}$", rotation, re.MULTILINE | re.DOTALL)
    assert re.search(r"^ +su relay-gevent relay-gevent$", lines, re.MULTILINE)


# Variables.


@pytest.mark.parametrize("value", ["tcp://10.96.0.12:4001", "4002", "$(touch RAN)"])
def test_what_kubernetes_sets_for_a_service_named_relay_is_not_read(value: str) -> None:
    with supervised(started=False) as service:
        service.env |= {
            "RELAY_PORT": value,
            "RELAY_SERVICE_HOST": "10.96.0.12",
            "RELAY_SERVICE_PORT": "4001",
            "RELAY_PORT_4001_TCP": "tcp://10.96.0.12:4001",
            "RELAY_PORT_4001_TCP_PROTO": "tcp",
            "RELAY_PORT_4001_TCP_PORT": "4001",
            "RELAY_PORT_4001_TCP_ADDR": "10.96.0.12",
        }
        service.start()
        honest_transfer(service.port)
        assert list(service.home.rglob("RAN")) == []


@pytest.mark.parametrize("value", ["$(touch RAN); `touch RAN`", "*", "'--help"])
def test_a_wrong_port_in_the_environment_is_a_mistake_and_nothing_that_runs(value: str) -> None:
    with supervised(started=False) as service:
        service.env["RELAY_LISTEN"] = value
        assert told(service).startswith(f"--port {value}: ")
        assert list(service.home.rglob("RAN")) == []


def test_make_names_its_port_as_the_configuration_does() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    conf = (CHECKOUT / "etc" / "supervisord.conf").read_text()
    for name, port in (("RELAY_LISTEN", 4001), ("RELAY_WEBSOCKET", 4002), ("RELAY_STATUS_LISTEN", 4080)):
        assert f"{name} ?= {port}\n" in makefile
        assert name in conf
    assert "export RELAY_LISTEN RELAY_WEBSOCKET RELAY_STATUS_LISTEN\n" in makefile
    for name in ["Makefile", "etc/supervisord.conf", "etc/systemd/relay-gevent.service", "docs/systemd.md"]:
        assert "RELAY_PORT" not in (CHECKOUT / name).read_text(), name
