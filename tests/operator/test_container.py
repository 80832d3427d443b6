"""The relay in a container: the image of misc/container, started as a platform starts it.

Every container here has a root that cannot be written and no capabilities, and its process 1 is what the image says.
"""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay.cli import RECORDS_SECONDS, read_options
from tests.support import container as containers
from tests.support.container import Image, container
from tests.support.harness import CHECKOUT, wait_until

pytestmark = [
    containers.skipped,
    pytest.mark.timeout(900),  # the first one makes a Debian and an image
    pytest.mark.long,
]

KUBERNETES = {
    # What it sets for services called relay, relay-gevent and kubernetes, unless told not to.
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "KUBERNETES_PORT": "tcp://10.96.0.1:443",
    **{
        f"{service}{end}": value
        for service in ("RELAY", "RELAY_GEVENT", "RELAY_STATUS", "RELAY_WEBSOCKET", "RELAY_USAGE")
        for end, value in (
            ("_SERVICE_HOST", "10.96.0.12"),
            ("_SERVICE_PORT", "4001"),
            ("_SERVICE_PORT_RELAY", "4001"),
            ("_PORT", "tcp://10.96.0.12:4001"),
            ("_PORT_4001_TCP", "tcp://10.96.0.12:4001"),
            ("_PORT_4001_TCP_PROTO", "tcp"),
            ("_PORT_4001_TCP_PORT", "4001"),
            ("_PORT_4001_TCP_ADDR", "10.96.0.12"),
        )
    },
}


@pytest.fixture(scope="module")
def image(pytestconfig: pytest.Config) -> Iterator[Image]:
    """The image, on a Debian of this machine's release."""
    folder = Path(tempfile.mkdtemp(prefix="rg-image-", dir="/var/tmp"))
    with containers.built(pytestconfig, folder) as made:
        yield made


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume as a platform makes it for a group: any user of group 0 may write there."""
    path = tmp_path / "volume"
    path.mkdir()
    path.chmod(0o2775)
    return path


def rows(volume: Path) -> list[tuple[str, int]]:
    """Return mood and bytes of each record in the volume's database."""
    with closing(sqlite3.connect(f"file:{volume}/relay/usage.sqlite?mode=ro", uri=True)) as database:
        return database.execute("SELECT result, bytes FROM usage ORDER BY bytes").fetchall()


def complaints(text: str) -> list[str]:
    """Return the lines in which something is wrong, as supervisord, the workers or Python say it."""
    asked_for = "WARN received SIGTERM indicating exit request"
    wrong = re.compile(r"CRIT|WARN|ERRO|error|Error|Traceback|unknown")
    return [line for line in text.splitlines() if wrong.search(line) and asked_for not in line]


def test_it_relays_is_healthy_and_ends_within_ten_seconds_with_every_record(
    image: Image, volume: Path, tmp_path: Path
) -> None:
    with container(image, volume, tmp_path / "first") as first:
        first.wait_until_it_serves()
        assert b"supervisord" in Path(f"/proc/{first.first_pid}/cmdline").read_bytes()
        first.transfer(b"x" * 100_000)
        assert first.answer(4002).startswith("HTTP/1.1 200 ")
        assert first.answer(4003).startswith("HTTP/1.1 200 ")
        first.wait_until_it_is_well()
        under_way = [first.met() for _ in range(20)]
        for sender, receiver in under_way:
            sender.sendall(b"cut short")
            assert receiver.recv(9)
        assert first.stop(15) == 0  # ten, on a machine that has time
        assert " transfers have 7 seconds to finish" in first.text()
        # In blurred sizes.
        assert rows(volume) == [("happy", 10_000)] * 20 + [("happy", 100_000)]
        # Of what is on stdout engines keep the nanosecond in which it came.
        assert "total_bytes" not in first.text()
        assert list(volume.rglob("*.jsonl")) == []
        assert (volume / "relay" / "usage.sqlite").stat().st_mode & 0o777 == 0o660
        assert complaints(first.text()) == []
    with container(image, volume, tmp_path / "again") as again:
        again.wait_until_it_serves()
        again.transfer(b"x" * 200_000)
        assert again.stop(10) == 0
    assert rows(volume)[-2:] == [("happy", 100_000), ("happy", 200_000)]


