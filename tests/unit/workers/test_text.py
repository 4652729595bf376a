from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as CoreTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from bus.errors import BadArgument, KVCacheError, TokenizerError, TooLarge
from workers.text import WINDOW_TOKENS, StopStrings, TextStream, Tokenizer

from .conftest import EOS_ID, VOCAB_SIZE, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = Tokenizer(make_tokenizer(), vocab_size=VOCAB_SIZE, max_prompt_bytes=4096)
"""Stateless, and hypothesis may not be given function fixtures."""

any_tokens = st.lists(st.integers(0, 261) | st.just(EOS_ID), max_size=120)
characters = st.text(st.sampled_from("ab €é😀\n\ufffd"), max_size=40)


def make_llama2_tokenizer() -> Any:
    """Byte fallback and a space in front of words, as Llama 2's tokenizer decodes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁he", "llo", "▁", "é", "a"]
    core = CoreTokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")  # type: ignore[no-untyped-call]


LLAMA2 = Tokenizer(make_llama2_tokenizer(), vocab_size=300, max_prompt_bytes=4096)


def stream_text(tokens: Sequence[int], stops: Sequence[str] = (), decoder: Tokenizer = TOKENIZER) -> str:
    stream = TextStream(decoder, stops)
    return "".join(stream.push(token) for token in tokens) + stream.finish()


@given(any_tokens)
def test_pieces_joined_are_the_whole_decoding_whatever_the_bytes(tokens: list[int]) -> None:
    assert stream_text(tokens) == TOKENIZER.decode(tokens)


@given(characters)
def test_no_piece_holds_half_a_character(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in TOKENIZER.encode(text or "x")]
    assert sum(piece.count("\ufffd") for piece in pieces) <= text.count("\ufffd")
    assert "".join(pieces) + stream.finish() == (text or "x")


@given(any_tokens, st.integers(0, 120), st.lists(st.sampled_from(["he", "hello", "\ufffd", "aa"]), max_size=2))
def test_replayed_stream_goes_on_as_the_first_would_have(tokens: list[int], cut: int, stops: list[str]) -> None:
    first, resumed = TextStream(TOKENIZER, stops), TextStream(TOKENIZER, stops)
    released = "".join(first.push(token) for token in tokens[:cut])
    assert resumed.replay(tokens[:cut]) == released
    for token in tokens[cut:]:
        assert first.push(token) == resumed.push(token)
    assert first.finish() == resumed.finish()


@given(st.lists(st.sampled_from([257, 258, 259, 260, 261]) | st.just(-1), max_size=80))
def test_byte_fallback_tokenizer_streams_its_whole_decoding_for_valid_text(tokens: list[int]) -> None:
    """-1 stands for a euro sign in three byte tokens."""
    flat = [part for token in tokens for part in ([0xE2 + 1, 0x82 + 1, 0xAC + 1] if token < 0 else [token])]
    assert stream_text(flat, decoder=LLAMA2) == LLAMA2.decode(flat)


@given(st.lists(st.sampled_from([[259], [257], [258], [0], [0] * 15, [0] * 40]), max_size=12))
def test_tokens_that_show_nothing_lose_no_space_behind_them(runs: list[list[int]]) -> None:
    """259 is a space by itself, of which a decoder drops one in front; 0 is special."""
    tokens = [token for run in runs for token in run]
    assert stream_text(tokens, decoder=LLAMA2) == LLAMA2.decode(tokens)


@pytest.mark.parametrize("text", ["", "hello hello, the cache said to the worker"])
def test_an_endless_run_of_tokens_without_text_costs_no_more_than_any_other(text: str) -> None:
    """As of a model that has ended, and was told to go on."""
    longest = 0

    class Watched:
        def decode(self, token_ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return TOKENIZER.decode(token_ids)

    stream = TextStream(Watched())
    begun = TOKENIZER.encode(text) if text else []
    released = "".join(stream.push(token) for token in [*begun, *[EOS_ID] * 200, *TOKENIZER.encode("end")])
    assert released == f"{text}end"
    assert longest <= 4 * WINDOW_TOKENS


def test_text_comes_with_the_token_that_settles_it() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.push(token) for token in TOKENIZER.encode("a€b")] == ["a", "", "€", "b"]


def test_endless_invalid_bytes_keep_flowing() -> None:
    stream = TextStream(TOKENIZER)
    continuation = make_tokenizer().get_vocab()["Ĥ"]  # how the byte-level alphabet writes 0x82
    released = "".join(stream.push(continuation) for _ in range(100))
    assert released == "\ufffd" * 97


@given(characters, st.lists(st.text("ab €", min_size=1, max_size=4), max_size=3), st.randoms(use_true_random=False))
def test_stop_strings_cut_at_the_same_place_however_text_is_cut_up(text: str, stops: list[str], random: Any) -> None:
    matcher = StopStrings(stops)
    pieces, rest = [], text
    while rest:
        size = random.randint(1, len(rest))
        pieces.append(matcher.push(rest[:size]))
        rest = rest[size:]
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) + matcher.finish() == expected
    assert matcher.is_stopped == bool(ends)


def test_stop_string_across_tokens_is_held_back_and_left_out() -> None:
    stream = TextStream(TOKENIZER, ["END"])
    pieces = [(stream.push(token), stream.is_stopped) for token in TOKENIZER.encode("ab EN ENDx")]
    assert "".join(text for text, _ in pieces) == "ab EN "
    assert [text for text, _ in pieces][3:6] == ["", "", "EN "]
    assert [is_stopped for _, is_stopped in pieces] == [False] * 8 + [True] * 2
    assert stream.finish() == ""


def test_text_that_never_became_a_stop_string_comes_at_the_end() -> None:
    assert stream_text(TOKENIZER.encode("ab EN"), ["END"]) == "ab EN"


def test_first_complete_stop_string_wins_over_one_that_began_earlier() -> None:
    assert stream_text(TOKENIZER.encode("xabcd"), ["abcd", "bc"]) == "xa"
    assert stream_text(TOKENIZER.encode("xabcd"), ["bc", "abc"]) == "x"


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(BadArgument, match="stop string is empty"):
        TextStream(TOKENIZER, ["a", ""])


def test_special_tokens_have_no_text() -> None:
    assert stream_text([*TOKENIZER.encode("hello"), EOS_ID]) == "hello"


def test_chat_messages_are_rendered_by_the_models_template_up_to_the_answer() -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert TOKENIZER.decode(TOKENIZER.encode_chat(messages)) == "<system>be kind\n<user>hello\n<assistant>"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        (["hello"], "message 0 must be an object"),
        ([{"role": "user"}], "message 0 must be an object"),
        ([{"role": "user", "content": "x", "voice": []}], "message 0 must be an object"),
        ([{"role": "user", "content": "x"}, {"role": "root", "content": "x"}], "message 1 has role 'root'"),
        ([{"role": ["user"], "content": "x"}], "message 0 has role"),
        ([{"role": "user", "content": 5}], "content of type int"),
    ],
)
def test_malformed_messages_are_refused_by_their_place(messages: list[object], words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        TOKENIZER.encode_chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role here') }}",
        "{{ messages[0].nothing.at_all }}",
        "{% for",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_template_that_fails_is_a_tokenizer_error(template: str) -> None:
    inner = make_tokenizer()
    inner.chat_template = template
    tokenizer = Tokenizer(inner, vocab_size=VOCAB_SIZE, max_prompt_bytes=4096)
    with pytest.raises(TokenizerError, match="chat template failed"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_model_without_a_template_says_what_to_send_instead() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        LLAMA2.encode_chat([{"role": "user", "content": "x"}])


class CountingTokenizer:
    """Stands in for transformers' tokenizer and counts what reaches it."""

    chat_template = "x"

    def __init__(self, *, rendered: str = "") -> None:
        self.calls = 0
        self._rendered = rendered

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.calls += 1
        raise RuntimeError(f"broken on {text} {add_special_tokens}")

    def apply_chat_template(self, *_args: object, **_kwargs: object) -> str:
        return self._rendered


