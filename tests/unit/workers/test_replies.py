"""Replies are kept for a while and a number, and never confused."""

from __future__ import annotations

import pytest

from bus import wire
from bus.errors import Conflict
from bus.messages import Generate, KvDone, Pin, PromptKind, Sampling, Unpin
from workers.calls import RequestKey
from workers.replies import KEEP_S, Replies, body_hash


def pin(req_id: bytes = b"r" * 16, **changes: object) -> Pin:
    fields: dict[str, object] = {"req_id": req_id, "attempt": 0, "deadline_ms": 5, "seq_id": "s"}
    return Pin(**(fields | changes))  # type: ignore[arg-type]  # fields by their names


def key(number: int = 0) -> RequestKey:
    return RequestKey("t", b"c" * 16, number.to_bytes(16, "big"))


def test_a_reply_is_given_again_within_a_minute_and_forgotten_after() -> None:
    replies = Replies()
    reply = KvDone(req_id=b"r" * 16)
    assert replies.claim(key(), pin(), 0.0) is None
    replies.keep(key(), reply)
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
        replies.keep(key(number), KvDone(req_id=b"r" * 16))
    assert len(replies) == 3
    assert replies.claim(key(0), pin(), 0.0) is None
    assert replies.claim(key(3), pin(), 0.0) is not None


def test_a_reply_to_a_request_that_was_forgotten_is_not_kept() -> None:
    replies = Replies()
    replies.keep(key(), KvDone(req_id=b"r" * 16))
    assert len(replies) == 0


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
