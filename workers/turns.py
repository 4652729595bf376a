"""Whose turn it is: how the room of one step, tokens and sequences, is shared out among those that can run.

Three rules, in this order:

- Who has waited `PATIENCE` steps goes first, the longest waiting before the others. A prefill among them takes
  half of the step's tokens at most, so that decodes go on beside it.
- Then every decode gets its one token. They are many and each is cheap, and their readers are waiting.
- Then the prefills, in their places in line (the shortest first, but for how long they have waited), fill what is
  left: the first gets all it can use. Those whose prompts are scored get `MAX_SCORED` tokens together.

No wait is longer than `PATIENCE` steps and one for each other that is admitted: whoever is first in line gets a
token, and is then behind all who wait. A prefill whose next block is computed by another in this step sits it
out, since the next step finds that block in the pool; the first in line never does, so this cannot hold up all. One
whose prompt is scored takes no block from others, and waits for none.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvcache.hashing import BlockHash
from workers.generation import Generation
from workers.lifecycle import State

PATIENCE = 16
"""Steps. Long enough that short prompts are computed one after the other, which makes the mean wait shortest."""

PACE_MEMORY = 0.98
"""Each step leaves so much of those before: fifty are enough for a rate that only orders prefills."""

MAX_SCORED = 256
"""Tokens in one step whose logits are all needed: 256 rows of a vocabulary of 150,000 are 150 MB in float32."""

_BY_WAIT = (0.0, 0)


class Shares:
    """The room of step number `step` while it is shared out: what is left, and who got how many tokens."""

    def __init__(self, step: int, max_tokens: int, max_seqs: int) -> None:
        self.num_tokens: dict[Generation, int] = {}
        self._step = step
        self._max_tokens = max_tokens
        self._tokens_left = max_tokens
        self._seqs_left = max_seqs
        self._scored_left = MAX_SCORED
        self._in_progress: set[BlockHash] = set()

    @property
    def is_full(self) -> bool:
        return self._tokens_left == 0 or self._seqs_left == 0

    def offer(self, generation: Generation) -> None:
        """Give it what it can use of what is left. To be asked in the order of `in_line`, while not full."""
        sequence = generation.sequence
        num_tokens = min(sequence.num_left, self._tokens_left)
        if generation.state is State.PREFILL:
            if _is_overdue(generation, self._step):
                num_tokens = min(num_tokens, max(1, self._max_tokens // 2))
            block = sequence.next_block
            if not sequence.is_scored:
                num_tokens = min(num_tokens, self._scored_left)
                self._scored_left -= num_tokens
            elif block in self._in_progress:
                num_tokens = 0
            if num_tokens == 0:
                return
            if block is not None:  # those that would share it have all caught up to it, so none is at a later one
                self._in_progress.add(block)
        self.num_tokens[generation] = num_tokens
        self._tokens_left -= num_tokens
        self._seqs_left -= 1


class Pace:
    """How quick prefills are here, from the steps that were run: old ones fade."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def token_s(self) -> float:
        """Seconds for each token; 0 before any was timed, so that all are alike and go by arrival."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def ran(self, num_tokens: int, seconds: float) -> None:
        """A step with so many tokens of prefills took so long. One of decodes alone says nothing."""
        if not num_tokens:
            return
        self._tokens = num_tokens + PACE_MEMORY * self._tokens
        self._seconds = seconds + PACE_MEMORY * self._seconds


def in_line(runnable: Iterable[Generation], step: int) -> list[Generation]:
    """All of them, given longest waiting first, in the order in which step number `step` is offered to them."""
    return sorted(runnable, key=lambda generation: _place(generation, step))


def _place(generation: Generation, step: int) -> tuple[int, tuple[float, int]]:
    """Equals stay in the order of their waits."""
    if _is_overdue(generation, step):
        return 0, _BY_WAIT
    if generation.state is State.DECODE:
        return 1, _BY_WAIT
    return 2, generation.place


def _is_overdue(generation: Generation, step: int) -> bool:
    return step - generation.last_turn > PATIENCE
