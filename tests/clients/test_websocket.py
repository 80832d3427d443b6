"""The opening handshake: what real clients ask, what is no such thing, and the same verdict as `websockets`.

Invariants of `RequestHead`, in whatever pieces it comes:

- every proper prefix of a good request needs more; what follows a head is handed back, to the byte;
- it says yes to exactly the upgrades to which `websockets` says yes, with the same proof;
- it never needs more than 8 KiB to decide.
"""

from __future__ import annotations

import base64
import http.client
import io
from typing import cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from relay.clients.websocket import LONGEST_HEAD, Answer, Outcome, RequestHead

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
PROOF = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # of that key: RFC 6455, 1.3


def read_request(received: bytes) -> Answer | None:
    """The verdict on this, which comes in one piece."""
    return RequestHead().hear(received)


def head(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


UPGRADES = {
    "chromium": head(
        "GET / HTTP/1.1",
        "Host: relay.example.org:4002",
        "Connection: Upgrade",
        "Pragma: no-cache",
        "Cache-Control: no-cache",
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130.0.0.0",
        "Upgrade: websocket",
        "Origin: https://transfer.example.org",
        "Sec-WebSocket-Version: 13",
        "Accept-Encoding: gzip, deflate, br, zstd",
        "Accept-Language: en-US,en;q=0.9",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    ),
    "firefox": head(
        "GET /relay?x=1 HTTP/1.1",
        "Host: [2001:db8::1]:4002",
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:132.0) Gecko/20100101 Firefox/132.0",
        "Accept: */*",
        "Accept-Language: en-US,en;q=0.5",
        "Accept-Encoding: gzip, deflate, br, zstd",
        "Sec-WebSocket-Version: 13",
        "Origin: null",
        "Sec-WebSocket-Extensions: permessage-deflate",
        f"Sec-WebSocket-Key: {KEY}",
        "Connection: keep-alive, Upgrade",
        "Sec-Fetch-Dest: empty",
        "Sec-Fetch-Mode: websocket",
        "Sec-Fetch-Site: cross-site",
        "Pragma: no-cache",
        "Cache-Control: no-cache",
        "Upgrade: websocket",
    ),
    "go": head(
        "GET / HTTP/1.1",
        "Host: relay.example.org:4002",
        "User-Agent: Go-http-client/1.1",
        "Connection: Upgrade",
        "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
        "Upgrade: websocket",
        "Accept-Encoding: gzip",
    ),
    "rust": head(
        "GET / HTTP/1.1",
        "Host: relay.example.org:4002",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY}",
    ),
    "autobahn": head(
        "GET / HTTP/1.1",
        "User-Agent: AutobahnPython/24.4.2",
        "Host: relay.example.org:4002",
        "Upgrade: WebSocket",
        "Connection: Upgrade",
        "Pragma: no-cache",
        "Cache-Control: no-cache",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Protocol: transit_relay, other",
        "Sec-WebSocket-Version: 13",
    ),
    "curl": head(
        "GET / HTTP/1.1",
        "Host: relay.example.org:4002",
        "User-Agent: curl/8.5.0",
        "Accept: */*",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY}",
        "Connection: Upgrade",
    ),
    "nginx": head(
        "GET /transit/ HTTP/1.1",
        "Host: 127.0.0.1:4002",
        "X-Forwarded-For: 2001:db8::7, 192.0.2.1",
        "X-Real-IP: 192.0.2.1",
        "Upgrade: websocket",
        "Connection: upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
    ),
    "several-upgrades": head(
        "GET / HTTP/1.1",
        "Upgrade: h2c, websocket",
        "Connection: HTTP2-Settings",
        "Connection: upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
    ),
    "sloppy": (
        f"GET /\xe4 HTTP/1.1\nupgrade:websocket\nCONNECTION:\tUPGRADE \t\nSEC-WEBSOCKET-KEY:{KEY}\n"
        "sec-websocket-version: 13 \t\nContent-Length: 0\nX: \xfc\nEmpty:\n\n"
    ).encode("latin-1"),
}

PLAIN = {
    "curl": head("GET / HTTP/1.1", "Host: relay.example.org:4002", "User-Agent: curl/8.5.0", "Accept: */*"),
    "curl-http2": head(
        "GET / HTTP/1.1",
        "Host: relay.example.org:4002",
        "Connection: Upgrade, HTTP2-Settings",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
    ),
    "haproxy": head("GET /health HTTP/1.0"),
    "http-1.0": head("GET / HTTP/1.0", "Host: relay.example.org"),
    "printf-and-nc": b"GET / HTTP/1.0\n\n",
    "with-a-body": head("GET / HTTP/1.1", "Content-Length: 5") + b"hello",
    "absolute": head("GET http://relay.example.org/ HTTP/1.1", "Host: relay.example.org"),
}

