"""A generation from the first event to the last: fields, text, temperatures, company, figures, and a model's start."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

if __name__ == "__main__":  # first, as only pytest makes the imports below work
    raise SystemExit(pytest.main([__file__, "-v", "-s", *sys.argv[1:]]))

from transformers import AutoTokenizer

from kvcache import AsyncClient, Done, Start, Token
from kvcache.models import ModelRegistry
from tests.harness.cluster import Cluster
from tests.harness.figures import ms, percentiles, show, show_table
from tests.harness.generations import assert_same_words
from tests.harness.services import MODEL, WORKER_FLAGS
from tests.harness.waiting import until
from tests.harness.workloads import Sent, at_once, random_prompt
from tests.test_utils import Sequences

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PROMPT = "The capital of France is"
STORY = "Once upon a time, in a small town by the sea,"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ModelRegistry().find(MODEL).path)


async def test_events_come_in_order_with_all_their_fields(client: AsyncClient, tokenizer: Any) -> None:
    events = [event async for event in client.generate(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True)]
    start, tokens, done = events[0], events[1:-1], events[-1]
    assert isinstance(start, Start)
    assert isinstance(done, Done)
    assert all(isinstance(token, Token) for token in tokens)

    prompt_len = len(tokenizer(PROMPT)["input_ids"])
    assert (start.model, start.prompt_tokens, start.index) == (MODEL, prompt_len, 0)
    assert start.worker_id in {worker.worker_id for worker in await client.workers()}
    assert start.reason
    assert [token.seq for token in tokens if isinstance(token, Token)] == list(range(12))

    assert (done.worker_id, done.reason, done.finish_reason) == (start.worker_id, start.reason, "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt_len, 12)
    assert done.usage.cached_tokens == start.cached_tokens
    assert len(done.request_id) == 32
    assert done.timings.resumes == 0


async def test_text_is_that_of_the_tokens(client: AsyncClient, tokenizer: Any) -> None:
    generation = client.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)
    tokens = [event async for event in generation if isinstance(event, Token)]
    done = await generation.result()
    assert "".join(token.text for token in tokens) == done.text
    assert tokenizer.decode([token.token_id for token in tokens]) == done.text
    assert "Paris" in done.text, "a model that small knows as much"
    show("greedy", {repr(PROMPT): repr(done.text)})


async def test_model_is_loaded_by_the_first_request_and_shows_its_states(cluster: Cluster) -> None:
    cluster.add_worker("late", *WORKER_FLAGS, "--no-preload")
    try:
        await asyncio.to_thread(cluster.wait_ready)
        async with AsyncClient(cluster.url, timeout=180.0) as client:
            sequences = Sequences(client)
            (seq_id,) = await sequences.owned_by("late", 1)
            began, states = time.monotonic(), [await state_on(client, "late")]
            first = asyncio.create_task(
                client.generate(PROMPT, max_tokens=4, temperature=0.0, ignore_eos=True, seq_id=seq_id).result()
            )

            async def is_ready() -> bool:
                states.extend(state for state in [await state_on(client, "late")] if state != states[-1])
                return states[-1] in {"ready", "failed"}

            await until(is_ready, "the model is there", 90.0)
            done = await first
            assert states == ["absent", "loading", "ready"]
            assert (done.worker_id, done.usage.completion_tokens) == ("late", 4)
            second = await client.generate(STORY, max_tokens=4, ignore_eos=True, seq_id=seq_id).result()
            show(
                "first use of a model",
                {
                    "states": " > ".join(states),
                    "first token": ms(done.timings.ttft_s),
                    "total": ms(time.monotonic() - began),
                    "first token of the next": ms(second.timings.ttft_s),
                },
            )
            await sequences.delete_all()
    finally:
        cluster.drop_worker("late")


async def state_on(client: AsyncClient, worker_id: str) -> str:
    (view,) = [view for view in await client.workers() if view.worker_id == worker_id]
    return dict(view.models).get(MODEL, "absent")


async def test_temperature_zero_is_deterministic(client: AsyncClient) -> None:
    texts = {await client.generate(STORY, max_tokens=16, temperature=0, seed=seed).text() for seed in (1, 2, 3)}
    assert len(texts) == 1


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0])
async def test_seed_decides_at_any_temperature(client: AsyncClient, temperature: float) -> None:
    async def run(seed: int) -> Done:
        return await client.generate(
            STORY, max_tokens=24, temperature=temperature, seed=seed, ignore_eos=True, logprobs=0
        ).result()

    outputs = [await run(seed) for seed in (1, 2, 3, 1, 2, 3)]  # alone, as company may change a rounding
    assert [done.text for done in outputs[:3]] == [done.text for done in outputs[3:]]
    assert {done.usage.completion_tokens for done in outputs} == {24}
    distinct = len({done.text for done in outputs})
    if temperature == 1.0:
        assert distinct == 3, "72 draws from a whole vocabulary are not three times the same"
    show(f"temperature {temperature}", {"different texts of 3 seeds": distinct, "one of them": repr(outputs[0].text)})


async def test_hotter_draws_are_less_likely(client: AsyncClient) -> None:
    async def mean_logprob(temperature: float) -> float:
        outputs = await asyncio.gather(
            *(
                client.generate(
                    STORY, max_tokens=16, temperature=temperature, seed=seed, ignore_eos=True, logprobs=0
                ).result()
                for seed in range(4)
            )
        )
        logprobs = [token.logprob for done in outputs for token in done.tokens if token.logprob is not None]
        assert len(logprobs) == 4 * 16
        return sum(logprobs) / len(logprobs)

    means = {temperature: await mean_logprob(temperature) for temperature in (0.1, 0.7, 1.0)}
    show("mean logprob of what was drawn", {str(name): f"{mean:.2f}" for name, mean in means.items()})
    assert means[0.1] > means[0.7] > means[1.0]


async def test_each_of_many_at_once_is_what_it_is_alone(client: AsyncClient, exact: None) -> None:
    work = [Sent(random_prompt(number, 10 + 9 * number), 12, salt="company", logprobs=2) for number in range(6)]
    together = await at_once(client, work)
    assert not together.failures
    for index, sent in enumerate(work):
        alone = await at_once(client, [replace(sent, salt=f"alone {index}")])
        assert_same_words(together.by_index[index], alone.by_index[0])
        assert alone.done[0].usage.cached_tokens == 0
    show("6 at once", together.figures())


async def test_timings_agree_with_what_the_reader_saw(client: AsyncClient) -> None:
    await client.generate(STORY, max_tokens=2).result()
    began = time.monotonic()
    generation = client.generate(STORY, max_tokens=32, temperature=0.7, seed=3, ignore_eos=True)
    times = [time.monotonic() - began async for event in generation if isinstance(event, Token)]
    done, total = await generation.result(), time.monotonic() - began
    timings = done.timings
    assert len(times) == 32
    assert 0 < timings.ttft_s <= times[0]
    assert timings.ttft_s < timings.total_s <= total
    assert times[-1] - times[0] == pytest.approx(31 / timings.tokens_per_s, rel=0.5)
    work_s = (timings.queue_ms + timings.prefill_ms + timings.decode_ms) / 1000
    assert 0 < work_s <= timings.total_s + 0.01
    rows = [
        ("first token", ms(timings.ttft_s)),
        ("tokens/s", timings.tokens_per_s),
        *percentiles("next token", [after - before for before, after in pairwise(times)]).items(),
        ("queue", ms(timings.queue_ms / 1000)),
        ("prefill", ms(timings.prefill_ms / 1000)),
        ("decode", ms(timings.decode_ms / 1000)),
    ]
    show_table("one stream", ("figure", "value"), rows)
