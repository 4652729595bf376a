"""Whole sequences from one worker to another: bit for bit or not at all, by ticket, whatever either end says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from bus.limits import CHUNK_BYTES
from bus.stats import LayerInfo, SequenceInfo, Snapshot, pack
from bus.tensors import DType, TensorMeta
from bus.wire import Buffer
from tests.unit.bus.any_message import any_frames
from workers.callers import GRACE_S, IDLE_S, MAX_PARKED
from workers.calls import Action, Send, ToCaller, ToPeer
from workers.holdings import HeldSequences
from workers.keys import SequenceKey
from workers.memory import HostMemory
from workers.replies import Replies
from workers.sequence_giver import MAX_GIVEN, Giver
from workers.sequence_taker import ID, MAX_TAKEN, SILENCE_S, WINDOW, Taker
from workers.store import KVStore

KEY = SequenceKey("t", "s")
PAGE = 4096
ROW = (2, 64)


class End:
    """One worker's store and both its sides. `written`: whether a client writes to the sequence there."""

    def __init__(self, num_pages: int = 4096) -> None:
        self.store = KVStore(HostMemory(num_pages * PAGE), PAGE)
        self.held = HeldSequences(1)
        self.written = False
        self.replies = Replies()
        self.giver = Giver(self.store, self.held, self.replies.receipts)
        self.taker = Taker("taker", self.store, self.held, self.is_written, self.outdate, self.replies.adopt)

    def is_written(self, key: SequenceKey) -> bool:
        return self.written

    def outdate(self, key: SequenceKey, newest: int) -> list[Action]:
        if 0 < self.held.version(key) < newest:
            self.held.dropped(key)
            self.store.delete(key)
        return []

    def put(self, layer: int, num_tokens: int, fill: int, version: int, *, rf: int = 1, key: SequenceKey = KEY) -> None:
        meta = TensorMeta(DType.FLOAT16, (num_tokens, *ROW))
        transfer = self.store.begin_put(key, layer, meta, meta, now=0.0)
        for half in range(2):
            data = bytes([fill + half]) * meta.nbytes
            for at in range(0, len(data), CHUNK_BYTES):
                self.store.write(transfer, half * meta.nbytes + at, data[at : at + CHUNK_BYTES])
        self.store.commit(transfer)
        self.held.wrote(key, version, rf, rf)

    def value(self, layer: int) -> bytes:
        read = self.store.open_read(KEY, layer)
        data = b"".join(bytes(piece) for _, piece in self.store.chunks(read, CHUNK_BYTES))
        self.store.close_read(read)
        return data

    def check(self) -> None:
        self.store.check()


def order(number: int = 1, version: int = 1, seq_id: str = "s") -> m.CopySequence:
    return m.CopySequence(
        ticket=number.to_bytes(16, "big"),
        worker_id="giver",
        url="giver",
        tenant="t",
        seq_id=seq_id,
        version=version,
        budget_ms=5000,
    )


def grant(number: int = 1, **changes: Any) -> m.Grant:
    fields: dict[str, Any] = {"target": "taker", "tenant": "t", "num_tokens": 0, "ttl_ms": 5000, "seq_id": "s"}
    return m.Grant(ticket=number.to_bytes(16, "big"), **(fields | changes))


def begin(taker: Taker, ordered: m.CopySequence, now: float = 0.0) -> list[Action]:
    return taker.ordered(0, ordered, now, is_closed=False)


def exchange(giver: Giver, taker: Taker, actions: Sequence[Action], now: float = 0.0) -> list[m.SequenceCopied]:
    """Carry messages between the two until there are none; what the broker is told."""
    queue, told = list(actions), list[m.SequenceCopied]()
    while queue:
        action = queue.pop(0)
        frames: list[Buffer] = list(action.frames) if isinstance(action, ToPeer | ToCaller | Send) else []
        if isinstance(action, ToPeer):
            queue += giver.on_message(b"taker", frames, now)
        elif isinstance(action, ToCaller):
            queue += taker.on_message("giver", frames, now)
        elif isinstance(action, Send):
            told.append(wire.decode(frames).message)
    return told


def copy(source: End, target: End, ordered: m.CopySequence | None = None) -> m.SequenceCopied:
    source.giver.granted(grant(), 0.0)
    (told,) = exchange(source.giver, target.taker, begin(target.taker, ordered or order()))
    source.check()
    target.check()
    assert (len(source.giver), len(target.taker)) == (0, 0)
    return told


