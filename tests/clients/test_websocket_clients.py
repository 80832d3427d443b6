"""WebSocket clients at a relay: each row of what was decided about them, over real sockets, with one worker and two."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection

from tests.support.harness import (
    CHECKOUT,
    Relay,
    Service,
    Workers,
    accepts,
    connect,
    free_port,
    handshake,
    new_side,
    new_token,
    own_memory,
    read_exactly,
    read_to_end,
    wait_until,
)
from tests.support.kernel_view import unacknowledged
from tests.support.web import dial_raw, dial_web, read_bytes, read_to_close, web_options, web_port

NOISE = random.Random(13).randbytes(3_000_017)


@pytest.fixture(params=["one-worker", "two-workers"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A recording relay that takes WebSocket clients, with the options of the call."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Service:
            options = (*web_options(), *options)
            if request.param == "one-worker":
                return stack.enter_context(Relay(tmp_path, *options, recording=True))
            return stack.enter_context(Workers(tmp_path, *options, count=2))

        yield start


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    """One without further options."""
    return start()


def lines() -> tuple[bytes, bytes]:
    """The handshakes of two that match."""
    token = new_token()
    return handshake(token, new_side()), handshake(token, new_side())


def send_in_messages(web: ClientConnection, content: bytes, size: int) -> None:
    """Send `content` in messages of that many bytes."""
    for at in range(0, len(content), size):
        web.send(content[at : at + size])


@pytest.mark.parametrize("first_comes", ["web", "tcp"])
def test_a_websocket_client_and_one_over_tcp_are_glued(service: Service, first_comes: str) -> None:
    one, other = lines()
    with dial_web(web_port(service), "/any/path?at=all") as web, connect(service.port) as tcp:
        if first_comes == "web":
            web.send(one)
            wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
            tcp.sendall(other)
        else:
            tcp.sendall(other)
            wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
            web.send(one)
        assert web.recv(10) == b"ok\n"
        assert read_exactly(tcp, 3) == b"ok\n"
        pours = [
            threading.Thread(target=tcp.sendall, args=(NOISE,)),
            threading.Thread(target=send_in_messages, args=(web, NOISE, 70_001)),
        ]
        for pour in pours:
            pour.start()
        tcp.settimeout(30)
        read: list[bytes] = []
        reads = threading.Thread(target=lambda: read.append(read_exactly(tcp, len(NOISE))))
        reads.start()
        assert read_bytes(web, len(NOISE)) == NOISE
        reads.join(30)
        assert read == [NOISE]
        for pour in pours:
            pour.join(10)
        tcp.sendall(b"the last words")
        tcp.shutdown(socket.SHUT_WR)
        messages, close = read_to_close(web)
        assert b"".join(map(bytes, messages)) == b"the last words"  # type: ignore[arg-type]
        assert close is not None
        assert close.code == 1000
        assert read_to_end(tcp) == b""
    (record,) = service.wait_for_records(1)
    assert (record["mood"], record["total_bytes"]) == ("happy", 2 * len(NOISE) + 14)


def test_two_websocket_clients_are_glued_and_a_close_is_the_end_of_the_stream(service: Service) -> None:
    one, other = lines()
    with dial_web(web_port(service)) as left, dial_web(web_port(service)) as right:
        left.send(one)
        right.send(other)
        assert left.recv(10) == right.recv(10) == b"ok\n"
        left.send([b"in ", b"three ", b"fragments"])
        assert read_bytes(right, 18) == b"in three fragments"
        right.send(NOISE[:100_000])
        assert read_bytes(left, 100_000) == NOISE[:100_000]
        left.send(b"under way before the Close")
        left.close()
        messages, close = read_to_close(right)
        assert messages == [b"under way before the Close"]
        assert close is not None
        assert close.code == 1000
    (record,) = service.wait_for_records(1)
    assert (record["mood"], record["total_bytes"]) == ("happy", 18 + 100_000 + 26)


@pytest.mark.parametrize("pieces", [[7], [1], [50, 60], [1000]])
def test_the_line_may_be_split_over_messages(service: Service, pieces: list[int]) -> None:
    one, other = lines()
    with dial_web(web_port(service)) as web, connect(service.port) as tcp:
        at = 0
        while at < len(one):
            size = pieces[0] if len(pieces) == 1 else pieces.pop(0)
            web.send(one[at : at + size])
            at += size
        tcp.sendall(other)
        assert web.recv(10) == b"ok\n"


def test_the_end_of_a_message_ends_the_line_too(service: Service) -> None:
    one, other = lines()
    with dial_web(web_port(service)) as web, connect(service.port) as tcp:
        web.send(one[:-1])
        tcp.sendall(other)
        assert web.recv(10) == b"ok\n"


def test_refusals_arrive_as_one_message_and_a_close(start: Callable[..., Service]) -> None:
    service = start("--handshake-timeout", "1")
    port = web_port(service)
    one, _ = lines()
    cases: list[tuple[list[bytes | str], list[bytes], int]] = [
        ([b"GET / HTTP/1.1\r\n"], [b"bad handshake\n"], 1000),
        ([one[:20]], [b"bad handshake\n"], 1000),
        ([one + b"x"], [b"impatient\n"], 1000),
        (["please relay"], [], 1003),
    ]
    for said, expected, code in cases:
        with dial_web(port) as web:
            for message in said:
                web.send(message)
            messages, close = read_to_close(web)
            assert messages == expected
            assert close is not None
            assert close.code == code
    with dial_web(port) as web:
        web.send(one)
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
        web.ping()
        web.send(b"too early")
        messages, close = read_to_close(web)
        assert messages == [b"impatient\n"]
        assert close is not None
        assert close.code == 1000
    moods = [record["mood"] for record in service.wait_for_records(5)]
    assert moods == ["errory"] * 5


WRONG_FRAMES = {
    "no mask": b"\x82\x01x",
    "a reserved bit": b"\xc2\x81\x00\x00\x00\x00x",
    "an unknown opcode": b"\x83\x81\x00\x00\x00\x00x",
    "a long ping": b"\x89\xfe\x00\x7e\x00\x00\x00\x00" + bytes(126),
}


@pytest.mark.parametrize("name", WRONG_FRAMES)
def test_a_frame_that_breaks_the_protocol_ends_its_side_with_1002_and_the_other_in_order(
    service: Service, name: str
) -> None:
    one, other = lines()
    with dial_web(web_port(service)) as web, connect(service.port) as tcp:
        web.send(one)
        tcp.sendall(other)
        assert web.recv(10) == b"ok\n"
        assert read_exactly(tcp, 3) == b"ok\n"
        web.send(b"before")
        web.socket.sendall(WRONG_FRAMES[name])
        assert read_to_end(tcp) == b"before"
        _, close = read_to_close(web)
        assert close is not None
        assert close.code == 1002
    assert service.wait_for_records(1)[0]["total_bytes"] == 6


def test_one_that_waits_and_leaves_is_lonely_and_a_spare_is_told_goodbye(service: Service) -> None:
    token, side = new_token(), new_side()
    with dial_web(web_port(service)) as spare, dial_web(web_port(service)) as last, connect(service.port) as tcp:
        spare.send(handshake(token, side))
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
        last.send(handshake(token, side))
        wait_until(lambda: service.rows("current")[0]["waiting"] == 2, what="both wait")
        tcp.sendall(handshake(token, new_side()))
        assert last.recv(10) == b"ok\n"
        messages, close = read_to_close(spare)
        assert messages == []
        assert close is not None
        assert close.code == 1000
    with dial_web(web_port(service)) as leaving:
        leaving.send(handshake(new_token(), new_side()))
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
    assert sorted(record["mood"] for record in service.wait_for_records(3)) == ["happy", "lonely", "lonely"]


def http(port: int, request: bytes) -> bytes:
    """What a plain HTTP request is answered with."""
    with connect(port) as sock:
        sock.sendall(request)
        return read_to_end(sock)


def test_plain_http_is_answered_and_on_no_record(service: Service) -> None:
    port = web_port(service)
    for request in (b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"):
        answer = http(port, request)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"magic-wormhole transit relay" in answer
    assert http(port, b"HEAD / HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    assert service.records() == []
    assert http(port, b"POST / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    assert http(port, b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert http(port, b"GET / HTTP/1.1\r\nX: " + b"x" * 9000).startswith(b"HTTP/1.1 431 ")
    assert [record["mood"] for record in service.wait_for_records(3)] == ["errory"] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_one_port_serves_both(tmp_path: Path, count: int) -> None:
    port = free_port()
    endpoint = f"tcp:{port}:interface=127.0.0.1"
    with contextlib.ExitStack() as stack:
        service: Service
        if count == 1:
            service = stack.enter_context(Relay(tmp_path, "--websocket", endpoint, port=port, recording=True))
        else:
            workers = Workers(tmp_path, "--websocket", endpoint, count=2)
            workers.port = port
            service = stack.enter_context(workers)
        assert web_port(service) == port
        for _ in range(4):
            one, other = lines()
            with dial_web(port) as web, connect(port) as tcp:
                web.send(one)
                tcp.sendall(other)
                assert web.recv(10) == b"ok\n"
                assert read_exactly(tcp, 3) == b"ok\n"
        with connect(port) as sock:
            sock.sendall(b"nonsense")
            assert read_to_end(sock) == b"bad handshake\n"


def _stands_still(count: list[int]) -> bool:
    before = count[0]
    time.sleep(0.5)
    return count[0] == before


def test_one_frame_of_any_length_passes_and_the_memory_stays_flat(service: Service) -> None:
    one, other = lines()
    size = 300 << 20
    with dial_web(web_port(service)) as web, connect(service.port) as tcp:
        web.send(one)
        tcp.sendall(other)
        assert web.recv(10) == b"ok\n"
        assert read_exactly(tcp, 3) == b"ok\n"
        tcp.settimeout(60)
        before = max(map(own_memory, service.pids))
        grown: list[int] = []
        mebibyte = random.Random(8).randbytes(1 << 20)
        poured = [0]

        def pour() -> None:
            web.socket.sendall(b"\x82\xff" + struct.pack("!Q", size) + bytes(4))  # a mask that changes nothing
            for _ in range(size >> 20):
                web.socket.sendall(mebibyte)
                poured[0] += 1

        pouring = threading.Thread(target=pour)
        pouring.start()
        wait_until(lambda: _stands_still(poured), what="everything rests that may, since nobody reads")
        grown.append(max(map(own_memory, service.pids)) - before)
        for number in range(size >> 20):
            assert read_exactly(tcp, 1 << 20) == mebibyte, f"the {number}th"
            if number % 50 == 0:
                grown.append(max(map(own_memory, service.pids)) - before)
        pouring.join(30)
        assert poured[0] == size >> 20
        assert max(grown) < 24 << 20, "1 MiB in each direction, and what is kept for all"


def test_a_silent_client_is_pinged_while_it_waits_and_in_a_pair(start: Callable[..., Service]) -> None:
    service = start("--ping-interval", "1")
    one, other = lines()
    with dial_raw(web_port(service)) as raw, connect(service.port) as tcp:
        raw.sendall(Frame(Opcode.BINARY, one).serialize(mask=True))
        assert read_exactly(raw, 2) == b"\x89\x00", "a ping while it waits"
        assert read_exactly(raw, 2) == b"\x89\x00", "and another, though no pong came"
        tcp.sendall(other)
        said = b""
        while b"ok\n" not in said:
            said += raw.recv(100)
        while b"\x89\x00" not in said.partition(b"ok\n")[2]:
            said += raw.recv(100)
        raw.sendall(Frame(Opcode.PING, b"are you there?").serialize(mask=True))
        while b"\x8a\x0eare you there?" not in said:
            said += raw.recv(100)
        tcp.sendall(b"payload")
        while b"\x82\x07payload" not in said:
            said += raw.recv(100)


def test_tiny_frames_do_not_take_the_worker_from_others(service: Service) -> None:
    one, other = lines()
    frame = Frame(Opcode.BINARY, b"x").serialize(mask=True)
    with dial_web(web_port(service)) as web, connect(service.port) as tcp:
        web.send(one)
        tcp.sendall(other)
        assert web.recv(10) == b"ok\n"
        assert read_exactly(tcp, 3) == b"ok\n"
        pour = threading.Thread(target=web.socket.sendall, args=(frame * 200_000,))
        pour.start()
        for _ in range(10):
            left, right = lines()
            with connect(service.port) as first, connect(service.port) as second:
                first.sendall(left)
                second.sendall(right)
                assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
        tcp.settimeout(30)
        assert read_exactly(tcp, 200_000) == b"x" * 200_000
        pour.join(30)


@pytest.mark.parametrize("reads", ["at once", "slowly"])
def test_transfers_move_house_in_the_middle_of_frames_and_nothing_is_lost(tmp_path: Path, reads: str) -> None:
    size = 12_000_000
    content = random.Random(7).randbytes(size)
    with Workers(tmp_path, *web_options(), count=2) as workers, contextlib.ExitStack() as stack:
        port = web_port(workers)
        transfers = []
        for number in range(6):
            one, other = lines()
            web = stack.enter_context(dial_web(port))
            partner = stack.enter_context(dial_web(port)) if number % 3 == 2 else None
            tcp = None if partner is not None else stack.enter_context(connect(workers.port))
            web.send(one)
            if partner is not None:
                partner.send(other)
                assert partner.recv(10) == b"ok\n"
            else:
                assert tcp is not None
                tcp.sendall(other)
                assert read_exactly(tcp, 3) == b"ok\n"
                tcp.settimeout(60)
            assert web.recv(10) == b"ok\n"
            transfers.append((web, partner, tcp))
        waiting_lines = lines()
        waiting = stack.enter_context(dial_web(port))
        waiting.send(waiting_lines[0])
        half_way = stack.enter_context(dial_web(port))
        half_way_lines = lines()
        half_way.send(half_way_lines[0][:30])
        wrong: list[str] = []
        threads = []
        for number, (web, partner, tcp) in enumerate(transfers):

            def pour(web: object = web, number: int = number) -> None:
                step = [1_000_000, 16_424, 333_333][number % 3]
                for at in range(0, size, step):
                    web.send(content[at : at + step])  # type: ignore[attr-defined]
                    time.sleep(0.001)

            def take(partner: object = partner, tcp: object = tcp, number: int = number) -> None:
                received = bytearray()
                while len(received) < size:
                    if reads == "slowly":
                        time.sleep(0.005)
                    part = partner.recv(60) if partner is not None else tcp.recv(1 << 16)  # type: ignore[attr-defined]
                    if not part:
                        break
                    received += part
                if bytes(received) != content:
                    wrong.append(f"transfer {number}: {len(received)} bytes")

            threads += [threading.Thread(target=pour), threading.Thread(target=take)]
        for thread in threads:
            thread.start()
        for number in range(3):
            workers.start_one()
            assert workers.stop_one(number) == 0
        for thread in threads:
            thread.join(90)
        assert wrong == []
        half_way.send(half_way_lines[0][30:])
        for line in (waiting_lines[1], half_way_lines[1]):
            late = stack.enter_context(connect(workers.port))
            late.sendall(line)
            assert read_exactly(late, 3) == b"ok\n"
        assert waiting.recv(10) == half_way.recv(10) == b"ok\n"
        for web, _, _ in transfers:
            web.close()
        wait_until(lambda: len(workers.records()) >= 6, 20, "six transfers are on record")
        happy = [record for record in workers.records() if record["mood"] == "happy"]
        assert [record["total_bytes"] for record in happy][:6] == [size] * 6


def test_without_the_option_nothing_of_it_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal, threading; threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start();"
        "sys.argv[1:] = ['--port', '0', '--interface', '127.0.0.1'];"
        "import relay.cli\ntry:\n relay.cli.main()\nfinally:\n"
        " print([n for n in sys.modules if 'websocket' in n or n in ('relay.clients.web', 'relay.clients.frames')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_first_client_finds_everything_loaded(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom relay.server import Relay\nstart = Relay.start\n"
        "def start_and_note(*given):\n start(*given)\n sys.modules_then = {*sys.modules}\n"
        "Relay.start = start_and_note\nfrom relay.cli import main\n"
        "try:\n main()\nfinally:\n print(sorted({*sys.modules} - sys.modules_then))\n"
    )
    port, web = free_port(), free_port()
    options = ["--port", f"tcp:{port}:interface=127.0.0.1", "--websocket", f"tcp:{web}:interface=127.0.0.1"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as process:
        try:
            wait_until(lambda: accepts(web), what="it takes WebSocket clients")
            one, other = lines()
            with dial_web(web) as client, connect(port) as tcp:
                client.send(one)
                tcp.sendall(other)
                assert client.recv(10) == b"ok\n"
                client.send(NOISE)
                assert read_exactly(tcp, 3 + len(NOISE))[3:] == NOISE
        finally:
            process.terminate()
        assert process.stdout is not None
        loaded = process.stdout.read()
    assert loaded == "[]\n"


def frame(opcode: Opcode, content: bytes = b"") -> bytes:
    """One frame of a client."""
    return Frame(opcode, content).serialize(mask=True)


def test_who_waits_and_only_pings_does_not_take_the_worker_from_others(service: Service) -> None:
    with dial_raw(web_port(service)) as raw:
        raw.sendall(frame(Opcode.BINARY, lines()[0]))
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
        raw.settimeout(5)
        with contextlib.suppress(OSError):
            for _ in range(200):
                raw.sendall(frame(Opcode.PING) * 10_000)
        for _ in range(5):
            one, other = lines()
            with connect(service.port) as first, connect(service.port) as second:
                first.sendall(one)
                second.sendall(other)
                assert read_exactly(first, 3) == read_exactly(second, 3) == b"ok\n"
        wait_until(lambda: service.rows("current")[0]["waiting"] == 0, what="it is turned away")


@pytest.mark.parametrize(("said", "answer"), [(b"please", b"bad handshake\n"), (None, b"impatient\n")])
def test_who_says_nothing_in_many_frames_is_turned_away(service: Service, said: bytes | None, answer: bytes) -> None:
    begun = Frame(Opcode.BINARY, said or lines()[0], fin=False).serialize(mask=True)
    nothing = Frame(Opcode.CONT, b"", fin=False).serialize(mask=True)
    with dial_raw(web_port(service)) as raw:
        raw.sendall(begun + nothing * 500)
        assert read_to_end(raw) == bytes((0x82, len(answer))) + answer + b"\x88\x02\x03\xe8"
    assert service.wait_for_records(1)[0]["mood"] == "errory"


def test_who_says_its_line_and_leaves_in_one_breath_has_left(service: Service) -> None:
    one, other = lines()
    with dial_raw(web_port(service)) as raw, connect(service.port) as tcp:
        raw.sendall(frame(Opcode.BINARY, one) + frame(Opcode.CLOSE, b"\x03\xe8"))
        assert read_to_end(raw) == b"\x88\x02\x03\xe8"
        tcp.sendall(other)
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="nobody is there for its partner")


@pytest.mark.parametrize(
    "last",
    [frame(Opcode.CLOSE, b"\x03\xe8"), frame(Opcode.PING) + frame(Opcode.CLOSE)],
    ids=["close", "ping-close"],  # and not the bytes, whose mask is another each time
)
def test_a_transfer_of_exactly_what_is_allowed_ends_in_order(start: Callable[..., Service], last: bytes) -> None:
    service = start("--max-pair-bytes", "1000")
    one, other = lines()
    with dial_raw(web_port(service)) as raw, connect(service.port) as tcp:
        raw.sendall(frame(Opcode.BINARY, one))
        tcp.sendall(other)
        assert read_exactly(tcp, 3) == b"ok\n"
        raw.sendall(frame(Opcode.BINARY, b"x" * 1000))
        assert read_exactly(tcp, 1000) == b"x" * 1000
        raw.sendall(last)
        assert read_to_end(tcp) == b""
    assert service.wait_for_records(1)[0]["total_bytes"] == 1000


def test_who_waits_and_says_much_that_is_nothing_is_turned_away(service: Service) -> None:
    with dial_raw(web_port(service)) as raw:
        raw.sendall(frame(Opcode.BINARY, lines()[0]))
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
        raw.settimeout(20)
        said = 0
        while said < 100:
            raw.sendall(frame(Opcode.PING, bytes(125)) * 30)
            words = read_exactly(raw, 2)
            if words == b"\x82\x0a":
                break
            assert read_exactly(raw, words[1]) == bytes(125)
            said += 1
        assert said > 10, "some of that is allowed"
        assert read_to_end(raw) == b"impatient\n\x88\x02\x03\xe8"


def test_who_waits_may_ping_as_often_as_it_likes(service: Service) -> None:
    one, other = lines()
    with dial_raw(web_port(service)) as raw, connect(service.port) as tcp:
        raw.sendall(frame(Opcode.BINARY, one))
        wait_until(lambda: service.rows("current")[0]["waiting"] == 1, what="it waits")
        raw.settimeout(20)
        for _ in range(1000):
            raw.sendall(frame(Opcode.PING, bytes(125)))
            assert read_exactly(raw, 127) == b"\x8a\x7d" + bytes(125)
        tcp.sendall(other)
        assert read_exactly(raw, 5) == b"\x82\x03ok\n"


def test_what_was_sent_before_the_end_arrives_though_the_other_goes_on_in_tiny_frames(service: Service) -> None:
    one, other = lines()
    with dial_raw(web_port(service)) as raw, connect(service.port) as tcp:
        raw.sendall(frame(Opcode.BINARY, one))
        tcp.sendall(other)
        assert read_exactly(tcp, 3) == b"ok\n"
        tcp.sendall(NOISE[:1_000_000])
        wait_until(lambda: unacknowledged(tcp) == 0, what="all of it is the relay's")
        tcp.close()
        pour = threading.Thread(target=_send_what_can_be, args=(raw, frame(Opcode.BINARY, b"y") * 100_000))
        pour.start()
        received = b""
        raw.settimeout(20)
        while b"\x88\x02\x03\xe8" not in received[-200:]:
            chunk = raw.recv(1 << 16)
            assert chunk, f"the stream ended after {len(received)} bytes"
            received += chunk
        assert len(received) > 1_000_000
        pour.join(20)


def _send_what_can_be(sock: socket.socket, content: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(content)


@pytest.mark.parametrize("why", ["--idle-timeout", "--grace", "--max-pair-bytes"])
def test_a_client_whose_transfer_the_relay_ends_reads_a_close(start: Callable[..., Service], why: str) -> None:
    options = {"--idle-timeout": "100", "--grace": "100", "--max-pair-bytes": "1000"}
    options[why] = {"--idle-timeout": "2", "--grace": "0", "--max-pair-bytes": "9"}[why]
    service = start(*(word for option in options.items() for word in option))
    one, other = lines()
    with dial_web(web_port(service)) as sender, dial_web(web_port(service)) as receiver:
        for client, line in ((sender, one), (receiver, other)):
            client.send(line)
        for client in (sender, receiver):
            assert client.recv(10) == b"ok\n"
        sender.send(b"x")
        assert receiver.recv(10) == b"x"
        if why == "--grace":
            service.stop()
        elif why == "--max-pair-bytes":
            sender.send(b"x" * 9)
        for client in (receiver, sender):
            _, close = read_to_close(client)
            assert close is not None
            assert close.code == 1000
