"""relay-status as a real process, and what its visitors read."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.harness import CHECKOUT, read_to_end, running, wait_until

COMMAND = [sys.executable, "-m", "relay.status.cli"]


@dataclass(frozen=True)
class Answer:
    """What was answered."""

    code: int
    headers: Mapping[str, str]
    text: str


Sample = tuple[str, frozenset[tuple[str, str]]]
"""A name, and labels."""


@dataclass
class Status:
    """A relay-status that runs."""

    port: int
    pid: int
    log: Path

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask for something."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read().decode())

    def raw(self, request: bytes) -> bytes:
        """Say anything, and return all that is answered."""
        with socket.create_connection(("127.0.0.1", self.port), 15) as sock:
            sock.sendall(request)
            return read_to_end(sock, 15)

    def document(self) -> dict[str, Any]:
        """/status.json."""
        found: dict[str, Any] = json.loads(self.get("/status.json").text)
        return found

    def health(self) -> tuple[int, str]:
        """/healthz: its status, and what it says."""
        answer = self.get("/healthz")
        return answer.code, answer.text

    def samples(self) -> dict[Sample, float]:
        """/metrics, read by Prometheus's own library. The label `database` is left out."""
        return {
            (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k != "database")): sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
        }

    def sample(self, name: str, **labels: str) -> float | None:
        """One of these; None when there is none."""
        return self.samples().get((f"relay_gevent_{name}", frozenset(labels.items())))

    def wait_for_health(self, code: int, words: str, seconds: float = 20) -> None:
        """Wait until /healthz says so."""
        wait_until(lambda: self.health()[0] == code and words in self.health()[1], seconds, f"{code} {words}")


@contextlib.contextmanager
def status_of(*databases: Path, folder: Path, options: tuple[str, ...] = ()) -> Iterator[Status]:
    """Run relay-status over these databases, with its log in `folder`; fails when it logs a traceback."""
    log = folder / "status.log"
    command = [*COMMAND, "--port", "0", *options]
    for database in databases:
        command += ["--usage-db", str(database)]
    with running(command, log, cwd=CHECKOUT) as process:

        def port() -> int:
            found = re.search(r"status page is at http://\S+:(\d+)/", log.read_text())
            assert process.poll() is None, log.read_text()
            return int(found[1]) if found else 0

        yield Status(wait_until(port, 20, "where the status page is"), process.pid, log)
        assert process.poll() is None, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert process.returncode == 0
