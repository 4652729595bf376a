"""What the broker tells of single requests: where each went, and what became of it.

Owns the broker's news. Of single requests nothing is told unless it is asked for (`is_detailed`): they are too many.
Of what a request holds nothing is ever told, only its name and kind, and the broker's own words.
"""

from __future__ import annotations

from typing import NamedTuple

from bus import messages as m
from bus.errors import KVCacheError
from kvcache.broker.members import Call


class News(NamedTuple):
    """Something for the log. request_id: how the request is called that it is about; empty for none."""

    text: str
    is_bad: bool = False
    request_id: str = ""


class Journal:
    """news: what has not been taken yet, in order; `Sessions` adds to it what concerns everybody."""

    def __init__(self, *, is_detailed: bool) -> None:
        self.news: list[News] = []
        self._is_detailed = is_detailed

    def take(self) -> list[News]:
        """What has happened since the last call."""
        news, self.news = self.news, []
        return news

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
        """A call is over."""
        if self._is_detailed:
            self.news.append(News(f"over at {call.worker.id}: {how}", request_id=call.label))


def called(message: m.Dispatched) -> str:
    """How logs call a request."""
    return (message.label if isinstance(message, m.Generate) else "") or message.req_id.hex()


def _kind(message: m.Dispatched) -> str:
    return type(message).__name__