BAD = {
    "post": (head("POST / HTTP/1.1", "Content-Length: 3") + b"x=1", 405),
    "haproxy-options": (head("OPTIONS / HTTP/1.0"), 405),
    "connect": (head("CONNECT relay.example.org:4001 HTTP/1.1"), 405),
    "lower-case": (head("get / HTTP/1.1"), 405),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "ssh": (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
    "tcp-client": (b"please relay " + b"a" * 64 + b" for side " + b"b" * 16 + b"\n", 400),
    "http-2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http-0.9": (b"GET /\r\n", 400),
    "two-spaces": (b"GET  / HTTP/1.1\r\n", 400),
    "no-path": (b"GET HTTP/1.1\r\n", 400),
    "empty-line-first": (b"\r\n", 400),
    "zeros": (bytes(10), 400),
    "folded": (b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400),
    "space-before-colon": (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "no-colon": (b"GET / HTTP/1.1\r\nHost\r\n\r\n", 400),
    "no-name": (b"GET / HTTP/1.1\r\n: x\r\n\r\n", 400),
    "control-character": (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", 400),
    "lone-carriage-return": (b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", 400),
}


def without(name: str) -> bytes:
    """Chromium's request without a field."""
    return b"".join(
        line for line in UPGRADES["chromium"].splitlines(keepends=True) if not line.startswith(f"{name}:".encode())
    )


def with_field(name: str, value: str) -> bytes:
    """Chromium's request with another value of a field."""
    return without(name)[:-2] + head(f"{name}: {value}")


BAD_UPGRADES = {
    "no-key": (without("Sec-WebSocket-Key"), 400),
    "empty-key": (with_field("Sec-WebSocket-Key", ""), 400),
    "short-key": (with_field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25j"), 400),
    "long-key": (with_field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZTE="), 400),
    "key-not-in-base64": (with_field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZ*=="), 400),
    "two-keys": (UPGRADES["chromium"][:-2] + head(f"Sec-WebSocket-Key: {KEY}"), 400),
    "no-version": (without("Sec-WebSocket-Version"), 400),
    "version-8": (with_field("Sec-WebSocket-Version", "8"), 426),
    "version-14": (with_field("Sec-WebSocket-Version", "14"), 426),
    "two-versions": (UPGRADES["chromium"][:-2] + head("Sec-WebSocket-Version: 13"), 426),
    "no-upgrade": (without("Upgrade"), 400),
    "upgrade-to-something-else": (with_field("Upgrade", "h2c"), 400),
    "no-connection": (without("Connection"), 400),
    "connection-close": (with_field("Connection", "close"), 400),
    "http-1.0": (UPGRADES["chromium"].replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    "with-a-body": (with_field("Content-Length", "3") + b"abc", 400),
    "with-chunks": (with_field("Transfer-Encoding", "chunked") + b"0\r\n\r\n", 400),
}


def answer_to(request: bytes) -> Answer:
    answer = read_request(request)
    assert answer is not None
    return answer


def response_in(answer: Answer, method: str = "GET") -> tuple[http.client.HTTPResponse, str]:
    """The response as Python's HTTP client reads it, and its body."""

    class Said:
        def makefile(self, _mode: str) -> io.BytesIO:
            return io.BytesIO(answer.response)

    response = http.client.HTTPResponse(Said(), method=method)  # type: ignore[arg-type]
    response.begin()
    body = response.read().decode()
    assert response.isclosed()
    return response, body


def read_by_websockets(request: bytes) -> str | None:
    """The proof with which `websockets` agrees to an upgrade; None if it does not."""
    server = ServerProtocol()
    server.receive_data(request)
    events = server.events_received()
    if not events:
        return None
    response = server.accept(cast(Request, events[0]))
    return response.headers["Sec-WebSocket-Accept"] if response.status_code == 101 else None


@pytest.mark.parametrize("client", UPGRADES)
def test_the_upgrades_of_real_clients_are_agreed_to(client: str) -> None:
    answer = answer_to(UPGRADES[client])
    assert (answer.outcome, answer.rest) == (Outcome.UPGRADED, b"")
    response, body = response_in(answer)
    assert (response.status, body) == (101, "")
    assert sorted(response.getheaders()) == [
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", PROOF),
        ("Upgrade", "websocket"),
    ]


@pytest.mark.parametrize("request_", [*UPGRADES.values(), *PLAIN.values()], ids=[*UPGRADES, *PLAIN])
def test_every_beginning_of_a_request_needs_more(request_: bytes) -> None:
    whole = request_.removesuffix(b"hello")
    for end in range(len(whole)):
        assert read_request(whole[:end]) is None, whole[:end]
    assert read_request(whole) is not None


@pytest.mark.parametrize("rest", [b"\x82", b"\x82\x85abcdhello", b"\r\n\r\n", bytes(100_000)])
def test_what_follows_the_head_is_handed_back(rest: bytes) -> None:
    for request in UPGRADES.values():
        answer = answer_to(request + rest)
        assert answer == Answer(Outcome.UPGRADED, answer.response, rest, answer.forwarded_for)


@pytest.mark.parametrize("client", PLAIN)
def test_plain_http_is_told_what_this_is(client: str) -> None:
    answer = answer_to(PLAIN[client])
    assert (answer.outcome, answer.rest) == (Outcome.ANSWERED, b"")
    response, body = response_in(answer)
    assert (response.status, response.getheader("Connection")) == (200, "close")
    assert body == "This is a magic-wormhole transit relay. WebSocket clients connect here.\n"


def test_head_is_answered_like_get_but_for_the_body() -> None:
    for request in (*PLAIN.values(), *UPGRADES.values()):
        answer = answer_to(b"HEAD" + request.removeprefix(b"GET"))
        assert answer.outcome is Outcome.ANSWERED
        get, _ = response_in(answer_to(PLAIN["curl"]))
        response, body = response_in(answer, "HEAD")
        assert response.getheaders() == get.getheaders()
        assert (response.status, body) == (200, "")
        assert answer.response.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("request_", BAD)
def test_what_is_not_for_here_is_refused(request_: str) -> None:
    sent, status = BAD[request_]
    answer = answer_to(sent)
    assert (answer.outcome, answer.rest) == (Outcome.REFUSED, b"")
    response, body = response_in(answer)
    assert (response.status, response.getheader("Connection")) == (status, "close")
    assert response.getheader("Allow") == ("GET, HEAD" if status == 405 else None)
    assert body.startswith("This is a magic-wormhole transit relay. ")


@pytest.mark.parametrize("request_", BAD_UPGRADES)
def test_a_bad_upgrade_is_refused_and_told_why(request_: str) -> None:
    sent, status = BAD_UPGRADES[request_]
    answer = answer_to(sent)
    assert (answer.outcome, answer.rest) == (Outcome.REFUSED, b"")
    response, body = response_in(answer)
    assert response.status == status
    assert response.getheader("Sec-WebSocket-Version") == ("13" if status == 426 else None)
    assert "The WebSocket upgrade failed: it" in body
    assert read_by_websockets(sent) is None


def test_what_is_not_http_is_refused_at_its_first_bytes() -> None:
    assert answer_to(b"\x16").outcome is Outcome.REFUSED
    assert answer_to(b"GET / HTTQ/1.1\n").outcome is Outcome.REFUSED
    assert read_request(b"") is None
    assert answer_to(b"A" * 21).outcome is Outcome.REFUSED
    assert read_request(b"A" * 20) is None


def test_a_head_of_8_kib_is_read_and_a_longer_one_refused() -> None:
    request = UPGRADES["rust"]
    for field in ("X-Long", "Cookie"):
        room = LONGEST_HEAD - len(request) - len(f"{field}: \r\n")
        full = request[:-2] + head(f"{field}: {'x' * room}")
        assert len(full) == LONGEST_HEAD
        assert answer_to(full + b"\x82").rest == b"\x82"
        longer = request[:-2] + head(f"{field}: {'x' * (room + 1)}")
        assert read_request(longer[: LONGEST_HEAD - 1]) is None
        for sent in (longer[:LONGEST_HEAD], longer):
            response, _ = response_in(answer_to(sent))
            assert response.status == 431


@pytest.mark.parametrize("begun", [b"GET /", b"GET / HTTP/1.1\r\nA: ", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1362])
def test_a_head_without_an_end_is_refused_at_8_kib(begun: bytes) -> None:
    endless = begun.ljust(LONGEST_HEAD, b"x")
    assert read_request(endless[:-1]) is None
    assert response_in(answer_to(endless))[0].status == 431


def test_who_a_proxy_came_from_is_told() -> None:
    told = ("2001:db8::7", "192.0.2.1")
    assert answer_to(UPGRADES["nginx"]).forwarded_for == told
    assert answer_to(UPGRADES["chromium"]).forwarded_for == ()
    spread = with_field("X-Forwarded-For", "2001:db8::7 ,")[:-2] + head("x-forwarded-for: ,192.0.2.1")
    assert answer_to(spread).forwarded_for == told
    assert answer_to(spread.replace(b"GET", b"HEAD")).forwarded_for == told
    assert answer_to(spread.replace(b"GET", b"POST")).forwarded_for == told
    assert answer_to(spread.replace(b"13", b"12")).forwarded_for == told


def test_the_client_of_websockets_finds_the_connection_open() -> None:
    client = ClientProtocol(parse_uri("ws://relay.example.org:4002/transit"), subprotocols=None)
    client.send_request(client.connect())
    answer = answer_to(b"".join(client.data_to_send()))
    client.receive_data(answer.response)
    assert client.handshake_exc is None
    assert client.state is State.OPEN


GOOD_FIELDS = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Origin": "null",
    "Sec-WebSocket-Protocol": "transit_relay",
}
OTHER_VALUES = {
    "Connection": ["upgrade", "keep-alive, Upgrade", "close", "keep-alive"],
    "Upgrade": ["WebSocket", "h2c"],
    "Sec-WebSocket-Version": ["8", "013", "13, 13", ""],
    "Sec-WebSocket-Protocol": ["a, b"],
    "Sec-WebSocket-Extensions": ["permessage-deflate; client_max_window_bits"],
    "Sec-WebSocket-Key": [KEY],
    "Content-Length": ["0", "3"],
    "Transfer-Encoding": ["chunked"],
}
good_keys = st.binary(min_size=16, max_size=16).map(lambda key: base64.b64encode(key).decode())
odd_keys = st.text("AZaz09+/", min_size=22, max_size=22).map("{}==".format)  # of 16 bytes, and some bits more
any_keys = st.binary(max_size=20).map(lambda key: base64.b64encode(key).decode()) | st.text("AZaz09+/=", max_size=25)
other_fields = st.sampled_from([(name, value) for name, values in OTHER_VALUES.items() for value in values])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A GET that asks for WebSocket, more or less."""
    fields = [*GOOD_FIELDS.items(), ("Sec-WebSocket-Key", draw(good_keys | odd_keys | any_keys))]
    for name, value in draw(st.lists(other_fields, max_size=2)):
        if draw(st.booleans()):  # instead of the good one, and not beside it
            fields = [field for field in fields if field[0] != name]
        fields.append((name, value))
    for name in draw(st.sets(st.sampled_from(sorted(GOOD_FIELDS)), max_size=1)):
        fields = [field for field in fields if field[0] != name]
    lines = [
        f"{draw(st.sampled_from([name, name.lower(), name.upper()]))}: {value}"
        for name, value in draw(st.permutations(fields))
    ]
    return head(f"GET /{draw(st.sampled_from(['', 'transit/', '?a=b']))} HTTP/1.1", *lines)


@given(requests())
def test_an_upgrade_is_agreed_to_when_websockets_agrees_and_with_the_same_proof(request: bytes) -> None:
    # An upgrade that may as well be to something else is one to RFC 9110, 7.8, and none to `websockets`.
    assume(request.lower().count(b"\nupgrade:") < 2)
    answer = answer_to(request)
    proof = read_by_websockets(request)
    assert (answer.outcome is Outcome.UPGRADED) == (proof is not None)
    if proof is not None:
        assert response_in(answer)[0].getheader("Sec-WebSocket-Accept") == proof


@given(st.binary(max_size=300), st.sampled_from([b"", b"GET / HTTP/1.1\r\n", UPGRADES["rust"][:-2]]))
def test_arbitrary_bytes_are_judged_once_and_for_all(sent: bytes, begun: bytes) -> None:
    request = begun + sent
    verdicts = [read_request(request[:end]) for end in range(len(request) + 1)]
    first = next((place for place, verdict in enumerate(verdicts) if verdict is not None), len(verdicts))
    for verdict in verdicts[first:]:
        assert verdict is not None
        assert (verdict.outcome, verdict.response) == (
            answer_to(request[:first]).outcome,
            answer_to(request[:first]).response,
        )


@given(
    st.binary(max_size=100),
    st.sampled_from([b"", b"GET / HTTP/1.1\r\n", *(UPGRADES[name] for name in ("rust", "chromium"))]),
)
def test_a_head_that_comes_byte_by_byte_gets_the_answer_of_one_that_comes_at_once(sent: bytes, begun: bytes) -> None:
    request = begun + sent
    in_pieces = RequestHead()
    for end in range(1, len(request) + 1):
        verdict = in_pieces.hear(request[end - 1 : end])
        assert verdict == read_request(request[:end])
        if verdict is not None:
            break
