"""Wrong requests: refused by the client where it can tell, and by the system when the client did not; nothing hangs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from bus import messages as m
from bus.errors import BadArgument, BadTensor, ErrorCode, KVCacheError, ModelNotFound, TooLarge
from bus.sockets import Context
from bus.tensors import DType, TensorMeta
from kvcache import AsyncClient
from tests.harness import raw
from tests.harness.cluster import Cluster
from tests.harness.counters import Counts, counters
from tests.harness.models import MAX_LEN
from tests.harness.prompts import PROMPT
from tests.unit.workers.conftest import VOCAB_SIZE

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MIB = 1 << 20
NAN, INF = float("nan"), float("inf")
F32 = DType.FLOAT32
GOOD = TensorMeta(F32, (4, 2, 8))
GOOD_BYTES = bytes(4 * 2 * 8 * 4)


def ones(*shape: int, dtype: str = "float32") -> Any:
    return np.ones(shape, dtype)


# --- tensors: rows 9 to 16 -----------------------------------------------------------------------

BAD_PAIRS: dict[str, tuple[Any, Any]] = {
    "a scalar": (np.float32(1), np.float32(1)),
    "a 0-d array": (ones(), ones()),
    "two dimensions": (ones(4, 16), ones(4, 16)),
    "four dimensions": (ones(1, 4, 2, 8), ones(1, 4, 2, 8)),
    "nine dimensions": (ones(*[1] * 9), ones(*[1] * 9)),
    "no heads": (ones(4, 0, 8), ones(4, 0, 8)),
    "no head_dim": (ones(4, 2, 0), ones(4, 2, 0)),
    "different lengths": (ones(4, 2, 8), ones(5, 2, 8)),
    "different heads": (ones(4, 2, 8), ones(4, 3, 8)),
    "different dtypes": (ones(4, 2, 8), ones(4, 2, 8, dtype="float64")),
    "complex numbers": (ones(4, 2, 8, dtype="complex64"), ones(4, 2, 8, dtype="complex64")),
    "objects": (np.empty((4, 2, 8), object), np.empty((4, 2, 8), object)),
    "text": (np.full((4, 2, 8), "x"), np.full((4, 2, 8), "x")),
    "lists": ([[[1.0]]], [[[1.0]]]),
    "nothing": (None, None),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
async def test_client_refuses_what_is_no_pair_of_tensors(client: AsyncClient, name: str) -> None:
    with pytest.raises(BadTensor):
        await client.kv.put("bad-pair", 0, *BAD_PAIRS[name])


Metas = tuple[TensorMeta, TensorMeta]
RAW_TENSORS: dict[str, tuple[Metas, list[bytes], set[ErrorCode]]] = {
    "a product beyond 64 bits": ((TensorMeta(F32, (2**40, 2**40, 1)),) * 2, [], {ErrorCode.BAD_FRAME}),
    "a dimension of 2^64 - 1": ((TensorMeta(F32, (2**64 - 1, 1, 1)),) * 2, [], {ErrorCode.BAD_FRAME}),
    "a negative dimension": ((TensorMeta(F32, (-1, 2, 8)),) * 2, [], {ErrorCode.BAD_FRAME}),
    "a dimension that is true": ((TensorMeta(F32, (True, 2, 8)),) * 2, [], {ErrorCode.BAD_FRAME}),
    "a dimension that is a float": ((TensorMeta(F32, (4.0, 2, 8)),) * 2, [], {ErrorCode.BAD_FRAME}),  # type: ignore[arg-type]
    "nine dimensions": ((TensorMeta(F32, (1,) * 9),) * 2, [], {ErrorCode.BAD_FRAME}),
    "an unknown dtype": ((TensorMeta(99, (4, 2, 8)),) * 2, [], {ErrorCode.BAD_FRAME}),  # type: ignore[arg-type]
    "a dtype by name": ((TensorMeta("float32", (4, 2, 8)),) * 2, [], {ErrorCode.BAD_FRAME}),  # type: ignore[arg-type]
    "a size nobody has": (
        (TensorMeta(F32, (2**31 - 1,) * 3),) * 2, [],
        {ErrorCode.BAD_TENSOR, ErrorCode.NO_SPACE, ErrorCode.TOO_LARGE, ErrorCode.BAD_ARG},
    ),
    "half the bytes": ((GOOD, GOOD), [GOOD_BYTES[:64], GOOD_BYTES[:64]], {ErrorCode.BAD_TENSOR}),
    "too many bytes": ((GOOD, GOOD), [GOOD_BYTES * 2, GOOD_BYTES], {ErrorCode.BAD_TENSOR}),
    "float16 for float32": (
        (TensorMeta(DType.FLOAT16, (4, 2, 8)),) * 2, [GOOD_BYTES, GOOD_BYTES], {ErrorCode.BAD_TENSOR},
    ),
    "keys without values": ((GOOD, GOOD), [GOOD_BYTES], {ErrorCode.BAD_TENSOR}),
    "a scalar": ((TensorMeta(F32, ()),) * 2, [bytes(4), bytes(4)], {ErrorCode.BAD_TENSOR}),
    "no heads": ((TensorMeta(F32, (4, 0, 8)),) * 2, [b"", b""], {ErrorCode.BAD_TENSOR}),
    "different lengths": ((GOOD, TensorMeta(F32, (5, 2, 8))), [GOOD_BYTES, bytes(320)], {ErrorCode.BAD_TENSOR}),
}  # fmt: skip


async def test_system_refuses_tensors_that_lie(cluster: Cluster, client: AsyncClient) -> None:
    before = await counters(client)
    async with raw.raw_client(cluster.url) as peer:
        for kind in (raw.put, raw.append):
            for send in (peer.send, peer.send_bulk):
                for name, ((k, v), payload, codes) in RAW_TENSORS.items():
                    req_id = raw.new_id()
                    send(kind(req_id, "bad-raw", k, v, payload), *payload)
                    failed = await peer.failure(req_id)
                    assert failed.code in codes, (kind, send, name, failed)
                    assert not failed.retryable, (kind, send, name)
    assert await client.kv.list("bad-raw") == []
    assert used_bytes(await counters(client)) == used_bytes(before)


def used_bytes(counts: Mapping[str, Counts]) -> dict[str, int]:
    """What each worker's KV plane takes."""
    return {worker: count["used_bytes"] for worker, count in counts.items()}


