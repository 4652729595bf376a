"""The KV plane, for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from bus.errors import BadArgument, WorkerLost
from bus.messages import QueryKind
from bus.stats import ClusterStats, SequenceInfo, SequencePage
from kvcache.client import requests
from kvcache.client.arrays import KVPair
from kvcache.client.link import Link, new_id
from kvcache.client.prompts import check_index, check_name
from kvcache.client.results import KvAck

if TYPE_CHECKING:
    from kvcache.client.arrays import Array

Sequences: TypeAlias = list[SequenceInfo]

PAGE = 1000


class AsyncKV:
    """The KV plane: tensors by sequence and layer, `[length, num_kv_heads, head_dim]`, bit for bit.

    Every method takes `deadline`, in seconds, in place of the client's timeout.
    """

    def __init__(self, link: Link) -> None:
        self.link = link

    async def put(
        self, seq_id: str, layer: int, k: Array, v: Array, *, rf: int = 1, deadline: float | None = None
    ) -> KvAck:
        """Store K and V of a layer, in place of what was there. k, v: numpy or torch, of one dtype.

        With rf=2, two workers have it before it is acknowledged (as `mem2`); the first write of a sequence says so.
        Raises BadTensor, NoSpace, Conflict (the sequence is a generation's, or was written with rf=1) or NoWorkers
        (there are not `rf`) besides what any request may.
        """
        call = requests.put(new_id(), self.link.deadline(deadline), seq_id, layer, k, v, rf)
        return await self.link.ask(call, KvAck)

    async def append(
        self,
        seq_id: str,
        layer: int,
        k: Array,
        v: Array,
        *,
        at: int | None = None,
        rf: int = 1,
        deadline: float | None = None,
    ) -> KvAck:
        """Add tokens to the end of a layer; with `at`, only if that is its length. rf: as in `put`.

        Raises Conflict, whose `current_len` is the length, if it is another one.
        """
        call = requests.append(new_id(), self.link.deadline(deadline), seq_id, layer, k, v, at, rf)
        return await self.link.ask(call, KvAck)

    async def get(
        self, seq_id: str, layer: int, start: int = 0, stop: int | None = None, *, deadline: float | None = None
    ) -> KVPair:
        """K and V of the tokens `start .. stop`, or to the end. Raises NotFound."""
        call = requests.get(new_id(), self.link.deadline(deadline), new_id, seq_id, layer, start, stop)
        return await self.link.ask(call, KVPair)

    async def length(self, seq_id: str, layer: int, *, deadline: float | None = None) -> int:
        """How many tokens a layer holds. Raises NotFound."""
        call = requests.length(new_id(), self.link.deadline(deadline), seq_id, layer)
        return await self.link.ask(call, int)

    async def delete(self, seq_id: str, layer: int | None = None, *, deadline: float | None = None) -> int:
        """Forget a sequence, or one layer of it; returns how many layers there were."""
        call = requests.delete(new_id(), self.link.deadline(deadline), seq_id, layer)
        return await self.link.ask(call, int)

    async def pin(self, seq_id: str, ttl: float | None = None, *, deadline: float | None = None) -> None:
        """Keep a sequence from eviction, for `ttl` seconds or until it is unpinned. Raises NotFound."""
        await self.link.ask(requests.pin(new_id(), self.link.deadline(deadline), seq_id, ttl), int)

    async def unpin(self, seq_id: str, *, deadline: float | None = None) -> None:
        """Let a sequence be evicted again. Raises NotFound."""
        await self.link.ask(requests.unpin(new_id(), self.link.deadline(deadline), seq_id), int)

    async def list(self, prefix: str = "", limit: int | None = None, *, deadline: float | None = None) -> Sequences:
        """All sequences whose id begins with `prefix`, by id, at most `limit`: of each its newest copy anywhere."""
        if prefix:
            check_name("prefix", prefix)
        if limit is not None:
            check_index("limit", limit, 2**31, least=1)
        until = self.link.deadline(deadline)
        query = requests.query(new_id(), until, QueryKind.WORKERS)
        figures = await self.link.ask(query, ClusterStats)
        newest: dict[str, SequenceInfo] = {}
        for worker in figures.workers:
            for info in await self._of_worker(worker.worker_id, prefix, limit, until):
                if info.seq_id not in newest or info.version > newest[info.seq_id].version:
                    newest[info.seq_id] = info
        return [newest[seq_id] for seq_id in sorted(newest)[:limit]]

    async def _of_worker(self, worker_id: str, prefix: str, limit: int | None, until: float) -> Sequences:
        """One worker's sequences, page by page. One that is lost meanwhile has none any more."""
        found: list[SequenceInfo] = []
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            after = found[-1].seq_id if found else ""
            call = requests.page(new_id(), until, worker_id=worker_id, prefix=prefix, after=after, limit=size)
            try:
                page = await self.link.ask(call, SequencePage)
            except (WorkerLost, BadArgument):
                return []
            found += page.sequences
            if not page.more or not page.sequences:
                break
        return found
