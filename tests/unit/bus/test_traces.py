"""Trace context: W3C's form, and what is none."""

from __future__ import annotations

import pytest

from bus.traces import Span, TraceContext, parse_traceparent, sampled

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_w3cs_own_example_is_read_and_written() -> None:
    text = f"00-{TRACE}-{SPAN}-01"
    assert parse_traceparent(text) == TraceContext(TRACE, SPAN, True)
    assert str(parse_traceparent(text)) == text
    assert str(TraceContext(TRACE, SPAN, False)) == f"00-{TRACE}-{SPAN}-00"


def test_of_the_flags_only_the_first_bit_counts_and_later_versions_may_be_longer() -> None:
    assert parse_traceparent(f"00-{TRACE}-{SPAN}-fe") == TraceContext(TRACE, SPAN, False)
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-03-what-comes") == TraceContext(TRACE, SPAN, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    ],
)
def test_what_is_no_context_is_none(text: str) -> None:
    assert parse_traceparent(text) is None
    assert sampled(text) is None


def test_only_what_somebody_records_is_sampled() -> None:
    assert sampled(f"00-{TRACE}-{SPAN}-01") == TraceContext(TRACE, SPAN, True)
    assert sampled(f"00-{TRACE}-{SPAN}-00") is None


def test_what_is_asked_within_a_span_belongs_to_its_trace() -> None:
    span = Span(name="x", parent=TraceContext(TRACE, SPAN, True), started_at=0.0, id="b" * 16)
    assert span.context == TraceContext(TRACE, "b" * 16, True)
