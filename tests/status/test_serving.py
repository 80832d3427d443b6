"""relay-status over databases of all kinds, and with visitors of all kinds."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from relay.status import source
from relay.status.history import COUNT, END, FIRST, LAST
from relay.usage.schema import open_database
from tests.support.harness import (
    CHECKOUT,
    Relay,
    Workers,
    connect,
    free_port,
    handshake,
    met,
    new_side,
    new_token,
    open_fds,
    read_exactly,
    running,
    stopped,
    wait_until,
)
from tests.support.status import COMMAND, Status, status_of


def transfer(port: int, size: int = 1000) -> None:
    """Let two clients meet, and one send so many bytes to the other."""
    left, right = met(port)
    with left, right:
        left.sendall(bytes(size))
        read_exactly(right, size)


# Databases.


def test_it_answers_before_the_relay_ever_ran_and_then_tells_of_the_relay(tmp_path: Path) -> None:
    with status_of(tmp_path / "usage.sqlite", folder=tmp_path) as status:
        status.wait_for_health(503, "no such file")
        assert "The database cannot be read" in status.get("/").text
        assert status.sample("healthy") == 0
        assert status.sample("database_readable") == 0
        assert not (tmp_path / "usage.sqlite").exists()
        with Relay(tmp_path, recording=True) as relay:
            status.wait_for_health(200, "runs with 1 worker and is idle")
            transfer(relay.port)
            relay.wait_for_rows("usage", 1)
            with connect(relay.port) as client:
                client.sendall(handshake(new_token(), new_side()))
                status.wait_for_health(200, "1 client waits for a partner")
                document = status.document()
                assert document["healthy"]
                assert document["now"]["waiting"] == 1
                assert document["since_start"]["happy"] == document["all_time"]["happy"] == 1
                assert status.sample("connections_total", mood="happy") == 1
                assert status.sample("relayed_bytes_total") == 1000
                assert "1 client waits" in status.get("/").text
            wait_until(lambda: sum(day["connections"] for day in status.document()["days"] or []) == 2)
        status.wait_for_health(503, "none of its workers lives")
        assert "Traceback" not in status.log.read_text()


def test_a_worker_killed_with_nobody_to_tell_of_it_is_known_to_be_dead(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay, status_of(relay.usage_db, folder=tmp_path) as status:
        status.wait_for_health(200, "1 worker")
        relay.kill()
        status.wait_for_health(503, "none of its workers lives")


def test_a_database_that_is_locked_or_damaged_or_replaced_is_told_of_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    open_database(str(path)).close()
    with status_of(path, folder=tmp_path) as status:
        status.wait_for_health(503, "not heard of yet")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("SELECT * FROM all_time").fetchall()  # with a -shm, as relays have it
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("INSERT INTO all_time (connections) VALUES (7)")
            status.wait_for_health(503, "locked")
            assert "locked" in status.get("/").text
        status.wait_for_health(503, "not heard of yet")
        assert status.document()["all_time"]["connections"] == 7
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + os.urandom(len(whole) - 100))
        status.wait_for_health(503, "malformed")
        path.write_bytes(b"anything" * 1000)
        status.wait_for_health(503, "not a database")
        path.unlink()
        status.wait_for_health(503, "no such file")
        path.mkdir()
        status.wait_for_health(503, "not a file")
        path.rmdir()
        path.symlink_to(path)
        status.wait_for_health(503, "symbolic links")
        path.unlink()
        open_database(str(path)).close()
        status.wait_for_health(503, "not heard of yet")
        assert status.document()["all_time"]["connections"] == 0
        before = open_fds(status.pid)
        for _ in range(5):
            status.document()
        wait_until(lambda: open_fds(status.pid) <= before, what="no descriptor is left open")


def test_two_relays_are_added_up_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with Relay(tmp_path / "one", recording=True) as one, Relay(tmp_path / "two", recording=True) as two:
        missing = tmp_path / "no <i>such</i>.sqlite"
        with status_of(one.usage_db, two.usage_db, folder=tmp_path) as status:
            transfer(one.port)
            transfer(two.port)
            wait_until(lambda: status.document()["since_start"]["happy"] == 2)
            status.wait_for_health(200, "2 workers")
        with status_of(one.usage_db, missing, folder=tmp_path / "two") as status:
            status.wait_for_health(503, f"no such file; give the path that the relay's --usage-db names ({missing})")
            wait_until(lambda: status.document()["since_start"]["happy"] == 1)
            page = status.get("/").text
            assert "no &lt;i&gt;such&lt;/i&gt;.sqlite" in page
            assert "<i>" not in page
            assert "The relay runs with 1 worker" in page


def test_the_workers_of_two_containers_over_one_volume_are_told_apart(tmp_path: Path) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    allowed = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"only root may do that, where the kernel lets it: {allowed.stderr.strip()}")
    path = tmp_path / "usage.sqlite"
    relay = [*inside, sys.executable, "-m", "relay", "--port", "0", "--interface", "127.0.0.1", "--usage-db", str(path)]
    with (
        running(relay, tmp_path / "one.log", cwd=CHECKOUT),
        running(relay, tmp_path / "other.log", cwd=CHECKOUT),
        status_of(path, folder=tmp_path) as status,
    ):
        status.wait_for_health(200, "2 workers")
        wait_until(lambda: status.get("/metrics").text.count("relay_gevent_worker_connections{") == 2)
        lines = status.get("/metrics").text.splitlines()
        series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
        assert len(set(series)) == len(series), "none stands there twice"
        one, other = status.document()["workers"]
        assert one["pid"] == other["pid"] == 1
        for worker in (one, other):
            assert status.sample("worker_connections", pid="1", start=worker["start"]) == 0
            assert f"<th>1 (start {worker['start']})</th>" in status.get("/").text


def test_a_scrape_reads_no_table_whole(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    with contextlib.closing(open_database(str(path))) as database:
        database.executemany(
            "INSERT INTO usage VALUES (?, 1.0, 1.0, 1, 'happy')", [(number * 600,) for number in range(1000)]
        )
        asked: list[str] = []
        database.set_trace_callback(asked.append)
        source._read(database, -1, path)
        database.set_trace_callback(None)
        assert len(asked) >= 8
        for statement in asked:
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not [step for step in plan if "usage" in step.split()], (statement, plan)
        # Nor does what is done in the background read more than it is meant to at a time.
        for statement, values in ((FIRST, ()), (LAST, ()), (END, (1, 2)), (COUNT, (1, 2))):
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert [step for step in plan if step.startswith("SEARCH usage")], (statement, plan)


# Visitors.


@pytest.fixture
def idle(tmp_path: Path) -> contextlib.AbstractContextManager[Status]:
    """relay-status over an empty database."""
    open_database(str(tmp_path / "usage.sqlite")).close()
    return status_of(tmp_path / "usage.sqlite", folder=tmp_path)


def test_wrong_methods_paths_hosts_and_heads_get_clear_answers(idle: contextlib.AbstractContextManager[Status]) -> None:
    with idle as status:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"):
            answer = status.get("/metrics", method)
            assert (answer.code, answer.headers["Allow"]) == (405, "GET, HEAD"), method
        for path in ("/nothing", "//", "/../etc/passwd", "/%2e%2e/", "/metrics/", "/index.html"):
            assert status.get(path).code == 404, path
        assert status.get("/metrics?x=1").code == 200
        for path in ("/", "/metrics", "/status.json"):
            got, head = status.get(path), status.get(path, "HEAD")
            assert (got.code, head.code, head.text) == (200, 200, "")
            assert int(head.headers["Content-Length"]) > 100
            assert "default-src 'none'" in got.headers["Content-Security-Policy"]
        for host in ("localhost", "localhost:80", "127.0.0.1:4080", "[::1]:4080"):
            assert status.get("/healthz", Host=host).code == 503, host
        for host in ("relay.example.org", "evil.example:4080", "localhost.evil.example"):
            assert status.get("/healthz", Host=host).code == 421, host
        for host in ("", "a b", "<script>", "a,b", "http://localhost/"):
            assert status.get("/healthz", Host=host).code == 400, host
        for raw, code in (
            (b"GET / HTTP/1.1\r\n\r\n", b"400"),
            (b"GET / HTTP/1.0\r\n\r\n", b"200"),
            (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
            (b"please relay " + b"a" * 64 + b"\n\n", b"400"),
            (b"GET / HTTP/9.x\r\n\r\n", b"400"),
            (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", b"414"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n", b"431"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 50_000 + b"\r\n", b"4"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 100_000, b"200"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"200"),
        ):
            assert status.raw(raw).split()[1].startswith(code), raw[:60]
        assert status.log.read_text().count("\n") == 1, status.log.read_text()


def test_500_idle_connections_keep_nobody_out_and_end(idle: contextlib.AbstractContextManager[Status]) -> None:
    with idle as status, contextlib.ExitStack() as opened:
        for number in range(500):
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", status.port), 20))
            if number % 2:
                sock.sendall(b"GET / HTTP/1.1\r\n")
        assert status.get("/status.json").code == 200
        wait_until(lambda: open_fds(status.pid) < 120)
        sock.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""  # the last of them, by the clock
        wait_until(lambda: open_fds(status.pid) < 40)


def test_nothing_of_a_client_or_of_a_visitor_is_told_or_written(tmp_path: Path) -> None:
    with Relay(tmp_path, recording=True) as relay, status_of(relay.usage_db, folder=tmp_path) as status:
        token, side = new_token(), new_side()
        with connect(relay.port) as client:
            client.sendall(handshake(token, side))
            status.wait_for_health(200, "1 client waits")
            said = "".join(status.get(path).text for path in ("/", "/metrics", "/status.json", "/healthz"))
            said += "".join(f"{status.get(path).headers}" for path in ("/", "/nothing-of-the-kind", "/?secret-word"))
            port = client.getsockname()[1]
        said += status.log.read_text()
        for what in (token, side, f":{port}", "nothing-of-the-kind", "secret-word"):
            assert what not in said
        assert status.log.read_text().count("\n") == 1


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give one --usage-db PATH"),
        (["--usage-db", "x", "--port", "99999"], "--port 99999: "),
        (["--usage-db", "x", "--port", "-1"], "--port -1: "),
        (["--usage-db", "x", "--interface", "eth0"], "--interface eth0: "),
        (["--usage-db", "x", "--interface", "192.0.2.1"], "--interface 192.0.2.1: not an address of this machine"),
        (["--usage-db", "x", "--interface", "fe80::1"], "--interface fe80::1: Invalid argument; name its link, too"),
        (["--usage-db", ""], "--usage-db: its value is empty; give a path"),
        (["--usage-db", "x", "--workers", "0"], "--workers 0: "),
        (["--usage-db", "x", "--usage-db", "./x"], "--usage-db x: it is given twice"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], says: str) -> None:
    ended = subprocess.run(
        [*COMMAND, *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"relay-status: error: {says}")
    assert ended.stderr.count("\n") == 1


def test_a_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        command = [*COMMAND, "--usage-db", str(tmp_path / "x"), "--port", str(port)]
        ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    remedy = "another program listens there already; stop it or choose another port"
    assert ended.stderr == f"relay-status: error: --port {port}: {remedy}\n"


def test_without_prometheus_client_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['prometheus_client'] = None\n")
    ended = subprocess.run(
        [sys.executable, "-m", "relay.status.cli", "--usage-db", "x"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{CHECKOUT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "relay-status: error: it needs the package prometheus-client: pip install 'relay-gevent[status]'\n"
    )


@pytest.mark.parametrize("interface", ["::ffff:127.0.0.1", "0:0:0:0:0:ffff:7f00:1", "127.1"])
def test_on_loopback_in_any_spelling_it_answers_only_to_who_calls_it_so(tmp_path: Path, interface: str) -> None:
    with status_of(tmp_path / "usage.sqlite", folder=tmp_path, options=("--interface", interface)) as status:
        assert status.get("/metrics", Host="localhost").code == 200
        assert status.get("/metrics", Host="relay.example.org").code == 421


def test_a_worker_that_stands_still_is_told_of_by_its_siblings_and_no_longer_when_it_answers(tmp_path: Path) -> None:
    with Workers(tmp_path, count=2) as relay, status_of(relay.usage_db, folder=tmp_path) as status:
        status.wait_for_health(200, "2 workers")
        other = relay.workers[1]
        with stopped(relay.workers[0]):
            status.wait_for_health(503, "A worker lives and does not answer the others", 60)
            assert status.sample("complaint", kind="silent") == 1
            silent = [
                value
                for (name, of), value in status.samples().items()
                if name.endswith("_silent_siblings") and ("pid", str(other.pid)) in of
            ]
            assert silent == [1]
        status.wait_for_health(200, "2 workers", 60)
        assert status.sample("complaint", kind="silent") == 0
