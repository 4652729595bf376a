"""What one generation's parameters do to the logits of single tokens: `logit_bias` and the penalties.

All of it follows from the parameters and the tokens of prompt and output, so a stream that goes on elsewhere is
penalised there as it would have been here. What is kept between steps only saves counting the tokens again:
one entry for each token that is touched, however long the context.

Bias comes first, then the repetition penalty (Keskar et al. 2019, CTRL, section 4.1, over prompt and output), then
frequency and presence (over the output alone). Both transformers and vLLM have it so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bus.messages import Sampling

_FIRST_CAPACITY = 64


class LogitChanges:
    """The tokens that a generation's parameters touch. `sampling` has been through the checks, ids are the model's."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], outputs: Iterable[int]) -> None:
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._counts_outputs = has_penalty(sampling)
        seen = np.unique(np.asarray(prompt if self._repetition != 1.0 else (), dtype=np.int64))
        self._size = len(seen)
        capacity = max(_FIRST_CAPACITY, 2 * len(seen))
        self._ids = np.zeros(capacity, np.int64)
        self._ids[: len(seen)] = seen
        self._is_seen = np.zeros(capacity, np.bool_)
        self._is_seen[: len(seen)] = True
        self._counts = np.zeros(capacity, np.float32)
        self._biases = np.zeros(capacity, np.float32)
        self._place_of = {token: place for place, token in enumerate(seen.tolist())}
        for token, bias in sampling.logit_bias:
            self._biases[self._place(token)] = bias
        for token in outputs:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token of the output."""
        if self._counts_outputs:
            place = self._place(token)
            self._is_seen[place] = True
            self._counts[place] += 1

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """The tokens whose logits change, each once."""
        return self._ids[: self._size]

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The new logits of `token_ids`, whose own are given in that order."""
        size = self._size
        changed = logits + self._biases[:size]
        if self._repetition != 1.0:
            factor = np.float32(self._repetition)
            penalised = np.where(changed > 0, changed / factor, changed * factor)
            changed = np.where(self._is_seen[:size], penalised, changed)
        if self._frequency != 0.0:
            changed -= np.float32(self._frequency) * self._counts[:size]
        if self._presence != 0.0:
            changed -= np.float32(self._presence) * (self._counts[:size] > 0)
        return changed

    def _place(self, token: int) -> int:
        place = self._place_of.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._grow()
            self._ids[place] = token
            self._size += 1
        return place

    def _grow(self) -> None:
        more = len(self._ids)
        self._ids = np.pad(self._ids, (0, more))
        self._is_seen = np.pad(self._is_seen, (0, more))
        self._counts = np.pad(self._counts, (0, more))
        self._biases = np.pad(self._biases, (0, more))


def changes_of(sampling: Sampling, prompt: Sequence[int], outputs: Sequence[int]) -> LogitChanges | None:
    """The changes that these parameters ask for; None if they ask for none."""
    if not sampling.logit_bias and not has_penalty(sampling):
        return None
    return LogitChanges(sampling, prompt, outputs)


def has_penalty(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)
