"""What callers get, in OpenAI's shapes, and the folding of a generation's events into it. Core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from kvcache.client.results import Done, Event, PromptTokens, Start, Token

LEAST_LOGPROB = -9999.0
"""OpenAI's word for next to impossible; JSON has no infinities."""

MAX_SKIPPED = 4
"""Characters of a text that no token is spelled like, one after the other."""

Texts = Mapping[int, str]
"""What token ids look like, one by one."""


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """cached_tokens: of the prompt's, those whose KV was in the cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """None: of a prompt's first token, which follows nothing."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, kw_only=True):
    """Also a chunk of one that is streamed."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ChatAnswer(msgspec.Struct, kw_only=True):
    """refusal: never one, but OpenAI always says so, and typed clients look for it."""

    role: str = "assistant"
    content: str
    refusal: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "kvcache"
    root: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(msgspec.Struct, kw_only=True):
    prompt: str


class Status(msgspec.Struct, kw_only=True):
    status: str


class Version(msgspec.Struct, kw_only=True):
    version: str


@dataclass(slots=True)
class Piece:
    """What came of one output since the last time. number: of the output among all that were asked for.

    echo, prompt: the prompt's text, and its tokens if their logprobs were asked for: before all else, and once.
    """

    number: int
    text: str = ""
    echo: str = ""
    prompt: Sequence[Token] = ()
    tokens: list[Token] = field(default_factory=list)
    text_offset: int = 0
    finish_reason: str | None = None
    is_start: bool = False


class Outputs:
    """All outputs of one request, in the order of their prompts: what has come of them, and the usage so far.

    n: outputs per prompt. has_logprobs: whether tokens are kept until somebody tells how they look; waits_for_prompt:
    whether the prompt's come too. is_prompt_only: whether what is generated is not shown.
    """

    def __init__(
        self,
        num_prompts: int,
        n: int,
        *,
        has_logprobs: bool,
        waits_for_prompt: bool = False,
        is_prompt_only: bool = False,
    ) -> None:
        self.echoes: Mapping[int, str] = {}
        """By the number of the output that begins with it."""
        self._n = n
        self._has_logprobs = has_logprobs
        self._waits_for_prompt = waits_for_prompt
        self._is_prompt_only = is_prompt_only
        self._num_chars = [0] * (num_prompts * n)
        self._num_tokens = [0] * (num_prompts * n)
        self._prompt_tokens = [0] * num_prompts
        self._cached_tokens = [0] * num_prompts
        self.model = ""

    def fold(self, prompt: int, events: Sequence[Event]) -> list[Piece]:
        """Events of one prompt's outputs, joined to one piece for each output, in the order of their numbers."""
        pieces: dict[int, Piece] = {}
        for event in events:
            number = prompt * self._n + event.index
            piece = pieces.get(number)
            if piece is None:
                piece = pieces[number] = Piece(number, text_offset=self._num_chars[number])
            match event:
                case Token():  # first, because most are
                    if self._is_prompt_only:
                        continue
                    piece.text += event.text
                    self._num_tokens[number] += 1
                    self._num_chars[number] += len(event.text)
                    if self._has_logprobs:
                        piece.tokens.append(event)
                case Start():
                    piece.is_start = True
                    self.model = self.model or event.model
                    if event.index == 0:  # the others share its prompt
                        self._prompt_tokens[prompt] = event.prompt_tokens
                        self._cached_tokens[prompt] = event.cached_tokens
                    if not self._waits_for_prompt:
                        self._echo(piece)
                case PromptTokens():
                    piece.prompt = event.tokens
                    self._echo(piece)
                case Done():
                    piece.finish_reason = "length" if self._is_prompt_only else event.finish_reason
                    self._settle(prompt, number, event)
        return [pieces[number] for number in sorted(pieces)]

    def usage(self) -> Usage:
        prompt_tokens, completion_tokens = sum(self._prompt_tokens), sum(self._num_tokens)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptDetails(sum(self._cached_tokens)),
        )

    def _echo(self, piece: Piece) -> None:
        piece.echo = self.echoes.get(piece.number, "")
        self._num_chars[piece.number] += len(piece.echo)

    def _settle(self, prompt: int, number: int, done: Done) -> None:
        """What the worker counted at the end is what counts."""
        self._num_tokens[number] = 0 if self._is_prompt_only else done.usage.completion_tokens
        if done.index == 0:
            self._prompt_tokens[prompt] = done.usage.prompt_tokens
            self._cached_tokens[prompt] = done.usage.cached_tokens


def token_ids(tokens: Sequence[Token]) -> set[int]:
    """All ids that the logprobs of these tokens speak of."""
    return {token.token_id for token in tokens} | {other.token_id for token in tokens for other in token.top_logprobs}


def chat_logprobs(tokens: Sequence[Token], texts: Texts) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                token=texts[token.token_id],
                logprob=_finite(token.logprob),
                bytes=_bytes(texts[token.token_id]),
                top_logprobs=[
                    TopLogprob(
                        token=texts[other.token_id], logprob=_finite(other.logprob), bytes=_bytes(texts[other.token_id])
                    )
                    for other in token.top_logprobs
                ],
            )
            for token in tokens
        ]
    )


def completion_logprobs(piece: Piece, texts: Texts) -> CompletionLogprobs:
    """Of the prompt's tokens, if they are there, and of the output's."""
    offsets = _places(piece.echo, [texts[token.token_id] for token in piece.prompt])
    text_offset = piece.text_offset + len(piece.echo)
    for token in piece.tokens:
        offsets.append(text_offset)
        text_offset += len(token.text)
    tokens = [*piece.prompt, *piece.tokens]
    return CompletionLogprobs(
        tokens=[texts[token.token_id] for token in tokens],
        token_logprobs=[None if token.logprob is None else _finite(token.logprob) for token in tokens],
        top_logprobs=[None if token.logprob is None else _by_text(token, texts) for token in tokens],
        text_offset=offsets,
    )


def _places(text: str, spellings: Sequence[str]) -> list[int]:
    """Where each token begins in their text.

    One by one tokens may look otherwise: a special one that the text does not show, part of a character, a space that
    is lost in front. Such a one is where the one before it ends, and the next is looked for a few characters on.
    """
    places = []
    end = 0
    for spelling in spellings:
        place = text.find(spelling, end, end + len(spelling) + MAX_SKIPPED)
        places.append(end if place < 0 else place)
        end = end if place < 0 else place + len(spelling)
    return places


def _by_text(token: Token, texts: Texts) -> dict[str, float]:
    """The likeliest tokens and the one that came; of those that look alike the likelier counts."""
    found = {texts[token.token_id]: _finite(token.logprob)}
    for other in token.top_logprobs:
        text = texts[other.token_id]
        found[text] = max(found.get(text, LEAST_LOGPROB), _finite(other.logprob))
    return found


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", "replace"))