def codes(actions: Sequence[Action]) -> list[ErrorCode]:
    messages = [wire.decode(list(action.frames)).message for action in actions if isinstance(action, ToCaller | Send)]
    return [ErrorCode(message.code) for message in messages if getattr(message, "code", 0)]


def test_all_layers_come_as_they_are_with_version_rf_and_pin() -> None:
    source, target = End(), End()
    for layer, num_tokens in ((0, 5), (7, 30_000), (9, 0)):  # in a page, in many chunks, and empty
        source.put(layer, num_tokens, 10 * layer, version=5 + layer, rf=2)
    source.store.pin(KEY, None, now=0.0)
    assert copy(source, target) == m.SequenceCopied(ticket=order().ticket, version=14)
    assert [target.value(layer) for layer in (0, 7, 9)] == [source.value(layer) for layer in (0, 7, 9)]
    assert (target.held.version(KEY), target.held.rf(KEY)) == (14, 2)
    assert target.store.pinned_s(KEY, 0.0) == math.inf
    assert (source.giver.num_given, target.taker.num_taken) == (1, 1)


def test_a_pin_that_ends_ends_there_too() -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    source.store.pin(KEY, 3.0, now=0.0)
    copy(source, target)
    assert target.store.pinned_s(KEY, 0.0) == pytest.approx(3.0)


def test_a_copy_is_what_was_there_at_one_moment() -> None:
    source, target = End(), End()
    source.put(0, 30_000, 1, version=5)
    before = source.value(0)
    source.giver.granted(grant(), 0.0)
    (ask,) = begin(target.taker, order())
    assert isinstance(ask, ToPeer)
    sent = source.giver.on_message(b"taker", list(ask.frames), 0.0)
    source.put(0, 10, 2, version=6)
    (told,) = exchange(source.giver, target.taker, sent)
    assert (told.version, target.value(0)) == (5, before)
    source.check()


def test_an_older_copy_is_replaced_and_a_newer_one_is_not() -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    target.put(0, 9, 7, version=3)
    target.put(1, 9, 7, version=4)
    assert copy(source, target, order(version=5)).version == 5
    assert (target.value(0), target.store.describe(KEY, 0.0).layers[0].length) == (source.value(0), 5)
    assert len(target.store.describe(KEY, 0.0).layers) == 1
    target.put(0, 9, 7, version=8)
    assert copy(source, target, order(version=5)).version == 8, "it has what is asked for already, and newer"
    assert target.held.version(KEY) == 8


def test_what_was_deleted_meanwhile_does_not_come_back() -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    target.held.dropped(KEY, 6)
    assert copy(source, target).code == ErrorCode.CONFLICT
    assert not target.store.has(KEY)


def test_nothing_is_taken_while_it_is_written_there() -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    target.written = True
    assert copy(source, target).code == ErrorCode.CONFLICT


def test_a_copy_takes_free_room_and_evicts_nothing() -> None:
    source, target = End(), End(num_pages=8)
    source.put(0, 8, 1, version=5)  # a page each for K and V
    source.put(1, 8, 1, version=5)
    target.put(0, 40, 3, version=3, key=SequenceKey("t", "other"))
    assert target.store.stats(0.0).used_bytes == 6 * PAGE
    assert copy(source, target).code == ErrorCode.NO_SPACE
    assert target.store.has(SequenceKey("t", "other"))
    assert target.store.stats(0.0).used_bytes == 6 * PAGE, "what was taken for the first layer is free again"


def test_the_next_write_to_the_source_alone_is_newer_than_every_copy() -> None:
    """Its broker may number it lower, when it does not know of the copy: they must not count as equal."""
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    copy(source, target)
    assert source.held.wrote(KEY, version=2) > target.held.version(KEY)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"seq_id": "other"}, ErrorCode.NOT_FOUND),
        ({"tenant": "other"}, ErrorCode.NOT_FOUND),
        ({"target": "other"}, ErrorCode.FORBIDDEN),
    ],
)
def test_a_ticket_is_for_one_sequence_and_one_worker(changes: dict[str, Any], code: ErrorCode) -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    source.giver.granted(grant(**changes), 0.0)
    (told,) = exchange(source.giver, target.taker, begin(target.taker, order()))
    assert told.code == code
    assert source.giver.num_given == 0