@pytest.mark.parametrize("prompt", ["x" * 4097, "€" * 1366, "\ud800" * 1366])
def test_prompt_over_the_byte_cap_never_reaches_the_tokenizer(prompt: str) -> None:
    inner: Any = CountingTokenizer()
    tokenizer = Tokenizer(inner, vocab_size=VOCAB_SIZE, max_prompt_bytes=4096)
    with pytest.raises(TooLarge, match="the limit is 4096"):
        tokenizer.encode(prompt)
    with pytest.raises(TooLarge, match="the limit is 4096"):
        tokenizer.encode_chat([{"role": "user", "content": prompt}])
    assert inner.calls == 0


def test_template_that_blows_a_small_message_up_is_stopped_before_the_tokenizer() -> None:
    inner: Any = CountingTokenizer(rendered="x" * 5000)
    tokenizer = Tokenizer(inner, vocab_size=VOCAB_SIZE, max_prompt_bytes=4096)
    with pytest.raises(TooLarge):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert inner.calls == 0


def test_failing_tokenizer_is_a_typed_error() -> None:
    inner: Any = CountingTokenizer()
    tokenizer = Tokenizer(inner, vocab_size=VOCAB_SIZE, max_prompt_bytes=4096)
    with pytest.raises(TokenizerError, match="broken on hello"):
        tokenizer.encode("hello")


def test_prompt_that_is_not_unicode_text_is_a_typed_error() -> None:
    with pytest.raises(TokenizerError, match="tokenizer failed"):
        TOKENIZER.encode("a\ud800b")


def test_prompt_just_under_the_byte_cap_is_taken() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("x" * 4096)) == "x" * 4096


@pytest.mark.parametrize("token_ids", [[], [0, -1], [VOCAB_SIZE], [2**40]])
def test_token_ids_the_model_does_not_have_are_refused(token_ids: list[int]) -> None:
    with pytest.raises(BadArgument):
        TOKENIZER.check_ids(token_ids)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(BadArgument, match="no tokens"):
        TOKENIZER.encode("")


def test_token_the_tokenizer_cannot_decode_is_a_typed_error() -> None:
    stream = TextStream(TOKENIZER)
    with pytest.raises(KVCacheError):
        stream.push(-5)


def test_tools_names_and_calls_reach_the_template() -> None:
    inner = make_tokenizer()
    inner.chat_template = (
        "{% for tool in tools or [] %}[{{ tool['name'] }}]{% endfor %}"
        "{% for m in messages %}{{ m['name'] }}:{{ m['content'] }}{% for c in m['tool_calls'] or [] %}({{ c['id'] }})"
        "{% endfor %};{% endfor %}"
    )
    tokenizer = Tokenizer(inner, vocab_size=VOCAB_SIZE, max_prompt_bytes=1000)
    messages = [{"role": "assistant", "content": "hi", "name": "ann", "tool_calls": [{"id": "c1"}]}]
    assert tokenizer.decode(tokenizer.encode_chat(messages, [{"name": "add"}])) == "[add]ann:hi(c1);"
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "ann:hi(c1);"


def test_spelling_shows_the_special_tokens_that_decoding_leaves_out() -> None:
    tokens = [*TOKENIZER.encode("hello"), EOS_ID]
    assert TOKENIZER.spell(tokens) == "hello<eos>"
    assert TOKENIZER.decode(tokens) == "hello"
