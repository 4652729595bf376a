"""What a named sequence is called inside a worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class SequenceKey:
    """A client's name for a sequence. The tenant, by the broker's word, is part of it: nobody can name another's."""

    tenant: str
    seq_id: str
