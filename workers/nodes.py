"""Chain nodes and the blocks they lead to: what a broker may know of a pool without seeing a token.

A client names its prompt by a chain of nodes (`kvcache.hashing.routing_chain`), made without a tokenizer. The
worker, which has the tokens too, finds for each node the block that holds the last token it covers: exactly for
token ids, in proportion to bytes for text. `BlockNodes` remembers the nodes of findable blocks, and says what
comes and goes. Nodes are what clients claim: they choose a worker, and never KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from bus.messages import PromptKind
from kvcache.hashing import ROUTING_BLOCK_TOKENS, ROUTING_DEPTHS, ROUTING_TEXT_BLOCK_BYTES
from workers.batch import BlockId

MAX_NODES_PER_BLOCK = 64
"""A block of 1,024 tokens has 32 nodes of one kind of chain; more than twice that is somebody's mischief."""

Landmark: TypeAlias = tuple[int, bytes]
"""The number of a block in its sequence, and a node that ends in it."""


class NodeChange(NamedTuple):
    """A block with this node became findable, or (not `is_stored`) no longer is."""

    tenant: str
    node: bytes
    is_stored: bool


def landmarks(
    chain: Sequence[bytes], kind: PromptKind, num_bytes: int, num_tokens: int, block_size: int
) -> tuple[Landmark, ...]:
    """Where in a prompt of `num_tokens` tokens the nodes of its chain end, in order.

    num_bytes: of a text prompt as it travelled. Of messages the chain covers another text than what travelled, so
    its length is taken from the chain itself, which is right to within a node.
    """
    if not chain or num_tokens == 0:
        return ()
    depths = ROUTING_DEPTHS[: len(chain)]
    if kind is PromptKind.TOKENS:
        ends = [min(depth * ROUTING_BLOCK_TOKENS, num_tokens) for depth in depths]
    else:
        total = num_bytes if kind is PromptKind.TEXT else depths[-1] * ROUTING_TEXT_BLOCK_BYTES
        covered = (min(depth * ROUTING_TEXT_BLOCK_BYTES, total) for depth in depths)
        ends = [max(1, -(-at * num_tokens // max(1, total))) for at in covered]
    return tuple(((end - 1) // block_size, node) for end, node in zip(ends, chain, strict=False))


class BlockNodes:
    """The nodes of one pool's findable blocks."""

    def __init__(self) -> None:
        self._of_block: dict[BlockId, dict[bytes, str]] = {}
        self._changes: list[NodeChange] = []

    def attach(self, block: BlockId, tenant: str, node: bytes) -> None:
        """This findable block holds the end of `node`. Of too many nodes the oldest goes."""
        nodes = self._of_block.setdefault(block, {})
        if node in nodes:
            return
        if len(nodes) >= MAX_NODES_PER_BLOCK:
            oldest = next(iter(nodes))
            self._changes.append(NodeChange(nodes.pop(oldest), oldest, False))
        nodes[node] = tenant
        self._changes.append(NodeChange(tenant, node, True))

    def detach(self, block: BlockId) -> None:
        """The block cannot be found any more."""
        nodes = self._of_block.pop(block, {})
        self._changes += [NodeChange(tenant, node, False) for node, tenant in nodes.items()]

    def take_changes(self) -> tuple[NodeChange, ...]:
        """What has changed since the last call, in order."""
        changes, self._changes = tuple(self._changes), []
        return changes
