"""A worker that copies from others: what it checks, and that every end lets the generation go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import wire
from bus.errors import ErrorCode, Forbidden, NoSpace
from bus.limits import CHUNK_BYTES
from bus.messages import BlocksFound, Cancel, Chunk, Credit, PullBlocks, PullOrder
from kvcache.hashing import HashSeed, block_digests, encode_token_ids
from tests.unit.bus.any_message import any_frames
from tests.unit.workers.core_bench import commands
from workers.calls import Action, HangUp, ToPeer
from workers.copy_api import CopyBroke, EndPull, Fill, Filled, Wanted
from workers.keys import RunId
from workers.peer_puller import IDLE_LINK_S, MAX_PULLS, PATIENCE_S, SILENCE_S, WINDOW, Puller

URL = "tcp://127.0.0.1:7"
SEED = HashSeed(model="f", dtype="float32", block_size=4, tenant="mine", cache_salt="salt")
IDS = list(range(40))
DIGESTS = block_digests(SEED, IDS)
RUN = RunId(b"run")
BLOCK_BYTES = CHUNK_BYTES // 2


def wanted(run: RunId = RUN, **changes: Any) -> Wanted:
    order = PullOrder(worker_id="holder", url=URL, ticket=b"t" * 16, num_tokens=40, budget_ms=60_000)
    fields: dict[str, Any] = {
        "run": run,
        "order": order,
        "seed": SEED,
        "tokens": encode_token_ids(IDS),
        "digests": DIGESTS,
        "start": 2,
        "block_bytes": BLOCK_BYTES,
        "deadline": 100.0,
    }
    return Wanted(**(fields | changes))


def said(actions: Sequence[Action]) -> list[Any]:
    return [wire.decode(action.frames).message for action in actions if isinstance(action, ToPeer)]


def ends(actions: Sequence[Action]) -> list[RunId]:
    return [command.run for command in commands(actions, EndPull)]


class Bench:
    """One puller with one pull under way, and its holder and engine played by the test."""

    def __init__(self, **changes: Any) -> None:
        self.now = 0.0
        self.puller = Puller("puller")
        self.begun = self.puller.begin(wanted(**changes), self.now)
        (self.request,) = said(self.begun)
        assert isinstance(self.request, PullBlocks)
        self.offset = 0

    def hear(self, message: Any, *payload: bytes) -> list[Action]:
        return self.puller.on_message(URL, [wire.encode(message), *payload], self.now)

    def found(self, **changes: Any) -> list[Action]:
        fields = {"req_id": self.request.req_id, "num_blocks": 10, "digest": DIGESTS[9], "block_bytes": BLOCK_BYTES}
        return self.hear(BlocksFound(**(fields | changes)))

    def chunk(self, nbytes: int = CHUNK_BYTES, *, offset: int | None = None) -> list[Action]:
        data = bytes([self.offset % 251]) * nbytes
        at = self.offset if offset is None else offset
        self.offset += nbytes
        return self.hear(Chunk(req_id=self.request.req_id, offset=at, payload=wire.describe([data])), data)

    def failures(self) -> dict[str, int]:
        return self.puller.stats().failures


def test_request_names_what_is_wanted_and_shows_the_ticket() -> None:
    bench = Bench()
    request = bench.request
    assert (request.ticket, request.worker_id, request.start, request.credit) == (b"t" * 16, "puller", 2, WINDOW)
    assert (request.fingerprint, request.dtype, request.block_size) == ("f", "float32", 4)
    assert (request.cache_salt, request.digest) == ("salt", DIGESTS[-1])
    assert wire.decode(bench.begun[0].frames).payload == [encode_token_ids(IDS)]  # type: ignore[union-attr]


def test_whole_blocks_go_to_the_engine_as_they_come_and_the_run_ends_the_pull() -> None:
    bench = Bench()
    assert bench.found() == []
    data = b""
    for index in range(4):
        (fill,) = commands(bench.chunk(), Fill)
        assert len(fill.data) == 2 * BLOCK_BYTES
        data += bytes(fill.data)
        bench.now += 0.1
        actions = bench.puller.on_engine(Filled(RUN, 4 + 2 * index), bench.now)
        assert ends(actions) == ([RUN] if index == 3 else [])
    assert data == b"".join(bytes([(i * CHUNK_BYTES) % 251]) * CHUNK_BYTES for i in range(4))
    stats = bench.puller.stats()
    assert (stats.pulls, stats.failures, stats.pulled_tokens) == (1, {}, 32)
    assert stats.pulled_bytes == 8 * BLOCK_BYTES
    assert stats.pulled_s == pytest.approx(0.4)
    assert stats.bytes_per_s == stats.links["holder"] == pytest.approx(8 * BLOCK_BYTES / 0.4)
    assert len(bench.puller) == 0


def test_block_that_comes_in_pieces_waits_for_all_of_them() -> None:
    bench = Bench(block_bytes=3 * CHUNK_BYTES // 2)
    bench.found(block_bytes=3 * CHUNK_BYTES // 2)
    assert bench.chunk() == []
    (fill,) = commands(bench.chunk(), Fill)
    assert len(fill.data) == 3 * CHUNK_BYTES // 2
    (fill,) = commands(bench.chunk(), Fill)
    assert fill.data[: CHUNK_BYTES // 2] == bytes([CHUNK_BYTES % 251]) * (CHUNK_BYTES // 2)


def test_credit_is_given_for_what_is_in_the_pool_and_no_more() -> None:
    ids = list(range(4 * 200))
    digests = block_digests(SEED, ids)
    bench = Bench(digests=digests, tokens=encode_token_ids(ids), start=0)
    bench.found(num_blocks=200, digest=digests[-1])
    for _ in range(WINDOW):
        assert not said(bench.chunk())
    assert not said(bench.puller.on_engine(Filled(RUN, 6), bench.now)), "too few to be worth a message"
    (credit,) = said(bench.puller.on_engine(Filled(RUN, 12), bench.now))
    assert credit == Credit(req_id=bench.request.req_id, chunks=6)


def test_holder_that_sends_beyond_its_credit_is_dropped() -> None:
    ids = list(range(4 * 200))
    digests = block_digests(SEED, ids)
    bench = Bench(digests=digests, tokens=encode_token_ids(ids), start=0)
    bench.found(num_blocks=200, digest=digests[-1])
    for _ in range(WINDOW):
        bench.chunk()
    assert ends(bench.chunk()) == [RUN]
    assert bench.failures() == {"BAD_FRAME": 1}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_blocks": 2, "digest": DIGESTS[1]}, ErrorCode.BAD_FRAME),
        ({"num_blocks": 11}, ErrorCode.BAD_FRAME),
        ({"num_blocks": 9}, ErrorCode.CORRUPT),
        ({"digest": bytes(32)}, ErrorCode.CORRUPT),
        ({"block_bytes": BLOCK_BYTES + 1}, ErrorCode.BAD_TENSOR),
    ],
    ids=["nothing new", "more than asked", "another digest", "no digest of ours", "another layout"],
)
def test_run_that_is_not_what_was_asked_for_is_refused(changes: dict[str, Any], code: ErrorCode) -> None:
    bench = Bench()
    actions = bench.found(**changes)
    assert said(actions) == [Cancel(req_id=bench.request.req_id)]
    assert ends(actions) == [RUN]
    assert bench.failures() == {code.name: 1}


def test_shorter_run_than_expected_is_taken() -> None:
    bench = Bench()
    assert bench.found(num_blocks=4, digest=DIGESTS[3]) == []
    assert commands(bench.chunk(), Fill)
    assert ends(bench.puller.on_engine(Filled(RUN, 4), bench.now)) == [RUN]
    assert bench.puller.stats().pulls == 1


def test_bytes_that_changed_on_the_way_are_not_used() -> None:
    bench = Bench()
    bench.found()
    chunk = Chunk(req_id=bench.request.req_id, offset=0, payload=wire.describe([bytes(CHUNK_BYTES)]))
    actions = bench.hear(chunk, b"\x01" + bytes(CHUNK_BYTES - 1))
    assert not commands(actions, Fill)
    assert ends(actions) == [RUN]
    assert bench.failures() == {"CORRUPT": 1}


@pytest.mark.parametrize("offset", [1, CHUNK_BYTES])
def test_chunk_out_of_place_ends_the_pull(offset: int) -> None:
    bench = Bench()
    bench.found()
    assert ends(bench.chunk(offset=offset)) == [RUN]


def test_chunk_before_the_run_was_announced_or_beyond_it_ends_the_pull() -> None:
    bench = Bench()
    assert ends(bench.chunk()) == [RUN]
    bench = Bench()
    bench.found(num_blocks=3, digest=DIGESTS[2])
    assert ends(bench.chunk()) == [RUN]


def test_refusal_ends_the_pull_without_another_word() -> None:
    bench = Bench()
    actions = bench.hear(wire.failed(bench.request.req_id, Forbidden("no")))
    assert (said(actions), ends(actions), bench.failures()) == ([], [RUN], {"FORBIDDEN": 1})
    assert bench.chunk() == [], "what still comes is of no use"


def test_pool_without_room_ends_the_pull() -> None:
    bench = Bench()
    bench.found()
    bench.chunk()
    actions = bench.puller.on_engine(CopyBroke(RUN, NoSpace("full")), bench.now)
    assert said(actions) == [Cancel(req_id=bench.request.req_id)]
    assert (ends(actions), bench.failures()) == ([RUN], {"NO_SPACE": 1})
    assert bench.puller.on_engine(CopyBroke(RUN, NoSpace("full")), bench.now) == [], "the next slice of it, too"


def test_holder_that_falls_silent_is_hung_up_on() -> None:
    bench = Bench()
    assert bench.puller.tick(SILENCE_S) == []
    actions = bench.puller.tick(SILENCE_S + 0.01)
    assert (ends(actions), actions[-1]) == ([RUN], HangUp(URL))
    assert bench.failures() == {"CONNECTION_LOST": 1}


def test_time_that_our_own_engine_takes_is_not_the_holders_silence() -> None:
    bench = Bench()
    bench.found()
    bench.chunk()
    assert bench.puller.tick(SILENCE_S + 0.01) == []
    bench.now = 1.01
    bench.puller.on_engine(Filled(RUN, 4), bench.now)
    assert bench.puller.tick(1.02) == []


def test_pull_that_takes_too_long_is_given_up_although_bytes_trickle_in() -> None:
    bench = Bench()
    bench.found()
    while not ends(bench.puller.tick(bench.now)):
        bench.now += PATIENCE_S / 10
        bench.chunk(1000)
    assert bench.failures() == {"DEADLINE": 1}
    assert bench.now == pytest.approx(PATIENCE_S, abs=0.2)


@pytest.mark.parametrize(
    "changes",
    [{"deadline": 1.0}, {"order": PullOrder(worker_id="h", url=URL, ticket=bytes(16), num_tokens=40, budget_ms=500)}],
)
def test_budget_is_the_orders_or_half_of_what_remains(changes: dict[str, Any]) -> None:
    bench = Bench(**changes)
    assert bench.puller.tick(0.49) == []
    assert ends(bench.puller.tick(0.5)) == [RUN]
    assert bench.failures() == {"DEADLINE": 1}


def test_generation_without_time_does_not_pull_at_all() -> None:
    puller = Puller("puller")
    actions = puller.begin(wanted(deadline=5.0), now=5.0)
    assert (said(actions), ends(actions)) == ([], [RUN])


def test_pulls_at_a_time_are_limited() -> None:
    puller = Puller("puller")
    for index in range(MAX_PULLS):
        assert said(puller.begin(wanted(RunId(bytes([index]))), now=0.0))
    actions = puller.begin(wanted(), now=0.0)
    assert (said(actions), ends(actions), puller.stats().failures) == ([], [RUN], {"OVERLOADED": 1})


def test_connection_that_takes_nothing_ends_its_pulls_and_no_other() -> None:
    puller = Puller("puller")
    far = PullOrder(worker_id="far", url="tcp://127.0.0.1:8", ticket=bytes(16), num_tokens=40, budget_ms=60_000)
    puller.begin(wanted(), now=0.0)
    puller.begin(wanted(RunId(b"far"), order=far), now=0.0)
    assert ends(puller.lose(URL)) == [RUN]
    assert len(puller) == 1


def test_connection_that_nobody_uses_is_closed() -> None:
    bench = Bench()
    bench.hear(wire.failed(bench.request.req_id, Forbidden("no")))
    assert bench.puller.tick(IDLE_LINK_S) == []
    assert bench.puller.tick(IDLE_LINK_S + 1) == [HangUp(URL)]
    assert bench.puller.tick(IDLE_LINK_S + 2) == []


def test_answer_over_another_connection_is_not_believed() -> None:
    bench = Bench()
    failed = wire.encode(wire.failed(bench.request.req_id, Forbidden("no")))
    assert bench.puller.on_message("tcp://127.0.0.1:666", [failed], 0.0) == []
    assert len(bench.puller) == 1


@given(st.lists(any_frames()))
def test_no_bytes_at_all_upset_it(batch: list[list[bytes]]) -> None:
    bench = Bench()
    told: list[RunId] = []
    for frames in batch:
        actions = bench.puller.on_message(URL, frames, 0.0)
        assert not commands(actions, Fill)
        told += ends(actions)
    told += ends(bench.puller.tick(1000.0))
    assert told == [RUN], "it ends once, whatever came"
