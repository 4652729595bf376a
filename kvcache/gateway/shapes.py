"""The two APIs that generate, side by side: how each writes its whole answer, its chunks and its ends. Core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from kvcache.gateway import replies
from kvcache.gateway.replies import Piece, Texts, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every chunk of one answer begins with. created: Unix seconds."""

    request_id: str
    created: int
    model: str


class Shape(Protocol):
    """How one API writes."""

    def whole(self, head: Head, outputs: Sequence[Piece], usage: Usage, texts: Texts | None) -> Struct:
        """The answer in one, from the pieces of each output joined. texts: of tokens, where logprobs were asked for."""

    def chunk(self, head: Head, piece: Piece, usage: Usage | UnsetType | None, texts: Texts | None) -> Struct | None:
        """One piece of a stream, or None if it shows nothing."""

    def usage_chunk(self, head: Head, usage: Usage) -> Struct:
        """The last chunk, which has no choices."""


class CompletionShape:
    """/v1/completions."""

    def whole(self, head: Head, outputs: Sequence[Piece], usage: Usage, texts: Texts | None) -> Struct:
        choices = [self._choice(piece, texts) for piece in outputs]
        return replies.Completion(
            id=f"cmpl-{head.request_id}", created=head.created, model=head.model, choices=choices, usage=usage
        )

    def chunk(self, head: Head, piece: Piece, usage: Usage | UnsetType | None, texts: Texts | None) -> Struct | None:
        if not (piece.echo or piece.prompt or piece.text or piece.finish_reason or piece.tokens):
            return None
        return replies.Completion(
            id=f"cmpl-{head.request_id}",
            created=head.created,
            model=head.model,
            choices=[self._choice(piece, texts)],
            usage=usage,
        )

    def usage_chunk(self, head: Head, usage: Usage) -> Struct:
        return replies.Completion(
            id=f"cmpl-{head.request_id}", created=head.created, model=head.model, choices=[], usage=usage
        )

    def _choice(self, piece: Piece, texts: Texts | None) -> replies.CompletionChoice:
        return replies.CompletionChoice(
            index=piece.number,
            text=piece.echo + piece.text,
            logprobs=None if texts is None else replies.completion_logprobs(piece, texts),
            finish_reason=piece.finish_reason,
        )


class ChatShape:
    """/v1/chat/completions."""

    def whole(self, head: Head, outputs: Sequence[Piece], usage: Usage, texts: Texts | None) -> Struct:
        choices = [
            replies.ChatChoice(
                index=piece.number,
                message=replies.ChatAnswer(content=piece.text),
                logprobs=None if texts is None else replies.chat_logprobs(piece.tokens, texts),
                finish_reason=piece.finish_reason or "stop",
            )
            for piece in outputs
        ]
        return replies.ChatCompletion(
            id=f"chatcmpl-{head.request_id}", created=head.created, model=head.model, choices=choices, usage=usage
        )

    def chunk(self, head: Head, piece: Piece, usage: Usage | UnsetType | None, texts: Texts | None) -> Struct | None:
        if not piece.text and not piece.finish_reason and not piece.tokens and not piece.is_start:
            return None
        choice = replies.ChunkChoice(
            index=piece.number,
            delta=replies.Delta(
                role="assistant" if piece.is_start else UNSET,
                content=piece.text if piece.text or piece.is_start else UNSET,
            ),
            logprobs=None if texts is None or not piece.tokens else replies.chat_logprobs(piece.tokens, texts),
            finish_reason=piece.finish_reason,
        )
        return self._chunk(head, [choice], usage)

    def usage_chunk(self, head: Head, usage: Usage) -> Struct:
        return self._chunk(head, [], usage)

    def _chunk(self, head: Head, choices: list[replies.ChunkChoice], usage: Usage | UnsetType | None) -> Struct:
        return replies.ChatChunk(
            id=f"chatcmpl-{head.request_id}", created=head.created, model=head.model, choices=choices, usage=usage
        )
