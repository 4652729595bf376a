"""What a caller may pass, checked before anything is sent, so that a mistake is told at the line that made it.

The limits are those of the messages; a broker may set lower ones, and then refuses with its own words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from bus.errors import BadArgument, TooLarge
from bus.limits import MAX_PROMPT_BYTES, MESSAGE_FIELDS
from bus.messages import PromptKind
from bus.traces import parse_traceparent
from kvcache.hashing import canonical_chat, encode_token_ids, routing_chain, session_chain

if TYPE_CHECKING:
    from kvcache.hashing import TokenIds

ChatMessages: TypeAlias = Sequence[Mapping[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]]

MAX_NAME_BYTES = 256
MAX_LABEL_CHARS = 128
MAX_SECONDS = 7 * 24 * 3600.0
MAX_LAYER = 2**32 - 1
MAX_LENGTH = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it travels, and the chain that places it."""

    kind: PromptKind
    payload: bytes
    chain: tuple[bytes, ...]


def make_prompt(
    prompt: str | None,
    token_ids: TokenIds | None,
    messages: ChatMessages | None,
    *,
    model: str,
    cache_salt: str,
    tools: Tools | None = None,
    session: str = "",
) -> Prompt:
    """The one of the three that was given. Raises BadArgument, or TooLarge for more than 1 MiB.

    tools: what the chat template shows beside the messages. session: what the prompt is placed by first of all.
    """
    made = _make_prompt(prompt, token_ids, messages, tools, model, cache_salt)
    return replace(made, chain=session_chain(made.chain, session)) if session else made


def _make_prompt(
    prompt: str | None,
    token_ids: TokenIds | None,
    messages: ChatMessages | None,
    tools: Tools | None,
    model: str,
    cache_salt: str,
) -> Prompt:
    given = [
        name
        for name, value in (("prompt", prompt), ("token_ids", token_ids), ("messages", messages))
        if value is not None
    ]
    if len(given) != 1:
        raise BadArgument(f"give exactly one of prompt, token_ids and messages, not {' and '.join(given) or 'none'}")
    if messages is not None:
        return _from_messages(messages, tools, model, cache_salt)
    if tools is not None:
        raise BadArgument("tools go with messages: only a chat template can show them")
    if token_ids is not None:
        return _from_token_ids(token_ids, model, cache_salt)
    if not isinstance(prompt, str):
        raise BadArgument(f"prompt must be text, not {type(prompt).__name__}")
    payload = _encode("prompt", prompt)
    return Prompt(PromptKind.TEXT, payload, routing_chain(prompt, model=model, cache_salt=cache_salt))


def check_name(what: str, value: object) -> str:
    """A name, such as a seq_id: printable text of 1 to 256 bytes. Raises BadArgument."""
    if not isinstance(value, str):
        raise BadArgument(f"{what} must be text, not {type(value).__name__}")
    if not value.isprintable():
        raise BadArgument(f"{what} has control or other unprintable characters: {value[:32]!r}")
    num_bytes = len(value.encode())
    if not 1 <= num_bytes <= MAX_NAME_BYTES:
        raise BadArgument(f"{what} is {num_bytes} bytes; 1 to {MAX_NAME_BYTES} are allowed")
    return value


def optional_name(what: str, value: object) -> str:
    """A name or, for None, the empty string that means none on the wire. Raises BadArgument."""
    return "" if value is None else check_name(what, value)


def check_label(value: object) -> str:
    """What logs are to call a request: up to 128 printable ASCII characters; None for none. Raises BadArgument."""
    if value is None:
        return ""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or len(value) > MAX_LABEL_CHARS:
        raise BadArgument(f"label must be up to {MAX_LABEL_CHARS} printable ASCII characters, not {value!r:.60}")
    return value


def check_traceparent(value: object) -> str:
    """A W3C traceparent; None for none. Raises BadArgument."""
    if value is None:
        return ""
    context = parse_traceparent(value) if isinstance(value, str) else None
    if context is None:
        raise BadArgument(f"traceparent must be of the form 00-<32 hex digits>-<16>-<2>, not {value!r:.80}")
    return str(context)


