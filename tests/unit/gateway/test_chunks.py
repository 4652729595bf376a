"""Chunks cut into what stays and what changes are, byte for byte, those encoded whole."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from kvcache.client.results import Token
from kvcache.gateway.chunks import MARK, Chunks
from kvcache.gateway.replies import Piece, Usage
from kvcache.gateway.shapes import ChatShape, CompletionShape, Head, Shape

SHAPES = pytest.mark.parametrize("shape", [CompletionShape(), ChatShape()])
HEAD = Head(request_id="r", created=1, model="m")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def whole(shape: Shape, head: Head, piece: Piece, usage: Usage | UnsetType | None = UNSET) -> bytes | None:
    """The slow, obvious way."""
    chunk = shape.chunk(head, piece, usage, None)
    return None if chunk is None else msgspec.json.encode(chunk)


@SHAPES
@given(texts=st.lists(st.tuples(st.integers(0, 3), TEXTS)), model=TEXTS, wants_usage=st.booleans())
def test_any_text_of_any_output_is_as_encoded_whole(
    shape: Shape, texts: list[tuple[int, str]], model: str, wants_usage: bool
) -> None:
    head, chunks = Head(request_id="r", created=1, model=model), Chunks(shape, has_plain=True)
    usage: UnsetType | None = None if wants_usage else UNSET
    for number, text in texts:
        piece = Piece(number, text=text)
        assert chunks.encode(head, piece, usage, None) == whole(shape, head, piece, usage)


@SHAPES
def test_beginnings_and_ends_have_what_only_they_have(shape: Shape) -> None:
    chunks = Chunks(shape, has_plain=True)
    pieces = [
        Piece(0, is_start=True),
        Piece(0, text="a", is_start=True),
        Piece(0, text="b"),
        Piece(0, text="c", finish_reason="stop"),
        Piece(0, finish_reason="length"),
    ]
    assert [chunks.encode(HEAD, piece, UNSET, None) for piece in pieces] == [whole(shape, HEAD, p) for p in pieces]


@SHAPES
def test_a_model_named_like_the_mark_does_no_harm(shape: Shape) -> None:
    head, piece = Head(request_id="r", created=1, model=MARK), Piece(0, text="a")
    assert Chunks(shape, has_plain=True).encode(head, piece, UNSET, None) == whole(shape, head, piece)


@SHAPES
def test_logprobs_are_never_left_out(shape: Shape) -> None:
    piece = Piece(0, text="a", tokens=[Token(0, 7, "a", logprob=-0.5)])
    made = Chunks(shape, has_plain=False).encode(HEAD, piece, UNSET, {7: "a"})
    assert made == msgspec.json.encode(shape.chunk(HEAD, piece, UNSET, {7: "a"}))