def test_a_ticket_may_come_a_little_later_and_is_good_once() -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    assert exchange(source.giver, target.taker, begin(target.taker, order())) == []
    (told,) = exchange(source.giver, target.taker, source.giver.granted(grant(), GRACE_S / 2))
    assert told.version == 5
    (again,) = begin(End().taker, order())
    assert isinstance(again, ToPeer)
    assert source.giver.on_message(b"other", list(again.frames), GRACE_S) == []
    assert codes(source.giver.tick(2 * GRACE_S)) == [ErrorCode.FORBIDDEN]


def test_an_older_version_than_the_broker_knows_of_is_not_taken() -> None:
    source, target = End(), End()
    source.put(0, 5, 1, version=5)
    assert copy(source, target, order(version=6)).code == ErrorCode.CONFLICT


def test_silence_budget_and_lost_links_end_a_copy_without_effect() -> None:
    ends: list[tuple[Callable[[Taker], list[Action]], ErrorCode]] = [
        (lambda taker: taker.tick(SILENCE_S + 0.1), ErrorCode.CONNECTION_LOST),
        (lambda taker: taker.tick(5.0), ErrorCode.DEADLINE),
        (lambda taker: taker.lose("giver"), ErrorCode.CONNECTION_LOST),
    ]
    for end, code in ends:
        taker = End().taker
        begin(taker, order())
        assert codes(end(taker)) == [code]
        assert len(taker) == 0
    taker = End().taker
    begin(taker, order())
    assert codes(taker.lose_session(0)) == [], "nobody is there to be told"
    assert len(taker) == 0


def test_what_was_dropped_with_a_session_is_told_if_that_is_regained_and_not_if_there_is_another() -> None:
    for regains in (True, False):
        taker = End().taker
        begin(taker, order(1))
        taker.lose_session(0)
        begin(taker, order(2, seq_id="other"))
        taker.lose_session(0)
        told = taker.regain_session(0) if regains else taker.replace_session(0)
        assert codes(told) == [ErrorCode.CONNECTION_LOST] * 2 * regains
        assert codes(taker.regain_session(0)) == [], "once"


def test_a_taker_that_falls_silent_is_forgotten_and_what_it_read_is_let_go() -> None:
    source, target = End(), End()
    source.put(0, 30_000, 1, version=5)
    source.giver.granted(grant(), 0.0)
    (ask,) = begin(target.taker, order())
    assert isinstance(ask, ToPeer)
    sent = source.giver.on_message(b"taker", list(ask.frames), 0.0)
    assert len(sent) == 1 + WINDOW, "no more than there is credit for"
    source.giver.tick(IDLE_S + 0.1)
    assert len(source.giver) == 0
    source.store.delete(KEY)
    assert source.store.stats(0.0).used_bytes == 0


def test_a_taker_that_cancels_hears_that_the_giver_is_there_and_what_it_read_is_let_go() -> None:
    source, target = End(), End()
    source.put(0, 30_000, 1, version=5)
    source.giver.granted(grant(), 0.0)
    (ask,) = begin(target.taker, order())
    assert isinstance(ask, ToPeer)
    source.giver.on_message(b"taker", ask.frames, 0.0)
    assert len(source.giver) == 1
    (cancel,) = target.taker.lose_session(0)
    assert isinstance(cancel, ToPeer)
    for _ in range(2):  # also when it knows of no such copy any more
        assert codes(source.giver.on_message(b"taker", cancel.frames, 0.0)) == [ErrorCode.CANCELLED]
        assert len(source.giver) == 0
    source.store.delete(KEY)
    source.check()


def test_no_more_copies_than_are_good_for_it_are_under_way() -> None:
    taker = End().taker
    for number in range(MAX_TAKEN):
        assert codes(begin(taker, order(number, seq_id=f"s{number}"))) == []
    assert codes(begin(taker, order(99, seq_id="more"))) == [ErrorCode.OVERLOADED]
    assert codes(begin(End().taker, order(seq_id="s"), now=0.0)) == []
    assert codes(End().taker.ordered(0, order(), 0.0, is_closed=True)) == [ErrorCode.DRAINING]
    giver = End().giver
    asks = [m.PullSequence(req_id=bytes([n]) * 16, ticket=bytes(16), worker_id="x", credit=1) for n in range(99)]
    refused = [codes(giver.on_message(b"x", [wire.encode(ask)], 0.0)) for ask in asks]
    assert refused == [[]] * MAX_PARKED + [[ErrorCode.FORBIDDEN]] * (99 - MAX_PARKED)


