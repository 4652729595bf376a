"""How much one message, one request or one stream may hold: what both ends must agree on, in one place.

A broker announces them in its `Welcome`; the bounds of single fields are types in `bus.messages`.
"""

from __future__ import annotations

CHUNK_BYTES = 1 << 20
"""Payload of one `Chunk` on the bulk lane, at most."""

MAX_INLINE_BYTES = 64 * 1024
"""K and V together up to this go within their message on the control lane: what is queued there for one peer (1,280
messages at most) stays below 100 MiB, and a beat behind ten of them is 5 ms late at 1 Gbit/s. Above it they go within
their message on the bulk lane, if they are no more than a chunk; above that they follow it there in chunks."""

UPLOAD_WINDOW = 8
"""Chunks of one write that may be under way: so many follow their request at once, the others as credit comes."""

MAX_PROMPT_BYTES = 1 << 20
"""A prompt as it travels, in any of its forms."""

MAX_SPELLED_TOKENS = MAX_PROMPT_BYTES // 4
"""Token ids in one question about tokens and text, or in its answer."""

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
"""What a message of a chat may have; the first two it has."""

MAX_PRIORITY = 100
"""A request's class is from minus this, which goes first, to this."""

WINDOW_TOKENS = 1024
"""Tokens of one stream that may be unacknowledged before its sequence pauses."""

MAX_CHAIN_NODES = 256
"""Nodes of a prompt's digest chain that travel with it; see `kvcache.hashing.routing_chain`."""

MAX_CHANGED_NODES = 4096
"""Nodes in one report of what a worker holds."""

MAX_RECEIPTS = 1000
"""Changes to a sequence that a copy of it remembers, so that none takes effect twice."""

MAX_COPIES = 2
"""Workers that a stored sequence may be written to at once."""
