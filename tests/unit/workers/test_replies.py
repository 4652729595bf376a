"""Replies are kept for a while and a number, and never confused."""

from __future__ import annotations

import pytest

from bus import wire
from bus.errors import Conflict
from bus.messages import Generate, KvDone, Pin, PromptKind, Sampling, Unpin
from workers.calls import RequestKey
from workers.keys import SequenceKey
from workers.replies import KEEP_S, Replies, body_hash

KEY = SequenceKey("t", "s")


def pin(req_id: bytes = b"r" * 16, **changes: object) -> Pin:
    fields: dict[str, object] = {"req_id": req_id, "attempt": 0, "deadline_ms": 5, "seq_id": "s"}
    return Pin(**(fields | changes))  # type: ignore[arg-type]  # fields by their names


def key(number: int = 0) -> RequestKey:
    return RequestKey("t", b"c" * 16, number.to_bytes(16, "big"))


def test_a_reply_is_given_again_within_a_minute_and_forgotten_after() -> None:
    replies = Replies()
    reply = KvDone(req_id=b"r" * 16)
    assert replies.claim(key(), pin(), 0.0) is None
    replies.keep(key(), KEY, reply)
    assert replies.claim(key(), pin(attempt=3, deadline_ms=1), KEEP_S) == reply
    assert replies.claim(key(), pin(), KEEP_S + 0.1) is None


def test_another_body_under_the_same_id_is_a_conflict() -> None:
    replies = Replies()
    replies.claim(key(), pin(), 0.0)
    with pytest.raises(Conflict, match="different request"):
        replies.claim(key(), pin(ttl_ms=7), 0.0)
    with pytest.raises(Conflict):
        replies.claim(key(), Unpin(req_id=b"r" * 16, attempt=0, deadline_ms=5, seq_id="s"), 0.0)


def test_their_number_is_bounded_and_the_oldest_go_first() -> None:
    replies = Replies(max_entries=3)
    for number in range(4):
        replies.claim(key(number), pin(), 0.0)
        replies.keep(key(number), KEY, KvDone(req_id=b"r" * 16))
    assert len(replies) == 3
    assert replies.claim(key(0), pin(), 0.0) is None
    assert replies.claim(key(3), pin(), 0.0) is not None


def test_a_reply_to_a_request_that_was_forgotten_is_not_kept() -> None:
    replies = Replies()
    replies.keep(key(), KEY, KvDone(req_id=b"r" * 16))
    assert len(replies) == 0


def answered(number: int, *, max_entries: int = 100) -> Replies:
    """So many changes of one sequence, and one of another."""
    replies = Replies(max_entries=max_entries)
    for index in range(number):
        replies.claim(key(index), pin(), 0.0)
        replies.keep(key(index), KEY, KvDone(req_id=key(index).req_id, length=index, count=1, duplicate=True))
    replies.claim(key(99), pin(), 0.0)
    replies.keep(key(99), SequenceKey("t", "other"), KvDone(req_id=b"r" * 16))
    return replies


def test_a_worker_that_gets_a_sequence_answers_what_the_other_had_answered() -> None:
    here, there = answered(3), Replies()
    assert there.claim(key(1), pin(), 0.0) is None, "it was tried there first, where the sequence was not yet"
    there.adopt(KEY, here.receipts(KEY), 1.0)
    assert there.claim(key(2), pin(), 2.0) == here.claim(key(2), pin(), 2.0)
    assert there.claim(key(1), pin(), 2.0) == here.claim(key(1), pin(), 2.0)
    with pytest.raises(Conflict, match="different request"):
        there.claim(key(2), pin(ttl_ms=7), 2.0)
    assert there.claim(key(99), pin(), 2.0) is None, "that was another sequence"
    assert set(there.receipts(KEY)) == set(here.receipts(KEY)), "and hands them on"
    assert here.receipts(SequenceKey("t", "none")) == ()


def test_what_has_been_forgotten_does_not_go_along() -> None:
    replies = answered(6, max_entries=4)
    assert [receipt.length for receipt in replies.receipts(KEY)] == [3, 4, 5]
    replies.claim(key(98), pin(), KEEP_S + 1.0)
    assert replies.receipts(KEY) == ()


def generate(prompt: bytes, **changes: object) -> Generate:
    fields: dict[str, object] = {
        "req_id": b"r" * 16,
        "attempt": 0,
        "deadline_ms": 5,
        "stream_id": bytes(16),
        "epoch": 0,
        "kind": PromptKind.TEXT,
        "sampling": Sampling(),
        "payload": wire.describe([prompt]),
    }
    return Generate(**(fields | changes))  # type: ignore[arg-type]  # fields by their names


def test_a_resumed_generation_has_the_body_of_the_first_attempt() -> None:
    first = generate(b"prompt")
    moved = generate(
        b"prompt", attempt=1, epoch=1, stream_id=b"x" * 16, payload=wire.describe([b"prompt", b"\x01\0\0\0"])
    )
    assert body_hash(moved) == body_hash(first)
    for other in (generate(b"trompt"), generate(b"prompt", seq_id="s"), generate(b"prompt", sampling=Sampling(seed=1))):
        assert body_hash(other) != body_hash(first)
