"""What the broker tells of single requests, to logs and to traces: where each went, and what became of it.

Owns the broker's news. Of single requests nothing is told unless it is asked for (`is_detailed`): they are too many.
Of what a request holds nothing is ever told, only its name and kind, and the broker's own words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from bus import messages as m
from bus.errors import KVCacheError
from bus.traces import SPAN_ID_BYTES, Attributes, Span, sampled
from kvcache.broker.members import Call

DONE = "done"
SPAN_NAME = "kvcache.broker"


class News(NamedTuple):
    """Something for the log. request_id: how the request is called that it is about; empty for none."""

    text: str
    is_bad: bool = False
    request_id: str = ""


class Journal:
    """news: what has not been taken yet, in order; `Sessions` adds to it what concerns everybody.

    `new_id` makes random bytes, at least 8. is_tracing: whether there is anybody who takes spans.
    """

    def __init__(self, new_id: Callable[[], bytes], *, is_detailed: bool, is_tracing: bool) -> None:
        self.news: list[News] = []
        self._new_id = new_id
        self._is_detailed = is_detailed
        self._is_tracing = is_tracing
        self._spans: list[Span] = []

    def take(self) -> list[News]:
        """What has happened since the last call."""
        news, self.news = self.news, []
        return news

    def take_spans(self) -> list[Span]:
        """Those that have ended since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def began(self, call: Call, message: m.Generate, reason: str, now: float) -> None:
        """A generation has its worker; if its trace is recorded, it has a span from now on."""
        parent = sampled(message.trace) if self._is_tracing else None
        if parent is not None:
            attributes: Attributes = {
                "kvcache.request.id": called(message),
                "kvcache.attempt": message.attempt,
                "kvcache.worker.id": call.worker.id,
                "kvcache.route.reason": reason,
            }
            span_id = self._new_id()[-SPAN_ID_BYTES:].hex()
            call.span = Span(name=SPAN_NAME, parent=parent, started_at=now, id=span_id, attributes=attributes)

    def placed(self, call: Call, message: m.Dispatched, reason: str) -> None:
        """A request, or a part of one, goes to this call's worker."""
        if self._is_detailed:
            call.label = called(message)
            self.news.append(News(f"{_kind(message)} goes to {call.worker.id}: {reason}", request_id=call.label))

    def refused(self, message: m.Dispatched, error: KVCacheError) -> None:
        """A request was answered without a worker."""
        if self._is_detailed:
            self.news.append(News(f"{_kind(message)} is refused: {error.code.name}", request_id=called(message)))

    def ended(self, call: Call, how: str) -> None:
        """A call is over: done, or else as the words say."""
        if call.span is not None:
            self._spans.append(replace(call.span, error="" if how == DONE else how))
        if self._is_detailed:
            self.news.append(News(f"over at {call.worker.id}: {how}", request_id=call.label))


def called(message: m.Dispatched) -> str:
    """How logs call a request."""
    return (message.label if isinstance(message, m.Generate) else "") or message.req_id.hex()


def _kind(message: m.Dispatched) -> str:
    return type(message).__name__
