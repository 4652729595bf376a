"""From a caller's request to what is asked of the bus, or to what is wrong with it. Core.

Routing and isolation: `session_id` in the body, or the headers X-Session-ID or X-Session-Affinity, keep a session's
requests on one worker; without one, `user` does. `cache_salt`, with the caller's API key, says who shares KV with whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from kvcache.gateway.access import isolation_salt
from kvcache.gateway.problems import Problem
from kvcache.gateway.schema import ChatRequest, ChatTurn, CompletionRequest, Part, Sampled
from kvcache.sampling import SamplingFields, SamplingParams
from kvcache.sampling_checks import MAX_LOGPROBS, MAX_SEED, brief

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of /v1/completions."""
MAX_OUTPUTS = 128
MAX_SESSION_CHARS = 256
SESSION_HEADERS = ("x-session-id", "x-session-affinity")

_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stop", "stop_token_ids", "ignore_eos", "min_tokens"),
)

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": ({},),
    "prompt_embeds": (),
    "web_search_options": (),
    "documents": ([],),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "audio": (),
    "modalities": (["text"],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
"""Fields that would change the answer in ways that are not served, and the values that change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. key: the hash of the API key, empty without one. session: from the headers."""

    key: bytes = b""
    session: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """prompts: arguments of `AsyncClient.generate`, each a prompt of its own, which share all else.

    is_echo: whether each output begins with its prompt. is_prompt_only: whether it ends there too; the one token that
    is drawn then, from logits that are there anyway, is not shown.
    """

    prompts: tuple[Mapping[str, Any], ...]
    params: SamplingParams
    model: str | None
    session: str | None
    cache_salt: str | None
    priority: int
    is_stream: bool
    wants_usage: bool
    wants_usage_always: bool
    is_echo: bool = False
    is_prompt_only: bool = False

    @property
    def num_outputs(self) -> int:
        return len(self.prompts) * self.params.n


def completion_ask(request: CompletionRequest, caller: Caller) -> Ask:
    """Raises Problem, or BadArgument for a parameter out of its range."""
    fields = _sampling_fields(request, COMPLETION_MAX_TOKENS, request.max_tokens)
    is_echo = bool(request.echo)
    if request.logprobs is not None:
        fields["logprobs"] = request.logprobs
        if is_echo:
            fields["prompt_logprobs"] = request.logprobs
    is_prompt_only = is_echo and request.max_tokens == 0
    if is_prompt_only:
        fields["max_tokens"] = 1
    ask = _ask(request, caller, _prompts(request.prompt), fields)
    return replace(ask, is_echo=is_echo, is_prompt_only=is_prompt_only)


def chat_ask(request: ChatRequest, caller: Caller, default_max_tokens: int) -> Ask:
    """Raises Problem, or BadArgument for a parameter out of its range."""
    if request.echo:
        raise Problem(400, "echo is not supported for chats", param="echo")
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    fields = _sampling_fields(request, default_max_tokens, limit)
    if request.top_logprobs and not request.logprobs:  # 0 asks for nothing
        raise Problem(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.logprobs:
        fields["logprobs"] = _top_logprobs(request.top_logprobs or 0)
    tools = None if request.tool_choice == "none" else request.tools
    return _ask(request, caller, (chat_prompt(request.messages, tools),), fields)


def chat_prompt(messages: Sequence[ChatTurn], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Messages, and tools if there are some, as arguments of `AsyncClient.generate`. Raises Problem."""
    prompt: dict[str, Any] = {"messages": [_turn(position, turn) for position, turn in enumerate(messages)]}
    return prompt | ({"tools": tools} if tools else {})


def _ask(
    request: Sampled,
    caller: Caller,
    prompts: tuple[Mapping[str, Any], ...],
    fields: SamplingFields,
) -> Ask:
    _check_supported(request)
    options = request.stream_options
    if options is not None and not request.stream:
        raise Problem(400, "stream_options needs stream to be true", param="stream_options")
    ask = Ask(
        prompts=prompts,
        params=SamplingParams(**fields),
        model=request.model or None,
        session=_session(request, caller),
        cache_salt=isolation_salt(caller.key, request.cache_salt or None),
        priority=request.priority or 0,
        is_stream=bool(request.stream),
        wants_usage=bool(options and (options.include_usage or options.continuous_usage_stats)),
        wants_usage_always=bool(options and options.continuous_usage_stats),
    )
    if ask.num_outputs > MAX_OUTPUTS:
        raise Problem(400, f"{ask.num_outputs} outputs were asked for, at most {MAX_OUTPUTS} at once", param="n")
    return ask


def _sampling_fields(request: Sampled, default_max_tokens: int, max_tokens: int | None) -> SamplingFields:
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    given["max_tokens"] = default_max_tokens if max_tokens is None else max_tokens
    if request.min_tokens is not None and max_tokens is None:
        given["max_tokens"] = max(default_max_tokens, request.min_tokens)
    if request.top_k == -1:
        given["top_k"] = 0  # vLLM's other word for all tokens
    if request.seed is not None:
        given["seed"] = request.seed % (MAX_SEED + 1)  # others take any 64-bit integer
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    if request.best_of not in {None, request.n or 1}:
        raise Problem(400, "best_of is not supported: leave it out, or let it be n", param="best_of")
    fields: SamplingFields = given  # type: ignore[assignment]  # its names are those of _SAMPLING
    return fields


def _top_logprobs(given: int) -> int:
    if not 0 <= given <= MAX_LOGPROBS:
        raise Problem(400, f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {given}", param="top_logprobs")
    return given


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are text. Raises Problem for one that is no number."""
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise Problem(400, f"logit_bias has the key {brief(key)}; keys are token ids", param="logit_bias")
        biases[int(key)] = bias
    return biases


def _prompts(given: str | list[str | int | list[int]]) -> tuple[Mapping[str, Any], ...]:
    if isinstance(given, str):
        return ({"prompt": given},)
    if given and all(isinstance(item, int) for item in given):
        return ({"token_ids": given},)
    if not given or any(isinstance(item, int) for item in given):
        raise Problem(400, "prompt must be a text, a list of token ids, or a list of these", param="prompt")
    if not all(given):
        raise Problem(400, f"prompt {given.index([] if [] in given else '')} of the list is empty", param="prompt")
    if len(given) > MAX_OUTPUTS:
        raise Problem(400, f"{len(given)} prompts were given, at most {MAX_OUTPUTS}", param="prompt")
    return tuple({"prompt": item} if isinstance(item, str) else {"token_ids": item} for item in given)


def _turn(position: int, turn: ChatTurn) -> dict[str, Any]:
    """A message as chat templates know it: content is one text, and what OpenAI calls developer is their system."""
    where = f"messages[{position}]"
    parts = turn.content if isinstance(turn.content, list) else []
    for part in parts:
        if part.type not in {"text", "refusal"} or _text(part) is None:
            raise Problem(400, f"{where} has content of type {brief(part.type)}; only text is supported", param=where)
    if turn.content is None and not turn.tool_calls:
        raise Problem(400, f"{where} has no content", param=where)
    content = turn.content if isinstance(turn.content, str) else "".join(_text(part) or "" for part in parts)
    message: dict[str, Any] = {"role": "system" if turn.role == "developer" else turn.role, "content": content}
    extras = {"name": turn.name, "tool_calls": turn.tool_calls, "tool_call_id": turn.tool_call_id}
    return message | {name: value for name, value in extras.items() if value}


def _text(part: Part) -> str | None:
    return part.refusal if part.type == "refusal" else part.text


def _session(request: Sampled, caller: Caller) -> str | None:
    session = request.session_id or caller.session
    if session and not _is_name(session):
        raise Problem(400, f"a session's name has at most {MAX_SESSION_CHARS} printable characters", param="session_id")
    if session or not request.user:
        return session or None
    # OpenAI takes any text here, so one that cannot be a name is told apart by its digest.
    return request.user if _is_name(request.user) else blake2b(request.user.encode(), digest_size=16).hexdigest()


def _is_name(text: str) -> bool:
    return len(text) <= MAX_SESSION_CHARS and text.isprintable() and len(text.encode()) <= MAX_SESSION_CHARS


def _check_supported(request: Sampled) -> None:
    # Templates write the special tokens of chats themselves; texts get them, as elsewhere.
    special = {"add_special_tokens": (isinstance(request, CompletionRequest),)}
    for name, harmless in (_UNSUPPORTED | special).items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            served = f"; what is: {', '.join(repr(one) for one in harmless)}" if harmless else ""
            raise Problem(400, f"{name} {brief(value)} is not supported here{served}", param=name, code="unsupported")
