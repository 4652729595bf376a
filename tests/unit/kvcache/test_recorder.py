"""A broker's record: what arrived and how long it was, and nothing that could tell what it said."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus import messages as m
from bus import wire
from bus.errors import BadArgument
from kvcache.broker.recorder import MAX_OPEN, Recorder, node_ends
from kvcache.broker.recording import Recording
from kvcache.hashing import encode_token_ids, routing_chain
from kvcache.simulate.traces import read_trace

PROMPT = list(range(100))
CHAIN = routing_chain(PROMPT)


def id16(number: int) -> bytes:
    return number.to_bytes(16, "big")


def asked(number: int, prompt: list[int] = PROMPT) -> list[bytes]:
    payload = encode_token_ids(prompt)
    message = m.Generate(
        req_id=id16(number),
        attempt=0,
        deadline_ms=1000,
        stream_id=id16(9),
        epoch=0,
        kind=m.PromptKind.TOKENS,
        sampling=m.Sampling(max_tokens=5),
        chain=routing_chain(prompt),
        payload=wire.describe([payload]),
    )
    return [wire.encode(message), payload]


def ended(number: int, prompt_tokens: int = 100) -> list[bytes]:
    message = m.StreamEnd(
        req_id=id16(number),
        epoch=0,
        num_tokens=7,
        digest=bytes(32),
        finish_reason=m.FinishReason.STOP,
        prompt_tokens=prompt_tokens,
        cached_tokens=0,
        queue_ms=0.0,
        prefill_ms=1.0,
        decode_ms=1.0,
    )
    return [wire.encode(message)]


def record(tmp_path: Path, *prompts: list[int]) -> Path:
    path = tmp_path / "record.jsonl"
    with Recording(path, 10.0) as recording:
        for number, prompt in enumerate(prompts):
            recording.asked(b"ann", asked(number, prompt), 10.0 + number)
        for number, prompt in enumerate(prompts):
            recording.answered(b"ann", ended(number, len(prompt)))
    return path


def test_a_record_is_a_trace_that_shares_what_the_prompts_shared(tmp_path: Path) -> None:
    first, second = read_trace(record(tmp_path, PROMPT, PROMPT[:64] + [7] * 64))
    assert (first.at, first.num_tokens, first.output_tokens) == (0.0, 100, 7)
    assert second.at == 1.0
    assert first.ends == (32, 64, 96, 100)
    assert first.chain[:2] == second.chain[:2]
    assert first.chain[2] != second.chain[2]


def test_a_record_has_neither_the_prompt_nor_its_digests(tmp_path: Path) -> None:
    content = record(tmp_path, PROMPT).read_bytes()
    assert encode_token_ids(PROMPT[:8]) not in content
    for node in CHAIN:
        assert node.hex().encode() not in content
    (tmp_path / "again").mkdir()
    assert record(tmp_path / "again", PROMPT).read_bytes() != content


def test_only_what_ended_well_and_was_asked_here_is_recorded() -> None:
    recorder = Recorder(b"secret", 0.0)
    assert recorder.answered(b"ann", ended(1)) is None
    recorder.asked(b"ann", asked(1), 0.0)
    assert recorder.answered(b"bob", ended(1)) is None
    assert recorder.answered(b"ann", [wire.encode(m.Ack(req_id=id16(1), epoch=0, upto=3))]) is None
    assert recorder.answered(b"ann", [b"garbage"]) is None
    recorder.asked(b"ann", [b"garbage"], 0.0)
    assert recorder.answered(b"ann", ended(1)) is not None
    assert recorder.answered(b"ann", ended(1)) is None


def test_generations_that_never_end_are_forgotten() -> None:
    recorder = Recorder(b"secret", 0.0)
    frames = asked(0)
    for number in range(MAX_OPEN + 1):
        recorder.asked(number.to_bytes(4, "big"), frames, 0.0)
    assert recorder.answered((0).to_bytes(4, "big"), ended(0)) is None
    assert recorder.answered(MAX_OPEN.to_bytes(4, "big"), ended(0)) is not None


def test_nodes_cover_their_share_of_the_prompts_bytes() -> None:
    assert node_ends(4, 400, 100) == [32, 64, 96, 100]
    assert node_ends(2, 200, 30) == [19, 30]
    assert node_ends(1, 0, 1) == [1]
    ends = node_ends(66, 128 * 1000, 32_000)
    assert ends[62:] == [63 * 32, 64 * 32, 66 * 32, 68 * 32]


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="cannot record to"):
        Recording(tmp_path, 0.0)


def test_a_full_disk_ends_the_record_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with Recording(Path("/dev/full"), 0.0) as recording:
        recording.asked(b"ann", asked(1), 0.0)
        recording.answered(b"ann", ended(1))
        recording.flush()
        recording.asked(b"ann", asked(2), 0.0)
        recording.answered(b"ann", ended(2))
        recording.flush()
    assert "recording has ended: " in caplog.text
    assert caplog.text.count("recording has ended") == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": ["zz"], "ends": [9]}',
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": ["00"], "ends": [10]}',
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": ["00", "01"], "ends": [9, 3]}',
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [], "ends": [9]}',
        '{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [3], "ends": [9]}',
    ],
)
def test_a_line_that_no_broker_wrote_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(line)
    with pytest.raises(BadArgument, match="line 1"):
        read_trace(path)
