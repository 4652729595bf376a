"""Trace context as it travels, and a span as plain data, for cores to tell of and shells to export.

The context is W3C's `traceparent` (Trace Context, level 1, section 3.2): which trace a request belongs to, the span
that it was asked within, and whether anybody records. Who is asked records if so, and never begins a trace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

Attributes: TypeAlias = Mapping[str, str | int | float]

SPAN_ID_BYTES = 8

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)


class TraceContext(NamedTuple):
    """Ids in hex, as they travel: 32 digits of the trace, 16 of the span."""

    trace_id: str
    span_id: str
    is_sampled: bool

    def __str__(self) -> str:
        """As a `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took from `started_at` (monotonic seconds) until it is exported.

    id: 16 hex digits, empty for any. error: why it failed, empty if it did not.
    parts: name and seconds of what it was made of, one after another, the last of which ended with it.
    """

    name: str
    parent: TraceContext
    started_at: float
    id: str = ""
    attributes: Attributes = field(default_factory=dict)
    error: str = ""
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def context(self) -> TraceContext:
        """What others are asked within this span. It must have an id."""
        return self.parent._replace(span_id=self.id)


def parse_traceparent(text: str) -> TraceContext | None:
    """What a `traceparent` says; None for what is none, to be ignored. Those of later versions may be longer."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


def sampled(traceparent: str) -> TraceContext | None:
    """The context, if somebody records this trace; else None."""
    context = parse_traceparent(traceparent) if traceparent else None
    return context if context is not None and context.is_sampled else None
