"""A bridge for clients that speak only TCP to a relay's WebSocket port, as somebody would build it with `websockets`.

    python -m tests.support.bridge PORT ws://192.0.2.2:4002/

It listens on 127.0.0.1, and says `ready` on stdout when it does. Each client gets a WebSocket of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

READ_BYTES = 1 << 16


async def carry_over(reader: asyncio.StreamReader, page: ClientConnection) -> None:
    """Everything that the client sends, and then the Close."""
    with contextlib.suppress(ConnectionClosed, ConnectionError):
        while chunk := await reader.read(READ_BYTES):
            await page.send(chunk)
    await page.close()


async def carry_back(page: ClientConnection, writer: asyncio.StreamWriter) -> None:
    """Everything that the relay sends, and then the end of the stream."""
    with contextlib.suppress(ConnectionClosed, ConnectionError):
        async for message in page:
            assert isinstance(message, bytes), "text"
            writer.write(message)
            await writer.drain()
    writer.close()


async def serve(port: int, url: str) -> None:
    """Serve until this is ended."""

    async def bridge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            page = await connect(url, compression=None)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry_over(reader, page), carry_back(page, writer))

    server = await asyncio.start_server(bridge, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
