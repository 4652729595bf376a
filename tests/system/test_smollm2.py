"""The model that comes with the project, in float32, against transformers: a chat of two turns and its KV."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoTokenizer

from kvcache import AsyncClient, Client, Token
from kvcache.models import ModelRegistry
from tests.harness.cluster import running_cluster
from tests.harness.generations import greedy
from tests.harness.models import Reference

SOURCE = ModelRegistry().find("smollm2")
QUESTION = "Name three colours of the rainbow, and nothing else."
NUM_TOKENS = 16

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not SOURCE.is_present, reason="run `kvcache models pull smollm2` first"),
]


@dataclass
class Loaded:
    """Where it is served, and the states that were seen on the way from not being there."""

    url: str
    states: list[str]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A worker that was started without its model, and then asked for it."""
    with running_cluster(tmp_path_factory.mktemp("smollm2")) as cluster:
        cluster.add_broker()
        flags = ("--model", "smollm2", "--dtype", "float32", "--kv-cache-memory-bytes", "512MiB", "--no-preload")
        cluster.add_worker("worker-1", *flags)
        cluster.wait_ready()
        with Client(cluster.url, timeout=60.0) as client, ThreadPoolExecutor(1) as pool:
            states = [state_of(client)]
            answer = pool.submit(lambda: client.generate("One", max_tokens=1).result())
            while states[-1] != "ready":
                time.sleep(0.05)
                assert states[-1] != "failed"
                states += [state for state in [state_of(client)] if state != states[-1]]
            assert answer.result().usage.completion_tokens == 1
        yield Loaded(cluster.url, states)


def state_of(client: Client) -> str:
    (view,) = client.workers()
    return dict(view.models)["smollm2"]


@pytest.fixture(scope="module")
def smollm2() -> Reference:
    return Reference(Path(SOURCE.path))


@pytest_asyncio.fixture
async def chat(loaded: Loaded) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(loaded.url, timeout=60.0) as client:
        yield client


def test_model_loads_when_first_asked_for_and_says_so_meanwhile(loaded: Loaded) -> None:
    assert loaded.states == ["absent", "loading", "ready"]


async def test_two_turns_of_chat_reuse_and_equal_transformers(chat: AsyncClient, smollm2: Reference) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(SOURCE.path)
    messages = [{"role": "user", "content": QUESTION}]
    for turn in range(2):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        generation = chat.generate(
            messages=messages, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, seq_id="chat"
        )
        tokens = [event.token_id async for event in generation if isinstance(event, Token)]
        done = await generation.result()
        assert tokens == smollm2.greedy(prompt, NUM_TOKENS)
        assert done.usage.prompt_tokens == len(prompt)
        assert (done.usage.cached_tokens > 0) == bool(turn)
        messages += [{"role": "assistant", "content": done.text}, {"role": "user", "content": "And the sky?"}]


async def test_kv_of_its_layers_is_what_transformers_computes(chat: AsyncClient, smollm2: Reference) -> None:
    prompt = list(range(1000, 1050))
    answer, _ = await greedy(chat, prompt, 8, seq_id="kv")
    length = await chat.kv.length("kv", 0)
    for layer in (0, 29):
        pair = await chat.kv.get("kv", layer)
        for found, expected in zip((pair.k, pair.v), smollm2.kv([*prompt, *answer][:length], layer), strict=True):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-3)
