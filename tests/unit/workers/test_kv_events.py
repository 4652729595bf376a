"""Block events in vLLM's schema, read by a follower that knows only that schema."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import ConnectionLost, Forbidden
from bus.security import SecurityConfig
from bus.sockets import Context
from kvcache.hashing import HashSeed, block_digests, encode_token_ids
from tests.harness.waiting import until
from workers.batch import BlockId
from workers.block_changes import AllDropped, BlockAdded, BlockChange, BlockDropped
from workers.kv_event_sockets import SLICE_BATCHES, KvEventsConfig, KvEventSockets
from workers.kv_events import KvEventLog
from workers.prefix_cache import PrefixCache

SEED = HashSeed(model="m", dtype="float32", block_size=2)
SALTED = HashSeed(model="m", dtype="float32", block_size=2, cache_salt="pepper")
ALONE = HashSeed(model="m", dtype="float32", block_size=2, adapter="ab12")
TOPIC = b"kv@w@m"
END = b"\xff" * 8


class Follower:
    """What a router makes of the events: for each block, the tokens of the whole prefix that it ends.

    It knows of a batch `[ts, events, rank]` and of events `[tag, ...]` what the schema's first release had, in which
    fields that came later are ignored, and it misses nothing without noticing.
    """

    def __init__(self) -> None:
        self.prefixes: dict[int, tuple[int, ...]] = {}
        self.next_seq = 0

    def take(self, seq: bytes, payload: bytes) -> None:
        assert len(seq) == 8
        assert int.from_bytes(seq, "big") == self.next_seq, "a batch was missed"
        self.next_seq += 1
        ts, events, rank = msgspec.msgpack.decode(payload)
        assert isinstance(ts, float)
        assert rank == 0
        for tag, *fields in events:
            getattr(self, f"_{tag}")(*fields)

    def _BlockStored(
        self, hashes: list[int], parent: int | None, tokens: list[int], size: int, lora_id: None, *_: object
    ) -> None:
        assert lora_id is None
        assert len(tokens) == size * len(hashes)
        prefix = () if parent is None else self.prefixes[parent]
        for number, name in enumerate(hashes):
            assert 0 <= name < 1 << 64
            prefix += tuple(tokens[number * size : (number + 1) * size])
            assert name not in self.prefixes, "a block came twice"
            self.prefixes[name] = prefix

    def _BlockRemoved(self, hashes: list[int], *_: object) -> None:
        for name in hashes:
            del self.prefixes[name]

    def _AllBlocksCleared(self) -> None:
        self.prefixes.clear()


def chain(tokens: Sequence[int], seed: HashSeed = SEED) -> list[BlockAdded]:
    """Blocks of two tokens each that follow on each other."""
    digests, data = block_digests(seed, list(tokens)), encode_token_ids(list(tokens))
    return [
        BlockAdded(digest, digests[at - 1] if at else None, data[at * 8 : at * 8 + 8], seed)
        for at, digest in enumerate(digests)
    ]


def number(change: BlockAdded) -> int:
    return int.from_bytes(change.digest[-8:], "big")


def said(log: KvEventLog, *changes: BlockChange) -> list[Any]:
    """The events that these changes are told as."""
    batch = log.add(changes, 5.5)
    assert batch is not None
    ts, events, _ = msgspec.msgpack.decode(batch.payload)
    assert ts == 5.5
    assert isinstance(events, list)
    return events


def test_blocks_that_follow_on_each_other_are_one_event_with_their_parent() -> None:
    one, two, three = chain([1, 2, 3, 4, 5, 6])
    log = KvEventLog(0.0)
    assert said(log, one, two) == [
        ["BlockStored", [number(one), number(two)], None, [1, 2, 3, 4], 2, None, "GPU", None, None]
    ]
    (other,) = chain([9, 9])
    assert said(log, three, other, BlockDropped(three.digest), BlockDropped(two.digest), AllDropped()) == [
        ["BlockStored", [number(three)], number(two), [5, 6], 2, None, "GPU", None, None],
        ["BlockStored", [number(other)], None, [9, 9], 2, None, "GPU", None, None],
        ["BlockRemoved", [number(three), number(two)], "GPU"],
        ["AllBlocksCleared"],
    ]


def test_a_salt_is_told_of_the_first_block_and_not_given_away() -> None:
    log = KvEventLog(0.0)
    one, two, three = chain([1, 2, 3, 4, 5, 6], SALTED)
    (first,) = said(log, one, two)
    assert first[-1] == [[SALTED.root[:8].hex()], None]
    (later,) = said(log, three)
    assert later[-1] is None
    assert b"pepper" not in b"".join(batch[1] for batch in log.replay([bytes(8)]))


def test_blocks_that_only_their_own_request_can_use_are_not_told() -> None:
    log = KvEventLog(0.0)
    assert log.add(chain([1, 2], ALONE), 0.0) is None
    assert len(said(log, *chain([1, 2], ALONE), *chain([1, 2]))) == 1
    assert [seq for seq, _ in log.replay([bytes(8)])] == [bytes(8), (1).to_bytes(8, "big"), END]


def test_what_is_kept_can_be_told_again_from_any_number_on() -> None:
    log = KvEventLog(0.0, kept=3)
    batches = [log.add(chain([at, at]), 0.0) for at in range(5)]  # numbers 1 to 5, after the one that clears
    assert list(log.replay([(4).to_bytes(8, "big")])) == [list(batches[3] or ()), list(batches[4] or ()), [END, b""]]
    assert [seq[-1] for seq, _ in log.replay([bytes(8)])] == [3, 4, 5, 255]
    assert list(log.replay([(6).to_bytes(8, "big")])) == [[END, b""]]
    assert list(log.replay([b"", (5).to_bytes(8, "big")])) == [[b"", *(batches[4] or ())], [b"", END, b""]]


@pytest.mark.parametrize(
    "request_frames", [[], [b""], [b"1234567"], [b"x", bytes(8)], [b"", b"", bytes(8)], [b"9" * 9]]
)
def test_what_is_no_request_has_no_answer(request_frames: list[bytes]) -> None:
    assert list(KvEventLog(0.0).replay(request_frames)) == []


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.lists(st.integers(0, 1), min_size=2, max_size=8), st.booleans()),
        st.tuples(st.just("flush"), st.sampled_from([SEED, SALTED, None])),
        st.tuples(st.just("drop"), st.integers(0, 5)),
    ),
    max_size=20,
)


@given(STEPS)
@settings(deadline=None, max_examples=60)
def test_a_follower_knows_exactly_what_can_be_found(steps: list[tuple[Any, ...]]) -> None:
    cache, log, follower = PrefixCache(6, 2, tells_blocks=True), KvEventLog(0.0), Follower()
    first, _ = log.replay([bytes(8)])
    follower.take(*first)
    seen: dict[int, BlockAdded] = {}
    for step in steps:
        match step:
            case "compute", tokens, is_salted:
                seen |= compute(cache, tokens, SALTED if is_salted else SEED)
            case "flush", seed:
                cache.flush(partial(is_of, seed))
            case "drop", block:
                cache.drop(BlockId(block))
        batch = log.add(cache.take_block_changes(), 0.0)
        if batch is not None:
            follower.take(*batch)
        cache.check()
        for name, tokens in follower.prefixes.items():
            digests = block_digests(seen[name].seed, tokens)
            assert len(cache.longest(digests, encode_token_ids(tokens))) == len(digests)
        assert len(follower.prefixes) == len(cache.pool.kept())


def is_of(seed: HashSeed | None, one: HashSeed) -> bool:
    return seed is None or one == seed


def compute(cache: PrefixCache, tokens: list[int], seed: HashSeed) -> dict[int, BlockAdded]:
    """What a sequence does that finds nothing in the cache and ends at once."""
    added = chain(tokens[: len(tokens) // 2 * 2], seed)
    table = cache.allocate(len(added))
    assert table is not None, "six blocks hold four"
    for at, block in enumerate(added):
        parent = table[at - 1] if at else None
        table[at] = cache.publish(table[at], block.digest, parent, block.tokens, seed)
    cache.pool.unpin(table)
    return {number(block): block for block in added}


def test_nothing_is_kept_of_changes_that_nobody_follows() -> None:
    cache = PrefixCache(6, 2)
    compute(cache, [1, 2], SEED)
    cache.flush()
    assert cache.take_block_changes() == ()


# --- over sockets, with plain ones on the other side ---


@contextmanager
def plain(kind: int, url: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 10_000)
        if kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, b"kv@")
        socket.connect(url)
        yield socket


@contextmanager
def told(folder: Path) -> Iterator[tuple[KvEventSockets, KvEventsConfig]]:
    config = KvEventsConfig(url=f"ipc://{folder}/events", replay_url=f"ipc://{folder}/replay", topic=TOPIC)
    with ExitStack() as stack:
        context = stack.enter_context(Context())
        yield KvEventSockets(context, SecurityConfig(), stack, config), config


async def hear_one(events: KvEventSockets, subscriber: zmq.Socket[bytes]) -> list[bytes]:
    """Publish until the subscription has arrived, and return the first batch that did."""
    numbers = iter(range(1, 1000))

    async def is_heard() -> bool:
        events.publish(chain([next(numbers), 0]))
        return bool(await asyncio.to_thread(subscriber.poll, 50))

    await until(is_heard, "a subscriber hears of blocks", 20.0)
    return subscriber.recv_multipart()


async def test_a_subscriber_gets_three_frames_and_asks_again_for_what_it_missed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        events, config = stack.enter_context(told(tmp_path))
        subscriber = stack.enter_context(plain(zmq.SUB, config.url))
        asker = stack.enter_context(plain(zmq.DEALER, config.replay_url))
        topic, seq, payload = await hear_one(events, subscriber)
        assert topic == TOPIC
        assert int.from_bytes(seq, "big") >= 1, "what came before the subscription is missed"
        follower = Follower()
        asker.send_multipart([b"", follower.next_seq.to_bytes(8, "big")])
        missed = content = b""
        while missed != seq:
            _, missed, content = await asyncio.to_thread(asker.recv_multipart)
            follower.take(missed, content)
        assert content == payload
        assert len(follower.prefixes) == int.from_bytes(seq, "big")
        ts, *_ = msgspec.msgpack.decode(payload)
        assert abs(ts - time.time()) < 3600


async def test_long_replays_are_told_side_by_side_and_one_who_leaves_is_forgotten(tmp_path: Path) -> None:
    with ExitStack() as stack:
        events, config = stack.enter_context(told(tmp_path))
        num_batches = 5 * SLICE_BATCHES
        for at in range(1, num_batches):
            events.publish(chain([at, at]))
        gone = stack.enter_context(plain(zmq.DEALER, config.replay_url))
        askers = [stack.enter_context(plain(zmq.DEALER, config.replay_url)) for _ in range(2)]
        for asker in (gone, *askers):
            asker.send(bytes(8))
        gone.close()
        for asker in askers:
            follower = Follower()
            while True:
                seq, payload = await asyncio.to_thread(asker.recv_multipart)
                if seq == END:
                    break
                follower.take(seq, payload)
            assert follower.next_seq == num_batches


async def test_a_replay_that_has_ended_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.kv_event_sockets.MAX_REPLAYS", 1)
    with told(tmp_path) as (_, config):
        for _ in range(3):
            with plain(zmq.DEALER, config.replay_url) as asker:
                asker.send(bytes(8))
                Follower().take(*await asyncio.to_thread(asker.recv_multipart))
                seq, _ = await asyncio.to_thread(asker.recv_multipart)
                assert seq == END


async def test_a_req_socket_is_answered_in_its_way_and_a_wrong_request_harms_nobody(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _, config = stack.enter_context(told(tmp_path))
        dealer = stack.enter_context(plain(zmq.DEALER, config.replay_url))
        req = stack.enter_context(plain(zmq.REQ, config.replay_url))
        dealer.send_multipart([b"", b"", b"", b"nonsense"])
        dealer.send(bytes(8))
        req.send(bytes(8))
        for asker in (dealer, req):
            Follower().take(*await asyncio.to_thread(asker.recv_multipart))


async def test_an_address_that_others_could_reach_or_that_is_taken_is_refused(tmp_path: Path) -> None:
    with Context() as context, ExitStack() as stack:
        config = KvEventsConfig(url="tcp://0.0.0.0:5557", topic=TOPIC)
        with pytest.raises(Forbidden, match="refusing to bind"):
            KvEventSockets(context, SecurityConfig(), stack, config)
    with told(tmp_path) as (_, config), Context() as context, ExitStack() as stack:
        second = pytest.raises(ConnectionLost, match="another process serves it")
        stack.enter_context(second)
        KvEventSockets(context, SecurityConfig(), stack, config)
