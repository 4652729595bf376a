"""CUDA graphs of decode steps: what a step launches is recorded once, and replayed by one call.

A decode of a small model is thousands of kernels of microseconds each, and telling the GPU of them takes longer than
they do. A graph has fixed shapes and addresses: so there is one for each of a few numbers of sequences, recorded when
it is first needed, and a step is padded to the next of them. It is padded with its last sequence again, which computes
what it computes anyway and writes it where it is written anyway, so that no block is needed for it. What differs from
step to step is copied into the tensors that the graph reads. Steps with prompts in them, and larger ones, run as they
always do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from workers.attention import Step
from workers.batch import Batch
from workers.paged_kv import PagedKV

log = logging.getLogger(__name__)

SIZES = (2, 4, 8, 16, 32, 64)
"""Sequences of a graph."""
WARM_UPS = 2
"""Runs before the recording: the first compiles kernels, and a library may set itself up in either."""


class FixedStep(Step, Protocol):
    """A step that another of the same shape can be put in the place of."""

    def renewed(self) -> Step:
        """The same step, with all that is derived from it yet to be derived."""

    def overwrite(self, other: Self) -> None:
        """Take the other's numbers, in place."""


PlanDecodes = Callable[[Batch, PagedKV], FixedStep]
"""Of decodes: a step whose shape is that of any other with as many slices."""
Again = Callable[[], torch.Tensor]
Record = Callable[[Again], Again]
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Step], torch.Tensor]


def record_on_cuda(forward: Again) -> Again:
    """A call that does again what `forward` does now, and returns the same tensor each time, written anew."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            forward()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Of a step whose slices are all one token. token_ids, positions: [1, num_slices] int64."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    step: FixedStep

    def overwrite(self, other: Inputs) -> None:
        """Take the numbers of a step with as many slices."""
        self.token_ids.copy_(other.token_ids)
        self.positions.copy_(other.positions)
        self.step.overwrite(other.step)


class DecodeGraphs:
    """Decode steps of one model over one pool. Call it from one thread, in inference mode.

    forward: from token ids, positions, which logits are wanted, and the step, those logits. Should recording fail,
    there are no graphs from then on.
    """

    def __init__(self, kv: PagedKV, plan: PlanDecodes, forward: Forward, record: Record) -> None:
        self._kv = kv
        self._plan = plan
        self._forward = forward
        self._record = record
        self._graphs: dict[int, tuple[Inputs, Again]] = {}
        self._is_usable = True

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Logits [num_slices, vocab_size], or None where there is no graph for such a step."""
        size = next((size for size in SIZES if size >= len(batch)), None)
        is_decode = all(len(piece.token_ids) == 1 and piece.wants_logits for piece in batch)
        if size is None or not is_decode or not self._is_usable:
            return None
        inputs = self._inputs([*batch, *[batch[-1]] * (size - len(batch))])
        if size not in self._graphs and not self._add(size, inputs):
            return None
        static, replay = self._graphs[size]
        if static is not inputs:
            static.overwrite(inputs)
        return replay()[: len(batch)].clone()  # the next replay writes into the same

    def _inputs(self, batch: Batch) -> Inputs:
        device = self._kv.device
        return Inputs(
            token_ids=torch.tensor([[piece.token_ids[0] for piece in batch]], device=device),
            positions=torch.tensor([[piece.start for piece in batch]], device=device),
            step=self._plan(batch, self._kv),
        )

    def _add(self, size: int, inputs: Inputs) -> bool:
        wanted = torch.arange(size, device=inputs.token_ids.device)

        def forward() -> torch.Tensor:
            # Renewed, so that its masks are made within the graph, from what is copied into it.
            return self._forward(inputs.token_ids, inputs.positions, wanted, inputs.step.renewed())

        try:
            self._graphs[size] = (inputs, self._record(forward))
        # Some family's code may do what cannot be recorded: torch then raises one of these, and without it runs on.
        except RuntimeError as error:
            self._is_usable = False
            log.warning("decode steps run without CUDA graphs: %s: %s", type(error).__name__, error)
        return self._is_usable
