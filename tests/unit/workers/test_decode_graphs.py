"""Decode steps that are recorded once and replayed: padded, overwritten, and never mistaken for others.

A recording here computes again, from the tensors that it was made with, into one tensor, as a graph on a GPU does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import combinations

import pytest
import torch

from workers.attention import Step
from workers.batch import Batch, BlockId
from workers.decode_graphs import SIZES, Again, DecodeGraphs
from workers.flex_attention import plan_flex
from workers.loader import LoadedModel, load_model
from workers.runner import TorchRunner

from .conftest import BLOCK_SIZE, VOCAB_SIZE, make_pool, make_slice, scattered_table, source_of
from .families import save_random

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
GROUP = 2
"""Query heads per KV head of the model below."""


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """With a window, so that a mask which is not made anew would show an old step's blocks."""
    return load_model(source_of(save_random("mistral", tmp_path_factory.mktemp("models"))), dtype="float32")


class Recorder:
    def __init__(self) -> None:
        self.num_recordings = 0
        self.num_replays = 0

    def __call__(self, forward: Again) -> Again:
        self.num_recordings += 1
        output = forward()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return output.copy_(forward())

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("workers.runner.record_on_cuda", recorder)
    return recorder


def make_runners(loaded: LoadedModel) -> tuple[TorchRunner, TorchRunner]:
    """One with graphs, and one without, which gathers."""
    plan = partial(plan_flex, group=GROUP)
    max_blocks = loaded.shape.max_model_len // BLOCK_SIZE
    ours = TorchRunner(loaded, make_pool(loaded), plan, partial(plan, max_blocks=max_blocks))
    return ours, TorchRunner(loaded, make_pool(loaded))


def decodes(step: int, num_seqs: int) -> Batch:
    """Of sequences whose prompts `prefill` computed: the one of each at `step` after it."""
    return [make_slice([(5 * step + seq) % VOCAB_SIZE], 9 + 3 * seq + step, table_of(seq)) for seq in range(num_seqs)]


def table_of(seq: int) -> list[BlockId]:
    return scattered_table(4 * 60, seed=8)[9 * seq : 9 * seq + 9]


def prefill(runners: tuple[TorchRunner, TorchRunner], num_seqs: int) -> None:
    for runner in runners:
        prompts = [[(seq + 3 * place) % VOCAB_SIZE for place in range(9 + 3 * seq)] for seq in range(num_seqs)]
        runner.run([make_slice(prompt, 0, table_of(seq)) for seq, prompt in enumerate(prompts)])


def test_replayed_decodes_give_the_logits_of_plain_ones_as_contexts_grow_and_sequences_go(
    loaded: LoadedModel, recorder: Recorder
) -> None:
    runners = make_runners(loaded)
    prefill(runners, 5)
    assert recorder.num_recordings == 0, "a step with prompts in it is not one of decodes"
    for step, num_seqs in enumerate((5, 3, 3, 4, 1, 2, 3, 5)):
        ours, plain = (runner.run(decodes(step, num_seqs)) for runner in runners)
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert (recorder.num_recordings, recorder.num_replays) == (3, 8), "for 8, 4 and 2 sequences"


def test_masks_are_made_anew_within_each_recording(loaded: LoadedModel) -> None:
    """Those that a former run of the same step made would be recorded as they were, and never change again."""
    steps: list[Step] = []

    def forward(token_ids: torch.Tensor, _positions: torch.Tensor, _wanted: torch.Tensor, step: Step) -> torch.Tensor:
        steps.append(step)
        return token_ids[0].float()[:, None]

    def record(forward: Again) -> Again:
        forward()
        return forward

    plan = partial(plan_flex, group=GROUP, max_blocks=9)
    graphs = DecodeGraphs(make_pool(loaded), plan, forward, record)
    for step in range(2):
        logits = graphs.run(decodes(step, 2))
        assert logits is not None
        assert logits.flatten().tolist() == [5 * step, 5 * step + 1]
    assert all(one is not other for one, other in combinations(steps, 2))


def test_logits_of_a_step_stay_as_they_are_when_the_next_is_replayed(loaded: LoadedModel, recorder: Recorder) -> None:
    runners = make_runners(loaded)
    prefill(runners, 2)
    first = runners[0].run(decodes(0, 2))
    before = first.clone()
    runners[0].run(decodes(1, 2))
    assert torch.equal(first, before)
    assert recorder.num_replays == 2


def test_step_that_wants_no_logits_or_is_larger_than_any_graph_runs_as_ever(
    loaded: LoadedModel, recorder: Recorder
) -> None:
    runner, _ = make_runners(loaded)
    silent = make_slice([1], 0, table_of(0), wants_logits=False)
    assert runner.run([silent, *decodes(0, 1)]).shape == (1, VOCAB_SIZE)
    blocks = scattered_table(4 * 64, seed=1)
    many = [make_slice([seq], 0, blocks[seq % 64 :][:1]) for seq in range(SIZES[-1] + 1)]
    assert runner.run(many).shape == (SIZES[-1] + 1, VOCAB_SIZE)
    assert recorder.num_recordings == 0


def test_model_that_cannot_be_recorded_runs_without_and_is_not_tried_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_forward: Again) -> Again:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("workers.runner.record_on_cuda", refuse)
    runners = make_runners(loaded)
    prefill(runners, 3)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            ours, plain = (runner.run(decodes(step, 3)) for runner in runners)
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    assert [record.message for record in caplog.records] == [
        "decode steps run without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]
