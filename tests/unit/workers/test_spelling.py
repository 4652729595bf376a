"""Questions about tokens and text: asked of the engine, answered once, and forgotten with their callers."""

from __future__ import annotations

import msgspec
import pytest

from bus import wire
from bus.errors import ErrorCode, TokenizerError
from bus.limits import MAX_SPELLED_TOKENS
from bus.messages import Detokenize, Detokenized, PromptKind, Release, Tokenize, Tokenized
from bus.stats import Spelling, unpack
from tests.unit.workers.core_bench import CoreBench, answers, commands
from workers.engine_api import Answered, EncodePrompt, Encoding, SpellTokens


@pytest.fixture
def bench() -> CoreBench:
    bench = CoreBench()
    bench.join()
    return bench


def ask(bench: CoreBench, message: Tokenize | Detokenize, data: bytes) -> tuple[int, EncodePrompt | SpellTokens]:
    call, actions = bench.assign(msgspec.structs.replace(message, payload=wire.describe([data])), data)
    asked: list[EncodePrompt | SpellTokens] = [*commands(actions, EncodePrompt), *commands(actions, SpellTokens)]
    (question,) = asked
    return call, question


def tokenize(bench: CoreBench) -> Tokenize:
    return Tokenize(req_id=bench.req_id(), attempt=0, deadline_ms=9000, kind=PromptKind.TEXT, model="m", special=False)


def detokenize(bench: CoreBench) -> Detokenize:
    return Detokenize(req_id=bench.req_id(), attempt=0, deadline_ms=9000, each=True)


def test_a_prompt_is_encoded_by_the_model_it_names(bench: CoreBench) -> None:
    call, question = ask(bench, tokenize(bench), b"hello")
    assert question == EncodePrompt(
        ticket=question.ticket, model="m", kind=PromptKind.TEXT, prompt=b"hello", special=False
    )
    (said,) = answers(bench.engine(Answered(question.ticket, Encoding(model="m", tokens=(1, 258), max_model_len=64))))
    assert (said.call, said.final, type(said.message)) == (call, True, Tokenized)
    assert (said.message.max_model_len, bytes(said.payload[0])) == (64, b"\1\0\0\0\2\1\0\0")


def test_tokens_are_spelled(bench: CoreBench) -> None:
    _, question = ask(bench, detokenize(bench), b"\1\0\0\0")
    assert question == SpellTokens(ticket=question.ticket, model="", tokens=b"\1\0\0\0", each=True)
    (said,) = answers(bench.engine(Answered(question.ticket, Spelling(texts=("a",)))))
    assert isinstance(said.message, Detokenized)
    assert unpack(said.payload[0], Spelling).texts == ("a",)


def test_what_the_tokenizer_refuses_is_the_answer(bench: CoreBench) -> None:
    call, question = ask(bench, tokenize(bench), b"hello")
    (said,) = answers(bench.engine(Answered(question.ticket, TokenizerError("no template"))))
    assert (said.call, said.message.code) == (call, ErrorCode.TOKENIZER)


def test_an_answer_that_no_message_can_hold_is_too_large(bench: CoreBench) -> None:
    _, question = ask(bench, tokenize(bench), b"x")
    encoding = Encoding(model="m", tokens=(1,) * (MAX_SPELLED_TOKENS + 1), max_model_len=64)
    (said,) = answers(bench.engine(Answered(question.ticket, encoding)))
    assert said.message.code == ErrorCode.TOO_LARGE
    _, question = ask(bench, detokenize(bench), b"\1\0\0\0")
    (said,) = answers(bench.engine(Answered(question.ticket, Spelling(texts=("x" * (2 << 20),)))))
    assert said.message.code == ErrorCode.TOO_LARGE


def test_the_answer_to_a_caller_that_has_left_is_dropped(bench: CoreBench) -> None:
    call, question = ask(bench, tokenize(bench), b"hello")
    bench.control(Release(call=call))
    assert bench.engine(Answered(question.ticket, TokenizerError("late"))) == []
