"""Who may see a stream: its topic exactly, and nothing that merely matches it."""

from __future__ import annotations

import secrets

import pytest

from bus import messages as m
from bus import wire
from bus.topics import topic_of
from kvcache import AsyncClient
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

TOKENS = m.Sampling(max_tokens=60, temperature=0.0, ignore_eos=True)


async def test_only_the_exact_topic_of_an_open_stream_shows_anything(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_client(cluster.url) as owner, raw.raw_client(cluster.url) as spy:
        refused = (await client.stats()).broker.refused_subscriptions
        stream_id = await owner.open_stream()
        topic = topic_of(stream_id)
        guesses = [b"", b"S", b"S|", topic[:10], topic[:-1], topic + b"\x00", topic_of(secrets.token_bytes(16))]
        for guess in guesses:
            spy.subscribe(guess)

        async def are_refused() -> bool:
            return (await client.stats()).broker.refused_subscriptions >= refused + len(guesses)

        await until(are_refused, "every guess was looked at and refused")
        message, payload = raw.generate(raw.new_id(), stream_id, b"hello", TOKENS)
        owner.send(message, *payload)
        assert isinstance(await owner.final(message.req_id), m.StreamEnd)
        await owner.published()
        assert spy.was_published() == []


async def test_what_is_published_is_the_stream_in_order_and_no_more(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as owner:
        stream_id = await owner.open_stream()
        message, payload = raw.generate(raw.new_id(), stream_id, b"hello", TOKENS)
        owner.send(message, *payload)
        tokens: list[int] = []
        while len(tokens) < 60:
            topic, *frames = await owner.published()
            assert topic == topic_of(stream_id)
            said = wire.decode(frames).message
            if isinstance(said, m.StreamTokens):
                assert (said.epoch, said.seq) == (0, len(tokens))
                tokens += said.tokens


async def test_stream_is_closed_to_subscribers_once_it_has_ended(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_client(cluster.url) as owner, raw.raw_client(cluster.url) as late:
        stream_id = await owner.open_stream()
        message, payload = raw.generate(raw.new_id(), stream_id, b"hello", TOKENS)
        owner.send(message, *payload)
        await owner.final(message.req_id)
        refused = (await client.stats()).broker.refused_subscriptions
        late.subscribe(topic_of(stream_id))

        async def is_refused() -> bool:
            return (await client.stats()).broker.refused_subscriptions > refused

        await until(is_refused, "the subscription was refused")


async def test_generating_on_a_stream_that_is_not_open_is_refused(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        message, payload = raw.generate(raw.new_id(), secrets.token_bytes(16), b"hello", TOKENS)
        peer.send(message, *payload)
        assert "OpenStream" in (await peer.failure(message.req_id)).message


async def test_filter_too_long_for_any_topic_is_cut_off_before_it_is_looked_at(
    cluster: Cluster, client: AsyncClient
) -> None:
    refused = (await client.stats()).broker.refused_subscriptions
    async with raw.raw_client(cluster.url) as noisy:
        for _ in range(5):
            noisy.subscribe(secrets.token_bytes(500))  # the port takes 64 bytes
        done = await client.generate("hello", max_tokens=60, ignore_eos=True, temperature=0.0).result()
        assert done.usage.completion_tokens == 60
    assert (await client.stats()).broker.refused_subscriptions == refused
