"""nginx and HAProxy in front of a relay's WebSocket port, configured as docs/websocket.md says.

Ports and folders are the test's own, and the times that matter are seconds in place of minutes.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.harness import (
    CHECKOUT,
    Relay,
    accepts,
    free_port,
    handshake,
    new_side,
    new_token,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.harness import connect as connect_tcp
from tests.support.namespaces import Host, not_allowed, run_ip
from tests.support.page import Page
from tests.support.proxies import (
    HAPROXY,
    NGINX,
    make_certificate,
    needs_haproxy,
    needs_nginx,
    needs_openssl,
    running,
)
from tests.support.web import web_options, web_port

PATIENCE = 4
"""Seconds after which the proxies cut what is silent: twice what the least interval of pings comes to."""

pytestmark = needs_openssl


WEBSOCKET, FIRST_HOUR = "websocket.md", "first-hour.md"


def documented(language: str) -> str:
    """The configuration in docs/websocket.md, or, of nginx, that of the first hour."""
    page = CHECKOUT / "docs" / (FIRST_HOUR if language == "sh" else WEBSOCKET)
    beginning = "cat >/etc/nginx/conf.d/relay.conf <<'END'" if language == "sh" else f"```{language}"
    found = re.search(rf"^{re.escape(beginning)}\n(.*?)^(?:```|END)$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with all of these replaced, each of which is there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The certificate that the clients trust."""
    return make_certificate(tmp_path)


SHARE = 6
"""What a client may have of a proxy here, in place of hundreds."""

SITES_SHARE = SHARE + 2
"""And what the networks of one IPv6 site may have together."""


@contextlib.contextmanager
def behind_nginx(folder: Path, port: int, relay_port: int) -> Iterator[None]:
    with _behind_nginx(folder, port, relay_port, documented("nginx"), "/etc/ssl/relay.example.org.{}"):
        yield


@contextlib.contextmanager
def behind_nginx_of_the_first_hour(folder: Path, port: int, relay_port: int) -> Iterator[None]:
    pem = "/etc/letsencrypt/live/relay.example.org/{}"
    with _behind_nginx(folder, port, relay_port, documented("sh"), pem, ("fullchain.pem", "privkey.pem")):
        yield


@contextlib.contextmanager
def _behind_nginx(
    folder: Path, port: int, relay_port: int, text: str, place: str, names: tuple[str, str] = ("pem", "key")
) -> Iterator[None]:
    """With an access log that is on, and an error log, as Debian's nginx.conf has them; neither is used."""
    server = replaced(
        text,
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("listen [::]:443 ssl;", f"listen [::1]:{port} ssl;"),
        (place.format(names[0]), str(folder / "cert.pem")),
        (place.format(names[1]), str(folder / "cert.key")),
        ("limit_conn relay_sources 500;", f"limit_conn relay_sources {SHARE};"),
        ("limit_conn relay_sites 2000;", f"limit_conn relay_sites {SITES_SHARE};"),
        ("client_header_timeout 10s;", f"client_header_timeout {PATIENCE}s;"),
        ("127.0.0.1:4002", f"127.0.0.1:{relay_port}"),
        ("proxy_read_timeout 60s;", f"proxy_read_timeout {PATIENCE}s;"),
    )
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nevents {{}}\n"
        f"http {{\naccess_log {folder}/access.log;\n{places}{server}}}\n"
    )
    with running(NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(configuration)):
        yield
        assert (folder / "access.log").read_text() == ""
        assert "client" not in (folder / "error.log").read_text()


