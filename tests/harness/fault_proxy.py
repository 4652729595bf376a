"""A TCP proxy in front of a broker's six ports that does to connections what networks do.

It runs in the test's own loop. Faults apply to every connection of a lane, those there are and those to come, until
they are taken back; bytes that are held up are delivered afterwards, as after a partition that TCP survives.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Literal, TypeAlias, cast

from bus.endpoints import NUM_PORTS
from kvcache.local import free_url

Direction = Literal["up", "down"]  # towards the broker, and away from it
LANES = ("control", "bulk", "streams", "worker_control", "worker_bulk", "tokens")
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
Line: TypeAlias = tuple[asyncio.StreamWriter, asyncio.StreamWriter]  # to the peer, to the broker
Pieces: TypeAlias = asyncio.Queue[tuple[float, bytes]]  # when they are due, and their bytes; none is the end
READ_BYTES = 65_536
MAX_PIECES = 64
CLOSE_S = 5.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time: close with RST


class Lane:
    """One port. `delay_s` is the latency it adds each way, `bytes_per_s` what it carries at most."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = math.inf
        self._upstream = upstream
        self._open = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._flip_in: dict[Direction, int | None] = dict.fromkeys(DIRECTIONS, None)
        self._lines: dict[Line, asyncio.Task[None]] = {}
        self.heal()

    def blackhole(self, *directions: Direction) -> None:
        """Let nothing through (none named: both ways), with every connection left open."""
        for direction in directions or DIRECTIONS:
            self._open[direction].clear()

    def heal(self) -> None:
        """Let all through again."""
        self.delay_s = 0.0
        self.bytes_per_s = math.inf
        for event in self._open.values():
            event.set()

    def flip_bit(self, direction: Direction, offset: int) -> None:
        """Change one bit, once: of the byte that is `offset` bytes behind the last one that was forwarded."""
        self._flip_in[direction] = offset

    def has_flipped(self, direction: Direction) -> bool:
        return self._flip_in[direction] is None

    def half_close(self) -> None:
        """End the broker's side of every connection in one direction: it sees the end of its input, and may write."""
        for _, upstream in self._lines:
            upstream.write_eof()

    def reset(self) -> None:
        """Cut every connection with RST, at both ends."""
        for line in self._lines:
            for writer in [each for each in line if not each.is_closing()]:
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until an end closes it."""
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        line = (writer, up_writer)
        try:
            async with asyncio.TaskGroup() as group:
                self._lines[line] = group.create_task(self._carry(line, reader, up_reader))
        finally:
            del self._lines[line]

    async def close(self) -> None:
        """Cut every connection and wait until nothing runs for it."""
        self.heal()
        self.reset()
        if self._lines:
            await asyncio.wait(self._lines.values(), timeout=CLOSE_S)

    async def _carry(self, line: Line, reader: asyncio.StreamReader, up_reader: asyncio.StreamReader) -> None:
        writer, up_writer = line
        try:
            async with asyncio.TaskGroup() as group:
                for direction, source, target in (("up", reader, up_writer), ("down", up_reader, writer)):
                    pieces: Pieces = asyncio.Queue(MAX_PIECES)
                    group.create_task(self._take(source, pieces))
                    group.create_task(self._pass_on(cast("Direction", direction), pieces, target))
        finally:
            for each in line:
                each.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, pieces: Pieces) -> None:
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await pieces.put((time.monotonic() + self.delay_s, data))
        await pieces.put((0.0, b""))

    async def _pass_on(self, direction: Direction, pieces: Pieces, writer: asyncio.StreamWriter) -> None:
        """Also what is read behind the end of the other side is taken, or its reader would wait for ever."""
        due, data = await pieces.get()
        while data:
            await asyncio.sleep(max(due - time.monotonic(), len(data) / self.bytes_per_s))
            await self._open[direction].wait()
            if not writer.is_closing():
                with suppress(OSError):
                    writer.write(self._damaged(direction, data))
                    await writer.drain()
            due, data = await pieces.get()
        if not writer.is_closing():
            writer.write_eof()

    def _damaged(self, direction: Direction, data: bytes) -> bytes:
        offset = self._flip_in[direction]
        if offset is None:
            return data
        if offset >= len(data):
            self._flip_in[direction] = offset - len(data)
            return data
        self._flip_in[direction] = None
        return data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :]


class FaultProxy:
    """Stands for the broker at `upstream`; use its `url` in place of the broker's."""

    def __init__(self, upstream: str) -> None:
        self.url = free_url()
        host, _, base = upstream.removeprefix("tcp://").rpartition(":")
        self._lanes = {name: Lane((host, int(base) + index)) for index, name in enumerate(LANES)}

    def __getitem__(self, lane: str) -> Lane:
        return self._lanes[lane]

    async def start(self, stack: AsyncExitStack) -> None:
        """Listen; `stack` closes what is opened."""
        base = int(self.url.rpartition(":")[2])
        assert len(self._lanes) == NUM_PORTS
        for index, lane in enumerate(self._lanes.values()):
            server = await asyncio.start_server(lane.serve, "127.0.0.1", base + index)
            stack.push_async_callback(lane.close)
            stack.callback(server.close)

    def blackhole(self, *directions: Direction) -> None:
        """On every lane."""
        for lane in self._lanes.values():
            lane.blackhole(*directions)

    def heal(self) -> None:
        for lane in self._lanes.values():
            lane.heal()


@asynccontextmanager
async def fault_proxy(upstream: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the broker at `upstream`, with no fault yet."""
    proxy = FaultProxy(upstream)
    async with AsyncExitStack() as stack:
        await proxy.start(stack)
        yield proxy
