"""Everything at once, for a minute, while workers and broker are killed, frozen, drained and started again.

Clients generate, cancel, go on under names, put, append, read and delete, each keeping a model of what must hold:

- a generation that ends well has the tokens that it has in peace, whatever it went through;
- what is read under a name is what was written last, or a write whose end its client never heard, or nothing; and
  nothing only after a worker was harmed: it is never older, torn or another's;
- every call ends, at the latest soon after its deadline;
- afterwards nothing is left: no call, no stream, and when all is deleted and flushed no block and no page.

Not in CI: `pytest -m chaos tests/chaos`. CHAOS_SEED and CHAOS_SECONDS choose another run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from bus.errors import Conflict, KVCacheError, NotFound
from bus.stats import WorkerView
from kvcache import AsyncClient, Token
from tests.harness.cluster import Cluster, running_cluster
from tests.harness.figures import show
from tests.harness.fixtures import TINY_FLAGS, tiny_model
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until

__all__ = ["tiny_model"]

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
WORKERS = ("worker-1", "worker-2", "worker-3")
DEADLINE_S = 20.0
LATE_S = 3.0
NUM_PROMPTS = 12
NUM_TOKENS = 48
ROW = (2, 16)
STREAM_S = 60.0  # for which the broker keeps a stream that was opened for a generation that never came


def rows(num_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_tokens, *ROW), np.float32)


@dataclass
class Tally:
    """What happened, for whoever reads the output, and when a worker was last harmed."""

    counts: Counter[str] = field(default_factory=Counter)
    harmed_at: float = float("-inf")

    async def call(self, what: str, work: Awaitable[object]) -> object | KVCacheError:
        """The value, or the error that it ended with. Fails if it ends long after its deadline."""
        begun = time.monotonic()
        try:
            result: object | KVCacheError = await work
        except KVCacheError as error:
            result = error
        took = time.monotonic() - begun
        assert took < DEADLINE_S + LATE_S, f"{what} took {took:.1f} s: {result!r:.200}"
        how = type(result).__name__ if isinstance(result, KVCacheError) else "ok"
        assert how not in {"InternalError", "MalformedMessage", "StreamGap", "BadTensor"}, f"{what}: {result!r}"
        self.counts[f"{what}: {how}"] += 1
        return result


@dataclass
class Prompts:
    """Prompts that share beginnings, and the tokens that each gives in peace: greedy, or drawn with penalties."""

    prompts: list[list[int]]
    expected: list[list[int]] = field(default_factory=list)

    def options(self, index: int) -> dict[str, object]:
        if index % 3:
            return {"temperature": 0.0}
        return {"temperature": 1.0, "seed": index, "repetition_penalty": 1.1, "frequency_penalty": 0.2}

    async def tokens(self, client: AsyncClient, index: int, seq_id: str | None = None) -> list[int]:
        generation = client.generate(
            token_ids=self.prompts[index],
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            seq_id=seq_id,
            deadline=DEADLINE_S,
            **self.options(index),  # type: ignore[arg-type]  # fields by their names
        )
        return [event.token_id async for event in generation if isinstance(event, Token)]


def make_prompts() -> Prompts:
    shared = token_prompt(SEED, 80)
    lengths = [9, 17, 33, 48, 64, 70]
    return Prompts([shared[: lengths[i % 6]] + token_prompt(1000 * SEED + i, 10 + 7 * i) for i in range(NUM_PROMPTS)])


async def generate(client: AsyncClient, prompts: Prompts, tally: Tally, draw: random.Random, name: str) -> None:
    """One whole generation, sometimes under a name."""
    index, seq_id = draw.randrange(NUM_PROMPTS), name if draw.random() < 0.4 else None
    tokens = await tally.call("generate", prompts.tokens(client, index, seq_id))
    if not isinstance(tokens, KVCacheError):
        assert tokens == prompts.expected[index], f"prompt {index} gave other tokens than in peace"
    if seq_id is not None and draw.random() < 0.5:
        await tally.call("drop computed", client.kv.delete(seq_id, deadline=DEADLINE_S))


async def give_up(client: AsyncClient, prompts: Prompts, tally: Tally, draw: random.Random, name: str) -> None:
    """A generation whose reader leaves after some tokens, and then perhaps uses its name for something else."""
    index, num_read = draw.randrange(NUM_PROMPTS), draw.randrange(NUM_TOKENS)

    async def read() -> list[int]:
        tokens: list[int] = []
        generation = client.generate(
            token_ids=prompts.prompts[index],
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            seq_id=name,
            deadline=DEADLINE_S,
            **prompts.options(index),  # type: ignore[arg-type]  # as above
        )
        async with generation:
            if num_read:
                async for event in generation:
                    if isinstance(event, Token):
                        tokens.append(event.token_id)
                        if len(tokens) == num_read:
                            break
        return tokens

    tokens = await tally.call("give up", read())
    if not isinstance(tokens, KVCacheError):
        assert tokens == prompts.expected[index][:num_read]
    if draw.random() < 0.5:  # else the name is still the generation's, or free if that left nothing
        await tally.call("delete before", client.kv.delete(name, deadline=DEADLINE_S))
    value = rows(5, draw.randrange(10_000))
    put = await tally.call("put after", client.kv.put(name, 0, value, value, deadline=DEADLINE_S))
    if not isinstance(put, KVCacheError):
        got = await tally.call("get after", client.kv.get(name, 0, deadline=DEADLINE_S))
        if not isinstance(got, KVCacheError):
            assert got.k.tobytes() == value.tobytes(), "what was put is what is read"  # type: ignore[attr-defined]
    await tally.call("delete after", client.kv.delete(name, deadline=DEADLINE_S))


@dataclass
class Stored:
    """One sequence of one owner. may_be: every value that it may have now; the first is the last acknowledged one.

    acked_at: when the first of them was acknowledged, None if it never was or was deleted.
    """

    name: str
    rf: int
    may_be: list[bytes | None] = field(default_factory=lambda: [None])
    acked_at: float | None = None

    async def change(self, client: AsyncClient, tally: Tally, draw: random.Random) -> None:
        known = self.may_be[0] if len(self.may_be) == 1 else None
        if known is not None and draw.random() < 0.4:
            await self._append(client, tally, draw, known)
        elif draw.random() < 0.85:
            num_tokens = draw.choice((1, 7, 300, 9000))
            value = rows(num_tokens, draw.randrange(1_000_000))
            work = client.kv.put(self.name, 0, value, value, rf=self.rf, deadline=DEADLINE_S)
            self._note(await tally.call(f"put rf={self.rf}", work), value.tobytes())
        else:
            deleted = await tally.call("delete", client.kv.delete(self.name, deadline=DEADLINE_S))
            self._note(None if isinstance(deleted, NotFound) else deleted, None)

    async def _append(self, client: AsyncClient, tally: Tally, draw: random.Random, known: bytes) -> None:
        at = len(known) // rows(1, 0).nbytes
        more = rows(draw.choice((1, 40)), draw.randrange(1_000_000))
        work = client.kv.append(self.name, 0, more, more, at=at, deadline=DEADLINE_S)
        result = await tally.call("append", work)
        if not isinstance(result, NotFound | Conflict):  # these changed nothing
            self._note(result, known + more.tobytes())

    def _note(self, result: object, value: bytes | None) -> None:
        if isinstance(result, KVCacheError):
            self.may_be.append(value)
        else:
            self.may_be = [value]
            self.acked_at = None if value is None else time.monotonic()

    async def look(self, client: AsyncClient, tally: Tally) -> None:
        got = await tally.call(f"get rf={self.rf}", client.kv.get(self.name, 0, deadline=DEADLINE_S))
        if isinstance(got, NotFound):
            may_be_lost = self.acked_at is None or tally.harmed_at > self.acked_at - 2.0
            assert may_be_lost or None in self.may_be, f"{self.name} is lost, and nobody was harmed"
        elif not isinstance(got, KVCacheError):
            k, v = got.k.tobytes(), got.v.tobytes()  # type: ignore[attr-defined]
            assert k == v, "K and V are of different writes"
            assert k in self.may_be, f"{self.name} holds what was not its last value: {len(k)} bytes"


async def live(until_s: float, step: Callable[[], Awaitable[None]], draw: random.Random) -> None:
    while time.monotonic() < until_s:
        await step()
        await asyncio.sleep(draw.random() * 0.05)


async def harm(cluster: Cluster, tally: Tally, draw: random.Random, until_s: float) -> None:
    """One fault after the other; at most one process is down at a time."""
    while time.monotonic() < until_s:
        name = draw.choice(WORKERS)
        node, kind = (
            cluster.workers[name],
            draw.choice(("kill", "freeze", "freeze", "blink", "blink", "drain", "broker")),
        )
        tally.counts[f"harm: {kind}"] += 1
        match kind:
            case "kill":
                node.kill9()
            case "freeze" | "blink":
                node.stop()
            case "drain":
                node.term()
            case "broker":
                cluster.broker.kill9()
        tally.harmed_at = time.monotonic()
        await asyncio.sleep(0.3 if kind == "blink" else 0.5 + 2.5 * draw.random())
        if kind == "drain":
            await asyncio.to_thread(node.wait, 40.0)
        await asyncio.to_thread(cluster.heal)
        tally.harmed_at = time.monotonic()
        await asyncio.sleep(1.0 + 2.0 * draw.random())


async def is_clean(client: AsyncClient) -> bool:
    """Whether nothing is left of anything, anywhere."""
    for info in await client.kv.list():
        with suppress(NotFound):
            await client.kv.delete(info.seq_id)
    await client.flush_prefix_cache()
    stats = await client.stats()
    leftovers = [one for view in stats.workers for one in left_on(view)]
    broker = stats.broker
    leftovers += [f"broker: {broker.inflight} calls"] * bool(broker.inflight)
    leftovers += [f"broker: {broker.streams} streams"] * bool(broker.streams)
    leftovers += [f"broker: {broker.waiting_copies} copies"] * bool(broker.waiting_copies)
    return not leftovers


def left_on(view: WorkerView) -> list[str]:
    if view.stats is None or view.inflight or view.running or view.waiting:
        return [f"{view.worker_id}: {view.inflight} calls, {view.running} run, {view.waiting} wait"]
    blocks = sum(model.pool.num_blocks - model.pool.free_blocks for model in view.stats.models)
    store = view.stats.store
    found = [f"{view.worker_id}: {blocks} blocks"] * bool(blocks)
    return found + [f"{view.worker_id}: {store.used_bytes} bytes of {store.sequences}"] * bool(store.used_bytes)


@pytest.fixture
async def cluster(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Cluster]:
    with running_cluster(tmp_path) as cluster:
        cluster.add_broker()
        for name in WORKERS:
            cluster.add_worker(name, "--model", str(tiny_model), *TINY_FLAGS)
        await asyncio.to_thread(cluster.wait_ready)
        yield cluster


async def test_what_must_hold_holds_whatever_happens(cluster: Cluster) -> None:
    prompts, tally, draw = make_prompts(), Tally(), random.Random(SEED)
    async with AsyncClient(cluster.url, timeout=DEADLINE_S, max_retries=5) as client:
        for index in range(NUM_PROMPTS):
            prompts.expected.append(await prompts.tokens(client, index))
        until_s = time.monotonic() + SECONDS
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    own, name = random.Random(f"{SEED} {number}"), f"computed {number}"
                    step = generate if number % 2 else give_up
                    group.create_task(
                        live(until_s, lambda s=step, o=own, n=name: s(client, prompts, tally, o, n), own)  # type: ignore[misc]
                    )
                for number in range(6):
                    own = random.Random(f"{SEED} stored {number}")
                    stored = Stored(f"stored {number}", rf=1 + number % 2)

                    async def step_of(one: Stored = stored, own: random.Random = own) -> None:
                        await one.change(client, tally, own)
                        for _ in range(2):
                            await one.look(client, tally)

                    group.create_task(live(until_s, step_of, own))
                group.create_task(harm(cluster, tally, draw, until_s))
        finally:
            show(f"chaos, seed {SEED}, {SECONDS:.0f} s", dict(sorted(tally.counts.items())))
        await asyncio.to_thread(cluster.heal)
        await until(lambda: is_clean(client), "nothing is left", STREAM_S + 30.0)
