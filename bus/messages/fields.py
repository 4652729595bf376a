"""What every message is made of: the root, payload parts, and the types of single fields with their bounds.

Bounds that protect the process stand here; those that a user can get wrong (a temperature, a length) are checked
where they are used, so that the answer can name the parameter.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from bus.limits import MAX_CHAIN_NODES, MAX_COPIES

MAX_PAYLOADS = 8

U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
I63 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
MAX_MILLIS = 7 * 24 * 3600 * 1000
Millis = Annotated[int, msgspec.Meta(ge=0, le=MAX_MILLIS)]
Id16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
ChainNode = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Chain = Annotated[tuple[ChainNode, ...], msgspec.Meta(max_length=MAX_CHAIN_NODES)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
SeqId = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Piece = Annotated[str, msgspec.Meta(max_length=4096)]
Label = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[ -~]*\Z")]
TraceParent = Annotated[str, msgspec.Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?\Z")]
Copies = Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)]
PayloadBytes = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One payload frame: its exact length and its crc32c."""

    nbytes: PayloadBytes
    crc: U32


Parts = Annotated[tuple[Part, ...], msgspec.Meta(max_length=MAX_PAYLOADS)]


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The root. `opcode` picks the type before anything is parsed; `payloads` is how many frames may follow."""

    opcode: ClassVar[int] = 0
    payloads: ClassVar[tuple[int, int]] = (0, 0)
