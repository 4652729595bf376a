"""Many requests at once, for long, in bursts, of all kinds, and under faults: every one ends right, and is counted."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import pytest

if __name__ == "__main__":  # first, as only pytest makes the imports below work
    raise SystemExit(pytest.main([__file__, "-v", "-s", *sys.argv[1:]]))

from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.counters import counters, until_counted
from tests.harness.figures import ms, percentiles, show
from tests.harness.generations import Reader, assert_same_words
from tests.harness.services import SECOND_BROKER_INFLIGHT
from tests.harness.waiting import until
from tests.harness.workloads import Outcome, Sent, at_once, at_rate, random_prompt
from tests.tensor_utils import assert_same, random_pair
from tests.test_utils import Sequences

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NUM_TOKENS = 8
SUSTAINED_PER_SECOND = 2.0
SUSTAINED_S = 30
LOAD_SHARE = 0.7
LOAD_S = 8
REFUSED_WITHIN_S = 2.0


def requests(label: str, num: int, prompt_len: int = 32, num_tokens: int = NUM_TOKENS) -> list[Sent]:
    """Different prompts, which share nothing."""
    return [Sent(random_prompt(f"{label} {index}", prompt_len), num_tokens) for index in range(num)]


def assert_all_ended_well(outcome: Outcome, num: int) -> None:
    assert not outcome.failures, outcome.failures
    assert not outcome.refusals
    assert len(outcome.done) == num


@pytest.mark.parametrize("num", [20, 64])
async def test_high_concurrency(client: AsyncClient, num: int) -> None:
    outcome = await at_once(client, requests(f"concurrent {num}", num))
    show(f"{num} at once", outcome.figures() | {"by worker": outcome.by_worker})
    assert_all_ended_well(outcome, num)
    assert outcome.num_tokens == NUM_TOKENS * num
    assert len(outcome.by_worker) == len(await client.workers()), "no worker was idle"


async def test_sustained_load(client: AsyncClient) -> None:
    num = int(SUSTAINED_PER_SECOND * SUSTAINED_S)
    outcome = await at_rate(client, requests("sustained", num), SUSTAINED_PER_SECOND)
    show(f"{SUSTAINED_PER_SECOND:.0f} requests/s for {SUSTAINED_S} s", outcome.figures())
    assert_all_ended_well(outcome, num)
    assert outcome.num_tokens == NUM_TOKENS * num


async def test_sustained_load_at_70_percent_of_capacity(client: AsyncClient) -> None:
    full = await at_once(client, requests("capacity", 32))
    assert_all_ended_well(full, 32)
    capacity = len(full.done) / full.seconds
    num = max(1, int(LOAD_SHARE * capacity * LOAD_S))
    outcome = await at_rate(client, requests("at 70 percent", num), LOAD_SHARE * capacity)
    show(f"70 % of {capacity:.1f} requests/s", outcome.figures())
    assert_all_ended_well(outcome, num)
    # At a rate that it can bear no queue grows: what is left at the last arrival is what was under way.
    assert outcome.seconds <= 2 * LOAD_S + 10


async def test_burst_traffic(client: AsyncClient) -> None:
    async def is_idle() -> bool:
        return all(worker.inflight == worker.running == worker.waiting == 0 for worker in await client.workers())

    for burst in range(3):
        outcome = await at_once(client, requests(f"burst {burst}", 16))
        show(f"burst {burst + 1} of 16", outcome.figures())
        assert_all_ended_well(outcome, 16)
        await until(is_idle, "nothing is left of the burst")


async def test_mixed_workload(client: AsyncClient, sequences: Sequences) -> None:
    """Long prompts, short ones, shared ones, tensors and questions, all at once."""
    shared = random_prompt("shared", 128)
    names = [sequences.new("stored") for _ in range(12)]
    pairs = {name: random_pair("gpt2", 50 + index, seed=index) for index, name in enumerate(names)}

    async def store_and_read(name: str) -> None:
        k, v = pairs[name]
        await client.kv.put(name, 0, k[:40], v[:40])
        assert (await client.kv.append(name, 0, k[40:], v[40:], at=40)).length == len(k)
        assert_same(await client.kv.get(name, 0), k, v)

    async with asyncio.TaskGroup() as group:
        long = group.create_task(at_once(client, requests("long", 3, 400, 8)))
        short = group.create_task(at_once(client, requests("short", 16, 8, 16)))
        alike = [Sent([*shared, index], 8, sequences.new("alike")) for index in range(8)]
        first = group.create_task(at_once(client, alike))
        for name in names:
            group.create_task(store_and_read(name))
        routes = [group.create_task(client.route(name)) for name in names]
    for label, outcome, num in (("long", long, 3), ("short", short, 16), ("alike", first, 8)):
        show(f"mixed: {label}", outcome.result().figures())
        assert_all_ended_well(outcome.result(), num)
    assert {task.result().worker_id for task in routes} <= {worker.worker_id for worker in await client.workers()}
    cached = sum(done.usage.cached_tokens for done in first.result().done)
    assert cached >= 128 * (8 - len(first.result().by_worker)), "each worker computed the shared part once"


async def test_worker_stats_under_load(client: AsyncClient, sequences: Sequences) -> None:
    """What each worker counted is what its clients sent and got, to the token."""
    before = await counters(client)
    shared = random_prompt("counted", 96)
    work = [
        Sent(
            [*shared, *random_prompt(index, 3 + index)] if index % 2 else random_prompt(index, 40 + index),
            5 + index % 7,
        )
        for index in range(32)
    ]
    outcome = await at_once(client, work)
    assert_all_ended_well(outcome, 32)
    k, v = random_pair("smollm2", 10)
    puts = dict.fromkeys(before, 0)
    for seq_id in [sequences.new() for _ in range(20)]:
        await client.kv.put(seq_id, 0, k, v)
        puts[(await client.route(seq_id)).worker_id] += 1
    expected = {}
    for name in before:
        ended = [done.usage for done in outcome.done if done.worker_id == name]
        expected[name] = {
            "prompt_tokens": sum(usage.prompt_tokens for usage in ended),
            "cached_tokens": sum(usage.cached_tokens for usage in ended),
            "completion_tokens": sum(usage.completion_tokens for usage in ended),
            "finished": len(ended),
            "failed": 0,
            "cancelled": 0,
            "puts": puts[name],
            "moved_bytes": puts[name] * (k.nbytes + v.nbytes),
        }
        show(f"{name} counted", expected[name])
    await until_counted(client, before, expected)


async def test_past_capacity_is_refused_at_once_and_by_type(cluster: Cluster) -> None:
    """Through the broker that lets each worker have few requests; nobody retries."""
    room = SECOND_BROKER_INFLIGHT * len(cluster.workers)
    num = room + room // 6
    async with AsyncClient(cluster.urls[1], timeout=180.0, max_retries=0) as client:
        outcome = await at_once(client, requests("too many", num, num_tokens=16))
        show(f"{num} where {room} have room", outcome.figures() | percentiles("refused after", outcome.refusals))
        assert not outcome.failures, outcome.failures
        assert outcome.refusals, "more than there is room for"
        assert len(outcome.done) + len(outcome.refusals) == num
        assert len(outcome.done) / num > 0.8
        assert max(outcome.refusals) < REFUSED_WITHIN_S
        after = await at_once(client, requests("after", 8))
        assert_all_ended_well(after, 8)


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_streams_end_right_when_a_worker_is(cluster: Cluster, fault: str) -> None:
    async with AsyncClient(cluster.url, timeout=180.0) as client:
        work = [replace(sent, logprobs=2) for sent in requests("fault", 8, num_tokens=24)]
        unharmed = await at_once(client, work)
        assert_all_ended_well(unharmed, 8)
        readers = [
            Reader(client.generate(token_ids=sent.prompt, max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2))
            for sent in work
        ]
        running = asyncio.gather(*(reader.read() for reader in readers))
        await until(lambda: all(len(reader.tokens) >= 3 for reader in readers), "every stream has begun")
        starts = [reader.start.worker_id for reader in readers if reader.start is not None]
        victim = max(cluster.workers, key=starts.count)
        hit = [reader for reader in readers if reader.start and reader.start.worker_id == victim and not reader.done]
        assert hit, "the worker has streams"
        if fault == "killed":
            cluster.workers[victim].kill9()
        else:
            cluster.workers[victim].stop()
        await running
        moved = 0
        for index, reader in enumerate(readers):
            assert reader.done is not None, reader.error
            assert_same_words(reader.done, unharmed.by_index[index])
            moved += reader.done.timings.resumes > 0
        assert 0 < moved <= len(hit), "some may have had their last tokens already"
        slowest = max(reader.done.timings.total_s for reader in readers if reader.done is not None)
        show(f"a worker is {fault}", {"streams": 8, "went on elsewhere": moved, "slowest": ms(slowest)})
        cluster.workers[victim].cont()