@contextlib.contextmanager
def behind_haproxy(folder: Path, port: int, relay_port: int) -> Iterator[None]:
    configuration = folder / "haproxy.cfg"
    configuration.write_text(
        replaced(
            documented("haproxy"),
            ("maxconn 20000", "maxconn 500"),
            ("bind :443 ", f"bind 127.0.0.1:{port} "),
            ("bind :::443 v6only ", f"bind ::1:{port} v6only "),
            ("/etc/haproxy/relay.example.org.pem", str(folder / "both.pem")),
            ("127.0.0.1:4002 check", f"127.0.0.1:{relay_port} check inter 100"),
            ("timeout tunnel 1h", f"timeout tunnel {PATIENCE}s"),
            ("timeout client 10s", f"timeout client {PATIENCE}s"),
            ("sc0_conn_cur gt 1000", f"sc0_conn_cur gt {SHARE}"),
            ("sc1_conn_cur gt 4000", f"sc1_conn_cur gt {SITES_SHARE}"),
        )
    )
    with running(HAPROXY, "-db", "-f", str(configuration)):
        yield


PROXIES = [
    pytest.param(behind_nginx, marks=needs_nginx, id="nginx"),
    pytest.param(behind_nginx_of_the_first_hour, marks=needs_nginx, id="nginx of the first hour"),
    pytest.param(behind_haproxy, marks=needs_haproxy, id="HAProxy"),
]
Behind = Callable[[Path, int, int], contextlib.AbstractContextManager[None]]


def dial_tls(port: int, certificate: Path, host: str = "127.0.0.1") -> Page:
    """A WebSocket client that came over TLS."""
    return Page.over_tls(connect_tcp(port, host), certificate)


def wait_for(port: int, certificate: Path) -> None:
    """Return once the proxy takes connections and has found the relay."""

    def answers() -> bool:
        with contextlib.suppress(Exception), dial_tls(port, certificate):
            return True
        return False

    wait_until(lambda: accepts(port), 20, "the proxy listens")
    wait_until(answers, 20, "the proxy reaches the relay")


@pytest.mark.parametrize("behind", PROXIES)
def test_a_client_waits_longer_than_its_proxy_does_and_is_matched(
    tmp_path: Path, certificate: Path, behind: Behind
) -> None:
    options = ("--ping-interval", "0.5", "--trusted-proxies", "127.0.0.1,::1")
    with Relay(tmp_path, *options, *web_options(), recording=True) as relay:
        port = free_port()
        with behind(tmp_path, port, web_port(relay)):
            wait_for(port, certificate)
            token = new_token()
            with dial_tls(port, certificate) as page:
                page.send(handshake(token, new_side()))
                page.rest(1.75 * PATIENCE)
                with connect_tcp(relay.port) as client:
                    client.sendall(handshake(token, new_side()))
                    assert page.recv() == b"ok\n"
                    assert read_exactly(client, 3) == b"ok\n"
                    page.send(b"to the client")
                    assert read_exactly(client, 13) == b"to the client"
                    page.rest(1.25 * PATIENCE)
                    client.sendall(b"and back")
                    assert page.recv() == b"and back"
            wait_until(lambda: [one for one in relay.records() if one["mood"] == "happy"], what="the record")


@pytest.mark.parametrize("behind", PROXIES)
def test_without_pings_the_proxy_cuts_who_waits(tmp_path: Path, certificate: Path, behind: Behind) -> None:
    with Relay(tmp_path, "--ping-interval", "0", *web_options()) as relay:
        port = free_port()
        with behind(tmp_path, port, web_port(relay)):
            wait_for(port, certificate)
            with dial_tls(port, certificate) as page:
                page.send(handshake(new_token(), new_side()))
                with pytest.raises(ConnectionError):
                    page.recv()


@pytest.mark.parametrize("behind", PROXIES)
def test_each_client_behind_it_has_its_share(tmp_path: Path, certificate: Path, behind: Behind) -> None:
    options = ("--trusted-proxies", "127.0.0.1", "--max-per-source", "3")
    with Relay(tmp_path, *options, *web_options()) as relay, contextlib.ExitStack() as stack:
        port = free_port()
        stack.enter_context(behind(tmp_path, port, web_port(relay)))
        wait_for(port, certificate)
        # The proxy is called over IPv4 and IPv6, so by two sources.
        held = [stack.enter_context(dial_tls(port, certificate, "::1")) for _ in range(3)]
        for page in held:
            page.send(handshake(new_token(), new_side()))
        with pytest.raises(ConnectionError, match=" 5"):
            dial_tls(port, certificate, "::1")
        with dial_tls(port, certificate) as page:
            page.send(handshake(new_token(), new_side()))


