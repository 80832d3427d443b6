"""Containers as a platform starts them: an image built by buildah, and namespaces of its own for what it runs.

No container runtime is needed, and none has to be allowed here: the image's own entry point is started as process 1 of
new PID, mount, IPC and network namespaces, without capabilities, on a root that cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.debian import debian, wheels
from tests.support.harness import CHECKOUT, connect, read_to_end, shake_hands, wait_until
from tests.support.namespaces import Host
from tests.support.namespaces import not_allowed as no_namespaces

CONTEXT = ("LICENSE", "README.md", "MANIFEST.in", "setup.py", "setup.cfg", "pyproject.toml", "relay", "etc", "misc")
"""What of a checkout the build of the image reads."""

# What a runtime does between its namespaces and the entry point. $1 is the root, $2 the volume, $3 "ro" or "rw".
_ENTER = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind "$2" "$1/relay/var"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=755 dev "$1/dev"
for device in "null 3" "zero 5" "full 7" "random 8" "urandom 9"; do
    mknod -m 666 "$1/dev/${device% *}" c 1 "${device#* }"
done
ln -s /proc/self/fd "$1/dev/fd"
ln -s fd/0 "$1/dev/stdin"; ln -s fd/1 "$1/dev/stdout"; ln -s fd/2 "$1/dev/stderr"
mkdir -m 1777 "$1/dev/shm"
mount -t tmpfs -o mode=1777 shm "$1/dev/shm"
mount -o "remount,bind,$3" "$1"
root=$1; shift 3
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        root: its files.
        config: what it says of how it wants to be started, as OCI has it.
    """

    root: Path
    config: dict[str, object]

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that it sets."""
        words = self.config["Env"]
        assert isinstance(words, list)
        return dict(word.split("=", 1) for word in words)

    @property
    def entry_point(self) -> list[str]:
        """Return the command that process 1 becomes."""
        words = self.config["Entrypoint"]
        assert isinstance(words, list)
        return words


def not_allowed() -> str:
    """Return why no image can be built and started here, or an empty string when one can."""
    for program, package in (("buildah", "buildah"), ("setpriv", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"apt-get install {package}"
    return no_namespaces()


def gather(context: Path, config: pytest.Config) -> None:
    """Copy what an image is built from, and wheels of what the relay needs, so that the build reaches for nothing."""
    context.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in CONTEXT:
        source = CHECKOUT / name
        (shutil.copytree(source, context / name, ignore=unwanted) if source.is_dir() else shutil.copy(source, context))
    (context / "var").mkdir()
    shutil.copy(CHECKOUT / "var" / "README", context / "var")
    shutil.copytree(wheels(config), context / "wheels")


@contextlib.contextmanager
def built(config: pytest.Config, folder: Path) -> Iterator[Image]:
    """Build the image; all that buildah keeps is in `folder`, which is removed."""
    base = debian(config)
    gather(folder / "context", config)
    driver = "overlay"

    def buildah(*words: str, check: bool = True) -> str:
        places = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", driver]
        done = subprocess.run(["buildah", *places, *words], capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0 or not check, f"buildah {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip() if done.returncode == 0 else ""

    if not buildah("from", "scratch", check=False):
        shutil.rmtree(folder / "storage", ignore_errors=True)
        driver = "vfs"  # no overlay file system here
        buildah("from", "scratch")
    try:
        buildah("add", "working-container", str(base), "/")
        buildah("commit", "--quiet", "--rm", "working-container", "localhost/base")
        arguments = {"BASE": "localhost/base", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "wheels"}
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        containerfile = folder / "context" / "misc" / "container" / "Containerfile"
        buildah(
            "bud", "--isolation", "chroot", *words, "-t", "relay", "-f", str(containerfile), str(folder / "context")
        )
        name = buildah("from", "localhost/relay")
        told = json.loads(buildah("inspect", "--type", "image", "localhost/relay"))
        yield Image(Path(buildah("mount", name)), told["OCIv1"]["config"])
    finally:
        buildah("umount", "--all", check=False)
        buildah("rm", "--all", check=False)
        for mounted in (folder / "storage" / driver, folder / "storage"):
            subprocess.run(["umount", str(mounted)], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Container:
    """A running container.

    Attributes:
        host: its network namespace.
        process: unshare(1), whose only child is the container's process 1.
        volume: what is at /relay/var.
        output: what it has written to stdout and stderr, one file each.
    """

    host: Host
    process: subprocess.Popen[bytes]
    volume: Path
    output: tuple[Path, Path]
    kept: list[socket.socket] = field(default_factory=list)

    @property
    def first_pid(self) -> int:
        """Return the process id, out here, of the container's process 1."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(wait_until(lambda: children.read_text().split(), 10, "process 1")[0])

    def text(self) -> str:
        """Return all that it said."""
        return "".join(path.read_text() for path in self.output)

    def connect(self, port: int) -> socket.socket:
        """Return a connection to a port of it, from inside its network; closed when the container ends."""
        made = self.host.make_there(lambda: connect(port))
        self.kept.append(made)
        return made

    def serves(self, port: int = 4001) -> bool:
        """Tell whether it accepts connections."""
        try:
            self.connect(port).close()
        except OSError:
            return False
        return True

    def wait_until_it_serves(self) -> None:
        """Return when its workers listen."""
        wait_until(
            lambda: self.text().count(" listening on ") >= 2 or self.process.poll() is not None,
            40,
            "workers that listen",
        )
        assert self.process.poll() is None, self.text()

    def met(self) -> tuple[socket.socket, socket.socket]:
        """Return two clients that were told ok."""
        first, second = self.connect(4001), self.connect(4001)
        shake_hands(first, second)
        return first, second

    def transfer(self, content: bytes) -> None:
        """Send `content` through it, and end."""
        sender, receiver = self.met()
        sender.sendall(content)
        sender.shutdown(socket.SHUT_WR)
        assert read_to_end(receiver) == content
        receiver.close()
        sender.close()

    def answer(self, port: int, path: str = "/") -> str:
        """Return what it answers to a GET, head and all."""
        asking = self.connect(port)
        asking.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return read_to_end(asking).decode()

    def wait_until_it_is_well(self) -> None:
        """Return when /healthz says so."""
        wait_until(lambda: self.serves(4080) and "200 OK" in self.answer(4080, "/healthz"), 30, "/healthz says 200")

    def stop(self, seconds: float) -> int:
        """Send SIGTERM to process 1, as a platform does, and return the exit status; AssertionError after `seconds`."""
        os.kill(self.first_pid, signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {seconds} s: {self.text()}") from None


@contextlib.contextmanager
def container(
    image: Image,
    volume: Path,
    folder: Path,
    *,
    user: str = "4001",
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    foreign_output: bool = False,
    beside: Container | None = None,
) -> Iterator[Container]:
    """Start a container, which is gone at the end.

    Args:
        image, volume: what it is started from, and on.
        folder: for what it says.
        user: its user id; the group is 0.
        environment: further variables.
        before: what to put before its command, such as prlimit(1).
        beside: share that one's network, as on the host's.
        foreign_output: have its stdout and stderr belong to somebody else, as pipes that it cannot open by name.
    """
    host = Host(f"rg{secrets.token_hex(4)}") if beside is None else beside.host
    if beside is None:
        host.create()
    folder.mkdir(exist_ok=True)
    output = (folder / "stdout", folder / "stderr")
    for path in output:
        path.touch(0o666)
        path.chmod(0o666)
    variables = {**image.environment, "HOSTNAME": host.name, **(environment or {})}
    powerless = ["setpriv", f"--reuid={user}", "--regid=0", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    inside = [*powerless, "env", "-i", *(f"{name}={value}" for name, value in variables.items()), *image.entry_point]
    namespaces = ["unshare", "--pid", "--mount", "--ipc", "--uts", "--fork"]
    command = [
        *host.inside,
        *namespaces,
        "sh",
        "-c",
        _ENTER,
        "enter",
        str(image.root),
        str(volume),
        "ro",
        *before,
        *inside,
    ]
    tees = []
    with contextlib.ExitStack() as opened:
        ends = []
        for path in output:
            file = opened.enter_context(path.open("ab"))
            if foreign_output:
                tee = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
                assert tee.stdin is not None
                tees.append(tee)
                ends.append(opened.enter_context(tee.stdin))
            else:
                ends.append(file)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=ends[0], stderr=ends[1], cwd="/")
    started = Container(host, process, volume, output)
    try:
        yield started
    finally:
        # Process 1 itself, since it outlives unshare(1) once it is another user's; all others there end with it.
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait()
        for tee in tees:
            tee.wait(20)
        for sock in started.kept:
            sock.close()
        if beside is None:
            host.remove()


skipped = pytest.mark.skipif(bool(not_allowed()) or sys.platform != "linux", reason=not_allowed() or "needs Linux")
