"""What several workers said to one request, as the one answer that its client gets."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from bus import wire
from bus.errors import ErrorCode, InternalError, KVCacheError, WorkerLost
from bus.messages import Failed, KvDone, Message


class Answers(ABC):
    """Answers to the client's request `req_id`, as they come."""

    def __init__(self, req_id: bytes) -> None:
        self._req_id = req_id
        self._done: list[KvDone] = []
        self._refused: Failed | None = None

    def add(self, answer: Message) -> None:
        """One worker's final answer."""
        match answer:
            case KvDone():
                self._done.append(answer)
            case Failed():
                self._refused = self._refused or answer
            case _:
                self.add_error(InternalError(f"a worker answered with a {type(answer).__name__}, which means nothing"))

    def add_error(self, error: KVCacheError) -> None:
        """One worker's answer is that it cannot."""
        self.add(wire.failed(self._req_id, error))

    @abstractmethod
    def lose(self, worker_id: str) -> None:
        """A worker that was asked is gone and will not answer."""

    @property
    def is_refused(self) -> bool:
        """Whether the request has failed."""
        return self._refused is not None

    @property
    def is_settled(self) -> bool:
        """Whether the answers that are still to come can change nothing."""
        return False

    def total(self) -> Message:
        """The client's answer: why it failed, if it did, else what was done."""
        return self._refused or self._total(self._done)

    @abstractmethod
    def _total(self, done: list[KvDone]) -> Message: ...


class DeleteAnswers(Answers):
    """Each worker deletes its own copy of the same layers; what none of them has is not found.

    A worker that is lost meanwhile took its copies with it, so nothing is left to do there.
    """

    def __init__(self, req_id: bytes) -> None:
        super().__init__(req_id)
        self._missing: Failed | None = None

    def add(self, answer: Message) -> None:
        if isinstance(answer, Failed) and answer.code == ErrorCode.NOT_FOUND:
            self._missing = answer
        else:
            super().add(answer)

    def lose(self, worker_id: str) -> None:
        pass

    def _total(self, done: list[KvDone]) -> Message:
        """If no worker has said anything, all of them were lost, and another attempt may find others."""
        if not done:
            return self._missing or wire.failed(self._req_id, WorkerLost("every worker that was asked was lost"))
        is_repeated = all(one.duplicate for one in done)
        return KvDone(req_id=self._req_id, count=max(one.count for one in done), duplicate=is_repeated)


class WriteAnswers(Answers):
    """A write is done when every worker that is to have it has it, in one state."""

    @property
    def is_settled(self) -> bool:
        """One that has failed somewhere has failed; what is left of it would wait for bytes that do not come."""
        return self.is_refused

    def lose(self, worker_id: str) -> None:
        self.add_error(WorkerLost(f"worker {worker_id}, which was to have a copy, was lost"))

    def _total(self, done: list[KvDone]) -> Message:
        lengths = {one.length for one in done}
        if len(lengths) != 1:
            error = InternalError(f"copies of the layer have different lengths, {sorted(lengths)}; delete the sequence")
            return wire.failed(self._req_id, error)
        is_repeated = all(one.duplicate for one in done)
        return msgspec.structs.replace(done[0], durability=f"mem{len(done)}", duplicate=is_repeated)
