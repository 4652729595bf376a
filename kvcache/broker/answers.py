"""What several workers said to one request, as the one answer that its client gets.

Each worker has its own copies of sequences, so what they did adds up, and what none of them has is not found.
Anything else that one of them refuses, the client must hear: it is not done there. A worker that is lost
meanwhile took its copies with it, so nothing is left to do there.
"""

from __future__ import annotations

from bus import wire
from bus.errors import ErrorCode, InternalError, KVCacheError, WorkerLost
from bus.messages import Failed, KvDone, Message


class Answers:
    """Answers to the client's request `req_id`, as they come."""

    def __init__(self, req_id: bytes) -> None:
        self._req_id = req_id
        self._done: KvDone | None = None
        self._missing: Failed | None = None
        self._refused: Failed | None = None

    def add(self, answer: Message) -> None:
        """One worker's final answer."""
        match answer:
            case KvDone():
                self._done = answer if self._done is None else _joined(self._done, answer)
            case Failed(code=ErrorCode.NOT_FOUND):
                self._missing = answer
            case Failed():
                self._refused = answer
            case _:
                self.add_error(InternalError(f"a worker answered with a {type(answer).__name__}, which means nothing"))

    def add_error(self, error: KVCacheError) -> None:
        """One worker's answer is that it cannot."""
        self._refused = wire.failed(self._req_id, error)

    def total(self) -> Message:
        """The client's answer: a refusal if there is one, else what was done, else that nobody has it.

        If no worker has said anything, all of them were lost, and another attempt may find others.
        """
        return self._refused or self._done or self._missing or self._nobody()

    def _nobody(self) -> Failed:
        return wire.failed(self._req_id, WorkerLost("every worker that was asked was lost"))


def _joined(one: KvDone, other: KvDone) -> KvDone:
    return KvDone(
        req_id=one.req_id,
        count=one.count + other.count,
        durability=one.durability,
        duplicate=one.duplicate and other.duplicate,
    )
