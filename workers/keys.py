"""What things are called inside a worker: generations, and the sequences that clients name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

RunId = NewType("RunId", bytes)
"""One attempt at a generation."""


@dataclass(frozen=True, slots=True, order=True)
class SequenceKey:
    """A client's name for a sequence. The tenant, by the broker's word, is part of it: nobody can name another's."""

    tenant: str
    seq_id: str
