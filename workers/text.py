"""Text to tokens and back: prompts in, an exact stream of text out.

`Tokenizer` wraps a model's own tokenizer and chat template, both from its folder (transformers renders the
template in a sandboxed jinja). `TextStream` turns tokens into text as they come and looks for stop strings.
Its output is a function of the token list alone, so a stream that resumes elsewhere replays the tokens there
are and goes on with the next character. No torch.

    tokens decoded so far    |------------------------------------|
    text released            |--------------------|
                                                  |- held back ---|  may yet change (a character with bytes
                                                                     still to come) or become a stop string
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from bus.errors import BadArgument, TokenizerError, TooLarge
from bus.limits import MESSAGE_FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""
MAX_UNFINISHED = 3
"""Bytes of a UTF-8 character that can be there before its last; some decoders show one mark for each."""
WINDOW_TOKENS = 16
"""Decode again from the last place known good once this many tokens have come since."""
ROLES = frozenset({"system", "user", "assistant", "tool"})


class Tokenizer:
    """A model's tokenizer with limits and typed errors.

    vocab_size: the model's, which token ids from outside are held to. max_prompt_bytes: utf-8, checked before
    any tokenizing, so that a huge prompt costs nothing.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, *, vocab_size: int, max_prompt_bytes: int) -> None:
        self._inner: Any = inner
        self._vocab_size = vocab_size
        self._max_prompt_bytes = max_prompt_bytes

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Token ids of a prompt; special: with the special tokens the model begins with.

        Raises TooLarge, BadArgument if no token comes of it, TokenizerError if the tokenizer fails.
        """
        self._check_bytes(prompt)
        return self._tokenize(prompt, add_special_tokens=special)

    def encode_chat(self, messages: Sequence[object], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation rendered by the model's chat template, up to where the answer begins.

        messages: mappings of `role` and `content`, both text, and perhaps `name`, `tool_calls` and `tool_call_id`.
        tools: JSON objects that the template may show; one that knows no tools leaves them out.
        Raises as `encode` does, BadArgument for a malformed message, TokenizerError if the model has no template or the
        template refuses the messages.
        """
        conversation = _as_conversation(messages)
        self._check_bytes("".join(message["content"] for message in conversation))
        if not self._inner.chat_template:
            raise TokenizerError("the model has no chat template; send a prompt or token ids")
        try:
            rendered = self._inner.apply_chat_template(
                conversation, tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise TokenizerError(f"the chat template failed: {type(error).__name__}: {error}") from error
        self._check_bytes(rendered)
        # The template writes the special tokens itself.
        return self._tokenize(rendered, add_special_tokens=False)

    def check_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids from outside, as they are. Raises BadArgument for none, or one the model does not have."""
        if not token_ids:
            raise BadArgument("the prompt has no tokens")
        for position, token in enumerate(token_ids):
            if not 0 <= token < self._vocab_size:
                raise BadArgument(f"token id {token} at {position} is not in 0..{self._vocab_size - 1}")
        return list(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a token list, special tokens left out, bytes that are no character as U+FFFD."""
        return self._decode(token_ids, skip_special_tokens=True)

    def spell(self, token_ids: Sequence[int]) -> str:
        """The text of a token list with its special tokens."""
        return self._decode(token_ids, skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        try:
            text = self._inner.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        except Exception as error:  # foreign code over a foreign vocabulary
            raise TokenizerError(f"the tokenizer failed to decode: {type(error).__name__}: {error}") from error
        return str(text)

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            token_ids = self._inner.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # foreign code over a user's text
            raise TokenizerError(f"the tokenizer failed: {type(error).__name__}: {error}") from error
        return self.check_ids(token_ids)

    def _check_bytes(self, text: str) -> None:
        # Characters are at most 4 bytes, so most prompts need no encoding to be known small.
        if len(text) * 4 <= self._max_prompt_bytes:
            return
        size = len(text.encode(errors="surrogatepass"))
        if size > self._max_prompt_bytes:
            raise TooLarge(f"the prompt has {size} bytes; the limit is {self._max_prompt_bytes}")


def _as_conversation(messages: Sequence[object]) -> list[dict[str, Any]]:
    """The messages with nothing in them but what templates know."""
    if not messages:
        raise BadArgument("messages is empty; it needs at least one message")
    conversation: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys() <= set(MESSAGE_FIELDS):
            raise BadArgument(
                f"message {position} must be an object of role and content, and besides only"
                f" {', '.join(MESSAGE_FIELDS[2:])}"
            )
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise BadArgument(f"message {position} has role {role!r:.40}; roles are {', '.join(sorted(ROLES))}")
        if not isinstance(content, str):
            raise BadArgument(f"message {position} has content of type {type(content).__name__}; it must be text")
        conversation.append(dict(message))
    return conversation


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a token list."""
        ...


class Detokenizer:
    """Text of a growing token list, released as soon as no further token can change it.

    The pieces joined, `finish()` last, are the decoding of the whole list for byte-level tokenizers, whatever
    the bytes; for byte-fallback ones (Llama 2's kind), whenever the bytes are valid UTF-8. A decoder may look at
    neighbouring tokens (leading spaces, byte runs), so it is always given a window that begins a few tokens back.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._text = ""
        self._released = ""

    def push(self, token: int) -> str:
        """The text that this token settles; often empty, sometimes more than its own."""
        self._window.append(token)
        self._text = self._decoder.decode(self._window)
        # Byte fallback decodes a run of bytes as one: an unfinished character at its end spoils those before it,
        # until it is finished. While the text contradicts what was released, nothing is settled.
        if not self._text.startswith(self._released):
            return ""
        piece = self._release(_settled_len(self._text))
        if self._released == self._text and len(self._window) >= 2 * WINDOW_TOKENS:
            self._shorten()
        return piece

    def finish(self) -> str:
        """What is still held back: an unfinished character, as U+FFFD."""
        return self._release(len(self._text))

    def _release(self, until: int) -> str:
        piece = self._text[len(self._released) : until]
        self._released += piece
        return piece

    def _shorten(self) -> None:
        """Forget all but the last tokens, if those show some text to go on from; or else them, if they show nothing.

        Ends of text that are ignored show nothing, and may go on for as long as the output does.
        """
        last = self._window[-WINDOW_TOKENS:]
        text = self._decoder.decode(last)
        if not text and not self._decoder.decode([*last, *last]):  # a space is dropped only in front
            before = self._window[:-WINDOW_TOKENS]
            if self._decoder.decode(before) == self._text:
                self._window = before
        elif text and not text.startswith(REPLACEMENT):
            self._window, self._text, self._released = last, text, text


def _settled_len(text: str) -> int:
    """Length of `text` without the marks at its end that later bytes may turn into a character."""
    tail = text[-MAX_UNFINISHED:]
    return len(text) - (len(tail) - len(tail.rstrip(REPLACEMENT)))


class StopStrings:
    """Passes text through until a stop string is complete, which is left out together with all after it.

    The first to be complete ends the text, and of those that end together the longest; so it does not matter
    how the text is cut into pieces. Text that may still become a stop string is held back. One that is complete
    in text pushed as not `counts` ends nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise BadArgument("a stop string is empty")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str, *, counts: bool = True) -> str:
        """The text released by more text."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        num_old = len(self._held)
        text = self._held + text
        end, start = self._first(text, num_old) if counts else (0, -1)
        if end:
            self.is_stopped, self._held = True, ""
            return text[:start]
        keep = self._may_become_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and became no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, num_old: int) -> tuple[int, int]:
        """Where the first stop string ends, behind the first `num_old` characters, and begins; (0, -1) for none."""
        found = ((text.find(stop, max(0, num_old - len(stop) + 1)), len(stop)) for stop in self._stops)
        return min(((at + size, at) for at, size in found if at >= 0), default=(0, -1))

    def _may_become_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """One generation's output as text: push every output token, then `finish`.

    `replay(tokens)` brings a new stream to where another one was after the same tokens. min_tokens: a stop string
    that is complete with one of so many first tokens ends nothing.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(stops)
        self._num_immune = min_tokens

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete, and no more text will come."""
        return self._stops.is_stopped

    def push(self, token: int) -> str:
        """The text that this token releases. Raises TokenizerError if it cannot be decoded."""
        counts = self._num_immune == 0
        self._num_immune -= not counts
        return self._stops.push(self._detokenizer.push(token), counts=counts)

    def replay(self, tokens: Sequence[int]) -> str:
        """Push many at once; all the text they release together."""
        return "".join(map(self.push, tokens))

    def finish(self) -> str:
        """The rest, when no more tokens come; empty after a stop string."""
        return self._stops.push(self._detokenizer.finish(), counts=self._num_immune == 0) + self._stops.finish()
