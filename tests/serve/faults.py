"""A proxy between a client and a server that does to the bytes what networks do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_CHUNK = 1024


@dataclass(frozen=True)
class Faults:
    """What befalls a connection's bytes, in one direction.

    delay_s: before the first. bytes_per_s: no more than that. cut_after, corrupted: the byte behind which the
    connection ends, or of which a bit is turned. swallowed: nothing arrives. doubled: the byte whose chunk comes twice.
    replayed: of what goes to the server, all of it comes there on a second connection too. connections: how many it
    befalls, the first ones.
    """

    delay_s: float = 0.0
    bytes_per_s: int | None = None
    cut_after: int | None = None
    corrupted: int | None = None
    swallowed: bool = False
    doubled: int | None = None
    replayed: bool = False
    connections: int = 1_000_000


class Proxy:
    """Listens on a port of this machine; up: of what goes to the server, down: of what it answers.

    server_port: of the server that further connections lead to; 0 leads nowhere, and they end. begun: whether faults
    befall them, from the first one that is made then. sent: what the server was sent since, by all of them.
    """

    def __init__(self, port: int, up: Faults, down: Faults) -> None:
        self.server_port, self._up, self._down = port, up, down
        self.begun, self.connections = False, 0
        self.sent = bytearray()
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def begin(self) -> None:
        """Let faults befall what comes from now on; who keeps a connection has to make another."""
        asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()

    async def _begin(self) -> None:
        for one in self._open:
            one.transport.abort()
        while self._open:
            await asyncio.sleep(0.001)
        self.begun, self.connections = True, 0
        self.sent.clear()

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await ended.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        befallen = (self.begun and number <= one.connections for one in (self._up, self._down))
        up, down = (
            one if is_befallen else Faults() for one, is_befallen in zip((self._up, self._down), befallen, strict=True)
        )
        if not self.server_port:
            writer.transport.abort()
            return
        sides = [await asyncio.open_connection("127.0.0.1", self.server_port) for _ in range(1 + up.replayed)]
        backs = [back for _, back in sides]
        self._open.add(writer)
        try:
            ways = [_carried(reader, backs, up, self.sent), _carried(sides[0][0], [writer], down, bytearray())]
            tasks = [asyncio.ensure_future(way) for way in ways]
            with suppress(asyncio.CancelledError):  # at the proxy's end
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        finally:
            for one in (writer, *backs):
                one.transport.abort()
            self._open.discard(writer)


async def _carried(
    reader: asyncio.StreamReader, writers: Sequence[asyncio.StreamWriter], own: Faults, kept: bytearray
) -> None:
    """Carry bytes from one side to the others until one ends, or a fault ends it; kept: what came there."""
    carried = 0
    with suppress(ConnectionError):
        async for chunk in _chunks(reader, own.bytes_per_s):
            if carried == 0 and own.delay_s:
                await asyncio.sleep(own.delay_s)
            if own.swallowed:
                continue
            data = bytearray(chunk)
            if own.corrupted is not None and carried <= own.corrupted < carried + len(data):
                data[own.corrupted - carried] ^= 0x40
            if own.doubled is not None and carried <= own.doubled < carried + len(data):
                data *= 2
            ends = own.cut_after is not None and carried + len(data) >= own.cut_after
            if ends and own.cut_after is not None:
                del data[own.cut_after - carried :]
            kept += data
            for writer in writers:
                writer.write(data)
                await writer.drain()
            carried += len(data)
            if ends:
                return
            if own.bytes_per_s is not None:
                await asyncio.sleep(len(data) / own.bytes_per_s)


async def _chunks(reader: asyncio.StreamReader, bytes_per_s: int | None) -> AsyncIterator[bytes]:
    while chunk := await reader.read(_CHUNK if bytes_per_s is None else max(1, bytes_per_s // 20)):
        yield chunk


@contextmanager
def between(port: int, up: Faults | None = None, down: Faults | None = None) -> Iterator[Proxy]:
    """A proxy before a server's port, or before none, 0, until there is one."""
    proxy, ready = Proxy(port, up or Faults(), down or Faults()), threading.Event()
    loop, ended = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(proxy.serve(ready, ended),))
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
