"""Events of the bus become chunks, answers, usage and errors of the API."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from bus import errors
from kvcache.client.results import Alternative, Done, Event, PromptTokens, Start, Timings, Token
from kvcache.client.results import Usage as BusUsage
from kvcache.gateway import openapi
from kvcache.gateway.problems import Problem, problem_of
from kvcache.gateway.replies import LEAST_LOGPROB, Outputs, Piece, chat_logprobs, completion_logprobs, token_ids
from kvcache.gateway.shapes import ChatShape, CompletionShape, Head

HEAD = Head(request_id="r", created=1, model="m")
TIMINGS = Timings(0.1, 0.2, 1.0, 0.0, 0.0, 0.0, 0)


def start(index: int = 0, prompt: int = 10, cached: int = 4) -> Start:
    return Start("w", "because", "m", prompt, cached, index=index)


def token(text: str, seq: int = 0, index: int = 0, logprob: float | None = None) -> Token:
    return Token(seq, seq, text, index, logprob, (Alternative(9, -0.5),) if logprob is not None else ())


def done(num: int, index: int = 0) -> Done:
    return Done("", "length", BusUsage(10, 4, num), TIMINGS, "w", "because", "r", index)


def plain(value: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def test_tokens_that_came_together_are_one_piece_for_each_output() -> None:
    outputs = Outputs(1, 2, has_logprobs=False)
    events: list[Event] = [start(0), start(1), token("a"), token("x", 0, 1), token("b", 1), done(2)]
    one, other = outputs.fold(0, events)
    assert (one.number, one.text, one.finish_reason, one.is_start) == (0, "ab", "length", True)
    assert (other.number, other.text, other.finish_reason) == (1, "x", None)
    (later,) = outputs.fold(0, [token("c", 1, 1)])
    assert (later.is_start, later.text_offset) == (False, 1)


def test_usage_counts_each_prompt_once_and_every_output() -> None:
    outputs = Outputs(2, 2, has_logprobs=False)
    for prompt in (0, 1):
        outputs.fold(prompt, [start(0), start(1, cached=10), token("a"), token("b", 0, 1)])
    usage = outputs.usage()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (20, 4, 24)
    assert usage.prompt_tokens_details.cached_tokens == 8
    outputs.fold(0, [done(5)])
    assert outputs.usage().completion_tokens == 8


def test_tokens_are_kept_only_where_somebody_wants_their_logprobs() -> None:
    for wants in (False, True):
        (piece,) = Outputs(1, 1, has_logprobs=wants).fold(0, [token("a", logprob=-1.0)])
        assert bool(piece.tokens) == wants


def test_a_chat_begins_with_its_role_and_shows_no_empty_chunks() -> None:
    outputs, shape = Outputs(1, 1, has_logprobs=False), ChatShape()

    def chunk(*events: Event) -> Any:
        (piece,) = outputs.fold(0, events)
        made = shape.chunk(HEAD, piece, UNSET, None)
        return None if made is None else plain(made)["choices"][0]

    assert chunk(start())["delta"] == {"role": "assistant", "content": ""}
    assert chunk(token("")) is None
    assert chunk(token("hi"))["delta"] == {"content": "hi"}
    last = chunk(done(2))
    assert (last["delta"], last["finish_reason"]) == ({}, "length")


@pytest.mark.parametrize(("usage", "has_usage"), [(UNSET, False), (None, True)])
def test_a_chunk_has_a_null_usage_only_where_one_will_come(usage: Any, has_usage: bool) -> None:
    (piece,) = Outputs(1, 1, has_logprobs=False).fold(0, [token("hi")])
    for shape in (ChatShape(), CompletionShape()):
        assert ("usage" in plain(shape.chunk(HEAD, piece, usage, None))) == has_usage


def test_the_last_chunk_has_the_usage_and_no_choices() -> None:
    for shape in (ChatShape(), CompletionShape()):
        made = plain(shape.usage_chunk(HEAD, Outputs(1, 1, has_logprobs=False).usage()))
        assert made["choices"] == []
        assert made["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_logprobs_are_spelled_and_finite() -> None:
    tokens = [token("a", 5, logprob=-0.5), token("b", 6, logprob=float("-inf"))]
    assert token_ids(tokens) == {5, 6, 9}
    texts = {5: "a", 6: "é", 9: "z"}
    shown = plain(chat_logprobs(tokens, texts))["content"]
    assert (shown[0]["token"], shown[0]["bytes"], shown[0]["top_logprobs"][0]["token"]) == ("a", [97], "z")
    assert (shown[1]["logprob"], shown[1]["bytes"]) == (LEAST_LOGPROB, [0xC3, 0xA9])
    legacy = completion_logprobs(Piece(0, tokens=tokens, text_offset=7), texts)
    assert (legacy.tokens, legacy.text_offset) == (["a", "é"], [7, 8])
    assert legacy.top_logprobs[0] == {"a": -0.5, "z": -0.5}


def test_a_prompts_logprobs_come_before_the_outputs_and_its_first_token_has_none() -> None:
    outputs, shape = Outputs(1, 1, has_logprobs=True, waits_for_prompt=True), CompletionShape()
    outputs.echoes = {0: "né a"}
    scored = tuple(token("", token_id, logprob=1.0 - token_id) for token_id in (2, 3, 4))
    prompt = PromptTokens((Token(0, 1, ""), *scored))
    texts = {1: "<s>", 2: "n", 3: "\ufffd", 4: " a", 5: "b", 9: "z"}
    batches: list[list[Event]] = [[start(), prompt], [token("b", 5, logprob=-0.5), done(1)]]
    pieces = [piece for events in batches for piece in outputs.fold(0, events)]
    shown = [plain(shape.chunk(HEAD, piece, UNSET, texts))["choices"][0] for piece in pieces]
    assert [choice["text"] for choice in shown] == ["né a", "b"]
    assert shown[0]["logprobs"] == {
        "tokens": ["<s>", "n", "\ufffd", " a"],
        "token_logprobs": [None, -1.0, -2.0, -3.0],
        "top_logprobs": [None, {"n": -1.0, "z": -0.5}, {"\ufffd": -2.0, "z": -0.5}, {" a": -3.0, "z": -0.5}],
        "text_offset": [0, 0, 1, 2],
    }
    assert shown[1]["logprobs"]["text_offset"] == [4]


def test_an_echo_without_logprobs_comes_at_once_and_a_prompt_alone_shows_nothing_else() -> None:
    outputs = Outputs(1, 1, has_logprobs=True, is_prompt_only=True)
    outputs.echoes = {0: "hello"}
    (first,) = outputs.fold(0, [start()])
    (last,) = outputs.fold(0, [token("x", logprob=-1.0), done(1)])
    assert (first.echo, last.text, last.tokens, last.finish_reason) == ("hello", "", [], "length")
    assert outputs.usage().completion_tokens == 0


STATUSES = {
    errors.BadArgument: 400, errors.TooLarge: 400, errors.TokenizerError: 400, errors.NoSpace: 400,
    errors.Unauthenticated: 401, errors.Forbidden: 403, errors.ModelNotFound: 404, errors.NotFound: 404,
    errors.Conflict: 409, errors.Overloaded: 429, errors.InternalError: 500, errors.StreamGap: 500,
    errors.ModelUnavailable: 503, errors.NoWorkers: 503, errors.WorkerLost: 503, errors.Draining: 503,
    errors.ConnectionLost: 503, errors.Cancelled: 503, errors.DeadlineExceeded: 504,
}  # fmt: skip


@pytest.mark.parametrize("kind", STATUSES)
def test_each_error_of_the_bus_has_its_status(kind: type[errors.KVCacheError]) -> None:
    problem = problem_of(kind("words", retry_after_ms=1500))
    assert (problem.status, problem.message) == (STATUSES[kind], "words")
    assert (problem.retry_after_s == 2) == (problem.status in {429, 503})
    assert plain(msgspec.Raw(problem.body()))["error"]["message"] == "words"


def test_an_error_names_its_parameter() -> None:
    assert problem_of(errors.BadArgument("top_p must be more than 0")).param == "top_p"
    assert problem_of(errors.BadArgument("messages[3]: role is empty")).param is None
    assert problem_of(errors.ModelNotFound("no model named 'x'")).param == "model"


def test_an_error_that_ends_the_connection_says_so() -> None:
    assert Problem(408, "slow", closes=True).headers()["connection"] == "close"
    assert "www-authenticate" in Problem(401, "who").headers()


def test_the_document_refers_to_nothing_that_it_does_not_have() -> None:
    document = openapi.document()
    text = msgspec.json.encode(document).decode()
    schemas = document["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
    assert {"CompletionRequest", "ChatRequest", "ErrorBody"} <= used
