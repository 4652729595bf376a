"""Errors cross the wire as themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import errors, wire
from bus.errors import BY_CODE, ErrorCode, InternalError, KVCacheError, error_from_wire
from bus.messages import Failed

REQ = bytes(16)

RETRYABLE = {"NO_WORKERS", "OVERLOADED", "WORKER_LOST", "DRAINING", "CORRUPT", "CONNECTION_LOST"}


def test_every_code_has_its_class() -> None:
    assert set(BY_CODE) == set(ErrorCode)


def test_codes_keep_their_numbers() -> None:
    """The numbers of the published table; a new code gets a new one."""
    assert {code.name: int(code) for code in ErrorCode} == {
        **{"BAD_FRAME": 1, "BAD_VERSION": 2, "UNAUTHENTICATED": 3, "FORBIDDEN": 4, "TOO_LARGE": 5, "BAD_TENSOR": 6},
        **{"BAD_ARG": 7, "NOT_FOUND": 8, "CONFLICT": 9, "STALE_EPOCH": 11, "OVERLOADED": 12},
        **{"NO_SPACE": 13, "DEADLINE": 14, "CANCELLED": 15, "WORKER_LOST": 16, "REPLAY_EXPIRED": 17},
        **{"MODEL_UNAVAILABLE": 18, "TOKENIZER": 19, "CORRUPT": 20, "DRAINING": 21, "INTERNAL": 22, "NO_WORKERS": 23},
        **{"CONNECTION_LOST": 24, "STREAM_GAP": 25, "MODEL_NOT_FOUND": 26},
    }


def test_exactly_what_may_pass_on_a_retry_is_retryable() -> None:
    assert {code.name for code, kind in BY_CODE.items() if kind.retryable} == RETRYABLE


@pytest.mark.parametrize("kind", BY_CODE.values(), ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_what_it_was(kind: type[KVCacheError]) -> None:
    sent = wire.decode([wire.encode(wire.failed(REQ, kind("why", detail=7, retry_after_ms=9)))]).message
    assert isinstance(sent, Failed)

    error = error_from_wire(
        sent.code, sent.message, detail=sent.detail, retry_after_ms=sent.retry_after_ms, request_id="ab"
    )

    assert type(error) is kind
    assert (error.message, error.detail, error.retry_after_ms) == ("why", 7, 9)
    assert str(error) == "why [request ab]"
    assert sent.retryable == kind.retryable


@given(st.integers(0, 2**32 - 1))
def test_a_code_from_a_newer_peer_is_an_internal_error(code: int) -> None:
    error = error_from_wire(code, "new")
    assert type(error) is (BY_CODE[ErrorCode(code)] if code in set(ErrorCode) else InternalError)
    assert error.message == "new"


def test_an_error_without_a_request_is_its_message() -> None:
    assert str(errors.NoWorkers("none there")) == "none there"


def test_the_number_that_an_error_carries_has_a_name() -> None:
    assert errors.Conflict("x", detail=12).current_len == 12
