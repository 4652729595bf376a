"""Generation through the whole system: right tokens, whatever is cached, batched or named around them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from bus.errors import Conflict, NotFound
from kvcache import AsyncClient, Client, Done, PromptTokens, SamplingParams, Start, Token
from tests.harness.cluster import Cluster
from tests.harness.generations import greedy
from tests.harness.models import NUM_LAYERS, Reference
from tests.harness.placement import owned_by
from tests.harness.prompts import PROMPT, token_prompt

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

BLOCK_SIZE = 32
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


async def test_greedy_tokens_are_those_of_transformers(client: AsyncClient, reference: Reference) -> None:
    prompt = token_prompt(401, 70)
    tokens, done = await greedy(client, prompt, 60)
    assert tokens == reference.greedy(prompt, 60)
    assert (done.finish_reason, done.usage.prompt_tokens, done.usage.completion_tokens) == ("length", 70, 60)


async def test_sixteen_streams_at_once_change_nothing(client: AsyncClient, reference: Reference) -> None:
    prompts = [token_prompt(seed, 20 + 5 * seed) for seed in range(16)]
    results = await asyncio.gather(*(greedy(client, prompt, 30) for prompt in prompts))
    assert [tokens for tokens, _ in results] == [reference.greedy(prompt, 30) for prompt in prompts]


async def test_events_come_in_order_and_the_text_is_that_of_the_tokens(client: AsyncClient) -> None:
    events = [event async for event in client.generate(PROMPT, max_tokens=20, seed=5, ignore_eos=True, explain=True)]
    assert isinstance(events[0], Start)
    assert isinstance(events[-1], Done)
    tokens = [event for event in events[1:-1] if isinstance(event, Token)]
    assert [token.seq for token in tokens] == list(range(20))
    assert "".join(token.text for token in tokens) == events[-1].text
    assert events[0].explanation is not None
    assert events[0].worker_id == events[0].explanation.worker_id == events[-1].worker_id


async def test_same_seed_gives_the_same_tokens_and_another_seed_others(client: AsyncClient) -> None:
    texts = [await client.generate(PROMPT, max_tokens=40, seed=seed, ignore_eos=True).text() for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


async def test_outputs_of_one_prompt_share_it_and_are_those_of_their_seeds(client: AsyncClient) -> None:
    prompt = token_prompt(430, 96)
    params = SamplingParams(n=3, max_tokens=12, seed=50, repetition_penalty=1.2, ignore_eos=True, logprobs=2)
    one_worker = client.generate(token_ids=prompt, params=params, policy="consistent_hash")
    outputs = await one_worker.results()
    assert [done.index for done in outputs] == [0, 1, 2]
    assert len({done.text for done in outputs}) == 3
    assert sum(done.usage.cached_tokens for done in outputs) >= 2 * 64, "one of them computed the prompt"
    for done in outputs:
        alone = await client.generate(token_ids=prompt, params=params, n=1, seed=50 + done.index).result()
        assert alone.text == done.text
        assert [token.token_id for token in alone.tokens] == [token.token_id for token in done.tokens]
        assert all(token.logprob is not None and len(token.top_logprobs) == 2 for token in done.tokens)


async def test_a_prompts_logprobs_are_those_of_transformers_and_its_blocks_are_shared(
    client: AsyncClient, cluster: Cluster, reference: Reference
) -> None:
    """Longer than a step, asked for twice, by both clients."""
    prompt = token_prompt(431, 600)
    exact = reference.logprobs(prompt)
    here = "consistent_hash"
    generation = client.generate(token_ids=prompt, max_tokens=3, ignore_eos=True, prompt_logprobs=2, policy=here)
    events = [event async for event in generation]
    assert [type(event) for event in events] == [Start, PromptTokens, Token, Token, Token, Done]

    def again() -> Done:
        with Client(cluster.url, timeout=30.0) as sync:
            return sync.generate(token_ids=prompt, max_tokens=1, prompt_logprobs=2, policy=here).result()

    done = await asyncio.to_thread(again)
    assert done.usage.cached_tokens == 0
    assert [(token.seq, token.token_id, token.text) for token in done.prompt] == [
        (seq, token_id, "") for seq, token_id in enumerate(prompt)
    ]
    first, *others = done.prompt
    assert (first.logprob, first.top_logprobs) == (None, ())
    found = torch.tensor([token.logprob for token in others], dtype=torch.float64)
    torch.testing.assert_close(found, exact[range(599), prompt[1:]], rtol=1e-4, atol=1e-4)
    tops = torch.tensor([[other.logprob for other in token.top_logprobs] for token in others], dtype=torch.float64)
    torch.testing.assert_close(tops, exact.topk(2).values, rtol=1e-4, atol=1e-4)
    plain = await client.generate(token_ids=prompt, max_tokens=1, policy=here).result()
    assert plain.usage.cached_tokens >= 576
    assert plain.prompt == ()


async def test_second_turn_under_one_name_reads_what_the_first_left(client: AsyncClient, reference: Reference) -> None:
    first = token_prompt(402, 50)
    answer, done = await greedy(client, first, 30, seq_id="turns")
    assert done.usage.cached_tokens == 0
    second = [*first, *answer, *token_prompt(403, 10)]
    tokens, done = await greedy(client, second, 30, seq_id="turns")
    assert done.usage.cached_tokens >= 79 // BLOCK_SIZE * BLOCK_SIZE
    assert tokens == reference.greedy(second, 30)


async def test_same_prefix_is_computed_once(client: AsyncClient) -> None:
    prompt = token_prompt(404, 100)  # that no other test has
    cold, cold_done = await greedy(client, prompt, 20)
    warm, warm_done = await greedy(client, prompt, 20)
    assert cold_done.usage.cached_tokens == 0
    assert warm_done.usage.cached_tokens >= 96
    assert warm_done.worker_id == cold_done.worker_id
    assert warm == cold


async def test_another_salt_shares_nothing(client: AsyncClient) -> None:
    names = await owned_by(client, "worker-1", 3)  # one cache, or the other would be empty anyway
    prompt = token_prompt(405, 100)
    cached = {}
    for name, salt in zip(names, ("mine", "mine again", "yours"), strict=True):
        _, done = await greedy(client, prompt, 20, cache_salt=salt.split()[0], seq_id=name)
        cached[salt] = done.usage.cached_tokens
    assert cached["mine"] == cached["yours"] == 0
    assert cached["mine again"] >= 96


async def test_flushed_prefixes_are_computed_again(client: AsyncClient) -> None:
    prompt = token_prompt(411, 80)

    async def cached(salt: str) -> int:
        done = await client.generate(token_ids=prompt, max_tokens=1, cache_salt=salt, priority=-1).result()
        return done.usage.cached_tokens

    assert [await cached(salt) for salt in ("x", "y", "x", "y")] == [0, 0, 64, 64]
    assert await client.flush_prefix_cache(cache_salt="x") > 0
    assert [await cached(salt) for salt in ("x", "y")] == [0, 64]
    assert await client.flush_prefix_cache() > 0
    assert [await cached(salt) for salt in ("x", "y")] == [0, 0]


async def test_kv_of_a_generation_is_what_transformers_computes(client: AsyncClient, reference: Reference) -> None:
    prompt = token_prompt(406, 45)
    answer, _ = await greedy(client, prompt, 25, seq_id="read-back")
    length = await client.kv.length("read-back", 0)
    assert length in {len(prompt) + len(answer) - 1, len(prompt) + len(answer)}
    for layer in range(NUM_LAYERS):
        pair = await client.kv.get("read-back", layer)
        keys, values = reference.kv([*prompt, *answer][:length], layer)
        torch.testing.assert_close(torch.tensor(pair.k), keys, **TOLERANCE)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.tensor(pair.v), values, **TOLERANCE)  # type: ignore[arg-type]
    middle = await client.kv.get("read-back", 1, 10, 40)
    whole = await client.kv.get("read-back", 1)
    assert middle.k.tobytes() == whole.k[10:40].tobytes()


async def test_computed_sequence_is_listed_pinned_and_deleted(client: AsyncClient) -> None:
    await greedy(client, token_prompt(407, 40), 10, seq_id="computed-one")
    (info,) = await client.kv.list("computed-one")
    assert (info.kind, info.pinned, len(info.layers)) == ("computed", False, NUM_LAYERS)
    await client.kv.pin("computed-one")
    assert (await client.kv.list("computed-one"))[0].pinned
    await client.kv.unpin("computed-one")
    assert await client.kv.delete("computed-one") == NUM_LAYERS
    with pytest.raises(NotFound):
        await client.kv.length("computed-one", 0)


async def test_computed_sequence_cannot_be_overwritten(client: AsyncClient) -> None:
    await greedy(client, token_prompt(408, 40), 10, seq_id="not-yours")
    pair = await client.kv.get("not-yours", 0)
    with pytest.raises(Conflict):
        await client.kv.put("not-yours", 0, pair.k, pair.v)
    with pytest.raises(Conflict):
        await client.kv.append("not-yours", 0, pair.k, pair.v)
    assert (await client.kv.get("not-yours", 0)).k.tobytes() == pair.k.tobytes()


async def test_stored_sequence_cannot_be_generated_over(client: AsyncClient) -> None:
    keys = torch.zeros(3, 2, 4)
    await client.kv.put("stored-first", 0, keys, keys)
    with pytest.raises(Conflict):
        await greedy(client, token_prompt(409, 10), 5, seq_id="stored-first")


async def test_two_generations_under_one_name_conflict_at_once(client: AsyncClient) -> None:
    async with client.generate(
        PROMPT, max_tokens=2000, temperature=0.0, ignore_eos=True, seq_id="busy", deadline=30.0
    ) as first:
        await anext(first)
        with pytest.raises(Conflict):
            await client.generate(PROMPT, max_tokens=5, seq_id="busy").result()


async def test_stop_string_ends_the_text_before_it(client: AsyncClient) -> None:
    whole = await client.generate(PROMPT, max_tokens=60, seed=3, ignore_eos=True).text()
    stop = whole[20:23]
    done = await client.generate(PROMPT, max_tokens=60, seed=3, ignore_eos=True, stop=stop).result()
    assert done.text == whole[: whole.index(stop)]
    assert done.finish_reason == "stop"


async def test_chat_is_templated_and_counted(client: AsyncClient, tiny_model: Path) -> None:
    messages = [{"role": "user", "content": "hello hello"}, {"role": "assistant", "content": "hello"}]
    done = await client.generate(messages=messages, max_tokens=4, temperature=0.0, ignore_eos=True).result()
    rendered = "<user>hello hello\n<assistant>hello\n<assistant>"
    plain = await client.generate(rendered, max_tokens=4, temperature=0.0, ignore_eos=True).result()
    assert (done.text, done.usage.prompt_tokens) == (plain.text, plain.usage.prompt_tokens)