def test_a_giver_serves_so_many_at_once() -> None:
    source = End()
    source.put(0, 30_000, 1, version=5)
    for number in range(MAX_GIVEN + 1):
        source.giver.granted(grant(number), 0.0)
        ask = m.PullSequence(req_id=bytes([number]) * 16, ticket=grant(number).ticket, worker_id="taker", credit=1)
        answer = codes(source.giver.on_message(b"taker", [wire.encode(ask)], 0.0))
        assert answer == ([ErrorCode.OVERLOADED] if number == MAX_GIVEN else [])
    source.giver.lose(b"taker")
    assert len(source.giver) == 0


LAYER = LayerInfo(layer=0, length=5, k_shape=(5, 2, 64), v_shape=(5, 2, 64), dtype="float16")


def info(*layers: LayerInfo) -> bytes:
    return pack(Snapshot(info=SequenceInfo(seq_id="s", kind="stored", nbytes=0, pinned=False, layers=layers)))


def lying(taker: Taker, *messages: tuple[m.Message, bytes]) -> list[ErrorCode]:
    """What the broker hears of a copy from a holder that says this."""
    begin(taker, order())
    actions: list[Action] = []
    for message, payload in messages:
        actions += taker.on_message("giver", [wire.encode(message), payload], 0.0)
    return codes(actions)


def found(payload: bytes, version: int = 5) -> tuple[m.Message, bytes]:
    described = wire.describe([payload])
    req_id = ID + (1).to_bytes(8, "big")
    return m.SequenceFound(req_id=req_id, version=version, rf=1, copies=1, pin_ms=0, payload=described), payload


def chunk(offset: int, data: bytes) -> tuple[m.Message, bytes]:
    return m.Chunk(req_id=ID + (1).to_bytes(8, "big"), offset=offset, payload=wire.describe([data])), data


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ({"dtype": "float99"}, ErrorCode.BAD_TENSOR),
        ({"k_shape": (5, -2, 64)}, ErrorCode.BAD_FRAME),
        ({"k_shape": (2**60, 2, 64)}, ErrorCode.BAD_FRAME),
        ({"k_shape": (2**30, 2, 64), "v_shape": (2**30, 2, 64)}, ErrorCode.NO_SPACE),
        ({"k_shape": (5, 2)}, ErrorCode.BAD_TENSOR),
        ({"v_shape": (6, 2, 64)}, ErrorCode.BAD_TENSOR),
        ({"layer": -1}, ErrorCode.BAD_ARG),
    ],
)
def test_a_holder_that_describes_what_cannot_be_is_not_believed(layer: dict[str, Any], code: ErrorCode) -> None:
    fields: dict[str, Any] = {"layer": 0, "length": 5, "k_shape": (5, 2, 64), "v_shape": (5, 2, 64), "dtype": "float16"}
    target = End()
    assert lying(target.taker, found(info(LAYER, LayerInfo(**(fields | layer))))) == [code]
    assert target.store.stats(0.0).used_bytes == 0
    target.check()


@pytest.mark.parametrize(
    "messages",
    [
        [found(info())],
        [found(info(LAYER)), found(info(LAYER))],
        [chunk(0, b"x")],
        [found(info(LAYER)), chunk(1, b"x")],
        [found(info(LAYER)), chunk(0, b"")],
        [found(info(LAYER)), chunk(0, bytes(10_000))],
        [found(info(LAYER)), *(chunk(at, b"x") for at in range(WINDOW * 4))],
        [
            (
                m.Tokenized(
                    req_id=ID + (1).to_bytes(8, "big"), model="", max_model_len=1, payload=wire.describe([b""])
                ),
                b"",
            )
        ],
    ],
    ids=["no layers", "found twice", "before it is found", "a gap", "nothing", "too much", "tiny", "another message"],
)
def test_a_holder_that_does_not_keep_to_the_protocol_harms_nobody(messages: list[tuple[m.Message, bytes]]) -> None:
    target = End()
    told = lying(target.taker, *messages)
    assert told in ([ErrorCode.BAD_FRAME], [])
    assert not target.store.has(KEY)
    target.taker.tick(9.0)
    assert target.store.stats(0.0).used_bytes == 0
    target.check()


@settings(max_examples=30)
@given(st.lists(any_frames()))
def test_no_bytes_at_all_upset_either_end(batch: list[list[bytes]]) -> None:
    source, target = End(num_pages=16), End(num_pages=16)
    source.put(0, 5, 1, version=5)
    begin(target.taker, order())
    for frames in batch:
        source.giver.on_message(b"peer", frames, 0.0)
        target.taker.on_message("giver", frames, 0.0)
    source.check()
    target.check()
    assert source.giver.num_given == 0
