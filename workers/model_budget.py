"""How the memory for models is shared out: who has how much, and what the next one would get.

Two limits hold over all loaded models together and are never exceeded: that of their block pools, which are cut at
load and never grow, and, if there is one, that of weights and pools in sum. Models named at start have equal
parts of the pools' limit; otherwise each takes half of what is left, until that falls below a part of the whole,
when the least recently used model has to go first (`workers.shelf` says which and when). This file only counts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from bus.errors import ModelUnavailable

SMALLEST_PART = 8
"""A model that nobody named at start gets a pool of at least one part in this many of the pools' limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNeed:
    """What a model takes, known from its files before it is loaded. block_bytes: of its pool, across all layers."""

    weights_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What a model was given. pool_bytes: a whole number of its blocks."""

    weights_bytes: int
    pool_bytes: int


class ModelBudget:
    """The grants that are out.

    pools_bytes: limit of all pools. model_bytes: limit of weights and pools together; None: weights are not counted.
    num_named: how many models were named at start, 0 if any may load.
    """

    def __init__(self, *, pools_bytes: int, model_bytes: int | None = None, num_named: int = 0) -> None:
        self._pools_bytes = pools_bytes
        self._model_bytes = model_bytes
        self._num_named = num_named
        self._grants: dict[str, Grant] = {}

    def grant(self, name: str, need: ModelNeed) -> Grant | None:
        """Give the model its memory; None, with nothing given, while others have too much of it.

        Raises ModelUnavailable, naming the flag that would help, if it cannot be served even alone.
        """
        self._check_alone(need)
        found = self._cut(need, without=())
        if found is not None:
            self._grants[name] = found
        return found

    def would_fit(self, need: ModelNeed, without: Collection[str]) -> bool:
        """Whether there would be room if the models `without` were gone."""
        return self._cut(need, without) is not None

    def release(self, name: str) -> None:
        """Take a grant back, if there is one."""
        self._grants.pop(name, None)

    def granted(self, name: str) -> Grant | None:
        return self._grants.get(name)

    def check(self) -> None:
        """Assert that no limit is exceeded."""
        pools = sum(grant.pool_bytes for grant in self._grants.values())
        weights = sum(grant.weights_bytes for grant in self._grants.values())
        assert pools <= self._pools_bytes, f"pools of {pools} bytes, the limit is {self._pools_bytes}"
        assert self._model_bytes is None or pools + weights <= self._model_bytes, "weights and pools exceed their limit"

    def _check_alone(self, need: ModelNeed) -> None:
        if self._cut(need, without=self._grants) is not None:
            return
        if self._model_bytes is not None and need.weights_bytes + need.block_bytes > self._model_bytes:
            raise ModelUnavailable(
                f"its weights take {need.weights_bytes} bytes and one block of KV {need.block_bytes}, and the limit "
                f"for both is {self._model_bytes}; give the worker more with --model-memory-bytes"
            )
        raise ModelUnavailable(
            f"one block of its KV takes {need.block_bytes} bytes, and its part of the memory for them is "
            f"{self._part(self._pools_bytes)}; give the worker more with --kv-cache-memory-bytes"
        )

    def _cut(self, need: ModelNeed, without: Collection[str]) -> Grant | None:
        others = [grant for name, grant in self._grants.items() if name not in without]
        pools_left = self._pools_bytes - sum(grant.pool_bytes for grant in others)
        part = self._part(pools_left)
        if part > pools_left:
            return None
        if self._model_bytes is not None:
            taken = sum(grant.pool_bytes + grant.weights_bytes for grant in others)
            # Alone it may have all there is; beside others it does not squeeze into what they have left over.
            if others and taken + need.weights_bytes + part > self._model_bytes:
                return None
            part = min(part, self._model_bytes - taken - need.weights_bytes)
        part -= part % need.block_bytes
        return Grant(need.weights_bytes, part) if part > 0 else None

    def _part(self, pools_left: int) -> int:
        """What a model's pool may take when `pools_left` bytes of the limit are nobody's."""
        if self._num_named:
            return self._pools_bytes // self._num_named
        return max(pools_left // 2, self._pools_bytes // SMALLEST_PART)
