"""The face of the client for code without asyncio: the same methods, served by one event loop in one thread.

Any thread may use a `Client`, at any time. Nothing here decides anything; `AsyncClient` does, and of calls with one
value on the KV plane, which are made in their caller's thread, `requests`.
"""

from __future__ import annotations

import weakref
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from bus.stats import ClusterStats, Explanation, WorkerView
from kvcache.client import requests
from kvcache.client.aio import AsyncClient
from kvcache.client.arrays import KVPair
from kvcache.client.generation import AsyncGeneration
from kvcache.client.kv import AsyncKV, Sequences
from kvcache.client.link import new_id
from kvcache.client.loop_thread import LoopThread
from kvcache.client.prompts import ChatMessages, Tools
from kvcache.client.results import Done, Encoding, Event, KvAck
from kvcache.sampling import SamplingFields, SamplingParams

if TYPE_CHECKING:
    from kvcache.client.arrays import Array
    from kvcache.hashing import TokenIds


class Client:
    """A client of one broker, for any number of threads. `with` or `close()` ends it; so does the interpreter's exit.

    url: `tcp://HOST:PORT`, `kvc://HOST:PORT` or `ipc:///PATH`; else KVCACHE_URL or KVCACHE_BROKER from the
    environment, else tcp://127.0.0.1:5555. timeout: seconds a request may take that names no `deadline` of its own.
    max_retries: how often a request is tried again that failed for a passing reason. Raises BadArgument.
    """

    def __init__(self, url: str | None = None, *, timeout: float = 60.0, max_retries: int = 2) -> None:
        self._client = AsyncClient(url, timeout=timeout, max_retries=max_retries)
        self._thread = LoopThread("kvcache-client")
        self._close = weakref.finalize(self, _stop, self._thread, self._client)
        self.kv = KV(self._thread, self._client.kv)

    @property
    def url(self) -> str:
        """The broker's address."""
        return self._client.url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is under way, which ends as `Cancelled`, and disconnect. Safe to call twice."""
        self._close()

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
    ) -> Generation:
        """Begin to generate from a prompt, token ids or chat messages; iterate over what is returned.

        params, sampling: `SamplingParams`, or its fields as keywords (`max_tokens=64, temperature=0`); given both,
        keywords win. With n > 1 every output is a request of its own, which share the prompt's KV.
        tools: JSON objects that the chat template may show to the model.
        seq_id: keep the KV under this id, and go on from what it holds. session: keep requests of this name together
        on one worker, as far as its load allows. cache_salt: share prefixes only with requests of the same salt.
        priority: -100 to 100; of those that wait on a worker the lower ones are sooner. deadline: seconds for all of
        it. explain: tell in `Start` why this worker.
        pull_from: have the worker copy what this other worker holds of the prompt, rather than compute it; the
        policy decides that by itself, so this is for measurements. A copy that fails only costs its time.
        label: what the logs of broker and worker call this request, instead of its id.
        traceparent: W3C's, of the span within which you ask; broker and worker add theirs if they are told to trace.
        A stream that loses its worker goes on elsewhere; tokens are never repeated or changed.
        Raises BadArgument or TooLarge at once; all other errors come from the iteration.
        """

        async def begin() -> AsyncGeneration:
            return self._client.generate(
                prompt,
                params,
                token_ids=token_ids,
                messages=messages,
                tools=tools,
                seq_id=seq_id,
                session=session,
                cache_salt=cache_salt,
                model=model,
                policy=policy,
                priority=priority,
                deadline=deadline,
                explain=explain,
                pull_from=pull_from,
                label=label,
                traceparent=traceparent,
                **sampling,
            )

        return Generation(self._thread, self._thread.call(begin()))

    def route(
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
        return self._thread.call(
            self._client.route(
                seq_id,
                prompt=prompt,
                token_ids=token_ids,
                messages=messages,
                model=model,
                cache_salt=cache_salt,
                policy=policy,
            )
        )

    def tokenize(
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
        return self._thread.call(
            self._client.tokenize(prompt, messages=messages, tools=tools, model=model, special=special)
        )

    def detokenize(self, token_ids: TokenIds, *, model: str | None = None) -> str:
        """The text of token ids, special tokens spelled out."""
        return self._thread.call(self._client.detokenize(token_ids, model=model))

    def spell(self, token_ids: TokenIds, *, model: str | None = None) -> tuple[str, ...]:
        """The text of each token id by itself; one that is only part of a character shows as U+FFFD."""
        return self._thread.call(self._client.spell(token_ids, model=model))

    def workers(self) -> tuple[WorkerView, ...]:
        """The workers as the broker sees them."""
        return self._thread.call(self._client.workers())

    def stats(self) -> ClusterStats:
        """The figures of the broker and, as far as they have reported, of every worker."""
        return self._thread.call(self._client.stats())

    def flush_prefix_cache(self, *, cache_salt: str | None = None, deadline: float | None = None) -> int:
        """Have all workers forget the prefixes that your requests left, or only those of one salt.

        Returns how many blocks there were. What runs keeps what it uses, and what is kept under a seq_id stays.
        """
        return self._thread.call(self._client.flush_prefix_cache(cache_salt=cache_salt, deadline=deadline))

    def health(self) -> bool:
        """Whether the broker answers within two seconds and has a worker that is ready."""
        return self._thread.call(self._client.health())


class KV:
    """The KV plane: tensors by sequence and layer, `[length, num_kv_heads, head_dim]`, bit for bit.

    Every method takes `deadline`, in seconds, in place of the client's timeout.
    """

    def __init__(self, thread: LoopThread, kv: AsyncKV) -> None:
        self._thread = thread
        self._kv = kv
        self._link = kv.link

    def put(self, seq_id: str, layer: int, k: Array, v: Array, *, rf: int = 1, deadline: float | None = None) -> KvAck:
        """Store K and V of a layer, in place of what was there. k, v: numpy or torch, of one dtype.

        With rf=2, two workers have it before it is acknowledged (as `mem2`); the first write of a sequence says so.
        Raises BadTensor, NoSpace, Conflict (the sequence is a generation's, or was written with rf=1) or NoWorkers
        (there are not `rf`) besides what any request may.
        """
        call = requests.put(new_id(), self._link.deadline(deadline), seq_id, layer, k, v, rf)
        return self._thread.ask(self._link, call, KvAck)

    def append(
        self,
        seq_id: str,
        layer: int,
        k: Array,
        v: Array,
        *,
        at: int | None = None,
        rf: int = 1,
        deadline: float | None = None,
    ) -> KvAck:
        """Add tokens to the end of a layer; with `at`, only if that is its length. rf: as in `put`.

        Raises Conflict, whose `current_len` is the length, if it is another one.
        """
        call = requests.append(new_id(), self._link.deadline(deadline), seq_id, layer, k, v, at, rf)
        return self._thread.ask(self._link, call, KvAck)

    def get(
        self, seq_id: str, layer: int, start: int = 0, stop: int | None = None, *, deadline: float | None = None
    ) -> KVPair:
        """K and V of the tokens `start .. stop`, or to the end. Raises NotFound."""
        call = requests.get(new_id(), self._link.deadline(deadline), new_id, seq_id, layer, start, stop)
        return self._thread.ask(self._link, call, KVPair)

    def length(self, seq_id: str, layer: int, *, deadline: float | None = None) -> int:
        """How many tokens a layer holds. Raises NotFound."""
        call = requests.length(new_id(), self._link.deadline(deadline), seq_id, layer)
        return self._thread.ask(self._link, call, int)

    def delete(self, seq_id: str, layer: int | None = None, *, deadline: float | None = None) -> int:
        """Forget a sequence, or one layer of it; returns how many layers there were."""
        call = requests.delete(new_id(), self._link.deadline(deadline), seq_id, layer)
        return self._thread.ask(self._link, call, int)

    def pin(self, seq_id: str, ttl: float | None = None, *, deadline: float | None = None) -> None:
        """Keep a sequence from eviction, for `ttl` seconds or until it is unpinned. Raises NotFound."""
        self._thread.ask(self._link, requests.pin(new_id(), self._link.deadline(deadline), seq_id, ttl), int)

    def unpin(self, seq_id: str, *, deadline: float | None = None) -> None:
        """Let a sequence be evicted again. Raises NotFound."""
        self._thread.ask(self._link, requests.unpin(new_id(), self._link.deadline(deadline), seq_id), int)

    def list(self, prefix: str = "", limit: int | None = None, *, deadline: float | None = None) -> Sequences:
        """All sequences whose id begins with `prefix`, by id: those of every worker, at most `limit`."""
        return self._thread.call(self._kv.list(prefix, limit, deadline=deadline))


class Generation:
    """A generation: iterate over its `Start`, `Token`s and `Done`, or take `text()` or `result()`.

    With n > 1 the outputs' events come interleaved, each with its `index`; `results()` gives them in that order.
    As a context manager it is cancelled when left before its end, and so it is when nobody holds it any more. A
    reader that falls behind makes the worker pause. One reader at a time; `cancel` may be called by another thread.
    """

    def __init__(self, thread: LoopThread, generation: AsyncGeneration) -> None:
        self._thread = thread
        self._generation = generation
        self._events: deque[Event] = deque()

    @property
    def request_id(self) -> str:
        """What names it in errors and in the logs of broker and worker."""
        return self._generation.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if not self._events:
            self._events.extend(self._thread.call(self._generation.next_batch()))
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def text(self) -> str:
        """The whole text; reads what is left of the stream. Raises BadArgument if there are several outputs."""
        return self.result().text

    def result(self) -> Done:
        """How it ended; reads what is left of the stream. Raises BadArgument if there are several outputs."""
        result = self._thread.call(self._generation.result())
        self._events.clear()
        return result

    def results(self) -> list[Done]:
        """How each output ended, in the order of their `index`; reads what is left of the stream."""
        self._events.clear()
        return self._thread.call(self._generation.results())

    def cancel(self) -> None:
        """Stop it, unless it has ended or its client is closed; whoever reads on gets `Cancelled`."""
        if self._thread.is_alive:
            self._thread.call(self._generation.cancel())


def _stop(thread: LoopThread, client: AsyncClient) -> None:
    thread.stop(client.aclose())
