"""The digests that name KV: published vectors, the chain's laws, and what is refused."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadArgument
from bus.limits import MAX_CHAIN_NODES
from kvcache.hashing import (
    ROUTING_DEPTHS,
    HashSeed,
    block_digests,
    canonical_chat,
    encode_token_ids,
    extend,
    routing_chain,
)

SEED = HashSeed(model="0123abcd", dtype="float32", block_size=4)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)

VECTORS = {
    "root": "1f58e6f5d5a60b9b89e72d53d3055c58d6f0ec4d9331ee761c405d0ba365c057",
    "blocks": [
        "29d9814e814fa6273a76bd543d45e5524efba005e64878519963bae969982618",
        "0f1c97a392cb28aa5e5b2ccee8ee8230447364ea7e82e02d69d3b4fe28df28d1",
    ],
    "tokens_chain": ["4c9cdd7ee39a40b3", "fe2206407255cfeb"],
    "text_chain": ["25be8748eb01c3e4"],
    "far_nodes": ["36edfd661fa9f976", "73c14e0283ba5df5"],
}


def test_published_vectors_hold() -> None:
    assert SEED.root.hex() == VECTORS["root"]
    assert [digest.hex() for digest in block_digests(SEED, range(10))] == VECTORS["blocks"]
    assert [node.hex() for node in routing_chain(list(range(40)), model="m")] == VECTORS["tokens_chain"]
    assert [node.hex() for node in routing_chain("Grüße", cache_salt="s")] == VECTORS["text_chain"]
    far = routing_chain(list(range(3000)))
    assert [far[64].hex(), far[-1].hex()] == VECTORS["far_nodes"]


def test_chain_follows_its_written_definition() -> None:
    """A second, plain implementation: what another language would have to write."""
    fields = b"".join(struct.pack("<I", len(text)) + text for text in (b"0123abcd", b"", b"float32", b"", b"", b""))
    root = blake2b(struct.pack("<III", 1, 1, 4) + fields, digest_size=32, person=b"kvcache/seed").digest()
    first = blake2b(root + struct.pack("<4I", 0, 1, 2, 3), digest_size=32, key=root, person=b"kvcache/block").digest()
    second = blake2b(first + struct.pack("<4I", 4, 5, 6, 7), digest_size=32, key=root, person=b"kvcache/block").digest()
    assert block_digests(SEED, range(8)) == (first, second)


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = (
        "from kvcache.hashing import *;"
        "print(block_digests(HashSeed(model='0123abcd', dtype='float32', block_size=4), range(10))[-1].hex())"
    )
    done = subprocess.run([sys.executable, "-R", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == VECTORS["blocks"][-1]


@given(TOKENS)
def test_extending_block_by_block_gives_the_same_chain(tokens: list[int]) -> None:
    parent, chain = SEED.root, []
    for start in range(0, len(tokens) - 3, 4):
        parent = extend(SEED, parent, tokens[start : start + 4])
        chain.append(parent)
    assert block_digests(SEED, tokens) == tuple(chain)


@given(TOKENS, TOKENS)
def test_chains_share_exactly_the_leading_full_blocks(one: list[int], two: list[int]) -> None:
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1
    first, second = block_digests(SEED, one), block_digests(SEED, two)
    shared = sum(a == b for a, b in zip(first, second, strict=False))
    assert shared == common // 4
    assert first[:shared] == second[:shared]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "0123abce"),
        ("revision", "main"),
        ("dtype", "bfloat16"),
        ("layout_version", 2),
        ("tenant", "acme"),
        ("cache_salt", "acme"),
        ("adapter", "acme"),
    ],
)
def test_every_field_of_the_seed_changes_every_digest(field: str, value: str | int) -> None:
    other = dataclasses.replace(SEED, **{field: value})  # type: ignore[arg-type]  # one field of each type
    assert not set(block_digests(SEED, range(16))) & set(block_digests(other, range(16)))


def test_block_size_is_inside_the_hash() -> None:
    """Thirty blocks of a hundred are not a hundred blocks of thirty, even for equal tokens and roots."""
    assert HashSeed(model="m", dtype="f", block_size=8).root != HashSeed(model="m", dtype="f", block_size=4).root


def test_fields_cannot_run_into_each_other() -> None:
    one = HashSeed(model="ab", revision="c", dtype="f", tenant="x", cache_salt="")
    two = HashSeed(model="a", revision="bc", dtype="f", tenant="", cache_salt="x")
    assert one.root != two.root


def test_numpy_and_plain_token_ids_give_the_same_digests() -> None:
    for dtype in (np.int64, np.uint32, np.int32, np.uint8):
        assert block_digests(SEED, np.arange(12, dtype=dtype)) == block_digests(SEED, list(range(12)))
    assert encode_token_ids(list(np.array([7]))) == encode_token_ids((7,)) == b"\x07\0\0\0"


@pytest.mark.parametrize("bad", [-1, 2**32, 2**80, 1.0, "1", None, [1]])
def test_token_id_out_of_range_is_refused_with_its_position(bad: object) -> None:
    with pytest.raises(BadArgument, match=r"at position 2: expected an integer from 0 to 4294967295"):
        encode_token_ids([1, np.int64(2), bad])  # type: ignore[list-item]  # that is the point


def test_numpy_arrays_of_the_wrong_kind_are_refused() -> None:
    for wrong in (np.array([0.5]), np.array([[1, 2]]), np.array([-1])):
        with pytest.raises(BadArgument, match="position 0"):
            encode_token_ids(wrong)


def test_partial_block_cannot_be_chained() -> None:
    with pytest.raises(BadArgument, match="a block has 4 tokens, not 3"):
        extend(SEED, SEED.root, [1, 2, 3])


@pytest.mark.parametrize("salt", ["a\x00b", "line\nbreak", "\ud800", "s" * 257, "é" * 129, 7, b"salt", None])
def test_bad_salt_is_a_typed_error(salt: object) -> None:
    with pytest.raises(BadArgument, match="cache_salt"):
        HashSeed(model="m", dtype="f", cache_salt=salt)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(BadArgument, match="cache_salt"):
        routing_chain("x", cache_salt=salt)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("size", [0, -1, 2**32, True, 1.5, "32"])
def test_bad_block_size_is_a_typed_error(size: object) -> None:
    with pytest.raises(BadArgument, match="block_size"):
        HashSeed(model="m", dtype="f", block_size=size)  # type: ignore[arg-type]  # that is the point


@given(st.text(max_size=600), st.text(max_size=600))
def test_longer_text_keeps_the_chain_of_its_full_blocks(text: str, more: str) -> None:
    full = len(text.encode()) // 128
    assert routing_chain(text)[:full] == routing_chain(text + more)[:full]


def test_routing_chain_ends_with_the_whole_prompt_until_it_is_full() -> None:
    assert len(routing_chain("")) == len(routing_chain("hi")) == len(routing_chain("x" * 128)) == 1
    assert len(routing_chain("x" * 129)) == 2
    assert routing_chain("x" * 128 + "a") != routing_chain("x" * 128 + "b")
    assert len(routing_chain(range(64))) == 2
    assert len(routing_chain(range(65))) == 3


def test_routing_chain_is_bounded_and_ignores_what_lies_beyond() -> None:
    assert len(routing_chain("x" * 10**6)) == MAX_CHAIN_NODES
    assert routing_chain("x" * 960 * 128 + "a") == routing_chain("x" * 960 * 128 + "b")
    assert len(routing_chain([1] * 10**5)) == MAX_CHAIN_NODES
    assert routing_chain([1] * 30_720 + [2]) == routing_chain([1] * 30_720)
    assert {len(node) for node in routing_chain("x" * 10**4)} == {8}


def test_nodes_of_long_prompts_stand_where_the_depths_say() -> None:
    """Every block of the first 64, then every 2nd, 4th, 8th: two prompts share a node if they agree up to there."""
    assert [ROUTING_DEPTHS[index] for index in (0, 63, 64, 127, 128, 255)] == [1, 64, 66, 192, 196, 960]
    prompt = list(range(12_000))
    chain = routing_chain(prompt)
    assert len(chain) == next(index for index, depth in enumerate(ROUTING_DEPTHS) if depth * 32 >= len(prompt)) + 1
    for at in (0, 31, 32, 2047, 2048, 2111, 2112, 6143, 6144, 11_999):
        other = routing_chain([*prompt[:at], 77_777, *prompt[at + 1 :]])
        agreed = sum(1 for mine, theirs in zip(chain, other, strict=True) if mine == theirs)
        assert agreed == sum(1 for depth in ROUTING_DEPTHS[: len(chain)] if depth * 32 <= at)


def test_routing_chain_is_salted_by_model_salt_and_kind() -> None:
    chains = [routing_chain("abcd"), routing_chain("abcd", model="m"), routing_chain("abcd", cache_salt="m")]
    chains.append(routing_chain(np.frombuffer(b"abcd", dtype="<u4")))
    assert len(set(chains)) == 4


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(BadArgument, match="not valid Unicode"):
        routing_chain("a\ud800")


def test_next_chat_turn_only_adds_to_the_canonical_text() -> None:
    turn = [("system", "be brief"), ("user", "hi")]
    assert canonical_chat(turn) == "system\x00be brief\x01user\x00hi\x01"
    assert canonical_chat([*turn, ("assistant", "hello")]).startswith(canonical_chat(turn))
