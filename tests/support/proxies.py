"""HAProxy and nginx in the foreground, in front of a relay or of whatever listens in its place.

with haproxy(tmp_path, port, f"127.0.0.1:{relay.port} send-proxy-v2"):
    connect(port)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

HOST = "relay.example.org"
"""Whom the certificates of the tests are for; docs/ and the shipped configurations name it, too."""

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="apt-get install openssl")
needs_haproxy = pytest.mark.skipif(not os.path.exists(HAPROXY), reason="apt-get install haproxy")
needs_nginx = pytest.mark.skipif(
    not (os.path.exists(NGINX) and NGINX_STREAM.exists()), reason="apt-get install nginx libnginx-mod-stream"
)


@contextlib.contextmanager
def running(*command: str) -> Iterator[None]:
    """Run a proxy in the foreground; AssertionError with what it said if it ended before it was told to."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield
        assert process.poll() is None, process.communicate()[1].decode()
    finally:
        process.terminate()
        process.communicate(timeout=20)


@contextlib.contextmanager
def haproxy(folder: Path, port: int, server: str) -> Iterator[None]:
    """HAProxy on `port` for both families, with one `server`."""
    configuration = folder / "haproxy.cfg"
    configuration.write_text(
        "defaults\n mode tcp\n timeout connect 9s\n timeout client 9s\n timeout server 9s\n"
        " unique-id-format %{+X}o%ci:%cp-%Ts-%rt\n"
        f"listen front\n bind :::{port} v4v6\n server relay {server}\n"
    )
    with running(HAPROXY, "-db", "-f", str(configuration)):
        yield


@contextlib.contextmanager
def nginx(folder: Path, port: int, server: str) -> Iterator[None]:
    """The same of nginx, which knows version 1 only."""
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"load_module {NGINX_STREAM};\ndaemon off;\nmaster_process off;\npid {folder}/nginx.pid;\n"
        "events {}\n"
        f"stream {{ server {{ listen [::]:{port} ipv6only=off; proxy_pass {server}; proxy_protocol on; }} }}\n"
    )
    with running(NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(configuration)):
        yield


def tell(control: Path, words: str) -> str:
    """Say something to a running HAProxy at its stats socket `control`, and return its answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(control))
        sock.sendall(words.encode() + b"\n")
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    return answer.decode()


def state_of(control: Path, server: str) -> str:
    """What it thinks of a server: UP, DRAIN, DOWN, …"""
    for line in tell(control, "show stat").splitlines():
        fields = line.split(",")
        if fields[1:2] == [server]:
            return fields[17]
    raise AssertionError(f"this HAProxy knows no {server}")


def make_certificate(folder: Path) -> Path:
    """Make a certificate for `HOST`, which only tests trust, and return cert.pem. Its key is in cert.key, and both are
    in both.pem, as HAProxy wants it."""
    pem, key = folder / "cert.pem", folder / "cert.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-out", pem, "-keyout", key],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    (folder / "both.pem").write_text(pem.read_text() + key.read_text())
    return pem
