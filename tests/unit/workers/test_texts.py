"""Tokens to text beside the steps: what the loop hears, and what the engine is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bus.errors import Cancelled, InternalError, KVCacheError, TokenizerError
from bus.messages import FinishReason, TokenLogprobs
from workers.engine_api import Admitted, Broke, Ended, EngineEvent, Fail, Finish, NewToken, Opened, Produced, RunId
from workers.text import TextStream
from workers.texts import Texts

RUN, OTHER = RunId(b"1"), RunId(b"2")


class Letters:
    """Token 0 is `a`, 1 is `b` and so on; 99 is no text, 98 a bug."""

    def decode(self, token_ids: Sequence[int]) -> str:
        if 99 in token_ids:
            raise TokenizerError("not text")
        if 98 in token_ids:
            raise ZeroDivisionError
        return "".join(chr(ord("a") + token) for token in token_ids)


def opened(*stops: str, run: RunId = RUN, resume: tuple[int, ...] = (), min_tokens: int = 0) -> Opened:
    return Opened(run, TextStream(Letters(), stops, min_tokens), resume)


def token(number: int, run: RunId = RUN, *, is_last: bool = False) -> NewToken:
    return NewToken(run, number, None, is_last)


def ended(run: RunId = RUN) -> Ended:
    return Ended(
        run=run,
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=3,
        cached_tokens=0,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
    )


def produced(number: int, text: str, run: RunId = RUN) -> Produced:
    return Produced(run, (number,), (text,))


def test_tokens_get_their_text_in_the_order_in_which_they_came() -> None:
    admitted = Admitted(RUN, "m", 3, 0)
    events: list[EngineEvent] = [opened(), opened(run=OTHER), admitted, token(0), token(1, OTHER), token(2), ended()]
    heard, commands = Texts().translate(events)
    assert heard == [admitted, produced(0, "a"), produced(1, "b", OTHER), produced(2, "c"), ended()]
    assert commands == []


def test_logprobs_stay_with_their_token() -> None:
    logprobs = TokenLogprobs(-0.5, ((1, -0.5),))
    heard, _ = Texts().translate([opened(), NewToken(RUN, 1, logprobs, False)])
    assert heard == [Produced(RUN, (1,), ("b",), (logprobs,))]


def test_a_stop_string_ends_the_output_however_far_the_engine_has_got() -> None:
    texts = Texts()
    heard, commands = texts.translate([opened("cd"), token(1), token(2), token(3), token(4), token(5)])
    assert heard == [produced(1, "b"), produced(2, ""), produced(3, "")]
    assert commands == [Finish(RUN, 3)]
    heard, commands = texts.translate([token(6), ended()])
    assert [(type(event), event.finish_reason) for event in heard if isinstance(event, Ended)] == [
        (Ended, FinishReason.STOP)
    ]
    assert len(heard) == 1
    assert commands == []


def test_what_was_held_back_comes_with_the_last_token_and_a_stop_string_in_it_is_the_reason() -> None:
    heard, _ = Texts().translate([opened("cdx"), token(2), token(3, is_last=True), ended()])
    assert heard == [produced(2, ""), produced(3, "cd"), ended()]
    heard, _ = Texts().translate([opened("cd"), token(2), token(3, is_last=True), ended()])
    assert heard[:2] == [produced(2, ""), produced(3, "")]
    assert isinstance(heard[2], Ended)
    assert heard[2].finish_reason is FinishReason.STOP


def test_a_resumed_output_goes_on_behind_the_tokens_it_has() -> None:
    heard, commands = Texts().translate([opened("cd", resume=(0, 2)), token(3), token(4)])
    assert heard == [produced(3, "")]
    assert commands == [Finish(RUN, 3)]


def test_a_resumed_output_that_was_complete_ends_with_the_tokens_it_has() -> None:
    heard, commands = Texts().translate([opened("cd", resume=(2, 3)), token(4)])
    assert heard == []
    assert commands == [Finish(RUN, 2)]


def test_stop_strings_mean_nothing_within_min_tokens() -> None:
    heard, commands = Texts().translate([opened("b", "cd", min_tokens=3), *(token(n) for n in (1, 1, 2, 3, 9))])
    assert "".join(event.texts[0] for event in heard if isinstance(event, Produced)) == "bb"
    assert commands == [Finish(RUN, 4)], "`cd` ends behind the third token"


@pytest.mark.parametrize(("bad", "kind"), [(99, TokenizerError), (98, InternalError)])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_token_without_text_breaks_its_own_generation_once(
    bad: int, kind: type[KVCacheError], is_last: bool, caplog: pytest.LogCaptureFixture
) -> None:
    texts = Texts()
    heard, commands = texts.translate(
        [opened(), opened(run=OTHER), token(0), token(bad, is_last=is_last), token(1, OTHER)]
    )
    assert heard[0] == produced(0, "a")
    assert isinstance(heard[1], Broke)
    assert isinstance(heard[1].error, kind)
    assert heard[2] == produced(1, "b", OTHER)
    assert commands == [Fail(RUN, heard[1].error)]
    assert texts.translate([token(1), ended()]) == ([], [])
    assert texts.translate([token(2, OTHER)]) == ([produced(2, "c", OTHER)], [])


def test_a_resumed_output_without_text_breaks_at_once() -> None:
    heard, commands = Texts().translate([opened(resume=(99,)), token(1)])
    assert [type(event) for event in heard] == [Broke]
    assert [type(command) for command in commands] == [Fail]


def test_the_end_of_what_never_began_and_of_what_was_stopped_meanwhile_passes() -> None:
    broke = Broke(RUN, Cancelled("by the client"))
    assert Texts().translate([broke]) == ([broke], [])
    texts = Texts()
    texts.translate([opened("b"), token(1)])
    assert texts.translate([broke]) == ([broke], [])
