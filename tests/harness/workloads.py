"""Generations by the dozen, sent at once or at a rate, and how they ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from bus.errors import KVCacheError, Overloaded
from kvcache import AsyncClient, Done, Token
from tests.harness.figures import percentiles

WORDS = range(1000, 40_000)
"""Token ids of ordinary words of SmolLM2."""


def random_prompt(seed: object, num_tokens: int) -> list[int]:
    """Token ids that depend on nothing but the arguments."""
    return random.Random(f"prompt {seed}").choices(WORDS, k=num_tokens)


@dataclass(frozen=True)
class Sent:
    """One generation to ask for: greedy, and exactly `num_tokens` long. logprobs: of so many words at each place."""

    prompt: list[int]
    num_tokens: int
    seq_id: str | None = None
    salt: str | None = None
    logprobs: int | None = None


@dataclass
class Outcome:
    """How each generation ended. by_index: by its place in the work. latencies: seconds between tokens.

    refusals: seconds until told that it was too much.
    """

    done: list[Done] = field(default_factory=list)
    by_index: dict[int, Done] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    failures: list[KVCacheError] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(done.usage.completion_tokens for done in self.done)

    @property
    def by_worker(self) -> dict[str, int]:
        """How many each worker ended."""
        names = sorted(done.worker_id for done in self.done)
        return {name: names.count(name) for name in names}

    def figures(self) -> dict[str, object]:
        """What a person wants to know of it."""
        total = len(self.done) + len(self.refusals) + len(self.failures)
        return {
            "ended well": f"{len(self.done)} of {total}",
            "refused": len(self.refusals),
            "failed": len(self.failures),
            "tokens/s": self.num_tokens / self.seconds,
            **percentiles("first token", [done.timings.ttft_s for done in self.done]),
            **percentiles("next token", self.latencies),
        }


async def at_once(client: AsyncClient, work: Iterable[Sent]) -> Outcome:
    """Send all of it now, and wait for all of it."""
    return await at_rate(client, work, None)


async def at_rate(client: AsyncClient, work: Iterable[Sent], per_second: float | None) -> Outcome:
    """Send so many a second, whether or not those before have ended (None: all at once), and wait for all of it."""
    outcome, began = Outcome(), time.monotonic()
    async with asyncio.TaskGroup() as group:
        for index, sent in enumerate(work):
            if per_second is not None:
                await asyncio.sleep(began + index / per_second - time.monotonic())
            group.create_task(_run(client, sent, index, outcome))
    outcome.seconds = time.monotonic() - began
    return outcome


async def _run(client: AsyncClient, sent: Sent, index: int, outcome: Outcome) -> None:
    began = time.monotonic()
    times: list[float] = []
    num_tokens = 0
    generation = client.generate(
        token_ids=sent.prompt,
        max_tokens=sent.num_tokens,
        temperature=0.0,
        ignore_eos=True,
        seq_id=sent.seq_id,
        cache_salt=sent.salt,
        logprobs=sent.logprobs,
    )
    try:
        async for event in generation:
            if isinstance(event, Token):
                assert event.seq == num_tokens, "tokens come in order, none twice"
                num_tokens += 1
                times.append(time.monotonic())
        done = await generation.result()
    except Overloaded:
        outcome.refusals.append(time.monotonic() - began)
    except KVCacheError as error:
        outcome.failures.append(error)
    else:
        assert done.usage.prompt_tokens == len(sent.prompt)
        assert done.usage.completion_tokens == num_tokens == sent.num_tokens
        outcome.done.append(done)
        outcome.by_index[index] = done
        outcome.latencies += [after - before for before, after in pairwise(times)]
