"""Workers of one cluster that run the same model differently, in float32: nobody can tell whose tokens they are."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvcache import AsyncClient, Start, Token
from tests.harness.cluster import Cluster, running_cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(150),
    pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed"),
]

RUNNERS = ("torch", "openvino")


@pytest.fixture(scope="module")
def mixed_cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    """A broker and a worker for each runner, which is its name."""
    with running_cluster(tmp_path_factory.mktemp("mixed")) as cluster:
        cluster.add_broker()
        for runner in RUNNERS:
            cluster.add_worker(runner, "--model", str(tiny_model), *TINY_FLAGS, "--runner", runner)
        yield cluster


@pytest.fixture
def cluster(mixed_cluster: Cluster) -> Cluster:
    mixed_cluster.heal()
    mixed_cluster.mark()
    return mixed_cluster


async def test_each_worker_says_what_runs_its_model(client: AsyncClient) -> None:
    async def is_told() -> bool:
        workers = (await client.stats()).workers
        found = {view.worker_id: [model.runner for model in view.stats.models] for view in workers if view.stats}
        return found == {runner: [runner] for runner in RUNNERS}

    await until(is_told, "each worker names its own runner")


@pytest.mark.parametrize("runner", RUNNERS)
async def test_kv_that_either_computed_is_what_transformers_computes(
    client: AsyncClient, reference: Reference, runner: str
) -> None:
    (name,) = await owned_by(client, runner, 1)
    prompt = token_prompt(50, 70)
    answer, done = await greedy(client, prompt, 6, seq_id=name)
    assert done.worker_id == runner
    length = await client.kv.length(name, 0)
    pair = await client.kv.get(name, 1)
    for found, expected in zip((pair.k, pair.v), reference.kv([*prompt, *answer][:length], 1), strict=True):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dying", RUNNERS)
async def test_streams_go_on_at_a_worker_of_the_other_runner_with_the_same_tokens(
    cluster: Cluster, client: AsyncClient, reference: Reference, dying: str
) -> None:
    prompts = [token_prompt(60 + index, 40 + index) for index in range(4)]
    generations = [
        client.generate(token_ids=prompt, max_tokens=60, temperature=0.0, ignore_eos=True, seq_id=name)
        for prompt, name in zip(prompts, await owned_by(client, dying, 4), strict=True)
    ]
    tokens: list[list[int]] = [[] for _ in generations]
    has_begun = asyncio.Event()

    async def read(index: int) -> None:
        async for event in generations[index]:
            if isinstance(event, Start) and not tokens[index]:
                assert event.worker_id == dying
            elif isinstance(event, Token):
                tokens[index].append(event.token_id)
                if all(len(each) >= 3 for each in tokens):
                    has_begun.set()

    async with asyncio.TaskGroup() as tasks:
        for index in range(len(generations)):
            tasks.create_task(read(index))
        await has_begun.wait()
        cluster.workers[dying].kill9()
    assert tokens == [reference.greedy(prompt, 60) for prompt in prompts]
    assert any([(await generation.result()).timings.resumes for generation in generations])
