"""Which workers hold which chain nodes, as the broker believes: soft state that may be wrong and never has to be right.

A node is 8 bytes of a prompt's digest chain (`kvcache.hashing.routing_chain`). For each node there is one integer
whose bits are the holders that have it, so that walking down a chain for all workers at once is one AND per node
(bit-parallel, as in Myers 1999). A holder is what one worker was heard to hold; a worker may have a second, hidden
one that is being filled, until it is shown in the place of the first.

    open -> hidden --show--> visible --close--> retired --sweep--> its bit is free again

What is closed is invisible at once; its bits are swept out of the table a little at a time, because a table of a
million nodes takes longer to walk than a broker may be deaf. The table is split by the node's last byte, so that no
growth of one dict moves all of it. A tenant's nodes are whitened with a secret: to know another's prompt and its
chain is not enough to ask who holds it.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

NODE_BYTES = 8
NUM_SHARDS = 256
MAX_ENTRIES = 8_000_000
"""Of all holders together; about 130 bytes for a node that one worker holds, so a gigabyte at most. Of 100 workers each
may have 80,000 nodes, which is 5 to 8 million tokens in prompts of 12,000 to 22,000; of 1,000 a tenth of that."""
SWEEP_NODES = 20_000
MAX_SHARED_MASKS = 4096

Keys: TypeAlias = tuple[int, ...]
"""Nodes as the table knows them, in the order of their chain."""


@dataclass(slots=True, eq=False)
class Holder:
    """What one worker was heard to hold. `is_cut`: that was more than its share of the table, and some is left out."""

    worker_id: str
    bit: int
    num_nodes: int = 0
    is_cut: bool = False


class NodeIndex:
    """max_entries: bound on (node, worker) pairs; each worker may have an equal part of it."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES, secret: bytes | None = None) -> None:
        self._max_entries = max_entries
        self._secret = secrets.token_bytes(16) if secret is None else secret
        self._shards: list[dict[int, int]] = [{} for _ in range(NUM_SHARDS)]
        self._masks: dict[int, int] = {}
        self._visible: dict[str, Holder] = {}
        self._worker_of: dict[int, str] = {}
        self._visible_mask = 0
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._retired: dict[int, int] = {}  # bit to the number of shards it may still be in
        self._hand = 0

    @property
    def num_nodes(self) -> int:
        """Different nodes in the table, those not yet swept included."""
        return sum(map(len, self._shards))

    @property
    def share(self) -> int:
        """How many nodes one worker may have."""
        return self._max_entries // max(1, len(self._visible))

    # --- asking ---

    def keys(self, nodes: bytes, tenant: str = "") -> Keys:
        """Nodes, 8 bytes each and one after another, as keys of this table for this tenant."""
        count = len(nodes) // NODE_BYTES
        pad = blake2b(tenant.encode(), digest_size=NODE_BYTES, key=self._secret, person=b"kvcache/tenant").digest()
        white = int.from_bytes(nodes, "little") ^ int.from_bytes(pad * count, "little")
        return struct.unpack(f"<{count}Q", white.to_bytes(count * NODE_BYTES, "little"))

    def lookup(self, chain: Sequence[bytes], tenant: str = "") -> dict[str, int]:
        """How many nodes of `chain`, from the first on, each worker holds; those that hold none are left out."""
        return self.held(self.keys(b"".join(chain), tenant))

    def held(self, keys: Keys) -> dict[str, int]:
        """As `lookup`, for keys that were made before."""
        shards, current = self._shards, self._visible_mask
        found: dict[str, int] = {}
        before, depth = -1, 0
        for key in keys:
            mask = shards[key & 255].get(key, 0)
            if mask is not before:  # equal masks are mostly one object
                before = mask
                mask &= current
                if mask != current:
                    if depth:
                        self._note(found, current ^ mask, depth)
                    if not mask:
                        return found
                    current = mask
            depth += 1
        if depth:
            self._note(found, current, depth)
        return found

    # --- holders ---

    def open(self, worker_id: str) -> Holder:
        """A new, hidden holder."""
        if not self._free_bits:
            self._free_bits.append(1 << self._num_bits)
            self._num_bits += 1
        return Holder(worker_id, self._free_bits.pop())

    def show(self, holder: Holder) -> None:
        """From now on this is what its worker holds; what was shown before is closed."""
        before = self._visible.get(holder.worker_id)
        if before is holder:
            return
        if before is not None:
            self.close(before)
        self._visible[holder.worker_id] = holder
        self._worker_of[holder.bit] = holder.worker_id
        self._visible_mask |= holder.bit

    def close(self, holder: Holder) -> None:
        """Forget all of it; it must not be used again."""
        if self._visible.get(holder.worker_id) is holder:
            del self._visible[holder.worker_id], self._worker_of[holder.bit]
            self._visible_mask ^= holder.bit
        self._retired[holder.bit] = NUM_SHARDS

    def store(self, holder: Holder, keys: Iterable[int]) -> None:
        """The worker holds these too, as far as its share goes."""
        shards, bit, num_nodes, share = self._shards, holder.bit, holder.num_nodes, self.share
        for key in keys:
            shard = shards[key & 255]
            mask = shard.get(key, 0)
            if mask & bit:
                continue
            if num_nodes >= share:
                holder.is_cut = True
                break
            shard[key] = self._shared(mask | bit) if mask else bit
            num_nodes += 1
        holder.num_nodes = num_nodes

    def remove(self, holder: Holder, keys: Iterable[int]) -> None:
        """The worker holds these no longer."""
        shards, bit = self._shards, holder.bit
        for key in keys:
            shard = shards[key & 255]
            mask = shard.get(key, 0)
            if not mask & bit:
                continue
            if mask == bit:
                del shard[key]
            else:
                shard[key] = self._shared(mask ^ bit)
            holder.num_nodes -= 1

    # --- the same, for who hears of changes without numbers ---

    def stored(self, worker_id: str, nodes: Sequence[bytes], tenant: str = "") -> None:
        """`worker_id`, known or not, holds these nodes too."""
        holder = self._visible.get(worker_id)
        if holder is None:
            holder = self.open(worker_id)
            self.show(holder)
        self.store(holder, self.keys(b"".join(nodes), tenant))

    def removed(self, worker_id: str, nodes: Sequence[bytes], tenant: str = "") -> None:
        """`worker_id` holds these no longer."""
        if worker_id in self._visible:
            self.remove(self._visible[worker_id], self.keys(b"".join(nodes), tenant))

    def clear(self, worker_id: str) -> None:
        """`worker_id` holds nothing."""
        if worker_id in self._visible:
            self.close(self._visible[worker_id])

    # --- housekeeping ---

    def sweep(self, budget: int = SWEEP_NODES) -> None:
        """Take the bits of closed holders out of the table, looking at about `budget` nodes; call it often."""
        while self._retired and budget > 0:
            stale = sum(self._retired)
            shard = self._shards[self._hand]
            budget -= 1 + len(shard)
            if any(mask & stale for mask in shard.values()):
                kept = ((key, self._shared(mask & ~stale) if mask & stale else mask) for key, mask in shard.items())
                self._shards[self._hand] = {key: mask for key, mask in kept if mask}
            self._hand = (self._hand + 1) % NUM_SHARDS
            for bit in list(self._retired):
                self._retired[bit] -= 1
                if not self._retired[bit]:
                    del self._retired[bit]
                    self._free_bits.append(bit)

    def check(self) -> None:
        """Assert that bits have one meaning each and that every holder's count is right."""
        counts: dict[int, int] = {}
        for shard in self._shards:
            for mask in shard.values():
                assert mask, "a node that nobody holds is in the table"
                for bit in _bits(mask):
                    counts[bit] = counts.get(bit, 0) + 1
        assert self._worker_of == {holder.bit: name for name, holder in self._visible.items()}
        assert self._visible_mask == sum(self._worker_of)
        assert not self._visible_mask & sum(self._retired), "a closed holder is visible"
        assert not set(self._free_bits) & (counts.keys() | self._worker_of.keys() | self._retired.keys())
        for holder in self._visible.values():
            assert holder.num_nodes == counts.get(holder.bit, 0), f"{holder.worker_id} has a wrong count"

    def _note(self, found: dict[str, int], bits: int, depth: int) -> None:
        worker_of = self._worker_of
        while bits:
            bit = bits & -bits
            found[worker_of[bit]] = depth
            bits ^= bit

    def _shared(self, mask: int) -> int:
        """An equal integer that others use too: along a chain the same workers hold many nodes."""
        if len(self._masks) >= MAX_SHARED_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)


def _bits(mask: int) -> Iterable[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
