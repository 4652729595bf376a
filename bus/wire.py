"""Bytes to messages and back; the only place that knows either.

    frame 0    'K' 'V' 0x01 | major u8 | minor u8 | opcode u8 | flags u16 | crc32c of the rest u32 | header
    frame 1..  payloads, exactly as many and as long as the header's `payload` says, each with its crc32c

The 12-byte prefix decides magic, version and opcode before msgpack sees a byte; the header is decoded
straight into the opcode's type, whose fields bound every length. `decode` returns a message or raises
`MalformedMessage` / `UnsupportedVersion`, whatever the bytes; nothing past it checks again. An envelope
(`Assign`, `Forward`, `Reply`) is one such frame in front of a message's own, added and taken off at the
broker so that what it relays is never parsed, copied or re-encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, get_args

import msgspec
from crc32c import crc32c

from bus import messages
from bus.errors import Corrupt, KVCacheError, MalformedMessage, UnsupportedVersion
from bus.messages import MAX_PAYLOADS, Failed, Message, Part

Buffer: TypeAlias = bytes | bytearray | memoryview
Frames: TypeAlias = Sequence[Buffer]

MAGIC = b"KV\x01"
MAJOR, MINOR = 2, 0
MAX_HEADER_BYTES = 8 * 1024
NO_REQUEST = bytes(16)

_PREFIX = struct.Struct("<3sBBBHI")
PREFIX_BYTES = _PREFIX.size
_OPCODE_AT = 5
MAX_FRAME_BYTES = PREFIX_BYTES + MAX_HEADER_BYTES
"""Of frame 0."""


def _all_messages() -> dict[int, type[Message]]:
    unions = (
        messages.ToBroker,
        messages.WorkerToBroker,
        messages.ToWorker,
        messages.ToClient,
        messages.ToHolder,
        messages.ToPuller,
        messages.OnStream,
    )
    return {kind.opcode: kind for union in unions for kind in get_args(union)}


BY_OPCODE: dict[int, type[Message]] = _all_messages()
_DECODERS: dict[int, msgspec.msgpack.Decoder[Any]] = {
    opcode: msgspec.msgpack.Decoder(kind) for opcode, kind in BY_OPCODE.items()
}
_HAS_PAYLOAD: dict[int, bool] = {opcode: "payload" in kind.__struct_fields__ for opcode, kind in BY_OPCODE.items()}
_encoder = msgspec.msgpack.Encoder()


class _RequestId(msgspec.Struct, array_like=True):
    req_id: messages.Id16


_request_id = msgspec.msgpack.Decoder(_RequestId)


class Decoded(NamedTuple):
    """A message and its payload frames, as they came (views of what was received, never copies)."""

    message: Any
    payload: Frames


def describe(payload: Sequence[Buffer]) -> tuple[Part, ...]:
    """The `payload` field for these frames: their lengths in bytes and checksums."""
    return tuple(Part(nbytes=_nbytes(frame), crc=crc32c(frame)) for frame in payload)


def encode(message: Message) -> bytes:
    """Frame 0 of a message; its payload frames are sent behind it.

    Raises MalformedMessage for what no frame can hold: too much text together, a number beyond 64 bits, half a
    surrogate pair. Ranges are not checked here, they are at the receiver.
    """
    try:
        header = _encoder.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise MalformedMessage(f"{type(message).__name__} cannot be sent: {error}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"{type(message).__name__} header is {len(header)} bytes, limit {MAX_HEADER_BYTES}")
    return _PREFIX.pack(MAGIC, MAJOR, MINOR, message.opcode, 0, crc32c(header)) + header


def decode(frames: Frames, *, verify_payload: bool = True) -> Decoded:
    """The message that `frames` are.

    verify_payload: check the payload frames' lengths and checksums too. The broker passes False for what
    it only relays: the far end checks, so a bit that flips on either hop is found.
    Raises MalformedMessage or UnsupportedVersion, and nothing else, for any bytes at all.
    """
    if not frames:
        raise MalformedMessage("message of no frames")
    if len(frames) > 1 + MAX_PAYLOADS:
        raise MalformedMessage(f"message of {len(frames)} frames; at most {1 + MAX_PAYLOADS}")
    message = decode_header(frames[0])
    payload = frames[1:]
    parts = check_count(message, payload)
    if verify_payload:
        check_payload(parts, payload)
    return Decoded(message, payload)


def decode_intact(frames: Frames) -> Decoded:
    """As `decode`, but payload bytes that changed on the way are Corrupt: the same may be sent again."""
    decoded = decode(frames, verify_payload=False)
    try:
        check_payload(getattr(decoded.message, "payload", ()), decoded.payload)
    except MalformedMessage as error:
        raise Corrupt(error.message) from error
    return decoded


def decode_envelope(frames: Frames) -> Any:  # noqa: ANN401  # any of the closed unions; receivers match on it
    """The message in frame 0, whatever follows it. Raises MalformedMessage or UnsupportedVersion."""
    if not frames:
        raise MalformedMessage("message of no frames")
    return decode_header(frames[0])


def decode_header(frame: Buffer) -> Any:  # noqa: ANN401  # see decode_envelope
    """The message in one frame 0. Raises MalformedMessage or UnsupportedVersion."""
    opcode, crc = _read_prefix(frame)
    decoder = _DECODERS.get(opcode)
    if decoder is None:
        raise MalformedMessage(f"opcode {opcode} is not defined")
    header = frame[PREFIX_BYTES:]
    if crc32c(header) != crc:
        raise MalformedMessage("header checksum does not match")
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"{BY_OPCODE[opcode].__name__}: {error}") from error


def check_count(message: Message, payload: Frames) -> Sequence[Part]:
    """What `message` says of its payload frames. Raises MalformedMessage unless so many came, and may come."""
    parts: Sequence[Part] = getattr(message, "payload", ()) if _HAS_PAYLOAD[message.opcode] else ()
    least, most = message.payloads
    if len(parts) != len(payload) or not least <= len(parts) <= most:
        raise MalformedMessage(
            f"{type(message).__name__} with {len(payload)} payload frames, {len(parts)} described,"
            f" {least} to {most} allowed"
        )
    return parts


def check_payload(parts: Sequence[Part], payload: Frames) -> None:
    """Raise MalformedMessage unless each payload frame has the length and checksum its part says."""
    for index, (part, frame) in enumerate(zip(parts, payload, strict=True)):
        if part.nbytes != _nbytes(frame):
            raise MalformedMessage(f"payload {index} is {_nbytes(frame)} bytes, its header says {part.nbytes}")
        if part.crc != crc32c(frame):
            raise MalformedMessage(f"payload {index} does not match its checksum")


def request_id_of(frame: Buffer) -> bytes:
    """The request id in a frame 0 whose other fields may be wrong; all zero when there is none to be read."""
    try:
        return _request_id.decode(frame[PREFIX_BYTES:]).req_id
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return NO_REQUEST


def is_failure(frames: Frames) -> bool:
    """Whether this message, that nobody here decodes, is a `Failed`."""
    return bool(frames) and len(frames[0]) >= PREFIX_BYTES and frames[0][_OPCODE_AT] == Failed.opcode


def failed(req_id: bytes, error: KVCacheError) -> Failed:
    """The terminal message that carries `error`; whatever is in it, this can be sent."""
    return Failed(
        req_id=req_id,
        code=int(error.code),
        message=error.message[:1000].encode(errors="replace").decode(),
        retryable=error.retryable,
        retry_after_ms=min(max(0, error.retry_after_ms), messages.MAX_MILLIS),
        detail=min(max(-(2**63), error.detail), 2**63 - 1),
    )


def _read_prefix(frame: Buffer) -> tuple[int, int]:
    """Opcode and header checksum, once the rest of the prefix was checked."""
    if not PREFIX_BYTES <= len(frame) <= MAX_FRAME_BYTES:
        raise MalformedMessage(f"first frame of {len(frame)} bytes, not {PREFIX_BYTES} to {MAX_FRAME_BYTES}")
    magic, major, _, opcode, flags, crc = _PREFIX.unpack_from(frame)
    if magic != MAGIC:
        raise MalformedMessage("first frame does not begin with the protocol's magic bytes")
    if major != MAJOR:
        raise UnsupportedVersion(
            f"protocol version {major} is not supported; this side speaks {MAJOR}.{MINOR}", detail=major
        )
    if flags:
        raise MalformedMessage(f"flags {flags:#x} are not defined")
    return opcode, crc


def _nbytes(frame: Buffer) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)
