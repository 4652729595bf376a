"""Names for prefixes: the digest chain of blocks that KV is shared by, and the chain that routing keys on.

Digests must agree between processes, machines and versions, so everything is fixed here: blake2b-256,
token ids as little-endian u32, text as utf-8, every field of variable length preceded by its length.
The test vectors in tests/unit/kvcache/test_hashing.py are the published ones; if they change, so must
`FORMAT_VERSION`. Nothing here knows what a digest is used for.
"""

from __future__ import annotations

import operator
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NewType, SupportsIndex, TypeAlias

from bus.errors import BadArgument
from bus.limits import MAX_CHAIN_NODES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    TokenIds: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]

BlockHash = NewType("BlockHash", bytes)

FORMAT_VERSION = 1
DIGEST_BYTES = 32
TOKEN_BYTES = 4
MAX_FIELD_BYTES = 256

ROUTING_NODE_BYTES = 8
ROUTING_BLOCK_TOKENS = 32
ROUTING_TEXT_BLOCK_BYTES = 128
ROUTING_FINE_NODES = 64
ROUTING_DEPTHS = tuple(accumulate(1 << index // ROUTING_FINE_NODES for index in range(MAX_CHAIN_NODES)))
"""How many blocks of a prompt end with its node 0, 1, ..: every one of the first 64, then every 2nd, 4th, 8th."""

# blake2b's `person` keeps the domains apart; it is at most 16 bytes.
_SEED_DOMAIN = b"kvcache/seed"
_BLOCK_DOMAIN = b"kvcache/block"
_ROUTE_SEED_DOMAIN = b"kvcache/routes"
_ROUTE_DOMAIN = b"kvcache/route"
_SESSION_DOMAIN = b"kvcache/session"

_SESSION_NODES = 2
"""The least depth that a request is keyed at (`kvcache.routing.keys`), so that the key is the session."""


@dataclass(frozen=True, kw_only=True)
class HashSeed:
    """All that must be equal, besides the tokens, for two blocks to hold the same KV and be shareable.

    model: fingerprint of config and weights. layout_version: of K and V inside a block, rope included.
    tenant, cache_salt: who may share with whom; empty means everyone who also leaves it empty.
    Text fields are printable and at most 256 bytes of utf-8. Raises BadArgument otherwise.
    """

    model: str
    revision: str = ""
    dtype: str
    layout_version: int = 1
    block_size: int = 32
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "revision", "dtype", "tenant", "cache_salt", "adapter"):
            _check_field(name, getattr(self, name))
        for name in ("layout_version", "block_size"):
            number = getattr(self, name)
            if type(number) is not int or not 0 < number < 2**32:
                raise BadArgument(f"{name} must be an integer from 1 to {2**32 - 1}, not {number!r}")

    @cached_property
    def root(self) -> BlockHash:
        """The parent of every first block, and the key of every digest in the chain."""
        numbers = struct.pack("<III", FORMAT_VERSION, self.layout_version, self.block_size)
        texts = (self.model, self.revision, self.dtype, self.tenant, self.cache_salt, self.adapter)
        return BlockHash(_seed_digest(numbers, texts, _SEED_DOMAIN))


def encode_token_ids(token_ids: TokenIds) -> bytes:
    """Token ids as little-endian u32, four bytes each.

    token_ids: one-dimensional, each an integer in 0 .. 2**32 - 1; a sequence or a numpy array.
    Raises BadArgument for anything else.
    """
    values = token_ids if isinstance(token_ids, list | tuple) else _as_list(token_ids)
    try:
        return struct.pack(f"<{len(values)}I", *values)
    except struct.error:
        position, value = next(item for item in enumerate(values) if not _is_token_id(item[1]))
        expected = f"expected an integer from 0 to {2**32 - 1}"
        raise BadArgument(f"token id {value!r} at position {position}: {expected}") from None


def extend(seed: HashSeed, parent: BlockHash, token_ids: TokenIds) -> BlockHash:
    """Digest of one full block of `seed.block_size` tokens after `parent` (`seed.root` for the first block).

    Raises BadArgument if the block is not full or a token id is out of range.
    """
    if len(token_ids) != seed.block_size:
        raise BadArgument(f"a block has {seed.block_size} tokens, not {len(token_ids)}")
    return BlockHash(_link(seed.root, parent, encode_token_ids(token_ids), _BLOCK_DOMAIN))


def block_digests(seed: HashSeed, token_ids: TokenIds) -> tuple[BlockHash, ...]:
    """Digests of all full blocks of `token_ids`, first to last; a partial last block has none.

    Each is blake2b-256 keyed by `seed.root` over its parent's digest and its own tokens, so a digest names
    the block and everything before it (the hash chain of prefix caching in vLLM, keyed and untruncated).
    Raises BadArgument if a token id is out of range.
    """
    return tuple(BlockHash(node) for node in _full_chain(seed, encode_token_ids(token_ids)))


def routing_chain(prompt: str | TokenIds, *, model: str = "", cache_salt: str = "") -> tuple[bytes, ...]:
    """The chain of 8-byte nodes by which the broker places a prompt; made without a tokenizer.

    prompt: utf-8 text, cut into blocks of 128 bytes, or token ids, cut into blocks of 32.
    A node stands where ROUTING_DEPTHS says: 256 of them reach 960 blocks, which is 30,720 tokens. In a prompt
    that ends before, the last node covers all of it, so that a short one has a key too; all other nodes are
    shared by every prompt that goes on in the same way.
    These nodes choose a worker and never KV: two prompts with equal nodes only meet on one worker.
    Raises BadArgument for a token id out of range, text that is not valid Unicode or a bad salt.
    """
    _check_field("model", model)
    _check_field("cache_salt", cache_salt)
    if isinstance(prompt, str):
        kind, block_bytes, data = "text", ROUTING_TEXT_BLOCK_BYTES, _encode_head(prompt)
    else:
        kind, block_bytes = "tokens", ROUTING_BLOCK_TOKENS * TOKEN_BYTES
        data = encode_token_ids(prompt[: ROUTING_BLOCK_TOKENS * ROUTING_DEPTHS[-1]])
    root = _seed_digest(struct.pack("<I", FORMAT_VERSION), (kind, model, cache_salt), _ROUTE_SEED_DOMAIN)
    return tuple(node[:ROUTING_NODE_BYTES] for node in _chain(root, _cut(data, block_bytes), _ROUTE_DOMAIN))


def session_chain(chain: Sequence[bytes], session: str) -> tuple[bytes, ...]:
    """A routing chain that begins with a session: what it asks for meets where it was asked before, whatever it says.

    The other nodes are made the session's own, since a node stands for all before it; other sessions' prefixes
    no longer count. Raises BadArgument for a bad name.
    """
    _check_field("session", session)
    root = _seed_digest(struct.pack("<I", FORMAT_VERSION), (session,), _SESSION_DOMAIN)
    heads = [bytes([depth]) for depth in range(_SESSION_NODES)]
    nodes = (blake2b(node, digest_size=DIGEST_BYTES, key=root, person=_SESSION_DOMAIN) for node in (*heads, *chain))
    return tuple(node.digest()[:ROUTING_NODE_BYTES] for node in nodes)[:MAX_CHAIN_NODES]


def canonical_chat(messages: Iterable[tuple[str, str]]) -> str:
    """Chat messages, as (role, content), in one text for `routing_chain`: the next turn only adds to its end."""
    return "".join(f"{role}\x00{content}\x01" for role, content in messages)


def _full_chain(seed: HashSeed, data: bytes) -> Iterator[bytes]:
    block_bytes = seed.block_size * TOKEN_BYTES
    ends = range(block_bytes, len(data) + 1, block_bytes)
    return _chain(seed.root, (data[end - block_bytes : end] for end in ends), _BLOCK_DOMAIN)


def _cut(data: bytes, block_bytes: int) -> list[bytes]:
    """The bytes from node to node, the last ones perhaps fewer; an empty prompt is one empty block."""
    ends = [depth * block_bytes for depth in ROUTING_DEPTHS]
    num = bisect_left(ends, len(data)) + 1
    return [data[start:end] for start, end in pairwise([0, *ends[:num]])]


def _chain(root: bytes, blocks: Iterable[bytes], domain: bytes) -> Iterator[bytes]:
    parent = root
    for block in blocks:
        parent = _link(root, parent, block, domain)
        yield parent


def _link(root: bytes, parent: bytes, block: bytes, domain: bytes) -> bytes:
    """The parent has a fixed length, so it needs no prefix before the tokens, which end the input."""
    return blake2b(parent + block, digest_size=DIGEST_BYTES, key=root, person=domain).digest()


def _seed_digest(numbers: bytes, texts: Iterable[str], domain: bytes) -> bytes:
    digest = blake2b(numbers, digest_size=DIGEST_BYTES, person=domain)
    for text in texts:
        field = text.encode()
        digest.update(struct.pack("<I", len(field)) + field)
    return digest.digest()


def _encode_head(text: str) -> bytes:
    """As much of the text as nodes can cover (a character is at least one byte), whatever its length."""
    try:
        return text[: ROUTING_TEXT_BLOCK_BYTES * ROUTING_DEPTHS[-1]].encode()
    except UnicodeEncodeError as error:
        raise BadArgument(f"the prompt is not valid Unicode text: {error.reason} at {error.start}") from None


def _check_field(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise BadArgument(f"{name} must be text, not {type(value).__name__}")
    # Lone surrogates are not printable, so what passes can be encoded.
    if not value.isprintable():
        raise BadArgument(f"{name} has control or other unprintable characters: {value[:32]!r}")
    if len(value.encode()) > MAX_FIELD_BYTES:
        raise BadArgument(f"{name} is {len(value.encode())} bytes, at most {MAX_FIELD_BYTES} are allowed")


def _as_list(token_ids: TokenIds) -> list[int]:
    """A plain list, whose items struct checks: `tolist` is far quicker than numpy's scalars one by one."""
    to_list = getattr(token_ids, "tolist", None)
    return to_list() if callable(to_list) else list(token_ids)


def _is_token_id(value: SupportsIndex) -> bool:
    try:
        return 0 <= operator.index(value) < 2**32
    except TypeError:
        return False