async def test_payload_that_changed_on_its_way_is_corrupt_and_may_be_sent_again(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        peer.send(raw.put(req_id, "flipped", GOOD, GOOD, [GOOD_BYTES] * 2), GOOD_BYTES, b"\x01" + GOOD_BYTES[1:])
        failed = await peer.failure(req_id)
        assert (failed.code, failed.retryable) == (ErrorCode.CORRUPT, True)
        peer.send(raw.put(req_id, "flipped", GOOD, GOOD, [GOOD_BYTES] * 2), GOOD_BYTES, GOOD_BYTES)
        assert isinstance(await peer.final(req_id), m.KvDone)


async def test_large_value_for_a_client_without_a_bulk_lane_fails_as_retryable(
    cluster: Cluster, client: AsyncClient
) -> None:
    await client.kv.put("no-lane", 0, ones(MIB // 64, 2, 8), ones(MIB // 64, 2, 8))
    with Context() as context:
        peer = raw.RawClient(context, cluster.url)
        try:
            await peer.join(attaches=False)
            get = m.Get(req_id=raw.new_id(), attempt=0, deadline_ms=10_000, seq_id="no-lane", layer=0)
            peer.send(get)
            failed = await peer.failure(get.req_id)
            assert (failed.code, failed.retryable) == (ErrorCode.CONNECTION_LOST, True)
        finally:
            peer.close()


async def test_writes_that_do_not_fit_their_lane_are_refused(cluster: Cluster, client: AsyncClient) -> None:
    big, both = TensorMeta(F32, (MIB // 64, 2, 8)), [bytes(MIB)] * 2
    async with raw.raw_client(cluster.url) as peer:
        cases: list[tuple[Callable[..., None], TensorMeta, list[bytes], int, ErrorCode]] = [
            (peer.send, big, [], 0, ErrorCode.BAD_ARG),
            (peer.send, big, both, 2, ErrorCode.TOO_LARGE),
            (peer.send_bulk, big, both, 2, ErrorCode.TOO_LARGE),
            (peer.send_bulk, GOOD, [GOOD_BYTES] * 2, 1, ErrorCode.BAD_FRAME),
        ]
        for send, meta, described, num_sent, code in cases:
            message = raw.put(raw.new_id(), "no-fit", meta, meta, described)
            send(message, *described[:num_sent])
            failed = await peer.failure(message.req_id)
            assert (failed.code, failed.retryable) == (code, False)
        flipped = raw.put(raw.new_id(), "no-fit", GOOD, GOOD, [GOOD_BYTES] * 2)
        peer.send_bulk(flipped, GOOD_BYTES, b"\x01" + GOOD_BYTES[1:])
        failed = await peer.failure(flipped.req_id)
        assert (failed.code, failed.retryable) == (ErrorCode.CORRUPT, True)
    assert await client.kv.list("no-fit") == []


CHUNK_LIES: dict[str, list[tuple[int, int]]] = {
    "overlapping chunks": [(0, MIB), (MIB - 1, MIB)],
    "the same chunk twice": [(0, MIB), (0, MIB)],
    "a chunk behind the end": [(0, MIB), (8 * MIB, 1024)],
    "a chunk of both K and V": [(0, MIB), (2 * MIB - 512, 1024)],
    "an empty chunk": [(0, 0)],
}


@pytest.mark.parametrize("name", CHUNK_LIES)
async def test_upload_that_does_not_add_up_is_refused_and_leaves_nothing(
    cluster: Cluster, client: AsyncClient, name: str
) -> None:
    meta = TensorMeta(F32, (2 * MIB // 64, 2, 8))
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        peer.send_bulk(raw.put(req_id, "bad-upload", meta, meta))
        for offset, size in CHUNK_LIES[name]:
            raw.send_chunk(peer, req_id, offset, bytes(size))
        assert (await peer.failure(req_id)).code in {ErrorCode.BAD_TENSOR, ErrorCode.BAD_ARG}
    assert await client.kv.list("bad-upload") == []


async def test_upload_that_stops_is_freed_at_its_deadline(cluster: Cluster, client: AsyncClient) -> None:
    meta = TensorMeta(F32, (2 * MIB // 64, 2, 8))
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        put = m.Put(req_id=req_id, attempt=0, deadline_ms=500, seq_id="stops", layer=0, k=meta, v=meta)
        peer.send_bulk(put)
        raw.send_chunk(peer, req_id, 0, bytes(MIB))
        assert (await peer.failure(req_id)).code == ErrorCode.DEADLINE
    assert (await client.kv.put("stops", 0, ones(1, 2, 8), ones(1, 2, 8))).length == 1


async def test_nan_infinity_and_denormals_are_stored_as_they_are(client: AsyncClient) -> None:
    k = np.array([NAN, -NAN, INF, -INF, 5e-324, -0.0, 1e308, 0.0], np.float64).reshape(1, 2, 4)
    await client.kv.put("odd-numbers", 0, k, k)
    assert (await client.kv.get("odd-numbers", 0)).k.tobytes() == k.tobytes()


async def test_append_of_another_kind_of_token_is_refused(client: AsyncClient) -> None:
    await client.kv.put("one-kind", 0, ones(4, 2, 8), ones(4, 2, 8))
    for k, v in (
        (ones(1, 2, 8, dtype="float16"), ones(1, 2, 8, dtype="float16")),
        (ones(1, 3, 8), ones(1, 3, 8)),
        (ones(1, 2, 9), ones(1, 2, 8)),
    ):
        with pytest.raises(BadTensor):
            await client.kv.append("one-kind", 0, k, v)
    assert await client.kv.length("one-kind", 0) == 4


# --- names, ranges and identities: rows 19, 21, 28 -----------------------------------------------


@pytest.mark.parametrize("seq_id", ["", "x" * 257, "tab\there", "nul\0", "\ud800", 7, None, b"bytes"])
async def test_bad_sequence_names_are_told_at_once(client: AsyncClient, seq_id: Any) -> None:
    with pytest.raises(BadArgument):
        await client.kv.get(seq_id, 0)
    with pytest.raises(BadArgument):
        await client.kv.put(seq_id, 0, ones(1, 2, 8), ones(1, 2, 8))


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (3, 2), (0, 2**64), (0.5, None), (True, None)])
async def test_bad_ranges_are_told_at_once(client: AsyncClient, start: Any, stop: Any) -> None:
    with pytest.raises(BadArgument):
        await client.kv.get("ranges", 0, start, stop)


async def test_request_id_used_again_for_something_else_conflicts(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        for seq_len, code in ((4, None), (3, ErrorCode.CONFLICT)):
            meta = TensorMeta(F32, (seq_len, 2, 8))
            payload = [bytes(meta.nbytes)] * 2
            peer.send(raw.put(req_id, "same-id", meta, meta, payload), *payload)
            answer = await peer.final(req_id)
            assert getattr(answer, "code", None) == code


async def test_request_sent_three_times_takes_effect_once(cluster: Cluster, client: AsyncClient) -> None:
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        message = raw.append(req_id, "thrice", GOOD, GOOD, [GOOD_BYTES] * 2)
        answers = []
        for _ in range(3):
            peer.send(message, GOOD_BYTES, GOOD_BYTES)
            answers.append(await peer.final(req_id))
        assert [(answer.length, answer.duplicate) for answer in answers] == [(4, False), (4, True), (4, True)]
    assert await client.kv.length("thrice", 0) == 4


@pytest.mark.parametrize(
    "model",
    ["../../etc", "/etc/passwd", "tiny/../tiny", "tiny ", "Tiny", "t\u0456ny", "~/tiny", "smollm2", "x" * 200],
)
async def test_model_that_nobody_serves_is_not_found(client: AsyncClient, model: str) -> None:
    with pytest.raises(ModelNotFound):
        await client.generate(PROMPT, model=model, max_tokens=2).result()


@pytest.mark.parametrize("model", ["nul\0", "x" * 4096, "line\nbreak", 5])
async def test_model_name_that_is_none_is_a_bad_argument(client: AsyncClient, model: Any) -> None:
    with pytest.raises(BadArgument):
        client.generate(PROMPT, model=model, max_tokens=2)


# --- prompts and parameters: rows 23 to 25 -------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({}, BadArgument),
        ({"prompt": ""}, BadArgument),
        ({"token_ids": []}, BadArgument),
        ({"messages": []}, BadArgument),
        ({"prompt": "a", "token_ids": [1]}, BadArgument),
        ({"prompt": b"bytes"}, BadArgument),
        ({"prompt": "\ud800"}, BadArgument),
        ({"prompt": "x" * (10 * MIB)}, TooLarge),
        ({"token_ids": [1] * (MIB // 4 + 1)}, TooLarge),
        ({"token_ids": [-1]}, BadArgument),
        ({"token_ids": [2**32]}, BadArgument),
        ({"token_ids": [VOCAB_SIZE]}, BadArgument),
        ({"token_ids": [1.5]}, BadArgument),
        ({"token_ids": [True]}, BadArgument),
        ({"token_ids": [1] * MAX_LEN}, TooLarge),
        ({"messages": [{"role": "user"}]}, BadArgument),
        ({"messages": [{"role": "user", "content": "x", "extra": "y"}]}, BadArgument),
        ({"messages": "hello"}, BadArgument),
    ],
    ids=lambda value: f"{value!r:.40}" if isinstance(value, dict) else "",
)
async def test_bad_prompts_are_refused(client: AsyncClient, how: dict[str, Any], error: type[KVCacheError]) -> None:
    with pytest.raises(error):
        await client.generate(max_tokens=2, **how).result()


BAD_PARAMETERS: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**9}, {"max_tokens": 1.5}, {"max_tokens": True},
    {"min_tokens": -1}, {"min_tokens": 9}, {"temperature": NAN}, {"temperature": INF}, {"temperature": -1.0},
    {"temperature": "hot"}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": NAN}, {"top_k": -1}, {"top_k": 2**63},
    {"seed": -1}, {"seed": 2**63}, {"seed": 0.5}, {"stop": [""]}, {"stop": ["x"] * 1_000_000}, {"stop": ["x" * 9999]},
    {"stop": [1]}, {"stop_token_ids": [-1]}, {"stop_token_ids": [2**40]}, {"stop_token_ids": list(range(1000))},
    {"ignore_eos": "yes"}, {"cache_salt": "x" * 4096}, {"cache_salt": "nul\0"}, {"cache_salt": 5}, {"seq_id": ""},
    {"deadline": 0}, {"deadline": -1}, {"deadline": NAN}, {"deadline": "soon"}, {"deadline": 1e12},
]  # fmt: skip


@pytest.mark.parametrize("how", BAD_PARAMETERS, ids=lambda how: f"{how!r:.40}")
async def test_bad_parameters_are_told_at_the_call(client: AsyncClient, how: dict[str, Any]) -> None:
    with pytest.raises(BadArgument):
        client.generate(PROMPT, **{"max_tokens": 8} | how)


async def test_unknown_policy_is_refused_by_name(client: AsyncClient) -> None:
    with pytest.raises(BadArgument, match="bounded_load"):
        await client.generate(PROMPT, policy="wishful", max_tokens=2).result()


RAW_SAMPLING: list[m.Sampling] = [
    m.Sampling(max_tokens=0), m.Sampling(max_tokens=-5), m.Sampling(max_tokens=2**62),
    m.Sampling(max_tokens=4, min_tokens=5), m.Sampling(temperature=NAN), m.Sampling(temperature=INF),
    m.Sampling(temperature=-1.0), m.Sampling(top_p=0.0), m.Sampling(top_p=2.0), m.Sampling(top_p=NAN),
    m.Sampling(top_k=-1), m.Sampling(seed=-1), m.Sampling(stop=("",)), m.Sampling(stop=("x",) * 60),
    m.Sampling(stop_token_ids=(-1,)), m.Sampling(stop_token_ids=(2**33,)), m.Sampling(min_p=NAN),
    m.Sampling(repetition_penalty=0.0), m.Sampling(presence_penalty=INF), m.Sampling(frequency_penalty=NAN),
    m.Sampling(logit_bias=((1, NAN),)), m.Sampling(logit_bias=((1, 1.0), (1, 1.0))), m.Sampling(logprobs=99),
    m.Sampling(logit_bias=((2**32 - 1, 1.0),)), m.Sampling(stop_token_ids=(2**32 - 1,), min_tokens=4),
]  # fmt: skip


async def test_worker_checks_parameters_that_no_client_checked(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        for sampling in RAW_SAMPLING:
            message, payload = raw.generate(raw.new_id(), await peer.open_stream(), b"hello", sampling)
            peer.send(message, *payload)
            failed = await peer.failure(message.req_id)
            assert (failed.code, failed.retryable) == (ErrorCode.BAD_ARG, False), sampling


RAW_PROMPTS: dict[str, tuple[m.PromptKind, bytes, ErrorCode]] = {
    "no text": (m.PromptKind.TEXT, b"", ErrorCode.BAD_ARG),
    "text that is not utf-8": (m.PromptKind.TEXT, b"\xff\xfe", ErrorCode.BAD_ARG),
    "half a token": (m.PromptKind.TOKENS, b"\x01\x00\x00", ErrorCode.BAD_ARG),
    "no tokens": (m.PromptKind.TOKENS, b"", ErrorCode.BAD_ARG),
    "a token beyond the vocabulary": (m.PromptKind.TOKENS, b"\xff\xff\xff\xff", ErrorCode.BAD_ARG),
    "more tokens than fit": (m.PromptKind.TOKENS, b"\x01\x00\x00\x00" * MAX_LEN, ErrorCode.TOO_LARGE),
    "messages that are no json": (m.PromptKind.MESSAGES, b"{", ErrorCode.BAD_ARG),
    "messages that are no list": (m.PromptKind.MESSAGES, b"{}", ErrorCode.BAD_ARG),
    "deep json": (m.PromptKind.MESSAGES, b"[" * 100_000, ErrorCode.BAD_ARG),
    "no messages": (m.PromptKind.MESSAGES, b"[]", ErrorCode.BAD_ARG),
    "a message with more to it": (
        m.PromptKind.MESSAGES, json.dumps([{"role": "u", "content": "c", "tool": 1}]).encode(), ErrorCode.BAD_ARG,
    ),
}  # fmt: skip


async def test_worker_checks_prompts_that_no_client_checked(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        for name, (kind, prompt, code) in RAW_PROMPTS.items():
            message, payload = raw.generate(raw.new_id(), await peer.open_stream(), prompt, kind=kind)
            peer.send(message, *payload)
            failed = await peer.failure(message.req_id)
            assert (failed.code, failed.retryable) == (code, False), (name, failed)


async def test_resume_with_more_tokens_than_were_wanted_is_refused(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        for resume in (b"\x01\x00\x00\x00" * 9, b"\x01\x00"):
            message, payload = raw.generate(raw.new_id(), await peer.open_stream(), b"hello", epoch=1, resume=resume)
            peer.send(message, *payload)
            assert (await peer.failure(message.req_id)).code == ErrorCode.BAD_ARG


async def test_deadline_that_has_passed_is_not_begun(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        req_id = raw.new_id()
        peer.send(m.Length(req_id=req_id, attempt=0, deadline_ms=0, seq_id="late", layer=0))
        assert (await peer.failure(req_id)).code == ErrorCode.DEADLINE


async def test_prompt_over_the_cap_is_refused_by_the_worker_too(cluster: Cluster) -> None:
    async with raw.raw_client(cluster.url) as peer:
        message, payload = raw.generate(raw.new_id(), await peer.open_stream(), b"x" * (MIB + 1))
        # Time for a prompt so long also on a machine that is slow, or the broker would refuse it for its deadline.
        peer.send(msgspec.structs.replace(message, deadline_ms=3_600_000), *payload)
        assert (await peer.failure(message.req_id)).code == ErrorCode.TOO_LARGE


# --- names that no client of ours would send -----------------------------------------------------

RUDE_NAMES = [
    f"rude {name}"[:256]
    for name in ("nul\0 bell\a newline\n", "safe\u202eexe.txt", "e\u0301", "\U0001f600" * 256, "\0" * 256)
]


async def test_names_that_no_client_checked_are_names_like_any_other(cluster: Cluster, client: AsyncClient) -> None:
    """Stored, read, listed and forgotten under exactly these characters, beside a name that looks the same as one."""
    twin = "rude \u00e9"
    await client.kv.put(twin, 0, ones(1, 2, 8), ones(1, 2, 8))
    async with raw.raw_client(cluster.url) as peer:
        for number, name in enumerate(RUDE_NAMES):
            data = bytes([number]) * GOOD.nbytes
            put = raw.put(raw.new_id(), name, GOOD, GOOD, [data] * 2)
            peer.send(put, data, data)
            assert isinstance(await peer.final(put.req_id), m.KvDone), name
        for number, name in enumerate(RUDE_NAMES):
            peer.send(m.Get(req_id=raw.new_id(), attempt=0, deadline_ms=10_000, seq_id=name, layer=0))
            _, payload = await peer.expect(m.KvValue)
            assert payload == [bytes([number]) * GOOD.nbytes] * 2, name
        assert {info.seq_id for info in await client.kv.list("rude")} == {twin, *RUDE_NAMES}
        for name in RUDE_NAMES:
            delete = m.Delete(req_id=raw.new_id(), attempt=0, deadline_ms=10_000, seq_id=name)
            peer.send(delete)
            assert isinstance(await peer.final(delete.req_id), m.KvDone), name
        longer = raw.put(raw.new_id(), "x" * 257, GOOD, GOOD, [GOOD_BYTES] * 2)
        peer.send(longer, GOOD_BYTES, GOOD_BYTES)
        assert (await peer.failure(longer.req_id)).code == ErrorCode.BAD_FRAME
    assert [info.seq_id for info in await client.kv.list("rude")] == [twin]
    await client.kv.delete(twin)
