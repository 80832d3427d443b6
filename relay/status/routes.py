"""What each URL answers: a WSGI application. It looks at the method, the path and the Host, and at nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from relay.status import metrics
from relay.status.document import as_json
from relay.status.dress import SCRIPT, STYLE
from relay.status.page import as_html
from relay.status.view import View

TEXT: Final = "text/plain; charset=utf-8"

HOST: Final = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
OWN_HOST: Final = re.compile(r"(?:localhost|[0-9.]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE)
"""What a visitor of this machine calls it. A name could be anybody's: a page elsewhere whose name its owner lets point
here for a moment (DNS rebinding) would read the answer in a browser of this machine."""


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


_POLICY: Final = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFETY: Final = [
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
]

StartResponse = Callable[[str, list[tuple[str, str]]], object]


@dataclass(frozen=True, slots=True)
class _Answer:
    status: str
    kind: str
    body: bytes
    more: tuple[tuple[str, str], ...] = ()


class Application:
    """Answers requests.

    Args:
        view: what is known now, with or without what is plotted.
        only_own: answer only to who calls this machine localhost or by an address.
    """

    def __init__(self, view: Callable[[bool], View], *, only_own: bool) -> None:
        self._view = view
        self._only_own = only_own

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request, as PEP 3333 has it."""
        answer = self._answer(environ)
        length = ("Content-Length", str(len(answer.body)))
        start_response(answer.status, [("Content-Type", answer.kind), length, *answer.more, *_SAFETY])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answer.body]

    def _answer(self, environ: dict[str, Any]) -> _Answer:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _plain("405 Method Not Allowed", "only GET and HEAD", ("Allow", "GET, HEAD"))
        refusal = self._refuses(environ)
        if refusal is not None:
            return refusal
        path = environ["PATH_INFO"]
        if path == "/":
            return _Answer("200 OK", "text/html; charset=utf-8", as_html(self._view(True)).encode())
        if path == "/metrics":
            return _Answer("200 OK", metrics.CONTENT_TYPE, metrics.exposition(self._view(False)))
        if path == "/status.json":
            return _Answer("200 OK", "application/json", as_json(self._view(False)).encode())
        if path == "/healthz":
            health = self._view(False).health
            return _plain("200 OK" if health.is_well else "503 Service Unavailable", health.state)
        return _plain("404 Not Found", "there is /, /metrics, /status.json and /healthz")

    def _refuses(self, environ: dict[str, Any]) -> _Answer | None:
        host = environ.get("HTTP_HOST")
        if host is None:
            if environ["SERVER_PROTOCOL"] == "HTTP/1.1":
                return _plain("400 Bad Request", "the request names no Host")
            return None
        if not HOST.fullmatch(host):
            return _plain("400 Bad Request", "the Host of the request is none")
        if self._only_own and not OWN_HOST.fullmatch(host):
            return _plain(
                "421 Misdirected Request",
                "call this localhost or by its address; a proxy in front has to set Host, for example to 127.0.0.1",
            )
        return None


def _plain(status: str, line: str, *more: tuple[str, str]) -> _Answer:
    return _Answer(status, TEXT, f"{line}\n".encode(), more)
