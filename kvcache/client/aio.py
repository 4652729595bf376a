"""The asyncio face of the client."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from bus.errors import BadArgument, KVCacheError, WorkerLost
from bus.limits import MAX_PRIORITY
from bus.messages import QueryKind
from bus.stats import ClusterStats, Explanation, Spelling, WorkerView
from kvcache.client import requests
from kvcache.client.config import client_config
from kvcache.client.generation import AsyncGeneration
from kvcache.client.kv import AsyncKV
from kvcache.client.link import Link, new_id
from kvcache.client.prompts import (
    ChatMessages,
    Tools,
    check_index,
    check_label,
    check_traceparent,
    make_prompt,
    optional_name,
)
from kvcache.client.results import Encoding
from kvcache.client.streams import GenerateCall, Wanted
from kvcache.sampling import SamplingFields, SamplingParams, sampling_params

if TYPE_CHECKING:
    from kvcache.hashing import TokenIds

HEALTH_S = 2.0


class AsyncClient:
    """A client of one broker, for one event loop. Connects at first use; `async with` or `aclose()` ends it.

    url: `tcp://HOST:PORT`, `kvc://HOST:PORT` or `ipc:///PATH`; else KVCACHE_URL or KVCACHE_BROKER from the
    environment, else tcp://127.0.0.1:5555. timeout: seconds a request may take that names no `deadline` of its own.
    max_retries: how often a request is tried again that failed for a passing reason. Raises BadArgument.
    """

    def __init__(self, url: str | None = None, *, timeout: float = 60.0, max_retries: int = 2) -> None:
        self._link = Link(client_config(url, timeout, max_retries))
        self.kv = AsyncKV(self._link)

    @property
    def url(self) -> str:
        """The broker's address."""
        return self._link.config.url

    async def __aenter__(self) -> Self:
        self._link.connected()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop what is under way, which ends as `Cancelled`, and disconnect. Safe to call twice."""
        self._link.close()

    def generate(
        self,
        prompt: str | None = None,
        params: SamplingParams | None = None,
        *,
        token_ids: TokenIds | None = None,
        messages: ChatMessages | None = None,
        tools: Tools | None = None,
        seq_id: str | None = None,
        session: str | None = None,
        cache_salt: str | None = None,
        model: str | None = None,
        policy: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        explain: bool = False,
        pull_from: str | None = None,
        label: str | None = None,
        traceparent: str | None = None,
        **sampling: Unpack[SamplingFields],
    ) -> AsyncGeneration:
        """Begin to generate from a prompt, token ids or chat messages; iterate over what is returned.

        params, sampling: `SamplingParams`, or its fields as keywords (`max_tokens=64, temperature=0`); given both,
        keywords win. With n > 1 every output is a request of its own, which share the prompt's KV.
        tools: JSON objects that the chat template may show to the model.
        seq_id: keep the KV under this id, and go on from what it holds. session: keep requests of this name together
        on one worker, as far as its load allows. cache_salt: share prefixes only with requests of the same salt.
        priority: -100 to 100; of those that wait on a worker the lower ones are sooner.
        deadline: seconds for all of it. explain: tell in `Start` why this worker.
        pull_from: have the worker copy what this other worker holds of the prompt, rather than compute it; the
        policy decides that by itself, so this is for measurements. A copy that fails only costs its time.
        label: what the logs of broker and worker call this request, instead of its id.
        traceparent: W3C's, of the span within which you ask; broker and worker add theirs if they are told to trace.
        A stream that loses its worker goes on elsewhere; tokens are never repeated or changed.
        Raises BadArgument or TooLarge at once; all other errors come from the iteration.
        """
        outputs = sampling_params(params, sampling).messages(secrets.randbits(63))
        if seq_id is not None and len(outputs) > 1:
            raise BadArgument("a seq_id names one sequence; with it n must be 1")
        model, salt = optional_name("model", model), optional_name("cache_salt", cache_salt)
        wanted = Wanted(
            prompt=make_prompt(
                prompt,
                token_ids,
                messages,
                model=model,
                cache_salt=salt,
                tools=tools,
                session=optional_name("session", session),
            ),
            sampling=outputs[0],
            model=model,
            seq_id=optional_name("seq_id", seq_id),
            cache_salt=salt,
            policy=optional_name("policy", policy),
            explain=bool(explain),
            priority=check_index("priority", priority, MAX_PRIORITY, least=-MAX_PRIORITY),
            pull_from=optional_name("pull_from", pull_from),
            label=check_label(label),
            trace=check_traceparent(traceparent),
        )
        ends, now = self._link.deadline(deadline), time.monotonic()
        calls = [
            GenerateCall(new_id(), ends, replace(wanted, sampling=output, index=index), now)
            for index, output in enumerate(outputs)
        ]
        return AsyncGeneration(calls, self._link)

    async def route(
        self,
        seq_id: str | None = None,
        *,
        prompt: str | None = None,
        token_ids: TokenIds | None = None,
        messages: ChatMessages | None = None,
        model: str | None = None,
        cache_salt: str | None = None,
        policy: str | None = None,
    ) -> Explanation:
        """Which worker would get a request for this sequence or prompt now, and why. Nothing is dispatched."""
        chain: tuple[bytes, ...] = ()
        if seq_id is None:
            salt, model = optional_name("cache_salt", cache_salt), optional_name("model", model)
            chain = make_prompt(prompt, token_ids, messages, model=model, cache_salt=salt).chain
        elif (prompt, token_ids, messages) != (None, None, None):
            raise BadArgument("give a seq_id or a prompt, not both: a sequence is placed by its id alone")
        name = optional_name("seq_id", seq_id)
        call = requests.route(
            new_id(), self._link.deadline(None), seq_id=name, chain=chain, policy=optional_name("policy", policy)
        )
        return await self._link.ask(call, Explanation)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: ChatMessages | None = None,
        tools: Tools | None = None,
        model: str | None = None,
        special: bool = True,
    ) -> Encoding:
        """The tokens that a prompt, or a chat as the model's template renders it, is made of.

        special: with the special tokens that the model's texts begin with. Raises as `generate` does.
        """
        name = optional_name("model", model)
        made = make_prompt(prompt, None, messages, model=name, cache_salt="", tools=tools)
        call = requests.tokenize(
            new_id(), self._link.deadline(None), kind=made.kind, payload=made.payload, model=name, special=special
        )
        return await self._link.ask(call, Encoding)

    async def detokenize(self, token_ids: TokenIds, *, model: str | None = None) -> str:
        """The text of token ids, special tokens spelled out."""
        return (await self._spell(token_ids, model, each=False))[0]

    async def spell(self, token_ids: TokenIds, *, model: str | None = None) -> tuple[str, ...]:
        """The text of each token id by itself; one that is only part of a character shows as U+FFFD."""
        return await self._spell(token_ids, model, each=True)

    async def _spell(self, token_ids: TokenIds, model: str | None, *, each: bool) -> tuple[str, ...]:
        name = optional_name("model", model)
        call = requests.detokenize(new_id(), self._link.deadline(None), token_ids=token_ids, model=name, each=each)
        return (await self._link.ask(call, Spelling)).texts

    async def workers(self) -> tuple[WorkerView, ...]:
        """The workers as the broker sees them."""
        return (await self._query(QueryKind.WORKERS, self._link.deadline(None))).workers

    async def stats(self) -> ClusterStats:
        """The figures of the broker and, as far as they have reported, of every worker."""
        return await self._query(QueryKind.STATS, self._link.deadline(None))

    async def flush_prefix_cache(self, *, cache_salt: str | None = None, deadline: float | None = None) -> int:
        """Have all workers forget the prefixes that your requests left, or only those of one salt.

        Returns how many blocks there were. What runs keeps what it uses, and what is kept under a seq_id stays.
        """
        salt = None if cache_salt is None else optional_name("cache_salt", cache_salt)
        until = self._link.deadline(deadline)
        num_blocks = 0
        for worker in (await self._query(QueryKind.WORKERS, until)).workers:
            call = requests.flush(new_id(), until, worker_id=worker.worker_id, cache_salt=salt)
            # One that is lost meanwhile has no prefixes any more.
            with suppress(WorkerLost, BadArgument):
                num_blocks += await self._link.ask(call, int)
        return num_blocks

    async def health(self) -> bool:
        """Whether the broker answers within two seconds and has a worker that is ready."""
        self._link.connected()
        seconds = min(HEALTH_S, self._link.config.timeout_s)
        try:
            figures = await self._query(QueryKind.HEALTH, time.monotonic() + seconds)
        except KVCacheError:
            return False
        return figures.healthy

    async def _query(self, kind: QueryKind, deadline: float) -> ClusterStats:
        return await self._link.ask(requests.query(new_id(), deadline, kind), ClusterStats)
