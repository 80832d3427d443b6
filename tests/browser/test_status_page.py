"""The status page in a real browser: over an idle, a busy, a stopped and a broken relay; wide, narrow, dark."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from tests.support.chromium import Page, chromium, needs_chromium
from tests.support.harness import Workers, connect, handshake, met, new_side, new_token, read_exactly, wait_until
from tests.support.status import Status, status_of

pytestmark = needs_chromium

PARTS = ("How fast", "Transfers and who waits", "How connections ended", "Turned away", "Workers", "By day")


def assert_it_fits(page: Page) -> None:
    """Nothing is wider than the window, save tables that scroll by themselves."""
    for width, dark in ((1280, False), (390, False), (320, False), (390, True)):
        page.look(width=width, dark=dark)
        assert page.ask("document.documentElement.scrollWidth") <= width
        assert page.ask("parseFloat(getComputedStyle(document.querySelector('td, .state')).fontSize)") >= 15
        red, green, blue = map(int, re.findall(r"\d+", page.ask("getComputedStyle(document.body).backgroundColor"))[:3])
        assert (max(red, green, blue) < 60) if dark else (min(red, green, blue) > 200)
    page.look(width=1280)


def assert_it_keeps_to_itself(page: Page, status: Status) -> None:
    """It asked for itself and for nothing else, and nothing was wrong with it."""
    assert page.requested() == {f"http://127.0.0.1:{status.port}/"}
    assert page.complaints() == []


def test_a_person_sees_an_idle_a_busy_a_stopped_and_a_broken_relay(tmp_path: Path) -> None:
    with chromium(tmp_path) as page, status_of(tmp_path / "usage.sqlite", folder=tmp_path) as status:
        with Workers(tmp_path, count=2) as workers:
            status.wait_for_health(200, "idle")
            page.open(f"http://127.0.0.1:{status.port}/")
            assert "The relay runs with 2 workers and is idle." in page.text()
            for part in PARTS:
                assert part in page.text()
            assert_it_fits(page)

            left, right = met(workers.port)
            waits = connect(workers.port)
            waits.sendall(handshake(new_token(), new_side()))
            ended = threading.Event()

            def flow() -> None:
                while not ended.wait(0.02):
                    left.sendall(bytes(100_000))
                    read_exactly(right, 100_000)

            thread = threading.Thread(target=flow)
            thread.start()
            try:
                wait_until(lambda: "1 transfer, and 1 client waits" in page.text(), 30, "the page says so by itself")
                moved = "document.querySelectorAll('.tile')[3].innerText"
                first = page.ask(moved)
                wait_until(lambda: page.ask(moved) != first, 30, "numbers change while bytes move")
                wait_until(lambda: re.search(r"at the moment\s+[0-9.]+ MB/s", page.text()), 30, "a rate")
                assert page.ask("document.querySelectorAll('svg path.rate.edge[d^=M]').length") >= 1
            finally:
                ended.set()
                thread.join(10)
            for client in (left, right, waits):
                client.close()
        wait_until(lambda: "The relay does not run: none of its workers lives." in page.text(), 30, "it says so")
        assert page.ask("document.title") == "relay: look after it"
        (tmp_path / "usage.sqlite").write_bytes(b"something else" * 100)
        wait_until(lambda: "The database cannot be read: not a database." in page.text(), 30, "it says so")
        assert_it_fits(page)
        assert_it_keeps_to_itself(page, status)

        page.tell("Emulation.setScriptExecutionDisabled", value=True)
        page.open(f"http://127.0.0.1:{status.port}/")
        assert "The database cannot be read: not a database." in page.text(), "without scripts"
        assert page.ask("document.querySelector('noscript meta[http-equiv=refresh]') !== null")
        assert_it_keeps_to_itself(page, status)


def test_a_page_whose_server_is_gone_says_that_it_is_old(tmp_path: Path) -> None:
    with chromium(tmp_path) as page:
        with status_of(tmp_path / "usage.sqlite", folder=tmp_path) as status:
            page.open(f"http://127.0.0.1:{status.port}/")
        wait_until(lambda: "relay-status has not answered for" in page.text(), 30, "it says so")
        assert "no such file" in page.text()
