"""The opening handshake of WebSocket (RFC 6455, 4.2), the server's side; pure.

What a client sends first is the head of an HTTP request. It asks for WebSocket, and then the connection is one; or it
is plain HTTP, as of a health check or of a person with a browser, and is told what this is. Everything that does not
matter here is accepted: any path, Host and Origin. No subprotocol is chosen and no extension agreed to; what clients
send is encrypted, so that compressing it would gain nothing.

The head is read here and not by `websockets`, which is the oracle in the tests: its releases for Python 3.10 know
neither HEAD nor HTTP/1.0, so that every head has to be read before one knows whether it is for them. Reading it and
answering takes 17 microseconds where `websockets` takes 54, and 4.5 MB less in each worker.
"""

from __future__ import annotations

import binascii
import enum
import re
from collections import defaultdict

from relay.process.dataclass import dataclass

try:
    # As `random` does with _sha512: hashlib would load all of OpenSSL for it, 3.6 MB in each worker.
    from _sha1 import sha1  # type: ignore[import-not-found]
except ImportError:
    from hashlib import sha1

LONGEST_HEAD = 8 << 10
"""Bytes of the longest request head that is read, its empty line included; what most HTTP servers take."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
_REQUEST_LINE = re.compile(rb"(%s) [!-~\x80-\xff]+ HTTP/1\.([0-9])\r?\n" % _TOKEN)  # RFC 9112, 3
_FIELD = re.compile(rb"(%s):([\t -~\x80-\xff]*)\r?\n" % _TOKEN)  # RFC 9112, 5; with the blanks around its value
_HEAD_END = re.compile(rb"\n\r?\n")  # a lone line feed ends a line as well: RFC 9112, 2.2
_LONGEST_END = len(b"\n\r\n")

# What a request line may begin with. No method has more letters (the registry's longest is UPDATEREDIRECTREF), and so
# what is not HTTP at all is soon seen not to be.
_REQUEST_BEGUN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,20}(?: |\Z)")

_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64
_KEY_SUFFIX = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_VERSION = "13"
_OTHER_VERSION = f"its Sec-WebSocket-Version is not {_VERSION}."

_WHAT_THIS_IS = "This is a magic-wormhole transit relay. "


class Outcome(enum.Enum):
    """What becomes of a connection after its `Answer`."""

    UPGRADED = enum.auto()
    """It speaks WebSocket from now on."""
    ANSWERED = enum.auto()
    """It was plain HTTP, and is over; it wanted no transfer, so there is nothing to record."""
    REFUSED = enum.auto()
    """It asked for something that cannot be had, or was no HTTP, and is over."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of an opening handshake.

    Attributes:
        outcome: what becomes of the connection.
        response: what to send.
        rest: what followed the head: the first frames.
        forwarded_for: the addresses in X-Forwarded-For, as they were written. Each proxy adds at the end the one that
            it was called from, so that of the first ones nobody knows who wrote them.
    """

    outcome: Outcome
    response: bytes
    rest: bytes = b""
    forwarded_for: tuple[str, ...] = ()


class RequestHead:
    """The head of a request while it comes.

    However many pieces it comes in, each byte is looked at a few times at the most: a request line is judged once, when
    it has ended, and so are the fields; and where their end is, is looked for only in what is new.

    Args:
        received: what had come when somebody else heard it.

    Attributes:
        received: what has come.
    """

    __slots__ = ("_fields_at", "_is_http_1_1", "_method", "_searched", "received")

    def __init__(self, received: bytes = b"") -> None:
        self.received = bytearray(received)
        self._searched = 0
        """How much of it is known to hold no end."""
        self._fields_at = 0
        """Where the request line has ended; 0 before it has."""
        self._method = b""
        self._is_http_1_1 = False

    def hear(self, chunk: bytes) -> Answer | None:
        """Judge everything that the client has sent since it connected, of which `chunk` is the latest.

        Returns None while more bytes are needed. That is never so with `LONGEST_HEAD` bytes. After an answer nothing
        more is to be heard.
        """
        self.received += chunk
        if not self.received:
            return None
        if not self._fields_at and not self._may_begin_with_line():
            return _refuse(400, "Bad Request", "This was not an HTTP request.")
        end = self._find_end()
        if end is not None:
            return self._answer(bytes(self.received[: end.start() + 1]), bytes(self.received[end.end() :]))
        if len(self.received) < LONGEST_HEAD:
            return None
        return _refuse(431, "Request Header Fields Too Large", "Request heads have at most 8 KiB here.")

    def _may_begin_with_line(self) -> bool:
        """Whether there is a request line, which is noted then, or can still be one."""
        if self.received.find(b"\n", self._searched) < 0:
            self._searched = len(self.received)
            return _REQUEST_BEGUN.match(self.received) is not None
        line = _REQUEST_LINE.match(self.received)
        if line is None:
            return False
        self._fields_at = line.end()
        self._method, self._is_http_1_1 = line[1], line[2] != b"0"
        self._searched = self._fields_at + 1  # whose line feed may be the first of the end
        return True

    def _find_end(self) -> re.Match[bytes] | None:
        if not self._fields_at:
            return None
        end = _HEAD_END.search(self.received, self._searched - (_LONGEST_END - 1), LONGEST_HEAD)
        self._searched = len(self.received)
        return end

    def _answer(self, head: bytes, rest: bytes) -> Answer:
        fields = _read_fields(head, self._fields_at)
        if fields is None:
            return _refuse(400, "Bad Request", "There was a header field that is none.")
        forwarded_for = tuple(_listed(fields["x-forwarded-for"]))
        if self._method not in (b"GET", b"HEAD"):
            return _refuse(
                405, "Method Not Allowed", "There is nothing but GET here.", "Allow: GET, HEAD\r\n", forwarded_for
            )
        if self._method == b"HEAD" or not _asks_for_websocket(fields):
            return Answer(Outcome.ANSWERED, _greeting(body=self._method == b"GET"), b"", forwarded_for)
        return _open(self._is_http_1_1, fields, rest, forwarded_for)


def _read_fields(head: bytes, at: int) -> defaultdict[str, list[str]] | None:
    """The header fields from `at` on, the values of each in order, by its name in lower case; None if there is
    something else among them."""
    fields: defaultdict[str, list[str]] = defaultdict(list)
    while at < len(head):
        field = _FIELD.match(head, at)
        if field is None:
            return None
        fields[field[1].decode().lower()].append(field[2].decode("latin-1").strip(" \t"))
        at = field.end()
    return fields


def _listed(values: list[str]) -> list[str]:
    """The members of a list that may be spread over several fields (RFC 9110, 5.6.1)."""
    members = (member.strip(" \t") for value in values for member in value.split(","))
    return [member for member in members if member]


def _names(values: list[str]) -> list[str]:
    return [member.lower() for member in _listed(values)]


def _asks_for_websocket(fields: defaultdict[str, list[str]]) -> bool:
    """Whether a GET does, if badly: behind a proxy that takes away `Upgrade` there still is a key."""
    return "websocket" in _names(fields["upgrade"]) or bool(
        fields["sec-websocket-key"] or fields["sec-websocket-version"]
    )


def _open(
    is_http_1_1: bool, fields: defaultdict[str, list[str]], rest: bytes, forwarded_for: tuple[str, ...]
) -> Answer:
    """Answer a GET that asks for WebSocket, by RFC 6455, 4.2.2."""
    flaw = _flaw_in(is_http_1_1, fields)
    if flaw is not None:
        why = f"The WebSocket upgrade failed: {flaw}"
        if flaw is _OTHER_VERSION:
            known = f"Upgrade: websocket\r\nSec-WebSocket-Version: {_VERSION}\r\n"  # RFC 6455, 4.4
            return _refuse(426, "Upgrade Required", why, known, forwarded_for)
        return _refuse(400, "Bad Request", why, "", forwarded_for)
    digest = sha1((fields["sec-websocket-key"][0] + _KEY_SUFFIX).encode(), usedforsecurity=False).digest()
    accept = binascii.b2a_base64(digest, newline=False).decode()
    response = (
        "HTTP/1.1 101 Switching Protocols\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n"
        "\r\n"
    )
    return Answer(Outcome.UPGRADED, response.encode(), rest, forwarded_for)


def _flaw_in(is_http_1_1: bool, fields: defaultdict[str, list[str]]) -> str | None:
    """What is wrong with a request for WebSocket, by RFC 6455, 4.2.1, for whoever set up the client or the proxy."""
    keys, versions = fields["sec-websocket-key"], fields["sec-websocket-version"]
    if not is_http_1_1:
        return "it came as HTTP/1.0. (In nginx: proxy_http_version 1.1.)"
    if "websocket" not in _names(fields["upgrade"]) or "upgrade" not in _names(fields["connection"]):
        return "it lacks Upgrade: websocket, or Connection: Upgrade. A proxy in front has to pass both on."
    if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        return "its Sec-WebSocket-Key is missing or is none."
    if not versions:
        return "it lacks Sec-WebSocket-Version."
    if versions != [_VERSION]:
        return _OTHER_VERSION
    if fields["transfer-encoding"] or set(fields["content-length"]) - {"0"}:
        return "it has a body."
    return None


def _greeting(*, body: bool) -> bytes:
    return _respond(200, "OK", f"{_WHAT_THIS_IS}WebSocket clients connect here.\n", body=body)


def _refuse(status: int, phrase: str, why: str, headers: str = "", forwarded_for: tuple[str, ...] = ()) -> Answer:
    return Answer(Outcome.REFUSED, _respond(status, phrase, f"{_WHAT_THIS_IS}{why}\n", headers), b"", forwarded_for)


def _respond(status: int, phrase: str, text: str, headers: str = "", *, body: bool = True) -> bytes:
    """A response after which the connection ends; without its body it answers a HEAD."""
    connection = "close, Upgrade" if status == 426 else "close"  # RFC 9110, 7.8
    head = (
        f"HTTP/1.1 {status} {phrase}\r\n"
        f"Connection: {connection}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(text)}\r\n"
        "Cache-Control: no-store\r\n"
        f"{headers}"
        "\r\n"
    )
    return (head + text if body else head).encode()