@pytest.mark.parametrize("behind", PROXIES)
def test_the_proxy_writes_nothing_down_whatever_happens(tmp_path: Path, certificate: Path, behind: Behind) -> None:
    with Relay(tmp_path, *web_options()) as relay:
        port = free_port()
        with behind(tmp_path, port, web_port(relay)):
            wait_for(port, certificate)
            token = new_token()
            with dial_tls(port, certificate) as first, dial_tls(port, certificate) as second:
                for page in (first, second):
                    page.send(handshake(token, new_side()))
                assert first.recv() == second.recv() == b"ok\n"
            for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello"):  # no TLS, or no good one
                with connect_tcp(port) as wrong:
                    wrong.sendall(said)
                    read_to_end(wrong)
            relay.stop()
            with pytest.raises(ConnectionError, match=" 50"):
                dial_tls(port, certificate)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ssl's own, when it is turned away
@pytest.mark.parametrize("behind", PROXIES)
def test_one_client_does_not_fill_the_proxy(tmp_path: Path, certificate: Path, behind: Behind) -> None:
    with Relay(tmp_path, *web_options()) as relay, contextlib.ExitStack() as stack:
        port = free_port()
        stack.enter_context(behind(tmp_path, port, web_port(relay)))
        wait_for(port, certificate)

        def come(source: str) -> bool:
            try:
                page = stack.enter_context(Page.over_tls(connect_tcp(port, source=source), certificate))
            except OSError:
                return False
            page.send(handshake(new_token(), new_side()))
            return True

        assert [come("127.0.0.9") for _ in range(SHARE + 2)] == [True] * SHARE + [False] * 2
        assert [come("127.0.0.10") for _ in range(SHARE)] == [True] * SHARE


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ssl's own, when it is turned away
@pytest.mark.skipif(bool(not_allowed()), reason=not_allowed())
@pytest.mark.parametrize("behind", PROXIES)
def test_nor_does_one_household_with_many_networks(
    tmp_path: Path, certificate: Path, behind: Behind, stack: contextlib.ExitStack
) -> None:
    host = Host(f"rg{new_side()[:8]}-tls")
    stack.callback(host.remove)
    host.create()
    networks = [f"2001:db8:0:{number}::1" for number in range(1, 4)]
    for address in (*networks, "2001:db8:1::1"):
        run_ip("-n", host.name, "address", "add", f"{address}/128", "dev", "lo", "nodad")
    relay = stack.enter_context(Relay(tmp_path, *web_options(), inside=host.inside))
    port = free_port()

    def come(source: str) -> bool:
        try:
            page = stack.enter_context(Page.over_tls(connect_tcp(port, "::1", source=source), certificate))
        except OSError:
            return False
        page.send(handshake(new_token(), new_side()))
        return True

    host.make_there(lambda: stack.enter_context(behind(tmp_path, port, web_port(relay))))
    host.make_there(lambda: wait_for(port, certificate))
    came = [host.make_there(lambda number=number: come(networks[number % 3])) for number in range(SITES_SHARE + 2)]  # type: ignore[misc]
    assert came == [True] * SITES_SHARE + [False] * 2
    assert host.make_there(lambda: come("2001:db8:1::1"))


@needs_haproxy
def test_health_checks_of_haproxy_leave_no_record(tmp_path: Path, certificate: Path) -> None:
    with Relay(tmp_path, *web_options(), recording=True) as relay:
        port = free_port()
        with behind_haproxy(tmp_path, port, web_port(relay)):
            wait_for(port, certificate)
            relay.wait_for_records(1)  # of `wait_for`
            time.sleep(0.5)
            before = len(relay.records())
            time.sleep(1)
            assert len(relay.records()) == before
