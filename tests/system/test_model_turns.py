"""Two models in a worker with room for one, real processes: each answers as itself, whoever came before."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from bus.errors import ModelUnavailable, NotFound
from kvcache import AsyncClient
from tests.harness.cluster import Cluster, running_cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.models import Reference, save_tiny_llama
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NUM_TOKENS = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """`tiny`, `other` with weights of its own, and `gone`, which a test removes."""
    root = tmp_path_factory.mktemp("turns")
    other = save_tiny_llama(root / "other", seed=12)
    return {"tiny": tiny_model, "other": other, "gone": Path(shutil.copytree(other, root / "gone"))}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Reference]:
    return {name: Reference(folders[name]) for name in ("tiny", "other")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Cluster]:
    """One worker whose models have room for one: a pool each of a third of 64 MiB, within 30 MiB together."""
    models = [flag for path in folders.values() for flag in ("--model", str(path))]
    with running_cluster(tmp_path_factory.mktemp("turns")) as cluster:
        cluster.add_broker()
        cluster.add_worker("w", *models, *TINY_FLAGS, "--runner", "torch", "--model-memory-bytes", "30MiB")
        cluster.wait_ready()
        yield cluster


@pytest_asyncio.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.url, timeout=60.0) as client:
        yield client


async def loaded(client: AsyncClient) -> set[str]:
    (view,) = await client.workers()
    return {name for name, state in view.models if state == "ready"}


async def test_requests_for_both_by_turns_and_at_once_get_each_models_own_tokens(
    client: AsyncClient, references: dict[str, Reference]
) -> None:
    async def ask(name: str, number: int) -> None:
        prompt = token_prompt(number, 30)
        tokens, _ = await greedy(client, prompt, NUM_TOKENS, model=name)
        assert tokens == references[name].greedy(prompt, NUM_TOKENS)

    for number in range(4):
        await ask("tiny" if number % 2 else "other", number)
        assert len(await loaded(client)) <= 1
    await asyncio.gather(*(ask("tiny" if number % 3 else "other", 100 + number) for number in range(12)))

    async def has_counted() -> bool:
        stats = (await client.stats()).workers[0].stats
        return stats is not None and sum(model.unloads for model in stats.models) >= 4

    await until(has_counted, "the models' comings and goings can be seen")


async def test_a_named_sequence_leaves_with_its_model_and_is_computed_anew(
    client: AsyncClient, references: dict[str, Reference]
) -> None:
    prompt = token_prompt(7, 40)
    await greedy(client, prompt, NUM_TOKENS, model="tiny", seq_id="kept")
    assert await client.kv.length("kept", 0) > 0
    await greedy(client, prompt, NUM_TOKENS, model="other")
    with pytest.raises(NotFound):
        await client.kv.length("kept", 0)
    tokens, done = await greedy(client, prompt, NUM_TOKENS, model="tiny", seq_id="kept")
    assert tokens == references["tiny"].greedy(prompt, NUM_TOKENS)
    assert done.usage.cached_tokens == 0


async def test_a_model_whose_folder_vanished_fails_by_name_and_the_others_serve_on(
    client: AsyncClient, references: dict[str, Reference], folders: dict[str, Path]
) -> None:
    prompt = token_prompt(8, 20)
    tokens, _ = await greedy(client, prompt, NUM_TOKENS, model="gone")
    assert tokens == references["other"].greedy(prompt, NUM_TOKENS), "its weights are those of the other"
    shutil.rmtree(folders["gone"])
    again, _ = await greedy(client, prompt, NUM_TOKENS, model="gone")
    assert again == tokens, "it is in memory"
    await greedy(client, prompt, NUM_TOKENS, model="tiny")
    with pytest.raises(ModelUnavailable, match="gone"):
        await greedy(client, prompt, 2, model="gone")
    assert (await greedy(client, prompt, NUM_TOKENS, model="tiny"))[0] == references["tiny"].greedy(prompt, NUM_TOKENS)


async def test_a_worker_killed_while_it_loads_harms_no_request(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], references: dict[str, Reference]
) -> None:
    with running_cluster(tmp_path_factory.mktemp("killed")) as cluster:
        cluster.add_broker()
        flags = ("--model", str(folders["tiny"]), "--no-preload", "--runner", "torch", *TINY_FLAGS)
        one = cluster.add_worker("one", *flags, KVCACHE_FAILPOINT="worker.load:kill9@2")
        cluster.add_worker("two", *flags)
        cluster.wait_ready()
        async with AsyncClient(cluster.url, timeout=60.0) as client:
            (name,) = await owned_by(client, "one", 1)
            prompt = token_prompt(9, 20)
            tokens, done = await greedy(client, prompt, NUM_TOKENS, seq_id=name)
        assert not one.is_running
    assert tokens == references["tiny"].greedy(prompt, NUM_TOKENS)
    assert done.worker_id == "two"
