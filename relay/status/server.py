"""HTTP, with bounds on whoever asks: one request a connection, so many bytes of it, so many seconds, so many at a time.

gevent's own WSGI server, which by itself has none of these bounds. It writes down nothing about anybody: no line for a
request, and of a mistake in this program the traceback without what was asked.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import gevent
from gevent import socket
from gevent.pywsgi import WSGIHandler, WSGIServer

from relay.process.addresses import bind, resolve, why_not

MOST_REQUEST_BYTES: Final = 16 << 10
"""Of a request, with what comes after its head."""

MOST_SECONDS: Final = 10.0
"""For a request and its answer."""

MOST_CONNECTIONS: Final = 64
"""At a time; the oldest gives way, since an honest one takes milliseconds."""

LINGER_SECONDS: Final = 1.0
LINGER_BYTES: Final = 256 << 10
"""What is read after the answer, so that it arrives: closing a socket with unread input sends a reset."""

BACKLOG: Final = 128

TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
NOT_HTTP: Final = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

logger = logging.getLogger("relay")


class _TooLarge(OSError):
    """A request of too many bytes."""


class _Request:
    """What comes from a visitor, up to so many bytes."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401  # gevent has no types
        self._file = file
        self._left = MOST_REQUEST_BYTES

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def readline(self, most: int = -1) -> bytes:
        return self._counted(self._file.readline(self._at_most(most)))

    def read(self, most: int = -1) -> bytes:
        return self._counted(self._file.read(self._at_most(most)))

    def _at_most(self, most: int) -> int:
        return self._left + 1 if most < 0 else min(most, self._left + 1)

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise _TooLarge
        return data


class _Handler(WSGIHandler):  # type: ignore[misc]  # gevent has no types
    """One request."""

    def __init__(self, sock: Any, address: object, server: object) -> None:  # noqa: ANN401
        super().__init__(sock, address, server, _Request(sock.makefile("rb", -1)))

    def handle(self) -> None:
        """Answer, and see the visitor off."""
        try:
            with gevent.Timeout(MOST_SECONDS, False):
                refusal = self.handle_one_request()
                if isinstance(refusal, tuple):
                    self.socket.sendall(refusal[1])
                self._linger()
        except OSError:
            pass  # it has gone
        finally:
            self.rfile.close()
            self.socket.close()

    def _linger(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)
        left = LINGER_BYTES
        with gevent.Timeout(LINGER_SECONDS, False):
            while left > 0 and (chunk := self.socket.recv(1 << 16)):
                left -= len(chunk)

    def _handle_client_error(self, ex: Exception) -> tuple[str, bytes]:
        return ("431", TOO_LARGE) if isinstance(ex, _TooLarge) else ("400", NOT_HTTP)

    def _log_error(self, t: type[BaseException], v: BaseException, tb: Any) -> None:  # noqa: ANN401
        if issubclass(t, Exception):
            logger.error("a request could not be answered", exc_info=(t, v, tb))

    def log_error(self, msg: str, *args: object) -> None:
        """Nothing: it would be about whoever asked."""

    def log_request(self) -> None:
        """Nothing, for the same reason."""


class Server(WSGIServer):  # type: ignore[misc]  # gevent has no types
    """Listens on `listener` and lets `application` answer."""

    def __init__(self, listener: socket.socket, application: Callable[..., Iterable[bytes]]) -> None:
        super().__init__(listener, application, log=None, error_log=None, handler_class=_Handler)
        self._visitors: dict[gevent.Greenlet, None] = {}  # in the order in which they came

    def handle(self, sock: Any, address: object) -> None:  # noqa: ANN401
        """Serve one connection, in a greenlet of its own."""
        visitor = gevent.getcurrent()
        self._visitors[visitor] = None
        if len(self._visitors) > MOST_CONNECTIONS:
            oldest = next(iter(self._visitors))
            del self._visitors[oldest]
            oldest.kill(block=False)
        try:
            _Handler(sock, address, self).handle()
        except Exception:  # of a mistake in here gevent would print the address
            self._tell()
        finally:
            self._visitors.pop(visitor, None)
            with contextlib.suppress(OSError):
                sock.close()

    def _tell(self) -> None:
        logger.error("a connection could not be served", exc_info=sys.exc_info())


def listen(interface: str, port: int) -> socket.socket:
    """A listening socket there; raises Mistake."""
    family, address = resolve(interface, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bind(sock, address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise why_not(error, interface, port) from None
    return sock
