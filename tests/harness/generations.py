"""Generations of known tokens, alone and as a crowd, and whether what came is what was generated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from bus.errors import KVCacheError
from kvcache import AsyncClient, AsyncGeneration, Done, Start, Token
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

TIE = 1e-3
"""Logprobs so close are one in float32: some tens of times what they differ by from step to step."""


async def greedy(
    client: AsyncClient,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    model: str | None = None,
    seq_id: str | None = None,
    cache_salt: str | None = None,
    pull_from: str | None = None,
    deadline: float | None = None,
) -> tuple[list[int], Done]:
    """The tokens of one greedy generation of exactly this length."""
    generation = client.generate(
        token_ids=prompt,
        max_tokens=num_tokens,
        temperature=0.0,
        ignore_eos=True,
        model=model,
        seq_id=seq_id,
        cache_salt=cache_salt,
        pull_from=pull_from,
        deadline=deadline,
    )
    tokens = [event.token_id async for event in generation if isinstance(event, Token)]
    return tokens, await generation.result()


def assert_same_words(found: Done, expected: Done) -> None:
    """That two greedy generations with two `logprobs` say the same, up to where either of two words could have come.

    From a tie on they may go apart, since whoever else is in a step may change a rounding.
    """
    assert len(found.tokens) == len(expected.tokens) > 0
    for ours, theirs in zip(found.tokens, expected.tokens, strict=True):
        if ours.token_id != theirs.token_id:
            first, second = theirs.top_logprobs
            assert {ours.token_id, theirs.token_id} == {first.token_id, second.token_id}, (found.text, expected.text)
            assert first.logprob - second.logprob < TIE, (found.text, expected.text)
            return


@dataclass(eq=False)
class Reader:
    """One generation while it is read. `error`: how it ended if it did not end well."""

    generation: AsyncGeneration
    start: Start | None = None
    tokens: list[int] = field(default_factory=list)
    done: Done | None = None
    error: KVCacheError | None = None

    async def read(self) -> None:
        with suppress(KVCacheError):
            await self._read()

    async def _read(self) -> None:
        try:
            async for event in self.generation:
                match event:
                    case Start():
                        self.start = event
                    case Token():
                        assert event.seq == len(self.tokens), "tokens come in order, none twice"
                        self.tokens.append(event.token_id)
                    case Done():
                        self.done = event
        except KVCacheError as error:
            self.error = error
            raise


class Crowd:
    """Many generations at once: every other one greedy, the rest drawn with a seed and penalties. All are random
    enough that a token lost, repeated, drawn anew or forgotten in a penalty shows."""

    def __init__(self, num: int, num_tokens: int, *, seq_ids: Sequence[str] = ()) -> None:
        self._num_tokens = num_tokens
        self._prompts = [token_prompt(1000 + index, 24 + index) for index in range(num)]
        self._seq_ids = seq_ids
        self.readers: list[Reader] = []

    async def run(self, client: AsyncClient, deadline: float = 60.0) -> list[list[int]]:
        """Read all to their ends and return their tokens, or nothing where one ended badly."""
        self.readers = [Reader(self._begin(client, index, deadline)) for index in range(len(self._prompts))]
        await asyncio.gather(*(reader.read() for reader in self.readers))
        return [reader.tokens if reader.done is not None else [] for reader in self.readers]

    async def begun(self, client: AsyncClient) -> asyncio.Task[list[list[int]]]:
        """Come back as soon as every stream has begun; the task ends as `run` does."""
        running = asyncio.create_task(self.run(client))
        await until(
            lambda: bool(self.readers) and all(len(reader.tokens) >= 5 for reader in self.readers),
            "every stream has begun",
        )
        return running

    @property
    def errors(self) -> list[KVCacheError]:
        return [reader.error for reader in self.readers if reader.error is not None]

    @property
    def num_moved(self) -> int:
        """How many went on after a fault."""
        return sum(1 for reader in self.readers if reader.done is not None and reader.done.timings.resumes > 0)

    def on(self, worker_id: str) -> list[Reader]:
        """Those that began on this worker."""
        return [reader for reader in self.readers if reader.start is not None and reader.start.worker_id == worker_id]

    def _begin(self, client: AsyncClient, index: int, deadline: float) -> AsyncGeneration:
        return client.generate(
            token_ids=self._prompts[index],
            max_tokens=self._num_tokens,
            temperature=0.0 if index % 2 else 1.0,
            seed=index,
            repetition_penalty=1.0 if index % 2 else 1.1,
            frequency_penalty=0.0 if index % 2 else 0.2,
            ignore_eos=True,
            deadline=deadline,
            seq_id=self._seq_ids[index] if self._seq_ids else None,
        )
