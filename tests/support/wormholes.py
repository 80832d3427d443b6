"""The real clients, magic-wormhole and wormhole-william, and the mailbox server through which they find each other.

A client runs with a HOME of its own, and is told of no server but the test's, so that nothing outside is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Service, running, wait_until

# wormhole-william has no option for the transit relay: this is what it asks for, unless its partner names another.
PUBLIC_RELAY = "transit.magic-wormhole.io"
PUBLIC_RELAY_PORT = 4001


@dataclass(frozen=True)
class Surroundings:
    """Where a client runs, and which servers it is told of.

    Attributes:
        inside: what comes before its command (`ip netns exec NAME`), or nothing.
        mailbox: address and port of the mailbox server.
        relay: address and port of the transit relay.
        listen: whether it may offer its own addresses to its partner (wormhole-william always does).
    """

    mailbox: tuple[str, int]
    relay: tuple[str, int]
    inside: Sequence[str] = ()
    listen: bool = True

    @property
    def mailbox_url(self) -> str:
        """The mailbox server as the clients' --relay-url wants it."""
        return f"ws://{self.mailbox[0]}:{self.mailbox[1]}/v1"


def magic_wormhole(around: Surroundings) -> list[str]:
    """Return the start of a magic-wormhole command line, up to `send` or `receive`."""
    host, port = around.relay
    servers = ["--relay-url", around.mailbox_url, "--transit-helper", f"tcp:{host}:{port}"]
    return [*around.inside, sys.executable, "-m", "wormhole", *servers]


def magic_wormhole_send(around: Surroundings, code: str, file: Path) -> list[str]:
    """Return the command that sends `file`."""
    listen = [] if around.listen else ["--no-listen"]
    return [*magic_wormhole(around), "send", "--hide-progress", "--no-qr", *listen, "--code", code, str(file)]


def magic_wormhole_receive(around: Surroundings, code: str) -> list[str]:
    """Return the command that receives into the current folder."""
    listen = [] if around.listen else ["--no-listen"]
    return [*magic_wormhole(around), "receive", "--hide-progress", "--accept-file", *listen, code]


def william_send(around: Surroundings, code: str, file: Path) -> list[str]:
    """Return the command that sends `file`."""
    servers = ["--relay-url", around.mailbox_url]
    return [*around.inside, "wormhole-william", "send", "--hide-progress", *servers, "--code", code, str(file)]


def william_receive(around: Surroundings, code: str) -> list[str]:
    """Return the command that receives into the current folder, after a `y` on its stdin."""
    servers = ["--relay-url", around.mailbox_url]
    return [*around.inside, "wormhole-william", "receive", "--hide-progress", *servers, code]


SENDERS = {"magic-wormhole": magic_wormhole_send, "wormhole-william": william_send}
RECEIVERS = {"magic-wormhole": magic_wormhole_receive, "wormhole-william": william_receive}


def skip_unless_installed(*programs: str) -> None:
    """Skip the test when one of the clients is missing, and say where it comes from."""
    if "wormhole-william" in programs and shutil.which("wormhole-william") is None:
        pytest.skip("apt-get install wormhole-william")


def file_of(size: int, path: Path) -> str:
    """Write `size` random bytes to `path` and return their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        left = size
        while left:
            chunk = os.urandom(min(left, 1 << 20))
            file.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def transfer(
    folder: Path,
    sender: str,
    receiver: str,
    *,
    sending: Surroundings,
    receiving: Surroundings,
    size: int,
    seconds: float = 90,
) -> None:
    """Send a file of `size` random bytes from one client to the other and compare the SHA-256 of both ends.

    Args:
        folder: where the clients' files and their output go.
        sender: a key of SENDERS.
        receiver: a key of RECEIVERS.
        sending: where the sender runs.
        receiving: where the receiver runs.
        size: bytes.
        seconds: for both clients to end.
    """
    code = f"{secrets.randbelow(9_000_000) + 1_000_000}-{secrets.token_hex(4)}-{secrets.token_hex(4)}"
    home, inbox = folder / "home", folder / "inbox"
    home.mkdir()
    inbox.mkdir()
    original = folder / "file.bin"
    digest = file_of(size, original)
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    with contextlib.ExitStack() as stack:
        log = folder / "sender.log"
        send = stack.enter_context(running(SENDERS[sender](sending, code, original), log, env=env, cwd=folder))
        received = subprocess.run(
            RECEIVERS[receiver](receiving, code),
            input=b"y\n",
            env=env,
            cwd=inbox,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        said = f"receiver: {received.stdout.decode(errors='replace')}\nsender: {log.read_text(errors='replace')}"
        assert received.returncode == 0, said
        assert send.wait(seconds) == 0, said
    assert sha256(inbox / original.name) == digest, said


@contextlib.contextmanager
def mailbox_server(folder: Path, port: int, interface: str, inside: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Run a mailbox server on `interface` and yield its address and port once it listens.

    Where it runs `inside` a network namespace, the test cannot connect to it; its log tells.
    """
    endpoint = f"tcp:{port}:interface={interface}"
    command = [*inside, sys.executable, "-m", "twisted", "wormhole-mailbox", "--port", endpoint]
    command += ["--channel-db", str(folder / "mailbox.sqlite")]
    log = folder / "mailbox.log"
    with running(command, log, cwd=folder) as process:

        def listens() -> bool:
            assert process.poll() is None, f"the mailbox server ended: {log.read_text()}"
            if not inside:
                with contextlib.suppress(OSError), socket.create_connection((interface, port), 1):
                    return True
                return False
            return f"starting on {port}" in log.read_text()

        wait_until(listens, 30, "the mailbox server listens")
        yield interface, port


def happy_ones(relay: Service, after: int = 0) -> list[dict[str, Any]]:
    """The records of transfers, of those that come after so many; a spare's may come before."""
    return [record for record in relay.records()[after:] if record["mood"] == "happy"]
