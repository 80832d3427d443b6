"""A real browser: pages that are clients of the relay, and tell the test what they saw."""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Workers, connect, handshake, new_side, new_token, read_exactly
from tests.support.web import web_options, web_port

SIZE = 64 << 20
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium")

# What all pages share: a client that keeps what it hears, and a word to the test at the end.
SCRIPT = """
const size = SIZE, chunk = 1 << 20;
const tell = (what) => fetch("/told", {method: "POST", body: JSON.stringify(what)});
function content(salt) {
  const bytes = new Uint8Array(chunk + 251);
  for (let i = 0; i < bytes.length; i++) bytes[i] = (i * 7 + (i >> 8) + salt) & 255;
  return (at) => bytes.subarray(at % 251, at % 251 + chunk);
}
function client(url, line) {
  const socket = new WebSocket(url);
  const it = {socket, heard: 0, wrong: 0, texts: 0, words: [], closed: null, ok: null};
  socket.binaryType = "arraybuffer";
  it.met = new Promise((resolve) => it.ok = resolve);
  it.over = new Promise((resolve) => socket.onclose = (event) => {
    it.closed = [event.code, event.wasClean];
    resolve();
  });
  socket.onopen = () => socket.send(new TextEncoder().encode(line));
  socket.onmessage = (event) => {
    if (typeof event.data === "string") { it.texts++; return; }
    if (it.words.length === 0) { it.words.push(new TextDecoder().decode(event.data)); it.ok(); return; }
    it.take(new Uint8Array(event.data));
  };
  it.expect = (salt) => {
    const wanted = content(salt);
    it.take = (bytes) => {
      for (let i = 0; i < bytes.length; i++) {
        const at = it.heard + i, begin = at - at % chunk;
        if (i === 0 || at % chunk === 0) it.now = wanted(begin);
        if (bytes[i] !== it.now[at % chunk]) it.wrong++;
      }
      it.heard += bytes.length;
    };
  };
  it.pour = async (salt) => {
    const mine = content(salt);
    for (let at = 0; at < size; at += chunk) {
      socket.send(mine(at));
      while (socket.bufferedAmount > 8 * chunk) await new Promise((resolve) => setTimeout(resolve, 5));
    }
  };
  it.all = async () => { while (it.heard < size) await new Promise((resolve) => setTimeout(resolve, 10)); };
  return it;
}
const seen = (it) => ({heard: it.heard, wrong: it.wrong, texts: it.texts, words: it.words, closed: it.closed});
"""


def content(salt: int, at: int, length: int = 1 << 20) -> bytes:
    """What the pages send from `at` on, as they make it."""
    begin = at % 251
    return bytes((i * 7 + (i >> 8) + salt) & 255 for i in range(begin, begin + length))


OpenPage = Callable[[str, str], "queue.Queue[Any]"]
"""Opens a page of that name with that script; what it tells comes out of the queue."""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[OpenPage]:
    """Serve pages, open one in Chromium, and wait for what it tells."""
    told: queue.Queue[Any] = queue.Queue()
    pages: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path, "")
            body = f"<!doctype html><script>{SCRIPT.replace('SIZE', str(SIZE))}{page}</script>".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)

        def open_page(name: str, script: str) -> queue.Queue[Any]:
            pages[f"/{name}"] = script
            assert CHROMIUM is not None
            process = subprocess.Popen(
                [
                    CHROMIUM,
                    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                    f"--user-data-dir={tmp_path / f'profile-{name}'}",
                    f"http://127.0.0.1:{server.server_port}/{name}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            return told

        yield open_page


def test_a_page_exchanges_64_mib_with_a_client_over_tcp_while_every_worker_is_restarted(
    tmp_path: Path, browser: OpenPage
) -> None:
    token = new_token()
    with Workers(tmp_path, *web_options(), count=2) as workers, connect(workers.port, timeout=90) as tcp:
        line = handshake(token, new_side()).decode()
        told = browser(
            "exchange",
            f"""
            (async () => {{
              const it = client("ws://127.0.0.1:{web_port(workers)}/", {json.dumps(line)});
              it.expect(2);
              await it.met;
              await Promise.all([it.pour(1), it.all()]);
              await it.over;
              tell(seen(it));
            }})();
            """,
        )
        tcp.sendall(handshake(token, new_side()))
        assert read_exactly(tcp, 3) == b"ok\n"

        def pour() -> None:
            for at in range(0, SIZE, 1 << 20):
                tcp.sendall(content(2, at))

        pouring = threading.Thread(target=pour)
        pouring.start()
        wrong = 0
        for number, at in enumerate(range(0, SIZE, 1 << 20)):
            wrong += read_exactly(tcp, 1 << 20) != content(1, at)
            if number in (5, 20):
                workers.start_one()
                assert workers.stop_one(0 if number == 5 else 1) == 0
        pouring.join(60)
        assert wrong == 0
        tcp.close()
        page = told.get(timeout=60)
        assert page == {"heard": SIZE, "wrong": 0, "texts": 0, "words": ["ok\n"], "closed": [1000, True]}
        assert workers.wait_for_records(1)[0]["total_bytes"] == 2 * SIZE


def test_a_page_is_the_partner_of_another_page_and_a_third_sees_its_refusals(tmp_path: Path, browser: OpenPage) -> None:
    token = new_token()
    one, other = (json.dumps(handshake(token, new_side()).decode()) for _ in range(2))
    with Workers(tmp_path, *web_options(), count=2) as workers:
        url = f"ws://127.0.0.1:{web_port(workers)}/"
        told = browser(
            "partners",
            f"""
            (async () => {{
              const left = client("{url}", {one}), right = client("{url}", {other});
              left.expect(4); right.expect(3);
              await Promise.all([left.met, right.met]);
              await Promise.all([left.pour(3), right.pour(4), left.all(), right.all()]);
              left.socket.close(1000);
              await Promise.all([left.over, right.over]);
              tell([seen(left), seen(right)]);
            }})();
            """,
        )
        whole = {"heard": SIZE, "wrong": 0, "texts": 0, "words": ["ok\n"], "closed": [1000, True]}
        assert told.get(timeout=90) == [whole, whole]
        told = browser(
            "refusals",
            f"""
            (async () => {{
              const bad = client("{url}", "nonsense\\n"), early = client("{url}", {one} + "x");
              const text = new WebSocket("{url}");
              text.onopen = () => text.send("please relay");
              const closed = new Promise((resolve) => text.onclose = (event) => resolve(event.code));
              await Promise.all([bad.over, early.over]);
              tell([bad.words, bad.closed, early.words, early.closed, await closed]);
            }})();
            """,
        )
        assert told.get(timeout=60) == [["bad handshake\n"], [1000, True], ["impatient\n"], [1000, True], 1003]
