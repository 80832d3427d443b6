"""Run the commands of docs/first-hour.md, in order, on a Debian made for that.

The Debian is a folder, entered with chroot(1) in namespaces of its own (mounts, network, processes), so that nothing of
this machine is changed, and nothing goes on afterwards. Needs root. What cannot be had there is played, by programs
that stand before the real ones on the PATH:

- systemctl: starts what the unit says, as its user; there is no systemd.
- apt-get: looks whether the packages are there; they were installed before, while there was a network.
- certbot: makes a certificate, and has this Debian believe in it.

pip finds what the relay needs in a folder of wheels, and the commands are run in one with its own.

Usage: first_hour.py [--short] [--base ARCHIVE] --wheels FOLDER [PAGE]

  --short         Leave out what is marked `long`: what needs further packages of Debian's.
  --base ARCHIVE  A Debian, as a tar archive with python3-venv and curl; otherwise mmdebstrap makes one, of the release
                  that this machine has.
  --wheels FOLDER Wheels, for the python3 of that Debian: of relay-gevent and of all that its extra `all` needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
SECONDS = 180
"""How long the commands of one block may take."""

SYSTEMCTL = r'''#!/usr/bin/python3
"""systemctl, as far as docs/first-hour.md needs it, where there is no systemd."""
import os, pwd, re, shlex, signal, subprocess, sys, time
from pathlib import Path

def settings(name):
    unit = Path(f"/etc/systemd/system/{name}.service")
    drop_ins = sorted(Path(f"{unit}.d").glob("*.conf"))
    found = {"Environment": []}
    for line in "\n".join(path.read_text() for path in [unit, *drop_ins]).splitlines():
        key, equals, value = line.partition("=")
        if equals and key == "Environment":
            found[key] += shlex.split(value)
        elif equals:
            found[key] = value
    return found

def running(name):
    try:
        pid = int(Path(f"/run/{name}.started").read_text())
        return pid if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() else None
    except (OSError, ValueError):
        return None

def start(name):
    if running(name):
        return
    if name == "nginx":
        process = subprocess.Popen(["/usr/sbin/nginx", "-g", "daemon off;"], start_new_session=True)
    else:
        told = settings(name)
        user = pwd.getpwnam(told["User"])
        environment = dict(word.split("=", 1) for word in ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", *told["Environment"]])
        log = open(f"/var/log/{name}.log", "ab")
        process = subprocess.Popen(
            shlex.split(told["ExecStart"]), cwd=told["WorkingDirectory"], env=environment, user=user.pw_uid,
            group=user.pw_gid, extra_groups=[], umask=int(told["UMask"], 8), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    Path(f"/run/{name}.started").write_text(str(process.pid))
    time.sleep(1)
    if process.poll() is not None:
        sys.exit(f"{name} has ended with status {process.returncode}; see /var/log/{name}.log")

def stop(name):
    pid = running(name)
    if pid:
        os.kill(pid, signal.SIGTERM)
    for _ in range(600):
        if not running(name):
            return
        time.sleep(0.1)
    sys.exit(f"{name} does not end")

words = [word for word in sys.argv[1:] if not word.startswith("-")]
verb, names = words[0], [re.sub(r"\.service$", "", name) for name in words[1:]]
now = "--now" in sys.argv
for name in names:
    if verb in ("stop", "restart") or (verb == "disable" and now):
        stop(name)
    if verb in ("start", "restart") or (verb == "enable" and now):
        start(name)
    if verb == "status":
        print(name, "is running" if running(name) else "is not running")
        if not running(name):
            sys.exit(3)
if verb not in ("daemon-reload", "stop", "restart", "start", "status", "enable", "disable"):
    sys.exit(f"systemctl {verb}: not known here")
'''

APT_GET = r"""#!/bin/sh
# Packages are there already.
set -e
case $1 in update) exit;; install) shift;; *) echo "apt-get $1: not known here" >&2; exit 1;; esac
for package in "$@"; do
    case $package in
        -*) ;;
        *) dpkg-query -W -f '${Package} ${Version}: ${db:Status-Status}\n' "$package" | grep ': installed$';;
    esac
done
"""

CERTBOT = r"""#!/bin/sh
# A certificate of nobody's, in which this Debian believes.
set -e
for name; do :; done
place=/etc/letsencrypt/live/$name
if [ "$1" = delete ]; then
    rm -r "$place"
    exit
fi
mkdir -p "$place" /etc/letsencrypt/renewal-hooks/pre /etc/letsencrypt/renewal-hooks/post
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$name" -addext "subjectAltName=DNS:$name" \
    -keyout "$place/privkey.pem" -out "$place/fullchain.pem" 2>/dev/null
