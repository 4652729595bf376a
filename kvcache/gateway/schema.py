"""What callers may send, by OpenAI's names and the further ones that vLLM's users know.

Types are checked here, ranges by `kvcache.sampling_checks`, so a request is refused with the same words wherever it
comes from. Fields that nobody here knows are ignored, as those servers do; fields that are known and not supported
are listed in `kvcache.gateway.asks`, and refused by name. Core.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

from kvcache.gateway.problems import Problem

S = TypeVar("S", bound=msgspec.Struct)

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_AT = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`")


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(msgspec.Struct, kw_only=True):
    """What both ways of generating share. None means: as if it had been left out."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    logits_processors: Any = None
    truncate_prompt_tokens: Any = None
    spaces_between_special_tokens: Any = None
    return_token_ids: Any = None
    return_tokens_as_token_ids: Any = None
    kv_transfer_params: Any = None


class CompletionRequest(Sampled, kw_only=True):
    """POST /v1/completions. prompt: a text, a list of token ids, or a list of either."""

    prompt: str | list[str | int | list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    prompt_embeds: Any = None


class Part(msgspec.Struct, kw_only=True):
    """A piece of a message's content; only `text`, and `refusal`, which is one, can be served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatTurn(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(Sampled, kw_only=True):
    """POST /v1/chat/completions. tools: JSON objects that the model's chat template may show."""

    messages: list[ChatTurn]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    documents: Any = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: of a prompt, or of messages as the model's chat template renders them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def parse(body: bytes, kind: type[S]) -> S:
    """A request's body as `kind`. Raises Problem (400), naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        where = _AT.search(str(error))
        raise Problem(400, f"{error}", param=where[1] or None if where else None, code="bad_arg") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the body is not valid JSON: {error}", code="bad_json") from None
