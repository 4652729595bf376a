"""Records what arrives, for `kvcache simulate`: times, lengths and digests of prefixes, never what anybody wrote.

It sees the frames that pass a broker's control lane and decodes generations and their ends again, so it costs
nothing to who does not ask for it. A generation is recorded when it ends well, because only then its lengths are
known; one that goes on elsewhere after a fault is recorded as the two requests that it was. Digests are hashed once
more with a secret that is never stored, so a record cannot be searched for a known prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from bus import wire
from bus.errors import ProtocolError
from bus.messages import Generate, StreamEnd
from bus.wire import Buffer
from kvcache.hashing import ROUTING_DEPTHS, ROUTING_NODE_BYTES, ROUTING_TEXT_BLOCK_BYTES

MAX_OPEN = 100_000
"""Generations that are remembered until they end; beyond it those that began first are not recorded."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One line. timestamp: ms. hash_ids: the prompt's nodes, as hex; ends: how many of its tokens each covers."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[str]
    ends: list[int]


@dataclass(frozen=True, slots=True)
class _Begun:
    at: float
    chain: Sequence[bytes]
    prompt_bytes: int


class Recorder:
    """`secret`: random bytes, new for every record. `started_at`: on the clock of every `now`."""

    def __init__(self, secret: bytes, started_at: float) -> None:
        self._secret = secret
        self._started_at = started_at
        self._begun: OrderedDict[tuple[bytes, bytes], _Begun] = OrderedDict()

    def asked(self, link: bytes, frames: Sequence[Buffer], now: float) -> None:
        """A client sent this."""
        message = _read(frames)
        if isinstance(message, Generate) and len(frames) > 1:
            self._begun[link, message.req_id] = _Begun(now, message.chain, len(frames[1]))
            while len(self._begun) > MAX_OPEN:
                self._begun.popitem(last=False)

    def answered(self, link: bytes, frames: Sequence[Buffer]) -> bytes | None:
        """A client is sent this: the line to record, if it ends a generation well."""
        message = _read(frames)
        if not isinstance(message, StreamEnd):
            return None
        begun = self._begun.pop((link, message.req_id), None)
        if begun is None or not message.prompt_tokens:
            return None
        line = Recorded(
            timestamp=round(1000 * (begun.at - self._started_at), 3),
            input_length=message.prompt_tokens,
            output_length=message.num_tokens,
            hash_ids=[self._masked(node) for node in begun.chain],
            ends=node_ends(len(begun.chain), begun.prompt_bytes, message.prompt_tokens),
        )
        return msgspec.json.encode(line) + b"\n"

    def _masked(self, node: bytes) -> str:
        return blake2b(node, digest_size=ROUTING_NODE_BYTES, key=self._secret).hexdigest()


def node_ends(num_nodes: int, prompt_bytes: int, num_tokens: int) -> list[int]:
    """How many tokens each node of a routing chain covers, by its share of the prompt's bytes; the last one all.

    A node of text and one of tokens cover equally many bytes, so this is exact for tokens.
    """
    depths = ROUTING_DEPTHS[:num_nodes]
    shares = (min(1.0, depth * ROUTING_TEXT_BLOCK_BYTES / max(1, prompt_bytes)) for depth in depths)
    return [max(1, round(share * num_tokens)) for share in shares]


def _read(frames: Sequence[Buffer]) -> object:
    try:
        return wire.decode_envelope(frames)
    except ProtocolError:
        return None  # the core says what is wrong with it
