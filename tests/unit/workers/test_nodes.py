"""Where the nodes of a chain end among the tokens of a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bus.messages import PromptKind
from kvcache.hashing import ROUTING_DEPTHS, canonical_chat, routing_chain
from workers.nodes import landmarks


def ends(chain: tuple[bytes, ...], kind: PromptKind, num_bytes: int, num_tokens: int, block_size: int) -> list[int]:
    marks = landmarks(chain, kind, num_bytes, num_tokens, block_size)
    assert [node for _, node in marks] == list(chain)
    return [block for block, _ in marks]


def test_nodes_of_token_ids_end_exactly_in_the_block_of_their_last_token() -> None:
    prompt = list(range(100))
    assert ends(routing_chain(prompt), PromptKind.TOKENS, 400, 100, 32) == [0, 1, 2, 3]
    assert ends(routing_chain(prompt), PromptKind.TOKENS, 400, 100, 16) == [1, 3, 5, 6]
    assert ends(routing_chain(prompt), PromptKind.TOKENS, 400, 100, 48) == [0, 1, 1, 2]
    long = list(range(5000))
    blocks = ends(routing_chain(long), PromptKind.TOKENS, 20_000, 5000, 32)
    assert blocks == [min(depth, 157) - 1 for depth in ROUTING_DEPTHS[: len(blocks)]]


def test_nodes_of_text_end_in_proportion_to_its_bytes() -> None:
    text = "x" * 1280
    assert ends(routing_chain(text), PromptKind.TEXT, 1280, 320, 32) == list(range(10))
    assert ends(routing_chain(text), PromptKind.TEXT, 1280, 640, 32) == [2 * n + 1 for n in range(10)]
    assert ends(routing_chain("hi"), PromptKind.TEXT, 2, 1, 32) == [0]


def test_nodes_of_messages_are_in_proportion_to_the_chain_and_not_to_its_json() -> None:
    chain = routing_chain(canonical_chat([("user", "y" * 1270)]))
    assert ends(chain, PromptKind.MESSAGES, 99_999, 320, 32) == list(range(10))


def test_a_prompt_of_nothing_has_no_landmarks() -> None:
    assert landmarks((), PromptKind.TEXT, 10, 10, 32) == ()
    assert landmarks((b"x" * 8,), PromptKind.TEXT, 10, 0, 32) == ()


@given(
    chain=st.integers(1, 256).map(lambda num: tuple(n.to_bytes(8, "big") for n in range(num))),
    kind=st.sampled_from(PromptKind),
    num_bytes=st.integers(0, 2**20),
    num_tokens=st.integers(1, 10**6),
    block_size=st.integers(1, 1024),
)
def test_whatever_a_client_claims_landmarks_lie_within_the_prompt_in_order(
    chain: tuple[bytes, ...], kind: PromptKind, num_bytes: int, num_tokens: int, block_size: int
) -> None:
    blocks = ends(chain, kind, num_bytes, num_tokens, block_size)
    assert blocks == sorted(blocks)
    assert blocks[0] >= 0
    assert blocks[-1] <= (num_tokens - 1) // block_size
