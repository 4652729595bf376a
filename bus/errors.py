"""Every error we raise on purpose, and the code each one has on the wire.

The class says what to do: `ProtocolError` is a bug in a peer, `Unavailable` may pass on a retry,
`Rejected` never will, `StreamError` is about one token stream. Whether to retry is decided by
`retryable`, never by matching text. An error that crossed the wire is rebuilt by `error_from_wire`
as the same class, with the sender's words and the request it belongs to.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class ErrorCode(enum.IntEnum):
    """The numbers on the wire. They are never reused for another meaning; 10 was one that nothing raised."""

    BAD_FRAME = 1
    BAD_VERSION = 2
    UNAUTHENTICATED = 3
    FORBIDDEN = 4
    TOO_LARGE = 5
    BAD_TENSOR = 6
    BAD_ARG = 7
    NOT_FOUND = 8
    CONFLICT = 9
    STALE_EPOCH = 11
    OVERLOADED = 12
    NO_SPACE = 13
    DEADLINE = 14
    CANCELLED = 15
    WORKER_LOST = 16
    REPLAY_EXPIRED = 17
    MODEL_UNAVAILABLE = 18
    TOKENIZER = 19
    CORRUPT = 20
    DRAINING = 21
    INTERNAL = 22
    NO_WORKERS = 23
    CONNECTION_LOST = 24
    STREAM_GAP = 25
    MODEL_NOT_FOUND = 26


class KVCacheError(Exception):
    """The root. `detail` is the one number some errors carry (a length, an epoch); subclasses name it."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, detail: int = 0, retry_after_ms: int = 0, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.retry_after_ms = retry_after_ms
        self.request_id = request_id

    def __str__(self) -> str:
        where = f" [request {self.request_id}]" if self.request_id else ""
        return f"{self.message}{where}"


class ProtocolError(KVCacheError):
    """A peer (or we) broke the protocol; the connection is kept, the message is not."""

    code = ErrorCode.BAD_FRAME


class MalformedMessage(ProtocolError):
    """Bytes that are no message: wrong frames, lengths, checksum, types or ranges."""


class UnsupportedVersion(ProtocolError):
    """The peer speaks a major version that we do not; `detail` is which."""

    code = ErrorCode.BAD_VERSION


class Unavailable(KVCacheError):
    """It cannot be done now; the same request may succeed later or elsewhere."""

    retryable = True


class NoWorkers(Unavailable):
    """No worker is ready to be routed to."""

    code = ErrorCode.NO_WORKERS

    @property
    def is_coming(self) -> bool:
        """Whether what is needed is on its way to a worker (`detail` is 1), so that waiting helps."""
        return self.detail == 1


class Overloaded(Unavailable):
    """Refused at once because there is too much to do; try again after `retry_after_ms`."""

    code = ErrorCode.OVERLOADED


class WorkerLost(Unavailable):
    """The worker that had the request died, froze or left."""

    code = ErrorCode.WORKER_LOST


class StaleEpoch(Unavailable):
    """A newer attempt of the same request has taken over; `detail` is its epoch."""

    code = ErrorCode.STALE_EPOCH
    retryable = False


class Draining(Unavailable):
    """The process is shutting down and takes nothing new."""

    code = ErrorCode.DRAINING


class Corrupt(Unavailable):
    """A checksum did not match: bytes changed on the way."""

    code = ErrorCode.CORRUPT


class ConnectionLost(Unavailable):
    """No broker answers."""

    code = ErrorCode.CONNECTION_LOST


class DeadlineExceeded(KVCacheError):
    """The request's time was up before it ended."""

    code = ErrorCode.DEADLINE


class Cancelled(KVCacheError):
    """The request was cancelled by whoever made it."""

    code = ErrorCode.CANCELLED


class Rejected(KVCacheError):
    """The request is wrong as it stands; a retry never helps."""

    code = ErrorCode.BAD_ARG


class BadArgument(Rejected):
    """A parameter is out of its range or of the wrong kind."""


class BadTensor(Rejected):
    """A tensor's dtype, shape or length do not agree."""

    code = ErrorCode.BAD_TENSOR


class TooLarge(Rejected):
    """More bytes or tokens than the stated limit."""

    code = ErrorCode.TOO_LARGE


class Unauthenticated(Rejected):
    """The peer did not show who it is."""

    code = ErrorCode.UNAUTHENTICATED


class Forbidden(Rejected):
    """The peer may not do this."""

    code = ErrorCode.FORBIDDEN


class NotFound(Rejected):
    """No such sequence, layer or stream on its owner; it may have been evicted."""

    code = ErrorCode.NOT_FOUND


class Conflict(Rejected):
    """The sequence is not in the state the request supposed."""

    code = ErrorCode.CONFLICT

    @property
    def current_len(self) -> int:
        """Length of the sequence as its owner has it, in tokens."""
        return self.detail


class NoSpace(Rejected):
    """The request can never fit, or all that could be evicted is pinned or in use."""

    code = ErrorCode.NO_SPACE


class ModelNotFound(Rejected):
    """No model of this name is known to the worker."""

    code = ErrorCode.MODEL_NOT_FOUND


class ModelUnavailable(Rejected):
    """The model is known and cannot be served; other models are not affected."""

    code = ErrorCode.MODEL_UNAVAILABLE


class TokenizerError(Rejected):
    """The tokenizer or the chat template failed on this prompt."""

    code = ErrorCode.TOKENIZER


class StreamError(KVCacheError):
    """A token stream cannot be continued as promised."""

    code = ErrorCode.STREAM_GAP


class StreamGap(StreamError):
    """Tokens are missing, or the digest at the end is not that of the tokens received."""


class ReplayExpired(StreamError):
    """The worker no longer keeps the tokens that were asked for again."""

    code = ErrorCode.REPLAY_EXPIRED


class InternalError(KVCacheError):
    """A fault of ours, with its traceback in the log of the process that had it."""


def _leaves(kind: type[KVCacheError]) -> list[type[KVCacheError]]:
    """The classes that errors are raised as: those of which there is no narrower one."""
    return [leaf for narrower in kind.__subclasses__() for leaf in _leaves(narrower)] or [kind]


BY_CODE: dict[ErrorCode, type[KVCacheError]] = {leaf.code: leaf for leaf in _leaves(KVCacheError)}


def error_from_wire(
    code: int, message: str, *, detail: int = 0, retry_after_ms: int = 0, request_id: str | None = None
) -> KVCacheError:
    """Rebuild a peer's error as its class; a code from a newer peer becomes `InternalError`."""
    try:
        kind = BY_CODE[ErrorCode(code)]
    except (ValueError, KeyError):
        kind = InternalError
    return kind(message, detail=detail, retry_after_ms=retry_after_ms, request_id=request_id)
