"""Workers as other workers see them, and what they report of copies between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bus import sockets
from bus.errors import ErrorCode
from bus.stats import PeerStats, SequencePage
from kvcache import AsyncClient
from kvcache.client import requests
from kvcache.client.link import new_id
from tests.harness.raw import RawPeer


async def peer_stats(client: AsyncClient, worker_id: str) -> PeerStats:
    """Its figures, which come each second."""
    (view,) = [view for view in (await client.stats()).workers if view.worker_id == worker_id]
    return view.stats.peers if view.stats is not None else PeerStats()


async def failures_of(client: AsyncClient, worker_id: str, code: ErrorCode) -> int:
    """How many pulls of this worker have failed in this way."""
    return (await peer_stats(client, worker_id)).failures.get(code.name, 0)


@asynccontextmanager
async def raw_peer(client: AsyncClient, worker_id: str) -> AsyncIterator[RawPeer]:
    """Somebody who has found out a worker's endpoint."""
    (view,) = [view for view in await client.workers() if view.worker_id == worker_id]
    assert view.peer_url
    with sockets.Context() as context:
        peer = RawPeer(context, view.peer_url, view.peer_url)
        try:
            yield peer
        finally:
            peer.close()


async def has(client: AsyncClient, worker_id: str, name: str) -> bool:
    """Whether a worker itself says that it has a sequence."""
    link = client.kv.link
    call = requests.page(new_id(), link.deadline(None), worker_id=worker_id, prefix=name, after="", limit=1)
    return name in {info.seq_id for info in (await link.ask(call, SequencePage)).sequences}


async def stored(client: AsyncClient, worker_id: str) -> int | None:
    """How many sequences a worker has stored, by its last report."""
    views = {view.worker_id: view for view in (await client.stats()).workers}
    stats = views[worker_id].stats
    return None if stats is None else stats.store.sequences
