#!/usr/bin/env python3
"""What WebSocket frames cost by themselves, in one process: no relay, no pairs, no event loop.

Usage:
  frames.py [--quick]
  frames.py --help

Each figure is the least of several runs, in CPU time of this process. “sketch” is what the sketch that the design
was made with took, on two cores of an AMD EPYC: where nothing is sent, as this program measures it. With sockets, the
figures of this program do without gevent and its waiting.

Options:
  --quick  Small and short: to see that everything works. The figures mean little.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from select import POLLIN, POLLOUT, poll

from docopt import docopt
from websockets.server import ServerProtocol

from relay.clients import masks, websocket
from relay.clients.frames import FrameReader, Payload, messages

GIB = 1 << 30
BUFFER = 1 << 20
RUNS = 5
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: relay.example.org:4002\r\nConnection: Upgrade\r\nPragma: no-cache\r\n"
    b"Cache-Control: no-cache\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    b"Chrome/130.0.0.0 Safari/537.36\r\nUpgrade: websocket\r\nOrigin: https://transfer.example.org\r\n"
    b"Sec-WebSocket-Version: 13\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)


def frame(size: int) -> bytes:
    """A binary message of a client."""
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 1 << 16:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    mask = os.urandom(4)
    return b"\x82" + length + mask + masks.apply_mask_slowly(os.urandom(size), mask)


def stream_of(*sizes: int) -> tuple[bytes, int]:
    """A megabyte of messages of these sizes in turn, and how many there are."""
    stream = bytearray()
    count = 0
    for size in itertools.cycle(sizes):
        message = frame(size)
        if len(stream) + len(message) > BUFFER:
            break
        stream += message
        count += 1
    return bytes(stream), count


def cpu_of(work: Callable[[], object], times: int) -> float:
    """Seconds of CPU that it takes once."""
    least = float("inf")
    for _ in range(RUNS):
        begun = time.process_time()
        for _ in range(times):
            work()
        least = min(least, time.process_time() - begun)
    return least / times


def cost_of_reading(sizes: Sequence[int], times: int, mask: masks.Mask | None = None) -> tuple[float, float]:
    """Seconds a frame, and a GiB, of which nothing is sent."""
    stream, count = stream_of(*sizes)
    buffer = bytearray(stream)
    reader = FrameReader()
    reader._apply_mask = mask or reader._apply_mask

    def read() -> None:
        at = 0
        while at < len(buffer):
            at = reader.read(buffer, at, len(buffer)).consumed

    cpu = cpu_of(read, times)
    return cpu / count, cpu / len(stream) * GIB


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, the second non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    near.setblocking(False)
    return far, near


def in_a_process(work: Callable[[], None], *ours: socket.socket) -> int:
    """Start one that does `work` and then ends; these sockets of ours are not its own."""
    pid = os.fork()
    if pid == 0:
        try:
            for sock in ours:
                sock.close()
            work()
        finally:
            os._exit(0)
    return pid


def send_out(sink: socket.socket, room: poll, buffers: list[Payload]) -> None:
    while buffers:
        try:
            sent = sink.sendmsg(buffers)
        except BlockingIOError:
            room.poll()
            continue
        taken = 0
        for buffer in buffers:
            if sent < len(buffer):
                break
            sent -= len(buffer)
            taken += 1
        del buffers[:taken]
        if sent:
            buffers[0] = memoryview(buffers[0])[sent:]


def cost_of_moving(stream: bytes, times: int, turn: Callable[[bytearray, int], list[Payload]]) -> float:
    """Seconds a GiB from one socket to another, through `turn`, which is given a buffer and how much is in it."""
    sender, source = connected()
    receiver, sink = connected()

    def send() -> None:
        for _ in range(times):
            sender.sendall(stream)

    def receive() -> None:
        scrap = bytearray(BUFFER)
        while receiver.recv_into(scrap):
            pass

    children = [in_a_process(send, source, sink, receiver), in_a_process(receive, source, sink, sender)]
    sender.close()
    receiver.close()
    input_, room = poll(), poll()
    input_.register(source, POLLIN)
    room.register(sink, POLLOUT)
    buffer = bytearray(BUFFER)
    moved = 0
    begun = time.process_time()
    with closing(source), closing(sink):
        while True:
            try:
                count = source.recv_into(buffer)
            except BlockingIOError:
                input_.poll()
                continue
            if not count:
                break
            moved += count
            send_out(sink, room, turn(buffer, count))
        cpu = time.process_time() - begun
    for child in children:
        os.waitpid(child, 0)
    return cpu / moved * GIB


def from_a_client(*, framed: bool) -> Callable[[bytearray, int], list[Payload]]:
    reader = FrameReader()

    def turn(buffer: bytearray, count: int) -> list[Payload]:
        out: list[Payload] = []
        at = 0
        while at < count:
            taken = reader.read(buffer, at, count)
            at = taken.consumed
            out += messages(taken.payload) if framed else taken.payload
        return out

    return turn


def to_a_client(buffer: bytearray, count: int) -> list[Payload]:
    return messages([memoryview(buffer)[:count]])


def open_with_websockets() -> bytes:
    """The opening handshake by `websockets`, for comparison."""
    server = ServerProtocol()
    server.receive_data(REQUEST)
    (request,) = server.events_received()
    return server.accept(request).serialize()  # type: ignore[arg-type]


def say(what: str, figure: str, sketch: str = "") -> None:
    print(f"{what:58} {figure:>9} {sketch:>9}", flush=True)


def main() -> None:
    """Read the command line and measure."""
    quick = docopt(__doc__)["--quick"]
    once = 1 if quick else 10
    bulk = 2 if quick else 100
    gib = 8 if quick else 1024
    say("", "here", "sketch")
    for size, sketch in ((1, "0.56"), (16, "0.56"), (125, "0.58")):
        cost, _ = cost_of_reading([size], once)
        say(f"read a message of {size} bytes, µs", f"{cost * 1e6:.2f}", sketch)
    for sizes, sketch in (((1 << 16,), "0.05"), ((4, 16424), "0.12"), ((1 << 19,), "0.03")):
        said = " and ".join(map(str, sizes))
        _, cost = cost_of_reading(sizes, bulk)
        say(f"read messages of {said} bytes, s/GiB", f"{cost:.3f}", sketch)
        _, cost = cost_of_reading(sizes, bulk // 10 or 1, masks.apply_mask_slowly)
        say("  without the function in C", f"{cost:.2f}")
    megabyte = memoryview(bytearray(BUFFER))
    cost = cpu_of(lambda: messages([megabyte]), once * 10)
    say("headers for a megabyte, s/GiB", f"{cost * GIB / BUFFER:.3f}")
    cost = cpu_of(lambda: websocket.RequestHead().hear(REQUEST), once * 100)
    say("opening handshake, µs", f"{cost * 1e6:.0f}")
    say("  by websockets", f"{cpu_of(open_with_websockets, once * 100) * 1e6:.0f}")
    for sizes, sketch in (((1 << 16,), "0.31–0.37"), ((4, 16424), "0.40")):
        said = " and ".join(map(str, sizes))
        stream, _ = stream_of(*sizes)
        cost = cost_of_moving(stream, gib, from_a_client(framed=False))
        say(f"socket to socket, WS to TCP, {said} bytes, s/GiB", f"{cost:.2f}", sketch)
    cost = cost_of_moving(bytes(BUFFER), gib, to_a_client)
    say("socket to socket, TCP to WS, s/GiB", f"{cost:.2f}", "0.31–0.42")
    cost = cost_of_moving(stream, gib, from_a_client(framed=True))
    say("socket to socket, WS to WS, 4 and 16424 bytes, s/GiB", f"{cost:.2f}", "0.45")
    cost = cost_of_moving(bytes(BUFFER), gib, lambda buffer, count: [memoryview(buffer)[:count]])
    say("socket to socket, copied as it is, s/GiB", f"{cost:.2f}")


if __name__ == "__main__":
    main()