def check_index(what: str, value: object, most: int, least: int = 0) -> int:
    """A whole number in its range; numpy's integers count. Raises BadArgument."""
    index = getattr(value, "__index__", None)
    if isinstance(value, bool) or index is None or not least <= (number := index()) <= most:
        raise BadArgument(f"{what} must be an integer from {least} to {most}, not {value!r:.60}")
    return int(number)


def check_seconds(what: str, value: object) -> float:
    """A duration in seconds, more than none and at most a week. Raises BadArgument."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadArgument(f"{what} must be a number of seconds, not {value!r:.60}")
    if not 0 < value <= MAX_SECONDS:
        raise BadArgument(f"{what} must be more than 0 and at most {MAX_SECONDS:.0f} seconds, not {value!r:.60}")
    return float(value)


def _from_token_ids(token_ids: TokenIds, model: str, cache_salt: str) -> Prompt:
    if isinstance(token_ids, str | bytes) or not hasattr(token_ids, "__len__"):
        raise BadArgument(f"token_ids must be a sequence of integers, not {type(token_ids).__name__}")
    if len(getattr(token_ids, "shape", (0,))) != 1:
        raise BadArgument("token_ids must have one dimension")
    if len(token_ids) == 0:
        raise BadArgument("token_ids is empty; at least one token is needed")
    _check_size("token_ids", 4 * len(token_ids))
    if any(isinstance(token_id, bool) for token_id in token_ids):
        raise BadArgument("token_ids must be integers, and True and False are not")
    payload = encode_token_ids(token_ids)
    return Prompt(PromptKind.TOKENS, payload, routing_chain(token_ids, model=model, cache_salt=cache_salt))


def _from_messages(messages: ChatMessages, tools: Tools | None, model: str, cache_salt: str) -> Prompt:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadArgument('messages must be a list of {"role": ..., "content": ...}, with at least one')
    turns = [_as_turn(position, message) for position, message in enumerate(messages)]
    _check_tools(tools)
    payload = _encode("messages", _as_json({"messages": turns, "tools": list(tools)} if tools else turns))
    # Templates show the tools before the conversation, or in its first message.
    head = [("tools", _as_json(list(tools)))] if tools else []
    plain = [(turn["role"], _spoken(turn)) for turn in turns]
    return Prompt(
        PromptKind.MESSAGES, payload, routing_chain(canonical_chat(head + plain), model=model, cache_salt=cache_salt)
    )


def _as_turn(position: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= set(MESSAGE_FIELDS):
        raise BadArgument(
            f'messages[{position}] must be {{"role": ..., "content": ...}}, and besides only name, tool_calls and'
            " tool_call_id"
        )
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str) or not role:
        raise BadArgument(f"messages[{position}]: role and content must be text, and role not empty")
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str):
            raise BadArgument(f"messages[{position}]: {name} must be text")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadArgument(f"messages[{position}]: tool_calls must be a list of objects")
    return {name: message[name] for name in MESSAGE_FIELDS if name in message}


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadArgument("tools must be a list of objects")


def _spoken(turn: Mapping[str, Any]) -> str:
    return turn["content"] + _as_json(turn["tool_calls"]) if turn.get("tool_calls") else str(turn["content"])


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadArgument(f"messages and tools must be plain JSON: {error}") from None


def _encode(what: str, text: str) -> bytes:
    if not text:
        raise BadArgument(f"{what} is empty; at least one character is needed")
    _check_size(what, len(text))  # a character is at least a byte: nothing huge is encoded first
    try:
        payload = text.encode()
    except UnicodeEncodeError as error:
        raise BadArgument(f"{what} is not valid Unicode text: {error.reason} at {error.start}") from None
    _check_size(what, len(payload))
    return payload


def _check_size(what: str, num_bytes: int) -> None:
    if num_bytes > MAX_PROMPT_BYTES:
        raise TooLarge(f"{what} is at least {num_bytes} bytes, limit {MAX_PROMPT_BYTES}", detail=MAX_PROMPT_BYTES)