cp "$place/fullchain.pem" "/usr/local/share/ca-certificates/$name.crt"
update-ca-certificates >/dev/null 2>&1
"""


@dataclass(frozen=True)
class Block:
    """Commands that stand together on the page.

    Attributes:
        line: where they begin.
        text: the commands.
        is_long: whether they need more than the base.
    """

    line: int
    text: str
    is_long: bool


def blocks(page: str) -> list[Block]:
    """Return the page's commands, in order."""
    found = re.finditer(r"^```sh( long)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(page.count("\n", 0, match.start()) + 2, match[2], bool(match[1])) for match in found]


def packages(wanted: list[Block]) -> list[str]:
    """Return the packages that the blocks install."""
    lines = [line for block in wanted for line in block.text.splitlines() if line.startswith("apt-get install ")]
    return [word for line in lines for word in line.split()[2:] if not word.startswith("-")]


def prepare(root: Path, base: Path | None, wheels: Path, wanted: list[Block]) -> None:
    """Lay the Debian into the folder `root`, while there is a network."""
    if base is None:
        base = root.parent / "base.tar"
        told = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
        made = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates,curl,python3-venv"]
        subprocess.run([*made, told["VERSION_CODENAME"], str(base)], check=True)
    root.mkdir()
    subprocess.run(["tar", "-C", str(root), "--exclude=./dev/*", "-xf", str(base)], check=True)
    shutil.copytree(wheels, root / "wheels")
    for wheel in wheels.glob("relay_gevent-*.whl"):
        shutil.copy(wheel, root)  # where the commands are run
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # no package starts anything
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    if any(block.is_long for block in wanted):
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages(wanted)]):
            there = 'mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; exec chroot "$0" apt-get -qq "$@"'
            inside = ["unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", there, str(root)]
            subprocess.run([*inside, *words], env=env, check=True, stdout=subprocess.DEVNULL)
    for name, text in (("systemctl", SYSTEMCTL), ("apt-get", APT_GET), ("certbot", CERTBOT)):
        path = root / "played" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (root / "etc/hosts").write_text("127.0.0.1 localhost relay.example.org\n::1 localhost\n")


def enter(root: Path) -> None:
    """Be in the Debian: mounts and loopback."""
    for kind, place in (("proc", "proc"), ("tmpfs", "dev"), ("tmpfs", "run")):
        subprocess.run(["mount", "-t", kind, kind, str(root / place)], check=True)
    for name, number in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
        subprocess.run(["mknod", "-m", "666", str(root / "dev" / name), "c", "1", str(number)], check=True)
    (root / "dev" / "fd").symlink_to("/proc/self/fd")
    (root / "dev" / "shm").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(root / "dev/shm")], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def run(block: Block, root: Path) -> None:
    """Run the commands as a shell of root's would, one after the other, up to the first that fails; SystemExit then."""
    env = {
        "PATH": "/played:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "/wheels",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "WORMHOLE_RELAY_URL": "ws://127.0.0.1:4000/v1",
    }
    # As on machines that are set up to keep what is new from everybody else.
    command = ["chroot", str(root), "/bin/sh", "-e", "-x", "-c", f"umask 077\n{block.text}"]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False)
    if done.returncode != 0:
        for log in sorted([*root.glob("var/log/relay-gevent.log"), *root.glob("var/lib/relay-gevent/var/*.log")]):
            print(f"== {log}\n{log.read_text()[-2000:]}")
        sys.exit(f"first_hour.py: the commands from line {block.line} on failed with status {done.returncode}")


def run_all(root: Path, wanted: list[Block]) -> None:
    """Run the blocks; to be called in namespaces of one's own."""
    enter(root)
    mailbox = None
    if any("wormhole " in block.text for block in wanted):
        options = ["--port", "tcp:4000:interface=127.0.0.1", "--channel-db", ":memory:", "--usage-db", ":memory:"]
        mailbox = subprocess.Popen(
            [sys.executable, "-m", "twisted", "wormhole-mailbox", *options], cwd=root / "tmp", stdout=subprocess.DEVNULL
        )
    for block in wanted:
        print(f"first_hour.py: line {block.line}", flush=True)
        run(block, root)
    if mailbox is not None:
        mailbox.terminate()
        mailbox.wait()
    print(f"first_hour.py: {len(wanted)} blocks of commands held")


def main() -> None:
    """Prepare, and begin again in namespaces of our own; there, run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("page", type=Path, nargs="?", default=TOP / "docs" / "first-hour.md")
    given = parser.parse_args()
    wanted = [block for block in blocks(given.page.read_text()) if not (given.short and block.is_long)]
    if given.root is not None:
        run_all(given.root, wanted)
        return
    if os.geteuid() != 0:
        sys.exit("first_hour.py: a Debian of one's own needs root")
    folder = Path(tempfile.mkdtemp(prefix="first-hour-", dir="/var/tmp"))
    try:
        root = folder / "root"
        prepare(root, given.base, given.wheels, wanted)
        own = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
        done = subprocess.run([*own, sys.executable, *sys.argv, "--root", str(root)], check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
