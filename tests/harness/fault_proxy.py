"""A TCP proxy in front of a broker's six ports that does to connections what networks do.

It runs in the test's own loop. Faults apply to every connection of a lane, those there are and those to come, until
they are taken back; bytes that are held up are delivered afterwards, as after a partition that TCP survives.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Literal

from bus.endpoints import NUM_PORTS
from kvcache.local import free_url

Direction = Literal["up", "down"]  # towards the broker, and away from it
LANES = ("control", "bulk", "streams", "worker_control", "worker_bulk", "tokens")
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
READ_BYTES = 65_536
RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time: close with RST


class Lane:
    """One port. Counts what it forwards; `delay_s` holds up every piece that passes."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.delay_s = 0.0
        self.num_bytes: dict[Direction, int] = dict.fromkeys(DIRECTIONS, 0)
        self.num_accepted = 0
        self._upstream = upstream
        self._open = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._flip_in: dict[Direction, int | None] = dict.fromkeys(DIRECTIONS, None)
        self._lines: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.heal()

    @property
    def num_lines(self) -> int:
        """How many connections there are now."""
        return len(self._lines)

    def blackhole(self, *directions: Direction) -> None:
        """Let nothing through (none named: both ways), with every connection left open."""
        for direction in directions or DIRECTIONS:
            self._open[direction].clear()

    def heal(self) -> None:
        """Let all through again."""
        self.delay_s = 0.0
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
            for writer in line:
                raw: socket.socket = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until an end closes it."""
        self.num_accepted += 1
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            writer.transport.abort()
            return
        line = (writer, up_writer)
        self._lines.add(line)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump("up", reader, up_writer))
                group.create_task(self._pump("down", up_reader, writer))
        finally:
            self._lines.discard(line)
            for each in line:
                each.transport.abort()

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await asyncio.sleep(self.delay_s)
                await self._open[direction].wait()
                self.num_bytes[direction] += len(data)
                writer.write(self._damaged(direction, data))
                await writer.drain()
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
            stack.callback(lane.reset)
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
