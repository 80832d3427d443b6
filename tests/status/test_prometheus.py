"""A real Prometheus scrapes a relay of two workers, and what it then says is what the clients did."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.harness import (
    CHECKOUT,
    Workers,
    connect,
    free_port,
    met,
    read_exactly,
    read_to_end,
    running,
    wait_until,
)
from tests.support.status import Status, status_of

RULES = CHECKOUT / "etc" / "prometheus"
pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="apt-get install prometheus"
)

Ask = Callable[[str], "float | None"]
SIZE = 2_000_000


def promtool(*arguments: str, given: str = "") -> str:
    """Run promtool, and return what it complains of."""
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@contextlib.contextmanager
def prometheus(status: Status, folder: Path) -> Iterator[Ask]:
    """Run it, and ask it for the value of an expression."""
    port = free_port()
    shutil.copy(RULES / "relay-gevent.rules.yml", folder)
    text = (RULES / "prometheus.yml").read_text().replace("4080", str(status.port)).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(text)
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}"], folder / "prometheus.log"):

        def ask(expression: str) -> float | None:
            url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
                return float(result[0]["value"][1]) if result else None
            return None

        wait_until(lambda: ask("up") == 1, 30, "Prometheus scrapes")
        yield ask


def transfer(port: int) -> None:
    """Move `SIZE` bytes from one client to another."""
    left, right = met(port)
    with left, right:
        left.sendall(bytes(SIZE))
        read_exactly(right, SIZE)


def test_what_prometheus_says_is_what_clients_did_also_through_a_rolling_restart(tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with (
        Workers(tmp_path, "--blur-usage", "600", count=2) as workers,
        status_of(workers.usage_db, folder=tmp_path) as status,
    ):
        # Before anything is counted, so that Prometheus sees everything grow.
        wait_until(lambda: status.sample("transfer_size_bytes_count") == 0, 20)
        with prometheus(status, folder) as ask:
            wait_until(lambda: ask("count_over_time(relay_gevent_relayed_bytes_total[1m])"), 20)
            goes_on, receives = met(workers.port)
            began = time.monotonic()
            for number in (0, 1):
                for _ in range(10):
                    transfer(workers.port)
                    time.sleep(0.05)
                with connect(workers.port) as client:
                    client.sendall(b"nonsense\n")
                    read_to_end(client)
                goes_on.sendall(bytes(SIZE))
                read_exactly(receives, SIZE)
                workers.start_one()
                workers.stop_one(number)
            goes_on.close()
            receives.close()
            workers.wait_for_rows("usage", 23)
            wait_until(lambda: status.sample("relayed_bytes_total") == 22 * SIZE, 20, "all that was moved")
            wait_until(lambda: ask("relay_gevent_transfer_size_bytes_count") == 21, 20)
            span = f"{int(time.monotonic() - began) + 15}s"
            assert ask(f"resets(relay_gevent_relayed_bytes_total[{span}])") == 0
            assert ask(f"max_over_time(relay_gevent_relayed_bytes_total[{span}])") == 22 * SIZE
            for expression, expected in (
                (f"increase(relay_gevent_relayed_bytes_total[{span}])", 22 * SIZE),
                (f"rate(relay_gevent_relayed_bytes_total[{span}]) * {span[:-1]}", 22 * SIZE),
                (f'increase(relay_gevent_connections_total{{mood="happy"}}[{span}])', 21),
                (f'increase(relay_gevent_refusals_total{{kind="bad_handshake"}}[{span}])', 2),
                (f"increase(relay_gevent_transfer_size_bytes_sum[{span}])", 22 * SIZE),
            ):
                # Prometheus stretches what it saw to the ends of the window.
                assert ask(expression) == pytest.approx(expected, rel=0.3), expression
            median = ask(f"histogram_quantile(0.5, rate(relay_gevent_transfer_size_bytes_bucket[{span}]))")
            assert 1e6 < (median or 0) <= 1e7
            waited = ask(f"histogram_quantile(0.9, rate(relay_gevent_transfer_waiting_seconds_bucket[{span}]))")
            assert 0 < (waited or 0) <= 1
            assert ask('count(ALERTS{alertstate="firing"})') is None
            assert promtool("check", "metrics", given=status.get("/metrics").text) == ""


def test_the_rules_that_are_shipped_hold_what_they_promise() -> None:
    assert promtool("check", "config", str(RULES / "prometheus.yml")) == ""
    assert promtool("check", "rules", str(RULES / "relay-gevent.rules.yml")) == ""
    assert promtool("test", "rules", str(RULES / "relay-gevent.test.yml")) == ""
