"""Everything that can go wrong with a pull: the generation computes what did not come, and its tokens are right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from kvcache import AsyncClient
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.fixtures import TINY_FLAGS
from tests.harness.generations import greedy
from tests.harness.models import Reference
from tests.harness.peers import failures_of, raw_peer
from tests.harness.placement import owned_by
from tests.harness.prompts import token_prompt
from tests.harness.waiting import until, until_serving

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]

LONG = 281 * 32 + 7  # tokens whose KV takes five chunks
CHUNK = 64 * 32  # tokens whose KV takes one


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("peer.chunk:kill9@3", ErrorCode.CONNECTION_LOST),
        ("peer.chunk:stop@3", ErrorCode.CONNECTION_LOST),
        ("peer.chunk:corrupt@3", ErrorCode.CORRUPT),
    ],
)
async def test_holder_that_fails_in_the_middle_only_costs_time(
    fault: str, code: ErrorCode, cluster: Cluster, client: AsyncClient, tiny_model: Path, reference: Reference
) -> None:
    prompt = token_prompt(81, LONG)
    doomed = cluster.add_worker("doomed", "--model", str(tiny_model), *TINY_FLAGS, KVCACHE_FAILPOINT=fault)
    try:
        await until_serving(client, "doomed")
        (there,) = await owned_by(client, "doomed", 1)
        (here,) = await owned_by(client, "worker-1", 1)
        expected, _ = await greedy(client, prompt, 6, seq_id=there, cache_salt=fault)
        assert expected == reference.greedy(prompt, 6)
        before = await failures_of(client, "worker-1", code)
        tokens, done = await greedy(client, prompt, 6, seq_id=here, cache_salt=fault, pull_from="doomed")
        assert tokens == expected
        assert (done.worker_id, done.timings.resumes) == ("worker-1", 0)
        assert done.usage.cached_tokens < LONG - CHUNK
        if code is ErrorCode.CORRUPT:
            assert done.usage.cached_tokens >= CHUNK, "what had come whole is used"

        async def is_counted() -> bool:
            return await failures_of(client, "worker-1", code) == before + 1

        await until(is_counted, "the failure is in the worker's figures")
    finally:
        if doomed.is_running:
            doomed.kill9()  # a stopped process would not hear that it is to drain
        cluster.drop_worker("doomed")


async def test_frozen_holder_and_a_short_deadline(cluster: Cluster, client: AsyncClient, reference: Reference) -> None:
    """The budget of a pull is half of what remains at most, so that the other half is left to compute."""
    prompt = token_prompt(82, 400)
    (there,) = await owned_by(client, "worker-1", 1)
    (here,) = await owned_by(client, "worker-2", 1)
    await greedy(client, prompt, 4, seq_id=there)
    cluster.workers["worker-1"].stop()
    tokens, done = await greedy(client, prompt, 4, seq_id=here, pull_from="worker-1", deadline=1.5)
    assert tokens == reference.greedy(prompt, 4)
    assert (done.usage.cached_tokens, done.timings.resumes) == (0, 0)
    cluster.workers["worker-1"].cont()


async def test_stranger_gets_nothing_and_harms_nobody(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    prompt = token_prompt(83, 200)
    (there,) = await owned_by(client, "worker-1", 1)
    (here,) = await owned_by(client, "worker-2", 1)
    await greedy(client, prompt, 4, seq_id=there)
    async with raw_peer(client, "worker-1") as stranger:
        for junk in ([b"junk"], [b""], [b"\x00" * 12, b"x" * 70_000], [wire.encode(m.Beat(beat=1))]):
            stranger.send_frames(*junk)
        req_id = raw.new_id()
        ask = m.PullBlocks(
            req_id=req_id,
            ticket=raw.new_id(),
            worker_id="worker-2",
            fingerprint="f",
            dtype="float32",
            layout_version=1,
            block_size=32,
            cache_salt="",
            start=0,
            digest=bytes(32),
            credit=8,
            payload=wire.describe([bytes(128)]),
        )
        stranger.send(ask, bytes(128))
        failed, _ = await stranger.expect(m.Failed, lambda message: message.req_id == req_id)
        assert failed.code == ErrorCode.FORBIDDEN
    tokens, done = await greedy(client, prompt, 4, seq_id=here, pull_from="worker-1")
    assert (tokens, done.usage.cached_tokens) == (reference.greedy(prompt, 4), 192)


async def test_holder_without_the_blocks_says_so(cluster: Cluster, client: AsyncClient, reference: Reference) -> None:
    (here,) = await owned_by(client, "worker-2", 1)
    prompt = token_prompt(84, 100)
    before = await failures_of(client, "worker-2", ErrorCode.NOT_FOUND)
    tokens, done = await greedy(client, prompt, 4, seq_id=here, pull_from="worker-1")
    assert (tokens, done.usage.cached_tokens) == (reference.greedy(prompt, 4), 0)

    async def is_counted() -> bool:
        return await failures_of(client, "worker-2", ErrorCode.NOT_FOUND) == before + 1

    await until(is_counted, "the refusal is in the worker's figures")


async def test_many_pulls_at_once_all_end_with_the_right_tokens(
    cluster: Cluster, client: AsyncClient, reference: Reference
) -> None:
    """More than a worker does at a time; those over the limit compute."""
    prompts = [token_prompt(90 + index, 1200) for index in range(12)]
    there = await owned_by(client, "worker-1", 12)
    here = await owned_by(client, "worker-2", 12)
    expected = [
        tokens
        for tokens, _ in await asyncio.gather(
            *(greedy(client, prompt, 3, seq_id=name) for prompt, name in zip(prompts, there, strict=True))
        )
    ]
    pulled = await asyncio.gather(
        *(
            greedy(client, prompt, 3, seq_id=name, pull_from="worker-1")
            for prompt, name in zip(prompts, here, strict=True)
        )
    )
    assert [tokens for tokens, _ in pulled] == expected
    assert any(done.usage.cached_tokens == 1184 for _, done in pulled)