def test_another_user_goes_on_with_the_volume_in_kubernetes_environment_and_with_few_descriptors(
    image: Image, volume: Path, tmp_path: Path
) -> None:
    with container(image, volume, tmp_path / "first") as first:
        first.wait_until_it_serves()
        first.transfer(b"x" * 100_000)
        assert first.stop(10) == 0
    few = ["prlimit", "--nofile=200:200"]
    variables = {**KUBERNETES, "RELAY_USAGE_LOG": "/dev/stdout"}
    with container(
        image, volume, tmp_path / "other", user="12345", environment=variables, before=few, foreign_output=True
    ) as other:
        other.wait_until_it_serves()
        other.transfer(b"x" * 200_000)
        assert other.answer(4002).startswith("HTTP/1.1 200 ")
        other.wait_until_it_is_well()
        assert other.stop(10) == 0

        def lines() -> list[int]:
            told = [line for line in other.output[0].read_text().splitlines() if line.startswith("{")]
            return [json.loads(line)["total_bytes"] for line in told]

        wait_until(lambda: lines() == [200_000], 5, "the JSON line that was asked for")
        assert complaints(other.text()) == []
    assert rows(volume) == [("happy", 100_000), ("happy", 200_000)]


def test_two_over_one_volume_both_serve_whoever_ends_first(image: Image, volume: Path, tmp_path: Path) -> None:
    with container(image, volume, tmp_path / "first") as first:
        first.wait_until_it_serves()
        first.transfer(b"x" * 100_000)
        with container(image, volume, tmp_path / "second", user="12345") as second:
            second.wait_until_it_serves()
            second.transfer(b"x" * 200_000)
            first.transfer(b"x" * 300_000)
            assert first.stop(10) == 0
            second.transfer(b"x" * 400_000)
            with container(image, volume, tmp_path / "third") as third:
                third.wait_until_it_serves()
                assert second.stop(10) == 0
                third.transfer(b"x" * 500_000)
                assert third.stop(10) == 0
            assert complaints(second.text()) == []
    assert rows(volume) == [("happy", 100_000 * number) for number in (1, 2, 3, 4, 5)]


def test_a_second_one_on_the_same_port_ends_and_says_so_and_the_first_goes_on(
    image: Image, volume: Path, tmp_path: Path
) -> None:
    with container(image, volume, tmp_path / "first") as first:
        first.wait_until_it_serves()
        with container(image, volume, tmp_path / "second", beside=first) as second:
            assert second.process.wait(120) == 0
            assert "relay-gevent: error: --port 4001: another program listens there already" in second.text()
        first.transfer(b"x" * 100_000)
        assert first.stop(10) == 0
    assert rows(volume) == [("happy", 100_000)]


def test_a_relay_that_cannot_start_ends_its_container_and_says_why(image: Image, volume: Path, tmp_path: Path) -> None:
    with container(image, volume, tmp_path / "wrong", environment={"RELAY_OPTIONS": "--grace soon"}) as wrong:
        wrong.process.wait(120)
        assert "relay-gevent: error: --grace soon" in wrong.text()
        assert "no worker can be started" in wrong.text()
    for number in ("0", "-1", "two"):
        with container(image, volume, tmp_path / f"{number} workers", environment={"RELAY_WORKERS": number}) as wrong:
            assert wrong.process.wait(30) == 2
            assert f"relay-gevent: error: RELAY_WORKERS={number}: give a whole number, 1 or more" in wrong.text()
    volume.chmod(0o755)
    with container(image, volume, tmp_path / "shut") as shut:
        assert shut.process.wait(30) == 2
        assert "relay-gevent: error: /relay/var may not be written by the user of this container" in shut.text()


def test_the_examples_ask_for_what_the_relay_needs() -> None:
    folder = CHECKOUT / "misc" / "container"
    kubernetes, compose = (folder / "kubernetes.yaml").read_text(), (folder / "compose.yaml").read_text()
    usual = read_options([])
    for name, text in (("terminationGracePeriodSeconds", kubernetes), ("stop_grace_period", compose)):
        (seconds,) = re.findall(rf"{name}: (\d+)", text)
        assert int(seconds) > usual.grace + RECORDS_SECONDS
    assert "readOnlyRootFilesystem: true" in kubernetes
    assert "read_only: true" in compose
    assert "enableServiceLinks: false" in kubernetes
    for text in (kubernetes, compose):
        assert "/relay/var" in text
    ports = {int(port) for port in re.findall(r"containerPort: (\d+)", kubernetes)}
    exposed = re.search(r"^EXPOSE (.+)$", (folder / "Containerfile").read_text(), re.MULTILINE)
    assert exposed is not None
    assert ports == {int(port) for port in exposed[1].split()} == {usual.port, 4002, 4003, 4080}
