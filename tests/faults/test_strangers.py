"""Whoever connects to a port and does not speak our protocol, or connects more often than the process may have
descriptors: turned away, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import pytest

from bus.endpoints import NUM_PORTS
from kvcache import AsyncClient
from tests.harness.cluster import Cluster, Node
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

EACH = 3
CLOSED_S = 15.0
SPARE = 8
CROWD = 40


def greeting(mechanism: bytes = b"NULL") -> bytes:
    """The first 64 bytes of a peer (ZMTP 3.1, section "Greeting")."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def ready(socket_type: bytes) -> bytes:
    """A peer says of which kind it is (ZMTP 3.1, section "The NULL security mechanism")."""
    body = b"\x05READY\x0bSocket-Type" + len(socket_type).to_bytes(4, "big") + socket_type
    return b"\x04" + bytes([len(body)]) + body


STRANGERS: dict[str, bytes] = {
    "silence": b"",
    "half a greeting": greeting()[:11],
    "a greeting and no more": greeting(),
    "a peer that wants keys": greeting(b"CURVE"),
    "a peer of the wrong kind": greeting() + ready(b"PULL"),
    "a peer of no kind": greeting() + ready(b"x" * 40),
    "a command that is none": greeting() + b"\x04\x05\xffHELL",
    "a frame of 2^63 bytes": greeting() + b"\x06" + b"\x7f" + b"\xff" * 7,
    "noise": b"\xff" + bytes(range(1, 200)),
}
"""None of which is a peer. Who writes anything but 0xff first counts as a peer of ZMTP 1, which has no handshake."""


async def test_strangers_on_every_port_are_hung_up_on_and_nobody_else_notices(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    prompt = token_prompt(80, 40)
    running = asyncio.create_task(greedy(client, prompt, 400))
    before = (await client.stats()).broker
    open_before = num_open(cluster.broker)
    base = int(cluster.url.rpartition(":")[2])
    ports = [*range(base, base + NUM_PORTS), await peer_port(client, "worker-1")]
    async with asyncio.timeout(CLOSED_S), asyncio.TaskGroup() as group:
        for port in ports:
            for said in [*STRANGERS.values()] * EACH:
                group.create_task(is_hung_up_on(port, said))
            group.create_task(is_hung_up_on(port, greeting(), pause_s=0.05))
    tokens, done = await running
    assert (tokens, done.timings.resumes) == (reference.greedy(prompt, 400), 0)
    await until(lambda: num_open(cluster.broker) <= open_before, "the broker has closed its side")
    now = (await client.stats()).broker
    assert (now.clients, now.workers_lost, now.malformed) == (before.clients, before.workers_lost, before.malformed)
    assert now.rss_bytes - before.rss_bytes < 16 << 20


async def test_without_a_free_descriptor_those_who_are_known_are_served_and_others_once_there_is_one(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    worker, base = cluster.workers["worker-1"], int(cluster.url.rpartition(":")[2])
    async with AsyncExitStack() as stack:
        for node, port in ((cluster.broker, base), (worker, await peer_port(client, "worker-1"))):
            most = num_open(node) + SPARE
            stack.enter_context(at_most(node, most))
            for _ in range(CROWD):
                await stack.enter_async_context(visitor(port))
            await until(lambda node=node, most=most: num_open(node) >= most, f"{node.name} has none left")  # type: ignore[misc]
        begun = await uptimes(client)

        async def have_gone_on() -> bool:
            """For longer than it takes them to look at their own memory, which takes a descriptor."""
            return all(now - then > 1.5 for now, then in zip(await uptimes(client), begun, strict=True))

        await until(have_gone_on, "both go on")
        tokens, _ = await greedy(client, token_prompt(81, 40), 20)
        assert tokens == reference.greedy(token_prompt(81, 40), 20)
    assert cluster.broker.is_running
    assert worker.is_running
    async with AsyncClient(cluster.url, timeout=30.0) as newcomer:
        assert await newcomer.health()


async def is_hung_up_on(port: int, said: bytes, pause_s: float = 0.0) -> None:
    """Say this, all at once or a byte at a time, and come back when the other side has closed the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionError):
        for piece in [said] if not pause_s else [said[index : index + 1] for index in range(len(said))]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        while await reader.read(4096):
            pass
    writer.close()


@asynccontextmanager
async def visitor(port: int) -> AsyncIterator[None]:
    """A connection that stays: to a peer of ZMTP 1 nobody says goodbye."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    try:
        yield
    finally:
        writer.close()


@contextmanager
def at_most(node: Node, most: int) -> Iterator[None]:
    """A process that may have so many descriptors, for as long as the block lasts."""
    before = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, before)


def num_open(node: Node) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{node.pid}/fd"))


async def peer_port(client: AsyncClient, worker_id: str) -> int:
    """Where a worker listens for other workers."""
    (view,) = [view for view in await client.workers() if view.worker_id == worker_id]
    return int(view.peer_url.rpartition(":")[2])


async def uptimes(client: AsyncClient) -> list[float]:
    """Of the broker and of worker-1, in seconds."""
    figures = await client.stats()
    (worker,) = [view.stats for view in figures.workers if view.worker_id == "worker-1"]
    return [figures.broker.uptime_s, worker.uptime_s if worker is not None else 0.0]
