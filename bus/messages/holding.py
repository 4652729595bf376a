"""What a worker holds, told to the broker: chain nodes whose blocks can be reused, and named sequences."""

from __future__ import annotations

from typing import Annotated

import msgspec

from bus.limits import MAX_CHANGED_NODES
from bus.messages.fields import U32, U63, Message, Name, Parts, SeqId


class NodeRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """So many of the payload's nodes belong to this tenant, and were stored (or else removed)."""

    tenant: Name
    is_stored: bool
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANGED_NODES)]


NodeRuns = Annotated[tuple[NodeRun, ...], msgspec.Meta(max_length=128)]


class NodesChanged(Message, frozen=True):
    """Chain nodes whose blocks can be reused at this worker from now on, or no longer; for routing only.

    first: the first change's number; they are counted from 1 without gaps. Payload: 8 bytes a node, `runs` in order.
    """

    opcode = 10
    payloads = (1, 1)
    first: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    runs: NodeRuns
    payload: Parts


class NodesHeld(Message, frozen=True):
    """One part, from 0 on, of all nodes that a worker holds, as of the change numbered `after`; payload as above."""

    opcode = 11
    payloads = (1, 1)
    after: U63
    part: U32
    is_last: bool
    runs: NodeRuns
    payload: Parts


class AskNodes(Message, frozen=True):
    """The broker misses the changes after this one: tell them again or, if they are forgotten or `after` is 0, all
    that is held."""

    opcode = 12
    after: U63


class WorkerSequences(Message, frozen=True):
    """What has become of a worker's named sequences; the payload is a `bus.stats.Holdings`.

    A worker tells all that it has when it joins, then what changes. is_complete: nothing is left to tell now.
    """

    opcode = 88
    payloads = (1, 1)
    is_complete: bool
    payload: Parts


class DropSequences(Message, frozen=True):
    """Newer copies than these exist: drop what is older. The payload is a `bus.stats.Holdings`."""

    opcode = 89
    payloads = (1, 1)
    payload: Parts


class ReleaseSequence(Message, frozen=True):
    """Other workers have this sequence in this version: let go of it, unless it is newer here or being written."""

    opcode = 90
    tenant: Name
    seq_id: SeqId
    version: U63
