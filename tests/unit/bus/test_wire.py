"""The codec: what is sent comes back, and whatever else arrives is one typed error."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any, get_args

import msgspec
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import messages as m
from bus import wire
from bus.errors import KVCacheError, MalformedMessage, Overloaded, ProtocolError, UnsupportedVersion
from bus.stats import ClusterStats, Explanation, Figures, ModelStats, WorkerStats, pack, unpack
from tests.unit.bus.any_message import figures, messages

KINDS = sorted(wire.BY_OPCODE.values(), key=lambda kind: kind.opcode)
REQ = bytes(range(16))
GET = m.Get(req_id=REQ, attempt=0, deadline_ms=1000, seq_id="a", layer=0)


def framed(
    header: bytes,
    opcode: int = GET.opcode,
    *,
    magic: bytes = wire.MAGIC,
    major: int = wire.MAJOR,
    minor: int = wire.MINOR,
    flags: int = 0,
    crc: int | None = None,
) -> bytes:
    """A frame 0 around any header, by default with a right prefix, so that the header is what is tested."""
    checksum = crc32c(header) if crc is None else crc
    return struct.pack("<3sBBBHI", magic, major, minor, opcode, flags, checksum) + header


def header_of(message: m.Message, **changed: object) -> bytes:
    """A header with some fields replaced by what the type would not allow."""
    names = message.__struct_fields__
    return msgspec.msgpack.encode([changed.get(name, getattr(message, name)) for name in names])


def put(k: object, payload: list[bytes] | None = None) -> list[bytes]:
    """The frames of a `Put` whose K is described by anything at all."""
    frames = payload or []
    parts = [[len(frame), crc32c(frame)] for frame in frames]
    header = msgspec.msgpack.encode([REQ, 0, 1000, "a", 0, k, [1, [1, 1, 1]], parts])
    return [framed(header, m.Put.opcode), *frames]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=12)
@given(data=st.data())
def test_every_message_comes_back_as_it_was_sent(kind: type[m.Message], data: st.DataObject) -> None:
    message, payload = data.draw(messages(kind))

    decoded = wire.decode([wire.encode(message), *payload])

    assert decoded.message == message
    assert type(decoded.message) is kind
    assert list(decoded.payload) == payload


@given(figures())
def test_figures_come_back_as_they_were_packed(figures: Figures) -> None:
    assert unpack(pack(figures), type(figures)) == figures


def test_of_figures_whose_words_are_no_unicode_the_rest_is_packed() -> None:
    model = ModelStats(name="m", state="failed", reason="/models/\udcff has no config.json", loads=3)
    figures = WorkerStats(worker_id="w", incarnation=2**62, state="ready", models=(model,))
    (told,) = unpack(pack(figures), WorkerStats).models
    assert (told.reason, told.loads) == ("/models/? has no config.json", 3)
    assert unpack(pack(figures), WorkerStats).incarnation == 2**62


def test_opcodes_are_those_of_the_published_protocol() -> None:
    assert {kind.__name__: kind.opcode for kind in KINDS} == {
        **{"Hello": 1, "WorkerHello": 2, "Welcome": 3, "AttachBulk": 4, "Beat": 5, "WorkerBeat": 6, "BrokerBeat": 7},
        **{"NodesChanged": 10, "NodesHeld": 11, "AskNodes": 12, "Prefilled": 116},
        **{"Goodbye": 8, "WorkerStatus": 9, "Query": 16, "Route": 17, "QueryReply": 18, "Routed": 19},
        **{"OpenStream": 32, "StreamOpened": 33, "Generate": 34, "Cancel": 35, "Resume": 36, "Ack": 37},
        **{"Started": 38, "Replay": 39, "StreamEnd": 40, "Tokenize": 41, "Tokenized": 42},
        **{"Detokenize": 43, "Detokenized": 44, "PromptLogprobs": 45},
        **{"SubAck": 48, "StreamTokens": 49, "StreamBeat": 50},
        **{"Put": 64, "Append": 65, "Get": 66, "Length": 67, "Delete": 68, "Pin": 69, "Unpin": 70},
        **{"ListSequences": 71, "KvDone": 72, "KvValue": 73, "KvListed": 74, "Credit": 75, "Chunk": 76},
        **{"FlushPrefixCache": 77},
        **{"Grant": 80, "PullBlocks": 81, "BlocksFound": 82},
        **{
            "CopySequence": 83,
            "PullSequence": 84,
            "SequenceFound": 85,
            "SequenceCopied": 86,
            "HandedOver": 87,
            "ReleaseSequence": 90,
        },
        **{"WorkerSequences": 88, "DropSequences": 89, "ReleaseSequence": 90},
        **{"Failed": 96, "Assign": 112, "Forward": 113, "Reply": 114, "Release": 115, "Relay": 117},
    }


def test_one_frame_is_byte_for_byte_what_the_document_shows() -> None:
    """A published vector: another implementation can check itself against it."""
    assert wire.encode(m.Beat(beat=7)).hex() == "4b5601" + "02" + "00" + "05" + "0000" + "36800ff2" + "9107"


def generate(label: str = "", trace: str = "") -> m.Generate:
    return m.Generate(
        req_id=bytes(16),
        attempt=0,
        deadline_ms=1,
        stream_id=bytes(16),
        epoch=0,
        kind=m.PromptKind.TEXT,
        sampling=m.Sampling(),
        label=label,
        trace=trace,
    )


def test_a_label_that_would_disturb_a_log_is_malformed() -> None:
    for label in ("", "chat 7", "~" * 128):
        assert wire.decode_header(wire.encode(generate(label))).label == label
    for label in ("two\nlines", "end\n", "\x1b[2J", "\u00e9", "~" * 129):
        with pytest.raises(MalformedMessage, match="Generate"):
            wire.decode_header(wire.encode(generate(label)))


def test_a_trace_that_is_none_is_malformed() -> None:
    whole = f"00-{'a' * 32}-{'b' * 16}-01"
    for trace in ("", whole):
        assert wire.decode_header(wire.encode(generate(trace=trace))).trace == trace
    for trace in (whole.upper(), f"{whole}-more", f"{whole}\n", f"01{whole[2:]}", whole[:-1]):
        with pytest.raises(MalformedMessage, match="Generate"):
            wire.decode_header(wire.encode(generate(trace=trace)))


def test_what_an_older_peer_sends_lacks_the_newest_fields() -> None:
    """Fields are only ever added at the end, with a default."""
    header = msgspec.msgpack.decode(wire.encode(generate("x"))[wire.PREFIX_BYTES :])
    older = wire.decode_header(framed(msgspec.msgpack.encode(header[:-2]), m.Generate.opcode))
    assert (older.label, older.trace) == ("", "")


def test_a_failure_is_known_by_its_opcode_alone() -> None:
    assert wire.is_failure([wire.encode(wire.failed(bytes(16), MalformedMessage("x")))])
    for frames in ([], [b""], [b"KV\x01\x01\x00"], [wire.encode(m.Beat(beat=m.Failed.opcode))]):
        assert not wire.is_failure(frames)


def test_the_checksum_is_castagnolis() -> None:
    """The check value of CRC-32C (RFC 3720, appendix B.4 uses the same polynomial)."""
    assert wire.describe([b"123456789"])[0].crc == 0xE3069283


def test_every_request_begins_with_its_request_id() -> None:
    for kind in (*get_args(m.Dispatched), *get_args(m.FollowUp), m.OpenStream, m.Query, m.Route):
        assert kind.__struct_fields__[0] == "req_id", kind


# --- anything that is no message -----------------------------------------------------------------


def decode_or_error(frames: list[bytes]) -> m.Message | ProtocolError:
    try:
        message = wire.decode(frames).message
    except ProtocolError as error:
        return error
    assert isinstance(message, m.Message)
    return message


@given(st.lists(st.binary(max_size=200), max_size=12))
def test_any_bytes_are_a_message_or_a_typed_error(frames: list[bytes]) -> None:
    assert isinstance(decode_or_error(frames), ProtocolError | m.Message)


@given(st.sampled_from(KINDS), st.binary(max_size=300), st.lists(st.binary(max_size=20), max_size=9))
def test_any_header_behind_a_right_prefix_is_a_message_or_a_typed_error(
    kind: type[m.Message], header: bytes, payload: list[bytes]
) -> None:
    decode_or_error([framed(header, kind.opcode), *payload])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner),
    max_leaves=20,
)


@given(st.sampled_from(KINDS), ANYTHING)
def test_any_msgpack_behind_a_right_prefix_is_a_message_or_a_typed_error(kind: type[m.Message], value: object) -> None:
    decode_or_error([framed(msgspec.msgpack.encode(value), kind.opcode)])


@given(messages(), st.data())
def test_any_bit_that_flips_is_noticed(sent: tuple[m.Message, list[bytes]], data: st.DataObject) -> None:
    """But in the minor version, which says nothing yet, and in a prefix that becomes another message's."""
    message, payload = sent
    frames = [bytearray(wire.encode(message)), *map(bytearray, payload)]
    index = data.draw(st.integers(0, len(frames) - 1).filter(lambda i: len(frames[i]) > 0))
    at = data.draw(st.integers(0, len(frames[index]) * 8 - 1))
    if index == 0 and at // 8 in {4, 5}:
        return
    frames[index][at // 8] ^= 1 << at % 8

    with pytest.raises(ProtocolError):
        wire.decode([bytes(frame) for frame in frames])


@given(messages(), st.integers(0, 255))
def test_an_opcode_that_changed_is_no_other_message_of_the_same_request(
    sent: tuple[m.Message, list[bytes]], opcode: int
) -> None:
    frame = bytearray(wire.encode(sent[0]))
    frame[5] = opcode
    decoded = decode_or_error([bytes(frame), *sent[1]])
    assert isinstance(decoded, ProtocolError) or decoded.opcode == opcode


@given(messages(), st.data())
def test_a_first_frame_that_was_cut_is_refused(sent: tuple[m.Message, list[bytes]], data: st.DataObject) -> None:
    frame = wire.encode(sent[0])
    short = frame[: data.draw(st.integers(0, len(frame) - 1))]
    with pytest.raises(MalformedMessage):
        wire.decode([short, *sent[1]])


GOOD = header_of(GET)

BAD_FRAMES: dict[str, list[bytes]] = {
    "no frames": [],
    "an empty frame": [b""],
    "200 frames": [framed(GOOD), *[b""] * 199],
    "a prefix that was cut": [framed(GOOD)[:11]],
    "another magic": [framed(GOOD, magic=b"KW\x01")],
    "another framing": [framed(GOOD, magic=b"KV\x02")],
    "http": [b"GET / HTTP/1.1\r\n\r\n"],
    "an opcode that is not defined": [framed(GOOD, 200)],
    "opcode 0": [framed(GOOD, 0)],
    "flags that are not defined": [framed(GOOD, flags=1)],
    "the high flag": [framed(GOOD, flags=0x8000)],
    "a wrong checksum": [framed(GOOD, crc=1)],
    "a header beyond the limit": [framed(GOOD + bytes(wire.MAX_HEADER_BYTES))],
    "no header": [framed(b"")],
    "a header that is a map": [framed(msgspec.msgpack.encode({"req_id": REQ}))],
    "a header that is a number": [framed(b"\x07")],
    "a map with two equal keys": [framed(b"\x82\xa1a\x01\xa1a\x02")],
    "a field too few": [framed(msgspec.msgpack.encode([REQ, 0, 1000, "a"]))],
    "a field too many": [framed(msgspec.msgpack.encode([*msgspec.msgpack.decode(GOOD), 1]))],
    "bytes behind the header": [framed(GOOD + b"\x00")],
    "a bool for a number": [framed(header_of(GET, layer=True))],
    "a float for a number": [framed(header_of(GET, layer=1.0))],
    "text for a number": [framed(header_of(GET, layer="1"))],
    "nil for a number": [framed(header_of(GET, layer=None))],
    "a negative number": [framed(header_of(GET, layer=-1))],
    "a number beyond its range": [framed(header_of(GET, layer=2**32))],
    "the largest number": [framed(header_of(GET, start=2**64 - 1))],
    "a deadline in the next century": [framed(header_of(GET, deadline_ms=2**40))],
    "an id that is too short": [framed(header_of(GET, req_id=REQ[:15]))],
    "an id that is too long": [framed(header_of(GET, req_id=REQ + b"x"))],
    "an id that is text": [framed(header_of(GET, req_id="0123456789abcdef"))],
    "a name that is too long": [framed(header_of(GET, seq_id="x" * 257))],
    "text that is no utf-8": [framed(header_of(GET, seq_id="ab").replace(b"ab", b"\xff\xfe"))],
    "an extension type": [framed(header_of(GET, layer=msgspec.msgpack.Ext(1, b"x")))],
    "an array bomb": [framed(b"\xdd\xff\xff\xff\xff")],
    "a map bomb": [framed(b"\xdf\xff\xff\xff\xff")],
    "a bytes bomb": [framed(b"\x98\xc6\xff\xff\xff\xff")],
    "a text bomb": [framed(b"\x98\xdb\xff\xff\xff\xff")],
    "an extension bomb": [framed(b"\x98\xc9\xff\xff\xff\xff\x01")],
    "nested as deep as a header can be": [framed(b"\x91" * (wire.MAX_HEADER_BYTES - 1) + b"\x00")],
    "nested arrays where a number belongs": [framed(GOOD[:1] + b"\x91" * 8000)],
    "nested maps": [framed(b"\x81\x00" * 4000)],
    "an enum's value that does not exist": [framed(msgspec.msgpack.encode([REQ, "all"]), m.Query.opcode)],
    "a tensor's dims overflow": put([1, [2**40, 2**40]]),
    "a dim beyond 31 bits": put([1, [2**31, 1, 1]]),
    "more dims than eight": put([1, [1] * 9]),
    "a dim that is negative": put([1, [-1, 1, 1]]),
    "a dim that is a bool": put([1, [True, 1, 1]]),
    "a dim that is a float": put([1, [1.0, 1, 1]]),
    "a dim of 2**64 - 1": put([1, [2**64 - 1, 1, 1]]),
    "a dtype that does not exist": put([99, [1, 1, 1]]),
    "a dtype by name": put(["object", [1, 1, 1]]),
    "a tensor with strides": put([1, [1, 1, 1], [4, 4, 4]]),
    "a payload that is missing": put([1, [1, 1, 1]], [b"k", b"v"])[:-1],
    "a payload too many": [*put([1, [1, 1, 1]], [b"k", b"v"]), b"x"],
    "more payloads than the message has": put([1, [1, 1, 1]], [b"k", b"v", b"w"]),
    "a payload shorter than it says": [*put([1, [1, 1, 1]], [b"k", b"v"])[:-1], b""],
    "a payload longer than it says": [*put([1, [1, 1, 1]], [b"k", b"v"])[:-1], b"vv"],
    "a payload that changed": [*put([1, [1, 1, 1]], [b"k", b"v"])[:-1], b"w"],
    "a payload where none belongs": [wire.encode(m.Beat(beat=1)), b"x"],
}


@pytest.mark.parametrize("frames", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_bad_frames_are_malformed(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        wire.decode(frames)


def test_the_frames_around_the_bad_ones_are_good() -> None:
    """What `framed`, `header_of` and `put` make is right until something is made wrong."""
    assert wire.decode([framed(GOOD)]).message == GET
    assert wire.decode(put([1, [1, 1, 1]], [b"k", b"v"])).message.k.shape == (1, 1, 1)
    assert wire.decode(put([1, [1, 1, 1]])).payload == []


@pytest.mark.parametrize("header", [b"\x91" * 100_000, b"\x81\xc0" * 100_000], ids=["arrays", "maps"])
def test_figures_nested_a_hundred_thousand_deep_are_malformed(header: bytes) -> None:
    """Payloads are longer than headers may be; msgspec answers this with RecursionError."""
    for kind in (ClusterStats, Explanation):
        with pytest.raises(MalformedMessage):
            unpack(b"\x81\xa7unknown" + header, kind)


def test_another_major_version_is_told_apart_from_garbage() -> None:
    with pytest.raises(UnsupportedVersion, match=r"version 3 is not supported; this side speaks 2\.") as caught:
        wire.decode([framed(b"whatever the future holds", 77, major=wire.MAJOR + 1, crc=0)])
    assert caught.value.detail == 3


def test_a_newer_minor_version_is_read() -> None:
    assert wire.decode([framed(GOOD, minor=9)]).message == GET


def test_an_envelope_is_read_whatever_follows_it() -> None:
    assert wire.decode_envelope([wire.encode(m.Forward(call=3)), b"anything"]) == m.Forward(call=3)
    with pytest.raises(MalformedMessage):
        wire.decode_envelope([])


def test_a_relay_does_not_read_payloads_but_counts_them() -> None:
    frames = put([1, [1, 1, 1]], [b"k", b"v"])
    assert wire.decode([*frames[:-1], b"w"], verify_payload=False).payload == [b"k", b"w"]
    with pytest.raises(MalformedMessage):
        wire.decode(frames[:-1], verify_payload=False)


def test_payloads_are_views_of_what_arrived_and_never_copies() -> None:
    data = memoryview(bytes(1 << 20)).toreadonly()
    message = m.Chunk(req_id=REQ, offset=0, payload=wire.describe([data]))

    tracemalloc.start()
    payload = wire.decode([wire.encode(message), data]).payload
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert payload[0] is data
    assert peak < 64 * 1024


def test_payloads_of_wider_items_are_measured_in_bytes() -> None:
    assert wire.describe([memoryview(bytes(16)).cast("I")])[0].nbytes == 16


@pytest.mark.parametrize(
    "name",
    [name for name in BAD_FRAMES if "bomb" in name or "nested" in name or "overflow" in name or "200" in name],
)
def test_a_refusal_allocates_nothing_on_a_peers_word(name: str) -> None:
    decode_or_error(BAD_FRAMES[name])  # what is allocated once for all is not counted

    tracemalloc.start()
    decode_or_error(BAD_FRAMES[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 256 * 1024


def test_ten_thousand_mutated_frames_leave_nothing_behind() -> None:
    rng = random.Random(7)
    frames = [wire.encode(GET), *(frames[0] for frames in BAD_FRAMES.values() if frames)]

    def mutate_many(count: int) -> None:
        for _ in range(count):
            frame = bytearray(rng.choice(frames))
            for _ in range(rng.randrange(1, 4)):
                if frame:
                    frame[rng.randrange(len(frame))] = rng.randrange(256)
            decode_or_error([bytes(frame)])

    mutate_many(1000)
    tracemalloc.start()
    mutate_many(10_000)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 64 * 1024


# --- what cannot be sent, and who asked ----------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"seq_id": "\ud800"}, {"seq_id": "x" * 9000}, {"layer": 2**64}, {"start": -(2**64)}], ids=str
)
def test_what_no_frame_can_hold_is_refused_before_it_is_sent(changed: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match="Get"):
        wire.encode(msgspec.structs.replace(GET, **changed))


@given(messages())
def test_the_request_id_is_found_in_frames_whose_other_fields_are_wrong(sent: tuple[m.Message, list[bytes]]) -> None:
    message = sent[0]
    req_id = getattr(message, "req_id", None)
    if req_id is not None:
        rest = [True] * 30
        assert wire.request_id_of(framed(msgspec.msgpack.encode([req_id, *rest]))) == req_id


@given(st.binary(max_size=400))
def test_no_bytes_upset_the_search_for_a_request_id(frame: bytes) -> None:
    assert len(wire.request_id_of(frame)) == 16


@pytest.mark.parametrize("frame", [b"", b"short", framed(b"\x91" * 8000), framed(b"\xdd\xff\xff\xff\xff")])
def test_a_request_id_that_cannot_be_read_is_all_zero(frame: bytes) -> None:
    assert wire.request_id_of(frame) == wire.NO_REQUEST


@given(st.text(st.characters(), max_size=3000), st.integers(), st.integers())
def test_any_error_can_be_sent(text: str, detail: int, wait_ms: int) -> None:
    message = wire.failed(REQ, Overloaded(text, detail=detail, retry_after_ms=wait_ms))
    decoded = wire.decode([wire.encode(message)]).message
    assert decoded == message
    assert decoded.retryable


def test_an_error_keeps_its_words_unless_they_cannot_be_sent() -> None:
    error: KVCacheError = Overloaded("no room", retry_after_ms=5, detail=-3)
    message = wire.failed(REQ, error)
    assert (message.message, message.retry_after_ms, message.detail) == ("no room", 5, -3)
    assert wire.failed(REQ, Overloaded("x\ud800y")).message == "x?y"
